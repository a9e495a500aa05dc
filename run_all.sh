#!/usr/bin/env bash
# Sets up what is missing and executes the notebooks. `./run_all.sh --help` tells the rest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
export SATLIB_STARTED="${EPOCHSECONDS:-$(date +%s)}" # set-up counts towards --budget

usage() {
    cat <<'HELP'
Usage: ./run_all.sh [--profile P] [--only 04,06] [--budget 9m] [--force] [--help]

Sets up what is missing, executes the notebooks under a profile, draws the figures, and prints a table of the
paper's numbers beside ours. Nothing is computed twice: a second call, or one after an interruption, goes on
from what is there.

Options
  --profile P     what to run the notebooks with (default: quick); see below
  --only 04,06    only these notebooks, by number or name
  --budget 9m     stop cleanly before this time is spent (9m, 90s, 1h30m; set-up counts); call again to go on
  --force         compute again what is already known
  --help          this text

HELP
    local file
    echo "Profiles (satlib/study/profiles/*.yaml; your own: profiles/*.yaml)"
    for file in satlib/study/profiles/*.yaml profiles/*.yaml; do
        [ -e "$file" ] || continue
        printf '  %-15s %s\n' "$(basename "$file" .yaml)" \
            "$(sed -n 's/^description: *//p' "$file" | sed "s/^[\"']//; s/[\"']\$//")"
    done
    printf '\nNotebooks\n'
    for file in notebooks/[0-9][0-9]_*.ipynb; do
        [ -e "$file" ] || continue
        printf '  %s\n' "$(basename "$file" .ipynb)"
    done
    cat <<'HELP'

Results
  notebooks/executed/P/   the executed notebooks, and each as an HTML page that needs no network
  figures/P/              the figures, as PNG and PDF; report/index.html leads to all pages, without a network
  data/runs/              what was computed, so that it never is again

Environment variables
  SATLIB_DATA     folder of the data sets (default: data/ in the checkout)
  SATLIB_HOME     folder that holds notebooks/, data/ and figures/ (default: the checkout)
  PYTHON          the Python 3.11 or 3.12 to use (default: the active environment's, else python3.12 or python3.11).
                  If it lacks what satlib needs, that is installed into .venv in the checkout (about 6 GB).

Exit status
  0  every notebook ran
  1  a notebook failed (the others ran), or the set-up failed
  2  the request cannot be met: a wrong option, profile or notebook, missing data, no Python, no space
  3  the budget was spent before the end; the same call goes on from there

Examples
  ./run_all.sh                                          a first look, on embedded synthetic data
  SATLIB_DATA=~/data ./run_all.sh --profile laptop --only 04
  ./run_all.sh --profile gpu --budget 9m                as much as fits into 9 minutes
HELP
}

for argument in "$@"; do
    case $argument in -h | --help) usage && exit 0 ;; esac
done

. tools/bootstrap.sh
find_python
"$python" -m satlib run --check "$@" # a wrong request is told before a long set-up
set_up notebooks
exec "$python" -m satlib run "$@"
