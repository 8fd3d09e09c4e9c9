#!/usr/bin/env bash
# bench/gpu_session.sh OUT [3|10] [STEP ...]: the first thing to run on a machine with an NVIDIA GPU. In 3 or 10 minutes it builds,
# checks against float64, times, compares with the predictions, profiles, tests and sanitizes, the most valuable first.
#
# Needs this source tree and a python with torch and triton; no network. nvcc, ncu, compute-sanitizer, pytest, hypothesis,
# pytest-xdist, timm, rich and matplotlib are used where they are there; what is missing is said.
# Nothing is lost when it is stopped: rows are written as they are measured, and after every step all there is goes into one file.
#   OUT/results.tgz   everything: versions, one .txt of output and one .jsonl of rows a step, the profiler's files
#   OUT/steps.txt     each step's outcome and time
# The times are limits; a step gets no more than what is left. STEPS, all by default and in this order (those from tests on with
# 10 minutes only): build info verify module predicted counters full warm compiled tests warm_triton triton nchw batch1 float32
# network network_compiled training memcheck racecheck launches overhead memory
#   SECONDS_LEFT=… instead of the minutes   PYTHON=python3
#   REHEARSAL=1  tiny inputs and few samples, tests are collected and not run: to try the script with a GPU that is none.
#   LAUNCH=tests/helpers/on_fake_gpu.sh  stands before PYTHON wherever CUDA tensors are used
#   PRINT=1      prints the commands and runs none
# shellcheck disable=SC2329  # the steps are called by name
set -uo pipefail
HERE=$PWD
cd "$(dirname "$0")/.." || exit 2

if [[ -z ${1:-} || $1 == -* || ! ${2:-3} =~ ^(3|10)$ ]]; then
  sed -n '2,19s/^# \?//p' "$0"
  exit 2
fi
OUT=$(cd "$HERE" && mkdir -p "$1" && cd "$1" && pwd) || exit 2
MINUTES=${2:-3}
shift
[[ $# -eq 0 ]] || shift
LEFT=${SECONDS_LEFT:-$((MINUTES * 60 - 20))}
PYTHON=${PYTHON:-python3}
REHEARSAL=${REHEARSAL:+1}
PRINT=${PRINT:-}
CORES=$(nproc)
CONFIGS=tests/data/ghost_configs.jsonl
PREDICTIONS=(tools/sass/results/sass_float16_{nhwc,nchw}_{forward,training}.jsonl)
MOST_BYTES=$((15 << 20)) # of a file that comes back
W=$(mktemp -d "${TMPDIR:-/tmp}/gpu_session.XXXX") || exit 2
FAILED=0
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
PY=(${LAUNCH:+"$LAUNCH"} "$PYTHON")

QUICK=(build info verify module predicted counters full warm compiled)
REST=(tests warm_triton triton nchw batch1 float32 network network_compiled training memcheck racecheck launches overhead memory)

has() { [[ $PRINT ]] || command -v "$1" >/dev/null; }

# Whoever stops the script gets what the running step has written.
stopped() {
  [[ -z $RUNNING ]] || kill "$RUNNING" 2>/dev/null
  note "stopped by a signal: FAILED"
  exit 1
}
RUNNING=
trap stopped TERM INT HUP

# Everything into one file; without the profiler's reports and long texts where they make it too large. If tar fails, what matters most as it is.
pack() {
  cp "$W/steps.txt" "$OUT/steps.txt"
  tar -czf "$OUT/results.part" -C "$W" . && ((MOST_BYTES > $(stat -c %s "$OUT/results.part"))) ||
    { tar -czf "$OUT/results.part" -C "$W" --exclude='*.ncu-rep' $(find "$W" -size +2M -name '*.txt' -printf '--exclude=./%f ') . && echo "pack: left out the profiler's reports and texts of over 2 MB" >>"$OUT/steps.txt"; } ||
    {
      FAILED=1
      echo "pack: FAILED, what matters most is copied as it is" >>"$OUT/steps.txt"
      rm -f "$OUT/results.part"
      cp "$W"/{build.txt,module.jsonl,compiled.jsonl,triton.jsonl,network.jsonl} "$OUT/" 2>/dev/null
      return
    }
  mv "$OUT/results.part" "$OUT/results.tgz"
}

note() {
  echo "$*" | tee -a "$W/steps.txt"
  [[ $* != *FAILED* ]] || FAILED=1
  [[ $PRINT ]] || pack
}

# step NAME SECONDS COMMAND...: at most SECONDS, and no longer than what is left; its output to NAME.txt, the end of it shown
step() {
  local name=$1 limit=$(($2 * (REHEARSAL ? 4 : 1))) start=$SECONDS left=$((LEFT - SECONDS)) code
  shift 2
  if [[ $PRINT ]]; then
    echo "$name: $*"
    return
  fi
  if ((left < 8)); then
    note "$name: skipped, no time left"
    return
  fi
  timeout --kill-after=3 "$((limit < left ? limit : left))" "$@" >"$W/$name.txt" 2>&1 &
  RUNNING=$!
  wait $RUNNING # in the background: a signal to this script is heard at once
  code=$?
  RUNNING=
  tail -n "${TAIL:-8}" "$W/$name.txt" | cut -c1-300
  case $code in
    0) note "$name: ok, $((SECONDS - start)) s" ;;
    124 | 137) note "$name: ${REHEARSAL:+FAILED, }stopped after $((SECONDS - start)) s; its files hold what was done" ;;
    *) note "$name: FAILED with exit code $code, $((SECONDS - start)) s" ;;
  esac
}

