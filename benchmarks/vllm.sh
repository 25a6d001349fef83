#!/usr/bin/env bash
# Measures what docs/vllm.md says of GPUs, part by part, with vLLM on PYTHONPATH:
#   PYTHONPATH=/tmp/site bash benchmarks/vllm.sh FOLDER tests|equal|steps-1.5b|steps-7b|beside|server-1.5b|server-7b ...
#   PYTHONPATH=/tmp/site bash benchmarks/vllm.sh FOLDER two-gpus|two-gpus-equal ...
# Each part is a folder in FOLDER with its JSON and logs; benchmarks/results/ keeps those that are published.
set -uo pipefail
out=$1; shift
export PYTHONPATH=src${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
failed=0
for part in "$@"; do
  name=${part##*-}
  new() { echo "== $part, $(date +%T)"; python3 "$@" --output "$out/$part" || failed=1; }
  case $part in
    tests)
      mkdir -p "$out/$part"
      python3 -m pytest -q -p no:cacheprovider -n 4 -m gpu tests/gpu/test_vllm_gpu.py tests/gpu/test_aside.py --junitxml "$out/$part/tests.xml" \
        > "$out/$part/log" 2>&1 || failed=1
      tail -n 3 "$out/$part/log" ;;
    equal) new benchmarks/vllm_gpu.py --parts equal --seconds 500 ;;
    steps-*) new benchmarks/vllm_gpu.py --parts "$name" --seconds 500 ;;
    server-*) new benchmarks/vllm_server.py --dims "$name" --seconds 500 ;;
    beside) new benchmarks/vllm_beside.py ;;
    two-gpus) new benchmarks/vllm_beside.py --setups two-gpus ;;
    two-gpus-equal) new benchmarks/vllm_tp.py ;;
    *) echo "no such part: $part"; failed=1 ;;
  esac
done
exit $failed
