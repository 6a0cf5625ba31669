#!/usr/bin/env bash
# Measures em-runner and alternatives, and compares the figures with the targets.
set -euo pipefail

usage() {
    cat <<'END'
usage: scripts/bench.sh [--quick] [--only SUITES [--amend]] [--runs N] [--out FOLDER]

Without arguments, runs every suite five times, which takes about half an hour. The figures replace
those in benchmarks/results and benchmarks/README.md. Other runs write to benchmarks/results/partial
or to the folder in --out.

  scripts/bench.sh --quick              a few cases of each suite, in two minutes
  scripts/bench.sh --only ws,http       two suites; the others are mixed, fanout, recovery,
                                        isolation and endurance
  scripts/bench.sh --only http --amend  measures one suite again in benchmarks/results

Prints the targets and the measured figures. Uses wrk if it is installed. Everything listens on
loopback, and stops with the script. The exit status is 1 if a suite failed.

EM_PYTHON names the Python that creates the environment.
END
}

# shellcheck source=scripts/env.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/env.sh"
enter_environment bench

exec "$VENV/bin/python" -m benchmarks "$@"