python_step() {
  local name=$1 limit=$2
  shift 2
  step "$name" "$limit" "${PY[@]}" "$@"
}

# bench NAME SECONDS ARGUMENTS...: one benchmark, its rows to NAME.jsonl
bench() {
  local name=$1 limit=$2
  shift 2
  TAIL=32 python_step "$name" "$limit" -m bench "$@" --device cuda --output "$W/$name.jsonl"
}

# What is timed: the 32 modules of GhostNet 1.0× or the network. Cut down to what the CPU can do in a rehearsal.
HALF=(--dtype float16 --batch 64 --layout nhwc)
MODULES=()
NETWORK=(--network paper)
COUNTS=(--network paper)
if [[ $REHEARSAL ]]; then
  MODULES=(--network paper:0.1 --size 32 --only blocks.0,blocks.8.0.ghost2 --samples 3 --repeats 2)
  NETWORK=(--network tests/helpers/small_network.py:small --size 16 --samples 3 --repeats 1)
  COUNTS=(--network tests/helpers/small_network.py:small --size 16)
  HALF=(--dtype float16 --batch 2 --layout nhwc)
fi
profiled_modules() { # the arguments of `profile` that choose modules
  [[ ! $REHEARSAL ]] || echo --network paper:0.1 --size 32 --only blocks.8.0.ghost2
}

# Limits. Measured with no GPU, in CPU seconds: build 227, verify 190, a Triton kernel 0.57; the GPU machine has 16 cores.
step_build() { # unless an extension was carried along that loads and was built for this GPU, not for another and its driver
  local there='import torch; from ghostfused import _C; built = _C.build_info()["architectures"].replace("+PTX", "").split()
assert "%d.%d" % torch.cuda.get_device_capability() in built, built'
  if [[ ! $PRINT ]] && "${PY[@]}" -c "$there" >/dev/null 2>&1; then
    note "build: skipped, ghostfused._C is there, for this GPU, and loads"
    return
  fi
  local arch=9.0
  [[ $PRINT ]] || arch=$("${PY[@]}" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())' 2>/dev/null) || arch=9.0
  step build 150 env TORCH_CUDA_ARCH_LIST="$arch" GHOSTFUSED_CUDA=1 GHOSTFUSED_CPU=0 MAX_JOBS="$CORES" \
    "$PYTHON" setup.py build_ext --inplace
}

step_info() { TAIL=30 python_step info 30 -m ghostfused info; }

# Every shape of GhostNet and the YOLOs against float64, cut in size so that float64 on the CPU is quick.
step_verify() {
  local rows=$CONFIGS
  if [[ $REHEARSAL ]]; then
    rows=$W/few_configs
    head -n 2 "$CONFIGS" >"$rows"
  fi
  python_step verify 45 -m ghostfused verify --configs "$rows" --backend cuda --dtype float16 --layout nhwc --max-size 15 \
    --device cuda
}

# Kernels alone (graphs) and as called; nothing here compiles.
step_module() {
  local ours=ghostfused_cuda
  [[ $PRINT ]] || "${PY[@]}" -c 'import torch; from ghostfused import _C' >/dev/null 2>&1 || ours=ghostfused_triton
  bench module 60 module "${MODULES[@]}" --peers eager,eager+graph,$ours,$ours+graph "${HALF[@]}" --time-limit 52
}

step_predicted() {
  local predictions=("${PREDICTIONS[@]}")
  [[ ! $REHEARSAL ]] || predictions=("$(made_up_predictions)")
  TAIL=40 python_step predicted 15 -m bench predicted "${predictions[@]}" "$W/module.jsonl"
}

