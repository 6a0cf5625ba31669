# The other scripts in this folder source this file. They define the function `usage` first.
#
# If the first argument is `--help`, it prints the usage and exits. Otherwise it sets ROOT (the
# checkout) and VENV (its environment), and defines functions that create the environment.
# EM_PYTHON names the Python that creates it. Without EM_PYTHON, a suitable Python is searched for.
# shellcheck shell=bash

ROOT="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
VENV="$ROOT/.venv"

# "$1" is the first argument of the script that sources this file.
if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
    usage
    exit 0
fi

report() {
    printf 'em-runner: %s\n' "$*" >&2
}

# Whether a command is a Python that can create environments. A name on the PATH is not enough:
# pyenv has shims for versions that are not selected, and Debian's python3 comes without ensurepip.
is_usable() {
    "$1" -I -c 'import sys; assert sys.version_info >= (3, 11); import ensurepip, venv' \
        >/dev/null 2>&1
}

is_new_enough() {
    "$1" -I -c 'import sys; assert sys.version_info >= (3, 11)' >/dev/null 2>&1
}

# Print the path of the first usable Python, or report what is missing.
find_python() {
    local candidate incomplete=''
    # Exclude the Python of an activated environment: it may be that of `.venv`, which may be about
    # to be replaced.
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
        report "$incomplete cannot create environments: its venv or ensurepip module is missing." \
            "On Debian and Ubuntu, run: apt-get install python3-venv." \
            "Or name another Python with EM_PYTHON."
    elif [[ -n "${EM_PYTHON:-}" ]]; then
        report "EM_PYTHON is '$EM_PYTHON', which does not run or is older than Python 3.11."
    else
        report "em-runner needs Python 3.11 or later, and none of these runs: ${candidates[*]}." \
            "Install one, or name it with EM_PYTHON."
    fi
    return 1
}

# Create or repair `.venv`. The argument is its purpose: runtime, docs, test or bench.
make_environment() {
    local python
    python="$(find_python)" || return 1
    "$python" -I "$ROOT/scripts/environment.py" "$1"
}

# Create or repair `.venv`, and change to the checkout.
enter_environment() {
    make_environment "$1"
    cd -- "$ROOT"
}
