#!/usr/bin/env bash
# Measures what benchmarks/README.md says of a GPU, part by part, each a few minutes:
#   bash benchmarks/gpu.sh FOLDER tests|steps-7b|steps-1.5b|average|ragged|ops|slope|crossover|generate-1.5b|generate-7b ...
#   bash benchmarks/gpu.sh FOLDER offload-smoke|offload-opt-6.7b|offload-qwen|offload-13b|offload-memory|offload-mixed
# Results are JSON (and pictures) in FOLDER; benchmarks/results/ keeps those that are published.
set -uo pipefail
out=$1; shift
export PYTHONPATH=src${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
day=$(date -u +%F)
card=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -1 | grep -oiE '[A-Z]+[0-9]+' | head -1 | tr '[:upper:]' '[:lower:]')
bench() { local name=$card-$1; shift; echo "== $name"; python3 -m deltakv bench "$@" --output-json "$out/$day-$name.json" || failed=1; }
# The paper's settings, with one sink page: layers 0 and 1 in full, 2, 14 and 22 pick.
methods=(--method full --method delta)
failed=0
source "$(dirname "$0")/gpu_offload.sh"
for part in "$@"; do
  case $part in
    tests)
      python3 -m pytest -q -p no:cacheprovider -n 12 -m gpu tests/gpu tests/ops --ignore tests/gpu/test_smollm2_gpu.py \
        --junitxml "$out/$day-gpu-tests.xml" || failed=1 ;;
    steps-7b)
      bench 7b-64x16k step --model r1-distill-qwen-7b --batch-size 64 --input-len 16000 --loop 48 --profile
      bench 7b-32x32k step --model r1-distill-qwen-7b --batch-size 32 --input-len 32000 --profile "${methods[@]}" ;;
    steps-1.5b)
      bench 1.5b-64x16k step --model r1-distill-qwen-1.5b --batch-size 64 --input-len 16000 --loop 48 --profile ;;
    ragged)
      bench 1.5b-64x1.6k-16k step --model r1-distill-qwen-1.5b --batch-size 64 --input-len 16000 --spread 10 "${methods[@]}"
      bench 1.5b-64x16k-finished step --model r1-distill-qwen-1.5b --batch-size 64 --input-len 16000 --finished 48 \
        "${methods[@]}" ;;
    ops)
      for shape in 64x16000 8x131072 1x1048576 1x131072 64x1024; do
        bench op-$shape op --model r1-distill-qwen-7b --batch-size "${shape%x*}" --input-len "${shape#*x}"
      done ;;
    slope)
      bench 7b-slope sweep --model r1-distill-qwen-7b --batch-size 8 "${methods[@]}" \
        --input-len 4096,8192,16384,32768,65536,131072 ;;
    average)  # of the contexts of `generate-7b`
      bench 7b-64x8k step --model r1-distill-qwen-7b --batch-size 64 --input-len 8000 --loop 48 --profile "${methods[@]}" ;;
    crossover)
      for size in 1.5b 7b; do
        bench $size-crossover sweep --model r1-distill-qwen-$size --batch-size 1,8,64 "${methods[@]}" \
          --input-len 512,1024,2048,4096,8192,16384,32768,65536,131072
      done ;;
    generate-*)
      bench "$part" generate --model "r1-distill-qwen-${part#generate-}" --batch-size 64 --output-len 16000 "${methods[@]}" ;;
    offload-*) offload_part "$part" || { echo "no such part: $part"; failed=1; } ;;
    *) echo "no such part: $part"; failed=1 ;;
  esac
done
exit $failed