made_up_predictions() { # of the rehearsal's modules, which no judge has seen; the numbers mean nothing
  "$PYTHON" - "$W/module.jsonl" "$W/made_up_predictions" <<'PY'
import json, sys
rows = [json.loads(line) for line in open(sys.argv[1])]
rows = [row | {"issue_us": 1.0, "dram_us": 2.0} for row in rows if row["kind"] == "module"]
open(sys.argv[2], "w").write("".join(json.dumps(row) + "\n" for row in rows))
PY
  echo "$W/made_up_predictions"
}

METRICS=smsp__inst_executed.sum,dram__bytes_read.sum,dram__bytes_write.sum,gpu__time_duration.sum
METRICS+=,smsp__issue_active.avg.pct_of_peak_sustained_active,dram__throughput.avg.pct_of_peak_sustained_elapsed
NCU=(ncu --clock-control none --profile-from-start off)

# profile NAME SECONDS [ncu's arguments --] ARGUMENTS...: the modules under the profiler; alone where there is none in a rehearsal
profile() {
  local name=$1 limit=$2 own=()
  shift 2
  while [[ $1 != -- ]]; do
    own+=("$1")
    shift
  done
  shift
  if has ncu; then
    step "$name" "$limit" "${NCU[@]}" "${own[@]}" "${PY[@]}" -m bench profile "$W/$name.order.jsonl" "$@" --device cuda
  elif [[ $REHEARSAL ]]; then
    python_step "$name" "$limit" -m bench profile "$W/$name.order.jsonl" "$@" --device cuda
  else
    note "$name: skipped, no ncu on PATH"
  fi
}

step_counters() {
  # shellcheck disable=SC2046
  profile counters 60 --csv --page raw --metrics "$METRICS" --log-file "$W/counters.csv" -- $(profiled_modules) "${HALF[@]}"
  if [[ $PRINT || -s $W/counters.csv ]]; then
    TAIL=60 python_step counted 15 -m bench predicted "${PREDICTIONS[@]}" "$W/module.jsonl" --counters "$W/counters.csv" \
      "$W/counters.order.jsonl"
  fi
}

step_full() { # everything that the profiler knows of a large map, a middle one and a small one
  local chosen=(--only blocks.1.0.ghost1,blocks.6.1.ghost1,blocks.8.0.ghost1)
  # shellcheck disable=SC2207
  [[ ! $REHEARSAL ]] || chosen=($(profiled_modules))
  profile full 60 --set full -f -o "$W/full" -- "${chosen[@]}" "${HALF[@]}"
  [[ ! -s $W/full.ncu-rep ]] || TAIL=1 step full_text 20 ncu --import "$W/full.ncu-rep" --page details
}

# warm_up NAME SECONDS ARGUMENTS...: compiles what the next step needs, a share of the modules in each of several processes;
# the compilers' caches on disk are shared
warm_up() {
  local name=$1 limit=$2 shards=$((CORES > 8 ? 8 : CORES))
  shift 2
  # shellcheck disable=SC2016
  step "$name" "$limit" bash -c 'shards=$1; shift; failed=0; pids=()
    for ((i = 0; i < shards; i++)); do OMP_NUM_THREADS=2 "$@" --shard $i/$shards & pids+=($!); done
    for pid in "${pids[@]}"; do wait "$pid" || failed=1; done; exit $failed' \
    warm "$shards" "${PY[@]}" -m bench module "$@" --device cuda --samples 3 --repeats 1
}

COMPILED=compile_default
OURS_TRITON=ghostfused_triton,ghostfused_triton_two_kernel
step_warm() { [[ $REHEARSAL ]] || warm_up warm 60 --peers $COMPILED "${HALF[@]}"; }

step_compiled() {
  local peers=eager,eager+graph,$COMPILED,$COMPILED+graph,ghostfused_cuda,ghostfused_cuda+graph
  [[ ! $REHEARSAL ]] || peers=eager+graph,ghostfused_cuda+graph
  bench compiled 60 module "${MODULES[@]}" --peers $peers "${HALF[@]}" --time-limit 55
}

# ---- with ten minutes

step_tests() { # found by their marks; pytest's code, and so this step, says if that finds none or all of them are skipped
  local how=(-m "cuda or triton" --some-must-run)
  if [[ ! $PRINT ]] && ! "$PYTHON" -c 'import pytest, hypothesis' 2>/dev/null; then
    note "tests: skipped, pytest or hypothesis can't be imported here; the step verify checks the same kernels"
    return
  fi
  if [[ $REHEARSAL ]]; then
    how+=(--collect-only)
  elif [[ $PRINT ]] || "$PYTHON" -c 'import xdist' 2>/dev/null; then
    how+=(-n "$((CORES > 4 ? CORES / 2 : 2))")
  fi
  TAIL=20 step tests 150 "$PYTHON" -m pytest -q -rfE --maxfail=40 -p no:cacheprovider "${how[@]}" tests
}

