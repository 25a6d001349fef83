#!/usr/bin/env bash
# Measures what the methods do to real models, on a GPU that nothing can be fetched on; each part in less than 9 minutes:
#   bash benchmarks/quality.sh PART ...
#     models                              pieces that are here become /tmp/models/NAME (benchmarks/models.py)
#     explore-MODEL                       what was tried to make picks better
#     calibrate-MODEL                     a plan file
#     calibrate-gsm8k                     another for qwen, on worked examples as the many-shot task has them
#     pareto-MODEL@CONTEXT,...            all methods at all budgets; goes on where it was stopped
#     answers-8shot, answers-manyshot     GSM8K; goes on where it was stopped. answers-manyshot@h2o: one method alone, in a
#                                         folder of its own, so that several answer at once; its file belongs with the others
#     background PART                     any of these beside what comes next, and beyond this call; wait PART, which
#                                         gives up after WAIT_SECONDS. Several at once use the GPU better than one by one
# MODEL is qwen or smollm2. Everything is kept in $KEPT and copied into $OUT/quality.tgz at the end of each call; carried as
# .gpu/qd/kept it is where a fresh machine goes on from. Options are variables: EXPLORE_SECONDS, PARETO_SECONDS, ANSWER_SECONDS, POSITIONS.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
HERE=/tmp/here CARRIED=${CARRIED:-.gpu/qd} KEPT=${KEPT:-/tmp/kept} MODELS=${MODELS:-/tmp/models} DEVICE=${DEVICE:-cuda}
mkdir -p "$KEPT" /tmp/site "$HERE"
[ -d "$CARRIED" ] && [ "$CARRIED" != "$HERE" ] && cp -r "$CARRIED/." "$HERE/"  # so that later calls need not carry it
[ -d "$HERE/kept" ] && cp -rn "$HERE/kept/." "$KEPT/"
[ -d /tmp/site/gguf ] || python3 -m pip install -q --no-index --no-deps --no-compile --target /tmp/site "$HERE"/gguf-*.whl
export PYTHONPATH=$root/src:/tmp/site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
texts=("$HERE/texts/topics.txt" "$HERE/texts/jargon.txt" "$HERE/texts/perl.txt")
failed=0

plan() { echo "$KEPT/$1-plan.json"; }

# The methods that answer, at one budget, but that calibrated plans have their own at 1,024 for the same attended tokens.
# DELTA's rows are sparse from the first token on.
methods() {
  local budget=$1
  echo full
  for name in qwen qwen-gsm8k; do
    [ -f "$(plan $name)" ] && python3 - "$(plan $name)" "$budget" <<'PY'
import json, sys
told, budget = json.load(open(sys.argv[1])), sys.argv[2]  # letters and all: at home there is no such file
print(told["method"] if budget == "1024" else f"delta:budget={budget},recent=128,min_context=0,plan={told['plan']}")
PY
  done
  echo "delta:budget=$budget,sinks=0,min_context=0" "quest:budget=$budget" "streaming:window=$((budget - 16))" \
    "h2o:budget=$budget,recent=$((budget / 2))"
}

calibrate() {  # model, name of the plan, context, texts
  local given=()
  for text in "${@:4}"; do given+=(--text "$text"); done
  python3 -m deltakv calibrate --model "$MODELS/$1" --context "$3" --windows 3 --dtype float32 "${given[@]}" \
    --positions "${POSITIONS:-128}" --confirm-positions 512 --device "$DEVICE" --state "$KEPT/$2-plan.state" \
    --out "$(plan "$2")" | tee "$KEPT/calibrate-$2.log"
}

answers() {  # folder, with @ and what methods' names begin with or without; budget
  local folder=$KEPT/gsm8k-$1 asked=() only=${1#"${1%@*}"}
  [ -d "$folder" ] || { mkdir -p "$folder" && tar -xzf "$HERE/gsm8k-${1%@*}.tgz" -C "$folder"; }
  rm -f "$folder/.lock"
  for method in $(methods "$2" | tr ' ' '\n' | grep "^${only#@}"); do asked+=(--method "$method"); done
  [ ${#asked[@]} -gt 0 ] || { echo "no method begins with ${only#@}"; return 1; }
  timeout -s INT "${ANSWER_SECONDS:-520}" python3 -m deltakv eval --out "$folder" --model "$MODELS/qwen" "${asked[@]}" \
    --dtype bfloat16 --device "$DEVICE" --stop-after answers
}

part() {
  local name=$1 model=${1#*-}
  case $name in
    models) python3 "$root/benchmarks/models.py" convert "$HERE" $(cd /tmp/pieces && ls ./*.gguf | sed 's#./##; s#.gguf##') ;;
    explore-*)
      (cd "$root/benchmarks" && timeout $((${EXPLORE_SECONDS:-230} + 150)) python3 explore.py --model "$MODELS/$model" \
        --texts "${texts[@]}" --out "$KEPT/explore-$model.jsonl" --seconds "${EXPLORE_SECONDS:-230}" --device "$DEVICE") |
        tee "$KEPT/explore-$model.log" ;;
    calibrate-gsm8k) calibrate qwen qwen-gsm8k 12000 "$HERE/texts/gsm8k.txt" ;;
    calibrate-*) calibrate "$model" "$model" "${CONTEXT:-8000}" "${texts[@]}" ;;
    pareto-*@*)
      local contexts=${model#*@}; model=${model%@*}
      [ -f "$(plan "$model")" ] && calibrated=(--plan "$(plan "$model")") || calibrated=()
      python3 "$root/benchmarks/pareto.py" --model "$MODELS/$model" --name "$model" --texts "${texts[@]}" \
        --contexts "$contexts" "${calibrated[@]}" --positions "${POSITIONS:-256}" --device "$DEVICE" \
        --out "$KEPT/pareto-$model-${contexts//,/-}.json" --seconds "${PARETO_SECONDS:-480}" ;;
    answers-8shot*) answers "${name#answers-}" "${BUDGET:-512}" ;;
    answers-manyshot*) answers "${name#answers-}" "${BUDGET:-1024}" ;;
    *) echo "no such part: $name"; return 1 ;;
  esac
}

while [ $# -gt 0 ]; do
  name=$1; shift
  case $name in
    background)
      name=$1; shift
      echo "== $name, in the background"
      code=/tmp/code/$name  # the next call writes these anew
      rm -rf "$code" && mkdir -p "$code" && cp -r "$root/src" "$root/benchmarks" "$code/"
      KEPT=$KEPT CARRIED=/tmp/here OUT= setsid nohup bash "$code/benchmarks/quality.sh" "$name" \
        >"$KEPT/$name.out" 2>&1 </dev/null & ;;
    wait)
      name=$1; shift
      for _ in $(seq "${WAIT_SECONDS:-500}"); do grep -q "^== done" "$KEPT/$name.out" && break; sleep 1; done
      tail -60 "$KEPT/$name.out" ;;
    *) echo "== $name, $(date +%T)"; part "$name" || failed=1 ;;
  esac
done
echo "== done, $(date +%T)"
[ -n "${OUT:-}" ] && tar -czf "$OUT/quality.tgz" --exclude questions.jsonl -C "$KEPT" .  # those came from here
exit $failed
