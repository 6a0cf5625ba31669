#!/usr/bin/env bash
# Runs em-runner: the demo, or the agents of a configuration. Makes its own environment first.
set -euo pipefail

usage() {
    cat <<'END'
usage: scripts/run_cluster.sh [OPTIONS]

Without -c: two embedded em_disco nodes on 127.0.0.1:8080 and :8081, the echo agent with one worker
at each, and HTTP on 127.0.0.1:9600.

  --nodes N             how many nodes (2)
  --first-port PORT     the first node's port, the next ones follow (8080; 0 takes any free ones)

With -c: the agents of a configuration.

  -c, --config FILE     the configuration, a TOML file; see em-runner.example.toml

Both:

  --http HOST:PORT      where the runner listens (127.0.0.1:9600; port 0 takes any free one)
  --state-dir FOLDER    where it keeps its lock, socket and address (~/.local/state/em-runner)
  -h, --help            show this and leave

Ctrl-C or SIGTERM ends it: what is in flight is finished first, within shutdown_timeout_ms (5 s).

The first start makes the environment in .venv, for which it needs a Python 3.11 or later and, that once,
a package index. EM_PYTHON names the Python to use.
END
}

command=demo
for argument in "$@"; do
    case "$argument" in
        -h | --help)
            usage
            exit 0
            ;;
        -c* | --config | --config=*) command=run ;;
    esac
done
if [[ $# -gt 0 && "$1" != -* ]]; then
    printf "em-runner: '%s' is not an option; to run a configuration: run_cluster.sh -c FILE (see --help)\n" "$1" >&2
    exit 2
fi

here="$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}" 2>/dev/null || printf '%s' "${BASH_SOURCE[0]}")")"
# shellcheck source=scripts/env.sh
source "$here/env.sh"
make_environment runtime
exec "$VENV/bin/em-runner" "$command" "$@"
