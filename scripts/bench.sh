#!/usr/bin/env bash
# Measures em-runner beside other ways to do the same, and holds it to its targets.
set -euo pipefail

usage() {
    cat <<'END'
usage: scripts/bench.sh [--quick] [--only SUITES [--amend]] [--runs N] [--out FOLDER]

Without arguments: every suite, five runs each, about half an hour; what it finds replaces
benchmarks/results, which the README shows. Everything else goes to benchmarks/results/partial,
or where --out says.

  scripts/bench.sh --quick              a few cases of each suite, two minutes: does it work here?
  scripts/bench.sh --only ws,http       ws, http, mixed, fanout, recovery, isolation, endurance
  scripts/bench.sh --only http --amend  measures one suite anew in benchmarks/results

Prints the targets beside what was found. wrk is used where it is installed. Everything listens on
loopback, and ends with the script. Exit status 1 when something could not be measured.

EM_PYTHON names the Python to make the environment with.
END
}

if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
    usage
    exit 0
fi

here="$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}" 2>/dev/null || printf '%s' "${BASH_SOURCE[0]}")")"
# shellcheck source=scripts/env.sh
source "$here/env.sh"
make_environment bench
cd -- "$ROOT"

exec "$VENV/bin/python" -m benchmarks "$@"
