#!/usr/bin/env bash
# bench/gpu_session.sh OUT [STEP ...]: build, test and time everything on a machine with an NVIDIA GPU.
#
# Needs this source tree and a python with torch and triton; no network. nvcc, pytest, hypothesis, compute-sanitizer,
# timm, rich and matplotlib are used where they are there; what is missing is said. Writes to OUT (bench/results/NAME_OF_THE_GPU
# to keep the results in the project):
#   versions.txt card, driver, CUDA, python, torch and triton; each *.jsonl has them too
#   log.txt      everything that was printed
#   table.txt    the tables alone
#   *.jsonl      the rows, for `python -m bench compare` and `report`
#   report/      that report
#   steps.txt    each step's outcome and time
# STEPS, all by default and in this order: build verify tests module batch1 training network autotune overhead launches
# memory sanitizer report. A step gets the time that is left at most, so that what comes early is complete; run the others
# again by name.
#   DEADLINE=3000 (seconds)   PYTHON=python3   MAX_JOBS (of the build; default all cores)
#   DRY_RUN=1 prints the commands and runs none
# --dry-run in OUT's place before it (bench/gpu_session.sh --dry-run OUT) goes through all steps on the CPU, cut short.
# shellcheck disable=SC2329  # the steps are called by name
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

DEVICE=cuda
if [[ ${1:-} == --dry-run ]]; then
  DEVICE=cpu
  shift
fi
if [[ -z ${1:-} || $1 == -* ]]; then
  sed -n '2,19s/^# \?//p' "$0"
  exit 2
fi
mkdir -p "$1" || exit 2
OUT=$(cd "$1" && pwd)
shift
STEPS=("$@")
if [[ ${#STEPS[@]} -eq 0 ]]; then
  STEPS=(build verify tests module batch1 training network autotune overhead launches memory sanitizer report)
fi
PYTHON=${PYTHON:-python3}
DEADLINE=${DEADLINE:-3000}
DRY_RUN=${DRY_RUN:-}
CONFIGS=tests/data/ghost_configs.jsonl
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
: >"$OUT/steps.txt"
FAILED=0

say() { echo "$*" | tee -a "$OUT/log.txt"; }

note() { say "-- $*" && echo "$*" >>"$OUT/steps.txt"; }

has() { [[ $DRY_RUN ]] || "$PYTHON" -c "import $1" 2>/dev/null; }

# run NAME SECONDS COMMAND...: at most SECONDS, and no longer than what is left of DEADLINE
run() {
  local name=$1 limit=$2 start=$SECONDS left=$((DEADLINE - SECONDS)) code
  shift 2
  if [[ $DRY_RUN ]]; then
    say "$name: $*"
    return 0
  fi
  if ((left < 10)); then
    note "$name: skipped, no time left"
    return 0
  fi
  say "== $name: $*"
  timeout --kill-after=5 "$((limit < left ? limit : left))" "$@" 2>&1 | tee -a "$OUT/log.txt" "$OUT/last.txt"
  code=${PIPESTATUS[0]}
  case $code in
    0) note "$name: ok, $((SECONDS - start)) s" ;;
    124 | 137) note "$name: stopped after $((SECONDS - start)) s; its files hold what was done" ;;
    *) note "$name: FAILED with exit code $code, $((SECONDS - start)) s" && FAILED=1 ;;
  esac
}

# bench NAME SECONDS ARGUMENTS...: one benchmark, its rows to NAME.jsonl and its output to table.txt
bench() {
  local name=$1 limit=$2
  shift 2
  : >"$OUT/last.txt"
  run "$name" "$limit" "$PYTHON" -m bench "$@" --device "$DEVICE" --output "$OUT/$name.jsonl"
  cat "$OUT/last.txt" >>"$OUT/table.txt"
}

# In a dry run only two small modules, few samples and the peers that need no compiling.
CUT=()
SMALL=()
DTYPES=float16,float32
BATCHES=1,64
if [[ $DEVICE == cpu ]]; then
  export OMP_NUM_THREADS=1
  CUT=(--peers 'eager,ghostfused_*' --only blocks.6.3 --samples 3 --repeats 2)
  SMALL=(--peers 'eager,ghostfused_*' --size 32 --samples 3 --repeats 2)
  DTYPES=float32
  BATCHES=1
fi
OURS='ghostfused_cuda,ghostfused_triton,ghostfused_triton_two_kernel'

step_build() {
  if [[ $DEVICE == cpu ]]; then
    note "build: skipped in a dry run"
    return
  fi
  export TORCH_CUDA_ARCH_LIST GHOSTFUSED_CUDA=1 MAX_JOBS
  if [[ ! $DRY_RUN ]]; then
    TORCH_CUDA_ARCH_LIST=$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
  fi
  MAX_JOBS=${MAX_JOBS:-$(nproc)}
  run build 600 "$PYTHON" setup.py build_ext --inplace
}

# Every shape of GhostNet and the YOLOs against float64, cut in size so that float64 on the CPU is quick.
step_verify() {
  local backend dtype
  for backend in $([[ $DEVICE == cpu ]] && echo reference || echo cuda triton triton_two_kernel); do
    for dtype in ${DTYPES/,/ }; do
      run "verify $backend $dtype" 40 "$PYTHON" -m ghostfused verify --configs "$CONFIGS" --backend "$backend" \
        --dtype "$dtype" --layout nhwc --max-size 15 --device "$DEVICE"
    done
  done
}

