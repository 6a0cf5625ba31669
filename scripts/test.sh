#!/usr/bin/env bash
# Checks everything, as CI does: style, types and tests. Creates the environment first.
set -euo pipefail

usage() {
    cat <<'END'
usage: scripts/test.sh [PYTEST ARGUMENTS]

Without arguments, runs ruff check, ruff format --check, mypy, and the whole test suite. All of them
run, even if one fails. The exit status is that of the first that failed.

With arguments, runs only pytest with these arguments, in the root of the checkout:

  scripts/test.sh tests/unit
  scripts/test.sh tests/examples -k counter -x

EM_PYTHON names the Python that creates the environment. EM_TEST_PROCESSES (default 2) is the number
of tests that run at a time in the whole suite.
END
}

# shellcheck source=scripts/env.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/env.sh"
enter_environment test

if [[ $# -gt 0 ]]; then
    exec "$VENV/bin/python" -m pytest "$@"
fi

failed=''
status=0
processes="${EM_TEST_PROCESSES:-2}"

check() {
    local name="$1" found=0
    shift
    printf '== %s\n' "$name"
    "$VENV/bin/python" -m "$@" || found=$?
    if [[ "$found" -ne 0 ]]; then
        failed="${failed:+$failed, }$name"
        [[ "$status" -ne 0 ]] || status="$found"
    fi
}

check 'ruff check' ruff check .
check 'ruff format' ruff format --check .
check 'mypy' mypy
check 'mypy outside packages' mypy examples scripts/environment.py docs/_ext
check 'pytest' pytest -n "$processes" --dist worksteal

if [[ -n "$failed" ]]; then
    report "failed: $failed"
fi
exit "$status"
