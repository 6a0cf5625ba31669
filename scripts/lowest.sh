#!/usr/bin/env bash
# Runs the unit and integration tests on the lowest versions that pyproject.toml allows.
set -euo pipefail

usage() {
    cat <<'END'
usage: scripts/lowest.sh [PYTEST ARGUMENTS]

Installs em-runner in an environment inside `.venv`, with the lowest version of each direct
dependency that pyproject.toml allows, and runs the unit and integration tests there. Arguments
replace the paths of these tests:

  scripts/lowest.sh tests/unit/shared/config/test_tokens.py -x

EM_TEST_PROCESSES (default 2) is the number of tests that run at a time.
END
}

# shellcheck source=scripts/env.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/env.sh"
enter_environment test

# Each run installs from scratch, so that a package of an earlier run cannot hide a bound that is
# too low. With the packages in uv's cache this takes seconds.
lowest="$VENV/lowest"
python="$lowest/bin/python"
report 'installing the lowest allowed versions'
"$VENV/bin/uv" venv --quiet --clear --python "$VENV/bin/python" "$lowest"
"$VENV/bin/uv" pip install --quiet --python "$python" --resolution lowest-direct \
    --build-constraints constraints.txt --editable '.[otel]'

# The tests' tools have the pinned versions. Only em-runner's own bounds are tested.
tools=(pytest pytest-timeout pytest-xdist hypothesis trustme psutil openapi-spec-validator
    playwright axe-playwright-python httpx selectolax)
pins=()
for tool in "${tools[@]}"; do
    pins+=("$(grep -i "^$tool==" constraints.txt)")
done
"$VENV/bin/uv" pip install --quiet --python "$python" "${pins[@]}"

if [[ $# -gt 0 ]]; then
    exec "$python" -m pytest "$@"
fi
# The tests with other messages would only repeat what a run with the pinned versions shows.
exec "$python" -m pytest -n "${EM_TEST_PROCESSES:-2}" --dist worksteal \
    --ignore tests/unit/test_messages.py tests/unit tests/integration
