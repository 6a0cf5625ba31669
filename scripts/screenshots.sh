#!/usr/bin/env bash
# Takes the screenshots of the status page for the documentation.
set -euo pipefail

usage() {
    cat <<'END'
usage: scripts/screenshots.sh [FOLDER]

Runs three agents at two embedded nodes under some load for a minute and a half. Takes screenshots
of the status page with headless Chromium (light, dark, on a phone, with a worker and a node down),
and writes them to FOLDER (default docs/images). Everything listens on loopback, and stops with the
script.

EM_PYTHON names the Python that creates the environment.
END
}

# shellcheck source=scripts/env.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/env.sh"
folder="$(realpath -m -- "${1:-$ROOT/docs/images}")"
enter_environment test
exec "$VENV/bin/python" -m tests.screenshots "$folder"