# All modules at large batch, with PyTorch's peers that need no search.
step_module() {
  local cut=("${CUT[@]}")
  ((${#cut[@]})) || cut=(--peers "eager,compile_default,$OURS" --dtype float16 --batch 64)
  bench module 150 module "${cut[@]}" --layout nchw,nhwc --time-limit 140
}

# One image, as a CUDA graph too: what is left when launches cost nothing.
step_batch1() {
  local cut=("${CUT[@]}")
  ((${#cut[@]})) || cut=(--peers "eager,eager+graph,$OURS,ghostfused_cuda+graph,ghostfused_triton+graph")
  bench batch1 60 module "${cut[@]}" --dtype "$DTYPES" --batch 1 --layout nchw,nhwc --time-limit 55
}

# Everything that runs kernels on the GPU, plans them, compiles them for others, or captures them in CUDA graphs.
step_tests() {
  local cut=() file
  [[ $DEVICE == cuda ]] || cut=(--collect-only)
  if ! has pytest || ! has hypothesis; then
    note "tests: skipped, pytest or hypothesis can't be imported here; the step verify checks the same kernels"
    return
  fi
  for file in cuda cuda_bottleneck cuda_plan cuda_training training_kernels triton triton_bottleneck triton_training \
    replay fuse_export training_with_torch static triton_compiled triton_bottleneck_compiled triton_training_compiled; do
    [[ ! -f tests/test_$file.py ]] || run "test_$file" 180 "$PYTHON" -m pytest -q -rs --maxfail=20 \
      -p no:cacheprovider "${cut[@]}" "tests/test_$file.py"
  done
}

# Training forward and backward of all modules.
step_training() {
  local cut=("${CUT[@]}")
  ((${#cut[@]})) || cut=(--peers "eager,compile_default,$OURS" --dtype float16 --batch 64)
  bench training 120 module "${cut[@]}" --layout nhwc --mode training_forward,backward --time-limit 110
}

# torch.compile at its best, against ours, in the layout that suits both; as many modules as the time allows.
step_autotune() {
  local cut=("${CUT[@]}")
  ((${#cut[@]})) || cut=(--peers "eager,compile_max_autotune,ghostfused_cuda,ghostfused_triton" --dtype float16 --batch 64)
  bench autotune 130 module "${cut[@]}" --layout nhwc --time-limit 110
}

step_network() {
  local cut=("${SMALL[@]}")
  ((${#cut[@]})) || cut=(--peers "eager,eager+graph,compile_default,$OURS,ghostfused_cuda+graph" --dtype float16)
  bench network 90 network "${cut[@]}" --batch "$BATCHES" --layout nhwc
}

step_overhead() { bench overhead 30 overhead --calls 200; }

step_launches() { bench launches 60 launches --network paper; }

step_memory() {
  local batch=64
  [[ $DEVICE == cuda ]] || batch=1
  bench memory 60 memory --batch "$batch"
}

step_report() {
  if has matplotlib; then
    run report 120 "$PYTHON" -m bench report "$OUT" --output "$OUT/report"
  else
    note "report: skipped, matplotlib can't be imported here"
  fi
}

step_sanitizer() {
  local tool
  if [[ $DEVICE == cpu ]] || { [[ ! $DRY_RUN ]] && ! command -v compute-sanitizer >/dev/null; }; then
    note "sanitizer: skipped, no GPU or no compute-sanitizer on PATH"
    return
  fi
  head -n 4 "$CONFIGS" >"$OUT/few.jsonl"
  for tool in memcheck racecheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 run "sanitizer $tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 1 \
      --kernel-name kernel_substring=ghost "$PYTHON" -m ghostfused verify --configs "$OUT/few.jsonl" --backend cuda \
      --dtype float16 --layout nhwc --max-size 9
  done
  rm -f "$OUT/few.jsonl"
}

say "$(date -u +%FT%TZ) $DEVICE, steps: ${STEPS[*]}"
for package in torch triton pytest hypothesis rich matplotlib timm; do
  has $package || say "missing: $package"
done
[[ $DRY_RUN ]] || "$PYTHON" -c 'import setuptools; assert int(setuptools.__version__.partition(".")[0]) >= 77' 2>/dev/null ||
  say "missing: setuptools 77 or later, which the build needs"
for program in nvcc ninja nvidia-smi compute-sanitizer; do
  command -v $program >/dev/null || say "missing: $program on PATH"
done
if [[ $DEVICE == cuda && ! $DRY_RUN ]]; then
  nvidia-smi 2>&1 | tee -a "$OUT/log.txt"
  if ! "$PYTHON" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())'; then
    say "torch sees no CUDA GPU here; --dry-run goes through the steps on the CPU"
    exit 1
  fi
fi
if [[ ! $DRY_RUN ]]; then
  {
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null
    "$PYTHON" -c 'import platform, torch; print(f"python {platform.python_version()}, torch {torch.__version__}, CUDA {torch.version.cuda}")'
    "$PYTHON" -c 'import triton; print("triton", triton.__version__)' 2>/dev/null
    nvcc --version 2>/dev/null | tail -n 1
    git log -1 --format='commit %H' 2>/dev/null
  } | tee "$OUT/versions.txt" | tee -a "$OUT/log.txt"
fi
for step in "${STEPS[@]}"; do
  if ! declare -F "step_$step" >/dev/null; then
    note "$step: FAILED, no such step"
    FAILED=1
    continue
  fi
  "step_$step"
  [[ $step != build ]] || run info 30 "$PYTHON" -m ghostfused info
done
rm -f "$OUT/last.txt"
say "== done in $SECONDS s"
cat "$OUT/steps.txt"
exit $FAILED
