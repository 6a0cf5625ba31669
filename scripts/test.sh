#!/usr/bin/env bash
# Checks everything, as CI does: the style, the types, the tests. Makes its own environment first.
set -euo pipefail

usage() {
    cat <<'END'
usage: scripts/test.sh [PYTEST ARGUMENTS]

Without arguments: ruff check, ruff format --check, mypy, and the whole test suite. All of them run;
the exit status is that of the first that failed.

With arguments: pytest alone, with them, in the root of the checkout:

  scripts/test.sh tests/unit
  scripts/test.sh tests/examples -k counter -x

EM_PYTHON names the Python to make the environment with. EM_TEST_PROCESSES, 2 where it is not set, says how many
tests run side by side in the whole suite.
END
}

if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
    usage
    exit 0
fi

here="$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}" 2>/dev/null || printf '%s' "${BASH_SOURCE[0]}")")"
# shellcheck source=scripts/env.sh
source "$here/env.sh"
make_environment test
cd -- "$ROOT"

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
check 'mypy, what is not a package' mypy examples scripts/environment.py docs/_ext
check 'pytest' pytest -n "$processes" --dist worksteal

if [[ -n "$failed" ]]; then
    say "failed: $failed"
fi
exit "$status"
