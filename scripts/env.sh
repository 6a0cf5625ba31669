# Sourced by the scripts beside it. Finds a Python, and has it make the environment in `.venv`.
#
# Sets ROOT (the checkout) and VENV (its environment). EM_PYTHON names the Python to use.
# shellcheck shell=bash

ROOT="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
VENV="$ROOT/.venv"

say() {
    printf 'em-runner: %s\n' "$*" >&2
}

# Whether a command is a Python that can make environments. A name on the PATH proves nothing:
# pyenv's shims exist for versions that are not selected, and Debian's python3 comes without ensurepip.
is_usable() {
    "$1" -I -c 'import sys; assert sys.version_info >= (3, 11); import ensurepip, venv' >/dev/null 2>&1
}

is_new_enough() {
    "$1" -I -c 'import sys; assert sys.version_info >= (3, 11)' >/dev/null 2>&1
}

# Print the path of the first usable Python, or say what is missing.
find_python() {
    local candidate incomplete=''
    # Not the one of an environment that is activated: ours may be about to be made anew.
    local PATH=":$PATH:"
    PATH="${PATH//:"${VIRTUAL_ENV:-$VENV}/bin":/:}"
    local candidates=(python3 python3.14 python3.13 python3.12 python3.11 /usr/bin/python3)
    if [[ -n "${EM_PYTHON:-}" ]]; then
        candidates=("$EM_PYTHON")
    fi
    for candidate in "${candidates[@]}"; do
        if is_usable "$candidate"; then
            command -v -- "$candidate"
            return 0
        elif [[ -z "$incomplete" ]] && is_new_enough "$candidate"; then
            incomplete="$candidate"
        fi
    done
    if [[ -n "$incomplete" ]]; then
        say "$incomplete cannot make environments: its venv or ensurepip module is missing." \
            "On Debian and Ubuntu: apt-get install python3-venv. Or name another Python with EM_PYTHON."
    elif [[ -n "${EM_PYTHON:-}" ]]; then
        say "EM_PYTHON is '$EM_PYTHON', which is not a Python 3.11 or later that runs."
    else
        say "Python 3.11 or later is needed, and none of these runs: ${candidates[*]}." \
            "Install one, or name it with EM_PYTHON."
    fi
    return 1
}

# Make sure that `.venv` is whole. The argument is what it is for: runtime, docs, test or bench.
make_environment() {
    local python
    python="$(find_python)" || return 1
    "$python" -I "$ROOT/scripts/environment.py" "$1"
}
