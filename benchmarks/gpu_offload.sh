# The parts of gpu.sh that keep K and V in host memory (KVPR); it defines `bench` and sources this file.
# Memory on the host, page-locked: 32x2k and 8x8k of opt-6.7b 52 GB, then 73 GB for transformers' own; qwen 16 GB;
# opt-13b 112 GB; memory 52 GB; mixed 10 GB. Several cores page-lock it: 52 GB took one of them half a minute.
# Nothing else should run on the host meanwhile: it launches what the GPU does, and its memory is what the bus reads.
bench_registered() {
  PYTORCH_CUDA_ALLOC_CONF=pinned_use_cuda_host_register:True,pinned_num_register_threads:8 bench "$@"
}
opt=(offload --model opt-6.7b --dtype float16)
variants() { for name in "$@"; do printf -- '--variant %s ' "$name"; done; }
offload_part() {
  case $1 in
    offload-tests)
      python3 -m pytest -q -p no:cacheprovider -n 8 -m gpu tests/gpu/test_offload.py tests/ops/test_partial_attention.py \
        --junitxml "$out/$day-offload-tests.xml" || failed=1 ;;
    offload-smoke) # everything once, small: 3 minutes, 16 GB on the host
      grep -E 'MemTotal|MemAvailable' /proc/meminfo
      tiny=(--model tiny --dtype float16 --num-iters 2 --chunk-mib 0.25)
      bench smoke-tiny offload "${tiny[@]}" --batch 4 --context 400 \
        $(variants device naive transformers overlapped serial pipelined int8 int4)
      bench smoke-tiny-column offload "${tiny[@]}" --batch 4 --context 400 --batches 3
      bench smoke-memory offload-memory --model tiny --context 200,400 --batch 4 --chunk-mib 0.25
      bench smoke-mixed offload-mixed --model tiny --short --minutes 0
      bench smoke-opt "${opt[@]}" --layers 4 --batch 32 --context 2048 --num-iters 2
      bench_registered smoke-opt-registered "${opt[@]}" --layers 4 --batch 32 --context 2048 --num-iters 2 \
        $(variants overlapped pipelined)
      bench smoke-13b offload --model opt-13b --dtype float16 --layers 3 --batch 16 --context 1024 --batches 4 --num-iters 2
      grep -E 'MemTotal|MemAvailable' /proc/meminfo ;;
    offload-opt-6.7b) offload_part offload-opt-6.7b-2k; offload_part offload-opt-6.7b-8k ;;
    offload-opt-6.7b-2k)
      bench_registered offload-opt-6.7b-32x2k "${opt[@]}" --batch 32 --context 2048 --num-iters 7 ;;
    offload-opt-6.7b-8k)
      bench_registered offload-opt-6.7b-8x8k "${opt[@]}" --batch 8 --context 8192 --num-iters 7 ;;
    offload-qwen)
      bench_registered offload-qwen2.5-7b-32x8k offload --model qwen2.5-7b --batch 32 --context 8192 --num-iters 7 \
        $(variants device overlapped pipelined int8 int4) ;;
    offload-13b)
      bench_registered offload-opt-13b-4x16x1k offload --model opt-13b --dtype float16 --batch 16 --context 1024 --batches 4 \
        --num-iters 4 ;;
    offload-memory)
      bench offload-memory-llama-2-7b offload-memory --model llama-2-7b --recompute 1
      bench offload-memory-qwen2.5-7b offload-memory --model qwen2.5-7b --recompute 0 ;;
    offload-mixed) bench offload-mixed-opt-6.7b offload-mixed --dtype float16 --minutes "${OFFLOAD_MINUTES:-10}" ;;
    *) return 1 ;;
  esac
}
