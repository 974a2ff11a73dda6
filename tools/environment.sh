#!/usr/bin/env bash
# Finds a Python >= 3.12, makes .venv with what requirements.txt names, and prints the path of its python.
#   MOM_PYTHON=python3   use that interpreter and install nothing (containers, clusters)
#   DEV=1                install the test and lint tools too
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

extras=()
if [ -n "${DEV:-}" ]; then
    extras=("pytest>=8" "pytest-timeout>=2.3" "pytest-xdist>=3.6" "lm_eval>=0.4.9" "ruff>=0.12" "import-linter>=2.17"
        "peft>=0.18" "trl>=1.0")
fi
wanted="$(cat requirements.txt) ${extras[*]-}"
if [ -x .venv/bin/python ] && [[ "$(cat .venv/installed 2>/dev/null)" == "$wanted"* ]]; then
    echo "$PWD/.venv/bin/python"
    exit 0
fi

if [ ! -x .venv/bin/python ] || ! is_new_enough .venv/bin/python; then
    python=$(find_python)
    if [ -z "$python" ]; then
        log "error: no Python >= 3.12 with venv found (looked on PATH, in pyenv's versions and asked uv)."
        log "Get one with one of:  uv python install 3.12  |  pyenv install 3.12  |  apt-get install python3.12-venv"
        log "or set MOM_PYTHON to an interpreter that has the packages of requirements.txt."
        exit 1
    fi
    log "making .venv with $("$python" --version) ($python)"
    rm -rf .venv
    "$python" -m venv .venv
fi
log "installing requirements.txt into .venv (about 5 GB with PyTorch; a few minutes)"
.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt ${extras[@]+"${extras[@]}"} >&2
# The packages of this folder, for the tools and for commands of your own.
.venv/bin/python -c 'import pathlib, site, sys; pathlib.Path(site.getsitepackages()[0], "linear_moe.pth").write_text(sys.argv[1])' "$PWD"
echo "$wanted" >.venv/installed
echo "$PWD/.venv/bin/python"
