#!/usr/bin/env bash
# tools/sass/baselines.sh PYTHON [SETTING...]: counts GhostNet 1.0×'s 32 Ghost modules in each setting (dtype_layout_mode)
# and writes tools/sass/results/sass_SETTING.jsonl; about ten minutes of one core for all of them.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=$1
shift
settings=("$@")
if [[ $# -eq 0 ]]; then
  settings=({float16,float32,tf32}_{nhwc,nchw}_forward float16_{nhwc,nchw}_training float32_nhwc_training {float16,float32}_{nhwc,nchw}_triton float16_{nhwc,nchw}_latency)
fi
for setting in "${settings[@]}"; do
  IFS=_ read -r dtype layout mode <<<"$setting"
  out=tools/sass/results/sass_$setting.jsonl
  what=(--batch 64 --mode "$mode")
  [[ $mode != triton ]] || what=(--batch 64 --backend triton)
  [[ $mode != latency ]] || what=(--batch 1 --latency)
  "$python" -m tools.sass --configs tests/data/ghost_configs.jsonl --source timm/ghostnet_100@224 \
    --dtype "$dtype" --layout "$layout" "${what[@]}" --json >"$out.part"
  mv "$out.part" "$out"
  tail -n 1 "$out"
done
[[ $# -gt 0 ]] || "$python" -m tools.sass --network paper --batch 64 --json >tools/sass/results/sass_network.jsonl
