#!/usr/bin/env bash
# Runs the soak test: a cluster under load whose workers are killed and whose connections are cut.
set -euo pipefail

usage() {
    cat <<'END'
usage: scripts/soak.sh MINUTES [--seed N]

Starts two embedded nodes and a runner with three agents, one of which counts in a disk memory.
Sends queries over WebSocket and HTTP, and kills workers and cuts connections at random. Prints the
number of queries by outcome, and the resources of the processes at start and end. MINUTES may be a
fraction, such as 0.5.

The exit status is 1 if a query was lost or answered wrongly, or a resource grew past its bound.

EM_PYTHON names the Python that creates the environment.
END
}

# shellcheck source=scripts/env.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/env.sh"
if [[ ! "${1:-}" =~ ^[0-9]+(\.[0-9]+)?$ ]]; then
    usage >&2
    exit 2
fi
enter_environment test

seconds="$("$VENV/bin/python" -c 'import sys; print(float(sys.argv[1]) * 60)' "$1")"
shift
exec "$VENV/bin/python" -m tests.chaos.soak --seconds "$seconds" "$@"