step_warm_triton() {
  [[ $REHEARSAL ]] || warm_up warm_triton 60 --peers $OURS_TRITON --dtype float16 --batch 64,1 --layout nhwc,nchw
}

step_triton() {
  local peers=eager+graph,ghostfused_cuda+graph,ghostfused_triton+graph,ghostfused_triton_two_kernel
  [[ ! $REHEARSAL ]] || peers=eager+graph,ghostfused_cuda+graph
  bench triton 40 module "${MODULES[@]}" --peers $peers "${HALF[@]}" --time-limit 35
}

step_nchw() {
  bench nchw 40 module "${MODULES[@]}" --peers eager,eager+graph,ghostfused_cuda,ghostfused_cuda+graph "${HALF[@]}" \
    --layout nchw --time-limit 35
}

step_batch1() { # what is left when launches cost nothing, and what they cost
  bench batch1 40 module "${MODULES[@]}" --peers eager,eager+graph,ghostfused_cuda,ghostfused_cuda+graph "${HALF[@]}" \
    --batch 1 --time-limit 35
}

step_float32() {
  bench float32 40 module "${MODULES[@]}" --peers eager,eager+graph,ghostfused_cuda+graph "${HALF[@]}" --dtype float32,tf32 \
    --time-limit 35
}

step_network() {
  local batches=1,64
  [[ ! $REHEARSAL ]] || batches=1,2
  bench network 50 network "${NETWORK[@]}" --peers eager,eager+graph,ghostfused_cuda,ghostfused_cuda+graph "${HALF[@]}" \
    --batch $batches
}

step_network_compiled() { # rows of the peers that compile nothing are written first
  local peers=eager+graph,$COMPILED,$COMPILED+graph,ghostfused_cuda+graph
  [[ ! $REHEARSAL ]] || peers=eager+graph,ghostfused_cuda+graph
  bench network_compiled 60 network "${NETWORK[@]}" --peers $peers "${HALF[@]}"
}

step_training() {
  bench training 50 module "${MODULES[@]}" --peers eager,ghostfused_cuda "${HALF[@]}" --mode training_forward,backward \
    --time-limit 45
}

sanitize() {
  local tool=$1
  if ! has compute-sanitizer; then
    note "$tool: skipped, no compute-sanitizer on PATH"
    return
  fi
  head -n 4 "$CONFIGS" >"$W/few_configs"
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "$tool" 60 compute-sanitizer --tool "$tool" --report-api-errors no --error-exitcode 1 \
    --kernel-name kernel_substring=ghost "${PY[@]}" -m ghostfused verify --configs "$W/few_configs" --backend cuda \
    --dtype float16 --layout nhwc --max-size 9 --device cuda
}

step_memcheck() { sanitize memcheck; }

step_racecheck() { sanitize racecheck; }

step_launches() { bench launches 40 launches "${COUNTS[@]}"; }

step_overhead() {
  local calls=200
  [[ ! $REHEARSAL ]] || calls=2
  bench overhead 30 overhead --calls $calls --repeats 3
}

step_memory() {
  local batch=64
  [[ ! $REHEARSAL ]] || batch=2
  bench memory 50 memory "${COUNTS[@]}" --batch $batch --dtype float16
}

: >"$W/steps.txt"
STEPS=("$@")
if [[ ${#STEPS[@]} -eq 0 ]]; then
  STEPS=("${QUICK[@]}")
  ((MINUTES == 3)) || STEPS+=("${REST[@]}")
fi
if [[ ! $PRINT ]]; then
  {
    nvidia-smi -q -d CLOCK,POWER,PERFORMANCE
    nvidia-smi
  } >"$W/nvidia-smi.txt" 2>&1
  {
    date -u +%FT%TZ
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
    "$PYTHON" -c 'import platform, torch; print(f"python {platform.python_version()}, torch {torch.__version__}, CUDA {torch.version.cuda}")'
    "$PYTHON" -c 'import triton; print("triton", triton.__version__)'
    nvcc --version | tail -n 1
    git log -1 --format='commit %H'
  } >"$W/versions.txt" 2>&1
  cat "$W/versions.txt"
  for package in setuptools ninja pytest hypothesis xdist timm rich matplotlib; do
    "$PYTHON" -c "import $package" 2>/dev/null || echo "missing: $package" | tee -a "$W/versions.txt"
  done
  if ! "${PY[@]}" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    note "FAILED: torch sees no CUDA GPU here"
    exit 1
  fi
fi
for name in "${STEPS[@]}"; do
  if declare -F "step_$name" >/dev/null; then
    "step_$name"
  else
    note "$name: FAILED, no such step"
  fi
done
[[ $PRINT ]] || { pack; echo "== $SECONDS s"; cat "$OUT/steps.txt"; }
rm -rf "$W"
exit $FAILED
