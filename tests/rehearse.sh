#!/usr/bin/env bash
# tests/rehearse.sh FOLDER [PART...]: goes through a session on a machine with a GPU without one, on that machine's software.
#
# FOLDER keeps the Python environment. Parts, all by default and in this order:
#   environment  Python 3.12 with the packages below
#   copy         the files of this tree, without .git and what was built here, to a temporary folder; the others run there
#   build        both extensions, with PTX for compute capability 9.0, which ptx-on-cpu runs
#   info         the package imports and says what works
#   verify       some Ghost modules against float64, by the CUDA kernels
#   tests        all tests that can run, in the three environments of tests/run.py
#   session      bench/gpu_session.sh with a fake GPU (fake_gpu.py), on tiny inputs
# It prints how long each part took, and fails if any did. All need the first three: one of those that fails ends it.
#   PYTHON312=python3.12   PTX_ON_CPU=../shared/tools/ptx-on-cpu   KEEP=1 keeps the temporary folder
# shellcheck disable=SC2329  # the parts are called by name
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
[[ ${1:-} && $1 != -* ]] || { sed -n '2,14s/^# \?//p' "$0" && exit 2; }

PACKAGES=(torch==2.11.0 torchvision==0.26.0 triton==3.6.0 numpy==2.5.2 "setuptools>=77,<82" wheel ninja timm
  pytest pytest-xdist hypothesis)
mkdir -p "$1" || exit 2
FOLDER=$(cd "$1" && pwd)
shift
PARTS=("$@")
[[ ${#PARTS[@]} -gt 0 ]] || PARTS=(environment copy build info verify tests session)
PYTHON312=${PYTHON312:-python3.12}
export PYTHON=$FOLDER/venv/bin/python
PTX_ON_CPU=$(cd "${PTX_ON_CPU:-../shared/tools/ptx-on-cpu}" 2>/dev/null && pwd) ||
  { echo "PTX_ON_CPU: expected the folder of ptx-on-cpu, got ${PTX_ON_CPU:-../shared/tools/ptx-on-cpu}" && exit 2; }
export PTX_ON_CPU PTX_CPU_SM=90 OPT=${OPT:--O1} FLAGS=${FLAGS:--include tests/helpers/ptx_kernels.h} OMP_NUM_THREADS=1
export TORCH_CUDA_ARCH_LIST=9.0+PTX GHOSTFUSED_CUDA=1 GHOSTFUSED_CPU=1 MAX_JOBS=${MAX_JOBS:-$(nproc)}
SOURCE=$PWD
COPY=$FOLDER/tree
[[ ${KEEP:-} ]] || trap 'rm -rf "$COPY"' EXIT

part_environment() {
  local stamp=$FOLDER/venv/packages
  if ! "$PYTHON312" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; then
    echo "missing: Python 3.12; PYTHON312 names its program, got $PYTHON312"
    return 1
  fi
  [[ -x $PYTHON ]] || "$PYTHON312" -m venv "$FOLDER/venv" || return
  [[ -f $stamp && $(<"$stamp") == "${PACKAGES[*]}" ]] && return
  "$PYTHON" -m pip install --quiet "${PACKAGES[@]}" && echo "${PACKAGES[*]}" >"$stamp"
}

part_copy() {
  rm -rf "$COPY" && mkdir -p "$COPY" || return
  git -C "$SOURCE" ls-files -z --cached --others --exclude-standard | (cd "$SOURCE" && xargs -0 cp --parents -t "$COPY")
}

part_build() { "$PYTHON" setup.py --quiet build_ext --inplace; }

part_info() { on_cpu "$PYTHON" -m ghostfused info; }

part_verify() {
  local dtype
  head -n 4 tests/data/ghost_configs.jsonl >few.jsonl
  for dtype in float16 float32; do
    on_cpu "$PYTHON" -m ghostfused verify --configs few.jsonl --backend cuda --dtype "$dtype" --layout nhwc --max-size 9 \
      --device cuda || return
  done
}

part_tests() { "$PYTHON" tests/run.py; }

part_session() {
  PATH=$COPY/tests/helpers/fake_bin:$PATH REHEARSAL=1 LAUNCH=tests/helpers/on_fake_gpu.sh SECONDS_LEFT=3600 bench/gpu_session.sh "$FOLDER/session" 10
}

on_cpu() { "$PTX_ON_CPU/run-extension" ghostfused/_C*.so "$@"; }

outcomes=()
failed=0
for part in "${PARTS[@]}"; do
  declare -F "part_$part" >/dev/null || { echo "no such part: $part" && exit 2; }
  echo "== $part"
  start=$SECONDS
  if [[ $part == environment || $part == copy ]]; then
    "part_$part"
  else
    (cd "$COPY" && "part_$part")
  fi
  code=$?
  outcomes+=("$part: $( ((code == 0)) && echo ok || echo "FAILED with exit code $code"), $((SECONDS - start)) s")
  if ((code)); then
    failed=1
    [[ $part != environment && $part != copy && $part != build ]] || break
  fi
done
printf '%s\n' "== rehearsal" "${outcomes[@]}"
exit $failed
