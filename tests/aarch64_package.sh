#!/usr/bin/env bash
# tests/aarch64_package.sh FOLDER [CPU]: runs the package on aarch64 in an emulator, from the wheel that `make wheels` has built.
#
# FOLDER takes Debian's Python for arm64 and the aarch64 wheels of torch and timm, 6 GB, and keeps them; nothing is installed. What runs:
# `info`, README's first example, and `verify` of a network and of modules in each dtype. It fails if one of them does. CPU is the emulator's;
# by default one with products of fp16 and bf16.
#   PYTHON=.venv/bin/python    whose pip fetches the wheels
set -euo pipefail
cd "$(dirname "$0")/.."
[[ ${1:-} && $1 != -* ]] || { sed -n '2,7s/^# \?//p' "$0" && exit 2; }
mkdir -p "$1"
folder=$(cd "$1" && pwd) cpu=${2:-max,sve=off,sme=off}
wheel=$(ls -t dist/*-abi3-*_aarch64.whl | head -n 1)
platforms=()
for minor in 17 18 24 25 26 27 28; do platforms+=(--platform "manylinux_2_${minor}_aarch64"); done

if [[ ! -x $folder/root/usr/bin/python3.11 ]]; then
  mkdir -p "$folder"/apt/{lists,archives}/partial "$folder/debs"
  touch "$folder/apt/status"
  apt=(apt-get -qq -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o APT::Sandbox::User=root -o "Dir::State=$folder/apt"
    -o "Dir::State::status=$folder/apt/status" -o "Dir::Cache=$folder/apt")
  "${apt[@]}" update
  (cd "$folder/debs" && "${apt[@]}" download python3.11-minimal libpython3.11-minimal libpython3.11-stdlib libc6 libgcc-s1 \
    libstdc++6 zlib1g libexpat1 libffi8 libssl3 libbz2-1.0 liblzma5 libsqlite3-0 libuuid1 libgomp1)
  for package in "$folder"/debs/*.deb; do dpkg -x "$package" "$folder/root"; done
fi
# torch reads here what the CPU is and has; of this machine's it would make nothing, and crash
identification=$folder/root/sys/devices/system/cpu/cpu0/regs/identification
mkdir -p "$folder/root/proc" "$identification"
echo 0x410fd0c0 > "$identification/midr_el1"
for core in 0 1; do
  printf '%s\t: %s\n' processor $core Features "fp asimd fphp asimdhp asimdrdm asimddp asimdfhm bf16" "CPU implementer" 0x41 \
    "CPU architecture" 8 "CPU variant" 0x3 "CPU part" 0xd0c "CPU revision" 1
  echo
done > "$folder/root/proc/cpuinfo"
pip=("${PYTHON:-.venv/bin/python}" -m pip install --quiet --no-compile --only-binary=:all: --python-version 3.11 "${platforms[@]}")
if [[ ! -d $folder/site/torchvision ]]; then
  "${pip[@]}" --platform manylinux2014_aarch64 --target "$folder/site" "torch==2.14.*" "torchvision==0.29.*" timm numpy
fi
rm -rf "$folder"/site/ghostfused*
"${pip[@]}" --no-deps --target "$folder/site" "$wheel"

emulated() { # ATEN_CPU_CAPABILITY: torch's own kernels take no more than NEON
  (cd "$folder" && env -i HOME="$folder" PATH= PYTHONPATH="$folder/site" ATEN_CPU_CAPABILITY=default OMP_NUM_THREADS=1 \
    "$(type -P qemu-aarch64)" -cpu "$cpu" -L root root/usr/bin/python3.11 "$@")
}
emulated -m ghostfused info | sed '/^what their kernels take/,$d'
emulated -c "$(sed -n '/^```python$/,/^```$/{/^```/!p;/^```$/q}' README.md)"
emulated -m ghostfused verify --model paper --size 32 --batch 1 --backend cpu
head -n 12 tests/data/ghost_configs.jsonl > "$folder/configs.jsonl"
for dtype in float32 float16 bfloat16; do
  emulated -m ghostfused verify --configs configs.jsonl --max-size 14 --batch 1 --backend cpu --dtype $dtype --layout nhwc
done
