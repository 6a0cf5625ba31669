#!/usr/bin/env bash
# Runs `em-runner demo`, or `em-runner run` if -c is given. Creates the environment first.
set -euo pipefail

usage() {
    cat <<'END'
usage: scripts/run_cluster.sh [OPTIONS]

Without -c: two embedded em_disco nodes on 127.0.0.1:8080 and :8081, the echo agent with one worker
at each, and HTTP on 127.0.0.1:9600.

  --nodes N             the number of nodes (default 2)
  --first-port PORT     the first node's port (default 8080); the other nodes use the next ports;
                        port 0 takes free ports

With -c: the agents of a configuration.

  -c, --config FILE     the configuration, a TOML file; see em-runner.example.toml

Both:

  --http HOST:PORT      the runner's address (default 127.0.0.1:9600); port 0 takes a free port
  --state-dir FOLDER    the runner's state folder (default ~/.local/state/em-runner)
  -h, --help            show this message and exit

Ctrl-C or SIGTERM stops it. Queries in flight are finished first, within shutdown_timeout_ms (5 s).

The first start creates a virtual environment in .venv. It needs Python 3.11 or later and a package
index. EM_PYTHON names the Python to use.
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
    printf "em-runner: '%s' is not an option; %s\n" "$1" \
        'to run a configuration: run_cluster.sh -c FILE (see --help)' >&2
    exit 2
fi

# shellcheck source=scripts/env.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/env.sh"
# Without a change of folder: FILE is relative to the caller's.
make_environment runtime
exec "$VENV/bin/em-runner" "$command" "$@"
