# Sourced by run_all.sh and run_tests.sh, in the folder of the checkout: finds a Python and sets up what is missing.
# shellcheck shell=bash

fail() {
    printf 'satlib: %s\n' "$*" >&2
    exit 2
}

# Sets `python` to a Python 3.11 or 3.12 that has packages already or can make an environment for them: $PYTHON, or
# that of the active environment, or another one.
find_python() {
    local probe='import sys; from importlib.util import find_spec as f
sys.exit(not ((3, 11) <= sys.version_info[:2] <= (3, 12) and (f("ensurepip") or f("torch"))))'
    if [ -n "${PYTHON:-}" ]; then
        "$PYTHON" -c "$probe" >/dev/null 2>&1 ||
            fail "PYTHON is $PYTHON, expected a Python 3.11 or 3.12 with venv; set it to one or unset it"
        python=$PYTHON
        return
    fi
    for python in python python3 python3.12 python3.11 .venv/bin/python; do
        if "$python" -c "$probe" >/dev/null 2>&1; then return; fi
    done
    fail "no Python 3.11 or 3.12 with venv found; install one, or set PYTHON to its path"
}

# Sets `python` to one that has what the extras in $1 ask for.
set_up() {
    python=$("$python" tools/environment.py "$1")
}

# The checkout's own satlib, whatever else is installed.
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
