"""deltakv inside vLLM on a GPU, beside vLLM's own FlashAttention: what it answers, and how fast.

    PYTHONPATH=src:/tmp/site python3 benchmarks/vllm_gpu.py --output FOLDER [--parts equal 1.5b 7b]

Each contender runs in a process of its own, with the same engine settings and random weights, and finds the plugin by
its entry point, for which a folder is made here. A part that would not end in time is left out, and named.
Pure decode is timed on prefix-cached prompts, so that all rows start together: what a longer answer
takes more than a short one, by its tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from vllm_engines import (
    DIMS,
    ENVIRONMENT,
    LONG,
    SHORT,
    advertise,
    generate,
    prompts_of,
    provenance,
    save_config,
    save_tiny,
    start,
    switched_off,
)

#: Rows and tokens of context.
SHAPES = ((64, 16000), (64, 1000))
#: How often each is timed; the medians count.
TURNS = 3

#: Parts, each a model and its contenders, with a guess of the seconds that one takes.
PARTS = {
    "equal": ("tiny", ("stock", "full", "covers", "delta"), 40),
    "1.5b": ("1.5b", ("stock", "delta", "full"), 75),
    "7b": ("7b", ("stock", "delta", "full"), 110),
}


def timed(
    dims: str, folder: Path, name: str, sizes: tuple[tuple[int, int], ...] = SHAPES, longest: int = 0, **engine: Any
) -> dict[str, Any]:
    """TTFT of one prompt, reading all prompts, and a step of pure decode, by shape."""
    llm, result = start(dims, folder, name, longest or max(length for _, length in sizes) + LONG + 64, **engine)
    blocks = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
    needed = max(rows * (-(-(length + LONG) // 16)) for rows, length in sizes)
    vocabulary = min(150000, DIMS[dims][5])
    if blocks and blocks < needed:
        raise SystemExit(
            f"the KV cache has {blocks} blocks, and {needed} are needed for all rows at once: a larger GPU"
        )
    generate(llm, prompts_of(64, 200, 9, vocabulary), 4)  # whatever is compiled at first use
    shapes = []
    for rows, length in reversed(sizes):
        single = [generate(llm, prompts_of(1, length, 100 + attempt, vocabulary), 1)[0] for attempt in range(4)][1:]
        prompts = prompts_of(rows, length, rows + length, vocabulary)
        read = generate(llm, prompts, 1)[0]
        generate(llm, prompts, 4)
        runs: dict[int, list[float]] = {SHORT: [], LONG: []}
        for count in (SHORT, LONG) * TURNS:
            seconds, answers = generate(llm, prompts, count)
            assert all(len(answer.outputs[0].token_ids) == count for answer in answers)
            runs[count].append(seconds)
        step = (statistics.median(runs[LONG]) - statistics.median(runs[SHORT])) / (LONG - SHORT)
        shapes.append(
            {
                "rows": rows,
                "context": length,
                "ttft_one_prompt_ms": round(1e3 * statistics.median(single), 2),
                "read_all_s": round(read, 3),
                "tpot_ms": round(1e3 * step, 3),
                "runs_s": runs,
            }
        )
    return {**result, "shapes": shapes}


#: Long ones first: what two contenders say is compared up to the first token that differs, and only rows of more than
#: `min_context` are sparse.
PROMPTS = (8000, 7000, 6000, 5000, 4000, 3500, 3000, 2500, 900, 40)


def answered(folder: Path, name: str, **engine: Any) -> dict[str, Any]:
    """Tokens and all log-probabilities of a few rows of the tiny model."""
    llm, result = start("tiny", folder, name, 8192, **engine)
    rows = []
    for length in PROMPTS:
        (row,) = generate(llm, prompts_of(1, length, seed=length, vocabulary=1024), 24, logprobs=-1)[1]
        steps = row.outputs[0].logprobs
        assert steps is not None
        rows.append(
            {
                "context": length,
                "tokens": list(row.outputs[0].token_ids),
                "logprobs": [[step[token].logprob for token in range(1024)] for step in steps],
            }
        )
    return {**result, "rows": rows}


def compared(folder: Path, results: dict[str, Any]) -> list[dict[str, Any]]:
    """By row: errors against float32 through transformers, given stock's tokens, as far as they are the same."""
    import torch
    from transformers import AutoModelForCausalLM

    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).cuda().eval()
    torch.backends.cuda.matmul.allow_tf32 = False
    table = []
    for index, stock in enumerate(results["stock"]["rows"]):
        (prompt,) = prompts_of(1, stock["context"], seed=stock["context"], vocabulary=1024)
        with torch.inference_mode():
            logits = exact(torch.tensor([prompt + stock["tokens"][:-1]]).cuda()).logits[0, len(prompt) - 1 :]
        want = torch.log_softmax(logits.float(), -1).cpu()
        entry: dict[str, Any] = {"context": stock["context"]}
        for name, result in results.items():
            row = result["rows"][index]
            same = [one == other for one, other in zip(row["tokens"], stock["tokens"], strict=True)]
            steps = (
                same.index(False) + 1 if False in same else len(same)
            )  # the first other token follows from equal ones
            errors = (torch.tensor(row["logprobs"]) - want).abs().amax(1)[1:steps]
            entry[name] = {"steps": steps - 1, "mean": float(errors.mean()), "max": float(errors.max())}
        for name in ("full", "covers"):
            entry[f"{name}_within_1.5x_of_stock"] = entry[name]["mean"] <= 1.5 * entry["stock"]["mean"]
        table.append(entry)
    return table


