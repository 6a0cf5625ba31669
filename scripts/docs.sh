#!/usr/bin/env bash
# Builds the documentation's pages. Makes its own environment first.
set -euo pipefail

usage() {
    cat <<'END'
usage: scripts/docs.sh [SPHINX OPTIONS]

Builds docs/ into docs/_build/html; open index.html there. A warning, such as a link that leads nowhere, is an
error. The pages load nothing from elsewhere.

  scripts/docs.sh -E        build all of it anew

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
make_environment docs
cd -- "$ROOT"
exec "$VENV/bin/python" -m sphinx -W --keep-going -n -b html "$@" docs docs/_build/html
