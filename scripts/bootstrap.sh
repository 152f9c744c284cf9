# Sourced by the commands beside it. Makes .venv in the repository's root and installs multisbora into it with the
# pinned constraints. Leaves `root` (the repository) and `venv` (its virtual environment) set.
# shellcheck shell=bash

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
venv="$root/.venv"

# What the environment was made from, its own path first: a virtual environment does not survive a move.
_wanted() {
    echo "$root"
    cat "$root/pyproject.toml" "$root/scripts/constraints.txt"
}

_is_ready() {
    [[ -x "$venv/bin/python" && ! -e "$venv/.multisbora-unfinished" ]] && _wanted | cmp -s - "$venv/.multisbora-stamp"
}

# Each candidate is run, not just looked up: a name on PATH may be a shim for a Python that is not installed.
_find_python() {
    local candidate
    for candidate in "${PYTHON:-python3.11}" python3.11 python3.12 python3.13 python3.10 python3 python; do
        if "$candidate" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
    echo "multisbora: no Python 3.10 or newer with its venv module found: install one (Debian and Ubuntu:" \
        "apt-get install python3 python3-venv), or name it with PYTHON=/path/to/python, and run this again" >&2
    return 1
}

_set_up() {
    local python="" made_in="$root"
    if [[ -e "$venv/.multisbora-stamp" ]]; then read -r made_in <"$venv/.multisbora-stamp" || true; fi
    rm -f "$venv/.multisbora-stamp"
    # A set-up that was cut short may have left half a package, which pip takes for a whole one: start over.
    if [[ -e "$venv/.multisbora-unfinished" || "$made_in" != "$root" ]] ||
        ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        python="$(_find_python)"
    fi
    echo "multisbora: setting up .venv (once; some minutes, most of them for torch)" >&2
    if [[ -n "$python" ]]; then "$python" -m venv --clear "$venv"; fi
    touch "$venv/.multisbora-unfinished"
    if ! "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        --constraint "$root/scripts/constraints.txt" --editable "$root[demo,test,dev]"; then
        echo "multisbora: set-up failed for the reason that pip gives above; mend that and run this again" >&2
        return 1
    fi
    _wanted >"$venv/.multisbora-stamp"
    rm "$venv/.multisbora-unfinished"
}

if ! _is_ready; then
    # Two commands started at once must not install into one environment. Where flock is missing, that is on the user.
    (
        if command -v flock >/dev/null; then flock 9; fi
        if ! _is_ready; then _set_up; fi
    ) 9>"$root/.venv.lock"
fi
