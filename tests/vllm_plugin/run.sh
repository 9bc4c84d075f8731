#!/usr/bin/env bash
# `make test-vllm`: run.sh PYTHON VLLM…, from the root of the repository.
# Makes the environment .venv-vllm where it is missing or old, installs the package into it, and runs the tests. They are
# skipped, with a line that says so, only where the package index was reached and has no such distribution of vLLM, or of
# a package in a version that it requires, for this machine.
set -euo pipefail
here=tests/vllm_plugin venv=.venv-vllm python=$1
shift
pip=("$venv/bin/python" -m pip --disable-pip-version-check --quiet)

if [ ! "$venv/vllm" -nt "$here/constraints.txt" ]; then
    rm -rf "$venv"
    "$python" -m venv "$venv"
    "${pip[@]}" install --constraint "$here/constraints.txt" pip
    if ! "${pip[@]}" install --constraint "$here/constraints.txt" "$@" pytest accelerate gguf matplotlib 2>"$venv/install.log"; then
        cat "$venv/install.log" >&2
        # pip also says that nothing matches where it did not reach the index; then it has told of its attempts before.
        missing=$(sed -n 's/^ERROR: No matching distribution found for //p' "$venv/install.log" | head -1)
        if [ -n "$missing" ] && ! grep -qiE "retrying|connection|could not fetch|timed out|HTTP error" "$venv/install.log"; then
            echo "SKIPPED: the package index has no $missing for this machine, so the vLLM plug-in is NOT tested" >&2
            exit 0
        fi
        exit 1
    fi
    # Releases of these for another PyTorch, which vLLM requires and then cannot import.
    "${pip[@]}" uninstall --yes torchvision torchaudio torchcodec
    touch "$venv/vllm"
fi

sources=(pyproject.toml setup.py constraints.txt csrc actscale_fast)
if [ ! -e "$venv/installed" ] || [ -n "$(find "${sources[@]}" -type f -not -name '*.py[co]' -newer "$venv/installed")" ]; then
    # Again even where its version is the same; what it requires is there.
    ACTSCALE_BUILD_CUDA=0 "${pip[@]}" install --constraint "$here/constraints.txt" --build-constraint constraints.txt \
        --force-reinstall --no-deps .
    touch "$venv/installed"
fi

# The installed package, with its compiled kernels, not the sources in this folder.
PYTHONSAFEPATH=1 OMP_NUM_THREADS=1 "$venv/bin/python" -m pytest -c "$here/pytest.ini" "$here"
