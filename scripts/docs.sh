#!/usr/bin/env bash
# Builds the documentation. Creates the environment first.
set -euo pipefail

usage() {
    cat <<'END'
usage: scripts/docs.sh [SPHINX OPTIONS]

Updates the generated and included parts of the pages in docs/, then builds docs/ into
docs/_build/html. Open index.html there. A warning, such as a broken link, is an error. The built
pages load nothing from other sites.

  scripts/docs.sh -E        build every page from scratch

EM_PYTHON names the Python that creates the environment.
END
}

# shellcheck source=scripts/env.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/env.sh"
enter_environment docs
"$VENV/bin/python" docs/_ext/parts.py
exec "$VENV/bin/python" -m sphinx -W --keep-going -n -b html "$@" docs docs/_build/html
