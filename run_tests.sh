#!/usr/bin/env bash
# Sets up what is missing and runs all tests. `./run_tests.sh --help` tells the rest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() {
    cat <<'HELP'
Usage: ./run_tests.sh [--fast] [--help]

Sets up what is missing and runs, one after the other: ruff (lint and format), mypy, the unit tests, all notebooks
under the profile `quick`, and nbval (each notebook executed again, its tagged outputs compared). A stage that fails
does not keep the others from running.

Options
  --fast    only the unit tests
  --help    this text

Environment variables
  SATLIB_DATA   folder of real data sets; tests that need one are skipped where there is none
  PYTHON        the Python 3.11 or 3.12 to use (default: the active environment's, else python3.12 or python3.11).
                If it lacks what the tests need, that is installed into .venv in the checkout (about 6 GB).

Exit status
  0  everything passed
  1  something failed; the last lines name it
  2  the tests cannot start: a wrong option, no Python, no space
HELP
}

for argument in "$@"; do
    case $argument in -h | --help) usage && exit 0 ;; esac
done
fast=
for argument in "$@"; do
    case $argument in
    --fast) fast=yes ;;
    *) echo "satlib: unknown option $argument; ./run_tests.sh --help shows what there is" >&2 && exit 2 ;;
    esac
done

. tools/bootstrap.sh
find_python
set_up notebooks,test

failed=()
summary=()
stage() { # stage NAME COMMAND...: runs it, tells how long it took, and remembers how it ended
    local name=$1 start=$SECONDS verdict=passed
    shift
    printf '\n=== %s\n' "$name"
    if ! "$@"; then
        verdict=FAILED
        failed+=("$name")
    fi
    summary+=("$(printf '%-20s %s in %s s' "$name" "$verdict" "$((SECONDS - start))")")
    printf '=== %s\n' "${summary[${#summary[@]} - 1]}"
}

if [ -z "$fast" ]; then
    stage "ruff check" "$python" -m ruff check .
    stage "ruff format" "$python" -m ruff format --check .
    stage "mypy" "$python" -m mypy
fi
stage "unit tests" "$python" -m pytest tests
if [ -z "$fast" ]; then
    stage "profile quick" "$python" -m satlib run --profile quick
    stage "notebook outputs" "$python" -m pytest --nbval-lax --nbval-current-env notebooks/*.ipynb
fi

printf '\n'
printf '%s\n' "${summary[@]}"
if [ ${#failed[@]} -gt 0 ]; then
    printf 'satlib: failed: %s\n' "${failed[*]}"
    exit 1
fi
