#!/usr/bin/env bash
# Takes the pictures of the status page that the documentation shows.
set -euo pipefail

usage() {
    cat <<'END'
usage: scripts/screenshots.sh [FOLDER]

Runs three agents at two embedded nodes under some load for a minute and a half, takes pictures of their
status page with headless Chromium (light, dark, on a phone, with a worker and a node down), and writes
them to FOLDER, docs/images without one. Everything listens on loopback, and ends with the script.

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
folder="$(realpath -m -- "${1:-$ROOT/docs/images}")"
make_environment test
cd -- "$ROOT"
exec "$VENV/bin/python" -m tests.screenshots "$folder"