def child(part: str, name: str, folder: Path, result: Path) -> None:
    dims = PARTS[part][0]
    answer = answered(folder, name) if part == "equal" else timed(dims, folder, name)
    result.write_text(json.dumps(answer), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="a folder, for vllm_gpu.json and the logs")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--contenders", nargs="+", choices=["stock", "full", "covers", "delta"], default=None)
    parser.add_argument("--seconds", type=float, default=350, help="for all of it")
    parser.add_argument("--child", nargs=4, default=None, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        part, name, folder, result = asked.child
        child(part, name, Path(folder), Path(result))
        return 0
    end = time.monotonic() + asked.seconds
    asked.output.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp())
    advertise(work)
    environment = switched_off({**ENVIRONMENT, **os.environ})
    environment["PYTHONPATH"] = os.pathsep.join([str(work), *filter(None, [os.environ.get("PYTHONPATH")])])
    report: dict[str, Any] = {**provenance(), "bench": "vllm", "parts": {}, "left_out": []}
    for part in asked.parts:
        dims, names, guess = PARTS[part]
        folder = work / dims
        save_tiny(folder) if part == "equal" else save_config(folder, dims)
        results: dict[str, Any] = {}
        for name in names:
            if asked.contenders and name not in asked.contenders:
                continue
            left = end - time.monotonic()
            if left < guess:
                report["left_out"].append([part, name, "no time left"])
                continue
            result, log = work / "result.json", asked.output / f"{part}-{name}.log"
            result.unlink(missing_ok=True)
            arguments = ["--output", str(asked.output), "--child", part, name, str(folder), str(result)]
            try:
                with log.open("w") as out:
                    subprocess.run(
                        [sys.executable, __file__, *arguments],
                        env=environment, stdout=out, stderr=subprocess.STDOUT, timeout=left, check=True,
                    )  # fmt: skip
                results[name] = json.loads(result.read_text(encoding="utf-8"))
                print(part, name, json.dumps(results[name].get("shapes", "answered")), flush=True)
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
                report["left_out"].append([part, name, str(error)])
                print(part, name, "FAILED\n", log.read_text()[-2500:], flush=True)
        if part == "equal" and "stock" in results and len(results) == len(names):
            results = {"errors": compared(folder, results)}
            print(json.dumps(results["errors"]), flush=True)
        report["parts"][part] = results
        (asked.output / "vllm_gpu.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    print("left out:", report["left_out"])
    return bool(report["left_out"])


if __name__ == "__main__":
    sys.exit(main())
