#!/usr/bin/env bash
# Finds a Python >= 3.12, makes .venv with this project and what its training needs, and prints the path of its python.
#   MOM_PYTHON=python3   use that interpreter and install nothing (containers, clusters)
#   DEV=1                install the test and lint tools too, and the other projects that tests run exports with;
#                        DEV=tools without these projects
#   CONSTRAINTS=FILE     exact versions of packages [tools/constraints.txt]; empty: the newest that fit
#   VENV=FOLDER          the environment's folder [.venv]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

log() { printf '%s\n' "$*" >&2; }

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; }
can_make_environments() { is_new_enough "$1" && "$1" -c 'import ensurepip, venv' >/dev/null 2>&1; }

find_python() {
    local candidate
    {
        for name in python3.12 python3.13 python3.14 python3 python; do command -v "$name" || true; done
        # pyenv's own commands answer only for the chosen version: look at every version.
        for version in 3.12 3.13 3.14; do
            ls -d "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/"$version"*/bin/python 2>/dev/null || true
        done
        if command -v uv >/dev/null; then uv python find '>=3.12' 2>/dev/null || true; fi
    } | while read -r candidate; do
        if can_make_environments "$candidate"; then echo "$candidate"; break; fi
    done
}

if [ -n "${MOM_PYTHON:-}" ]; then
    if ! is_new_enough "$MOM_PYTHON"; then
        log "error: MOM_PYTHON=$MOM_PYTHON is not a Python >= 3.12 ($("$MOM_PYTHON" --version 2>&1 || true))"
        exit 1
    fi
    "$MOM_PYTHON" -c 'import sys; print(sys.executable)'
    exit 0
fi

constraints=${CONSTRAINTS-tools/constraints.txt}
venv=${VENV:-.venv}
case "$venv" in /*) ;; *) venv=$PWD/$venv ;; esac
extras=train
packages=()
wanted="$(cat requirements.txt ${constraints:+"$constraints"})"
if [ -n "${DEV:-}" ]; then
    extras=train,dev
    wanted="$wanted $(grep '^dev = ' pyproject.toml)"
fi
if [ "${DEV:-}" = 1 ]; then
    packages=(-r tests/requirements.txt)
    wanted="$wanted $(cat tests/requirements.txt)"
fi
if [ -x "$venv/bin/python" ] && [[ "$(cat "$venv/installed" 2>/dev/null)" == "$wanted"* ]]; then
    echo "$venv/bin/python"
    exit 0
fi

if [ ! -x "$venv/bin/python" ] || ! is_new_enough "$venv/bin/python"; then
    python=$(find_python)
    if [ -z "$python" ]; then
        log "error: no Python >= 3.12 with venv found (looked on PATH, in pyenv's versions and asked uv)."
        log "Get one with one of:  uv python install 3.12  |  pyenv install 3.12  |  apt-get install python3.12-venv"
        log "or set MOM_PYTHON to an interpreter that has the packages of requirements.txt."
        exit 1
    fi
    log "making $venv with $("$python" --version) ($python)"
    rm -rf "$venv"
    "$python" -m venv "$venv"
fi
log "installing this project and the packages of requirements.txt into $venv (about 5 GB with PyTorch; a few minutes)"
rm -f "$venv"/lib/python*/site-packages/linear_moe.pth # of earlier versions of this file
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check ${constraints:+-c "$constraints"} \
    -e ".[$extras]" ${packages[@]+"${packages[@]}"} >&2
echo "$wanted" >"$venv/installed"
echo "$venv/bin/python"
