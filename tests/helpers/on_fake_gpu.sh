#!/usr/bin/env bash
# tests/helpers/on_fake_gpu.sh PYTHON ARGUMENT...: runs that Python with a fake GPU (fake_gpu.py), in the project's root.
# The extension must have been built with PTX (TORCH_CUDA_ARCH_LIST=9.0+PTX); PTX_ON_CPU names the runner's folder.
set -euo pipefail
extensions=(ghostfused/_C*.so)
[[ -e ${extensions[0]} && ${#extensions[@]} -eq 1 ]] || { echo "expected one ghostfused/_C*.so, got: ${extensions[*]}" >&2 && exit 2; }
export PYTHON=$1 OPT=${OPT:--O1} FLAGS=${FLAGS:--include tests/helpers/ptx_kernels.h} PTX_CPU_SM=${PTX_CPU_SM:-90} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
PYTHON=$(command -v "$PYTHON") # which has the disassembler that run-extension needs
exec "${PTX_ON_CPU:?names no ptx-on-cpu folder}/run-extension" "${extensions[0]}" "$PYTHON" tests/helpers/fake_gpu.py "${@:2}"
