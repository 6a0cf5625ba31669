#!/usr/bin/env bash
# Runs the soak: a cluster under load while its workers are killed and its lines are cut.
set -euo pipefail

usage() {
    cat <<'END'
usage: scripts/soak.sh MINUTES [--seed N]

Starts two embedded nodes and a runner with three agents, one of which counts on disk, asks them over
WebSocket and HTTP, kills workers and breaks connections at random, and prints at the end what became
of every query, and what the processes held at start and end. MINUTES may be a fraction, such as 0.5.

Exit status 1 when a query was lost or answered wrongly, or something grew past its bound.

EM_PYTHON names the Python to make the environment with.
END
}

if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
    usage
    exit 0
fi
if [[ ! "${1:-}" =~ ^[0-9]+(\.[0-9]+)?$ ]]; then
    usage >&2
    exit 2
fi

here="$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}" 2>/dev/null || printf '%s' "${BASH_SOURCE[0]}")")"
# shellcheck source=scripts/env.sh
source "$here/env.sh"
make_environment test
cd -- "$ROOT"

seconds="$("$VENV/bin/python" -c 'import sys; print(float(sys.argv[1]) * 60)' "$1")"
shift
exec "$VENV/bin/python" -m tests.chaos.soak --seconds "$seconds" "$@"
