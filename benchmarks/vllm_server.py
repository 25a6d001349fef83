"""vLLM's own server beside `deltakv serve`, over HTTP: time to the first token, and per output token.

    PYTHONPATH=src:/tmp/site python3 benchmarks/vllm_server.py --output FOLDER [--dims 1.5b 7b] [--seconds 560]

Random weights, the same options, prompts of token ids. Where the GPU has room for two servers at once both are up, and
are asked in turns; otherwise they come one after the other. Time per output token is taken on prefix-cached prompts,
so that all rows decode together. Each model's results are a JSON of their own, written again after each measurement.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from vllm_engines import DELTA, DIMS, ENVIRONMENT, advertise, prompts_of, provenance, save_config, switched_off
from vllm_http import Answer, Server, ServerError

ROWS = 64
#: Tokens of each answer: many, for requests reach the engine one after the other, and all have to decode together.
STEPS = 512
#: Fresh prompts, one at a time, for the time to the first token; and how often all rows decode.
SINGLE, TURNS = 15, 2
#: GPU memory of one server; of each of two.
ALONE, BESIDE = 0.85, 0.45
#: What a server holds of its share beside weights and KV cache, bytes: activations, the context.
OVERHEAD = 3e9
START_SECONDS = 240.0


def kv_bytes(dims: str, contexts: list[int], rows: int) -> float:
    """Of all rows at their longest, and a little more, so that a prompt that was cached stays."""
    hidden, _, heads, kv_heads, _, _ = DIMS[dims]
    return 1.03 * rows * (max(contexts) + STEPS + 16) * 2 * kv_heads * (hidden // heads) * 28 * 2


def weight_bytes(dims: str) -> float:
    hidden, intermediate, heads, kv_heads, tied, vocabulary = DIMS[dims]
    layer = hidden * hidden * (2 + 2 * kv_heads / heads) + 3 * hidden * intermediate
    return 2 * (28 * layer + vocabulary * hidden * (1 if tied else 2))


def memory_shares(total: float, dims: str, contexts: list[int], rows: int) -> tuple[float, bool]:
    """The share of the GPU's memory for each server, and whether two are up at once. Raises `ServerError`."""
    needed = weight_bytes(dims) + kv_bytes(dims, contexts, rows) + OVERHEAD
    if needed <= BESIDE * total:
        return BESIDE, True
    if needed <= ALONE * total:
        return ALONE, False
    raise ServerError(f"{dims} needs {needed / 1e9:.0f} GB, and the GPU has {total / 1e9:.0f}: a larger one")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def command(name: str, folder: Path, port: int, options: list[str], settings: dict[str, Any]) -> list[str]:
    """The server of a contender. `vllm serve` is vLLM's name for this module."""
    listen = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "random"]
    if name == "stock":
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), *listen, *options]
    said = ",".join(f"{key}={value}" for key, value in settings.items() if key not in ("algorithm", "budget"))
    method = ["--method", f"{settings['algorithm']}:{said}", "--budget", str(settings["budget"])]
    return [sys.executable, "-m", "deltakv", "serve", str(folder), *method, *listen, *options]


def in_turns(names: list[str], attempt: int) -> list[str]:
    """Nobody is always the first."""
    return names if attempt % 2 == 0 else names[::-1]


def first_token(answers: list[Answer]) -> float:
    return 1e3 * answers[0].times[0]


def per_token(answers: list[Answer]) -> float:
    """Milliseconds between tokens of the median row while all decode: from the last first token to the first last."""
    begin, end = max(one.times[0] for one in answers), min(one.times[-1] for one in answers)
    rates = []
    for one in answers:
        within = [(when, count) for when, count in zip(one.times, one.counts, strict=True) if begin <= when <= end]
        if len(within) > 1:
            rates.append((within[-1][0] - within[0][0]) / (within[-1][1] - within[0][1]))
    if 2 * len(rates) < len(answers):
        raise ServerError("the rows did not decode together: longer answers (--steps)")
    return 1e3 * statistics.median(rates)


def per_request(answers: list[Answer]) -> float:
    """The same over each whole answer behind its first token, whoever else decodes by then."""
    return 1e3 * statistics.median((one.times[-1] - one.times[0]) / (one.counts[-1] - one.counts[0]) for one in answers)


def slowest(answers: list[Answer]) -> float:
    return max(one.times[-1] for one in answers)


def measure(servers: dict[str, Server], context: int, asked: argparse.Namespace, vocabulary: int) -> dict[str, Any]:
    """By contender. All servers that are up take turns, with the same prompts."""
    names, rows, steps = list(servers), asked.rows, asked.steps
    taken: dict[str, dict[str, Any]] = {name: {"rows": rows, "context": context, "steps": steps} for name in names}
    runs: dict[str, dict[str, list[Any]]] = {
        name: {"ttft": [], "tpot": [], "request": [], "whole": []} for name in names
    }
    for attempt in range(-1, asked.single):  # the first one is not counted
        prompts = prompts_of(1, context, seed=1000 + context + attempt, vocabulary=vocabulary)
        for name in in_turns(names, attempt):
            took = first_token(servers[name].ask(prompts, 1, streamed=True))
            runs[name]["ttft"] += [took] if attempt >= 0 else []
    prompts = prompts_of(rows, context, seed=context + rows, vocabulary=vocabulary)
    before = {name: servers[name].counters() for name in names}
    for name in names:
        taken[name]["read_all_s"] = round(slowest(servers[name].ask(prompts, 1, streamed=False)), 3)
    for turn in range(TURNS):
        for name in in_turns(names, turn):
            streamed = servers[name].ask(prompts, steps, streamed=True)
            half, whole = (slowest(servers[name].ask(prompts, n, streamed=False)) for n in (steps // 2, steps))
            runs[name]["tpot"].append(per_token(streamed))
            runs[name]["request"].append(per_request(streamed))
            # Rows come and go at the same pace in both, so the difference is steps of all of them.
            runs[name]["whole"].append(1e3 * (whole - half) / (steps - steps // 2))
            taken[name]["events_a_token"] = round(sum(len(a.times) for a in streamed) / (rows * steps), 3)
    for name, found in taken.items():
        after = servers[name].counters()
        found["counted"] = {key: value - before[name].get(key, 0.0) for key, value in after.items() if key != "blocks"}
        for key, shown in (
            ("ttft", "ttft_ms"),
            ("tpot", "tpot_ms"),
            ("request", "tpot_request_ms"),
            ("whole", "tpot_whole_ms"),
        ):
            found[shown] = round(statistics.median(runs[name][key]), 4)
            found[f"{key}_runs_ms"] = [round(one, 4) for one in runs[name][key]]
    return taken


class Run:
    """One model: its servers, and its JSON."""

    def __init__(
        self, asked: argparse.Namespace, dims: str, folder: Path, environment: dict[str, str], end: float
    ) -> None:
        self.asked, self.dims, self.folder, self.environment, self.end = asked, dims, folder, environment, end
        self.settings = DELTA | ({"budget": 256, "min_context": 256} if asked.cpu else {})
        self.vocabulary = min(150000, DIMS[dims][5])
        self.results: dict[str, dict[str, Any]] = {}
        self.left_out: list[list[str]] = []
        self.facts: dict[str, Any] = {}

    def save(self) -> None:
        report = {
            **provenance(), "bench": "vllm-server", "model": f"qwen2-{self.dims}", **self.facts,
            "settings": self.settings, "results": list(self.results.values()), "left_out": self.left_out,
        }  # fmt: skip
        path = self.asked.output / f"vllm-server-{self.dims}.json"
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    def start(self, name: str, options: list[str]) -> Server:
        port = free_port()
        log = self.asked.output / f"server-{self.dims}-{name}.log"
        if name == "stock" and not self.asked.cpu:
            options = [*options, "--attention-backend", "FLASH_ATTN"]
        said = command(name, self.folder, port, options, self.settings)
        server = Server(said, port, self.environment, log)
        try:
            took = server.wait(min(START_SECONDS, self.end - time.monotonic()))
            self.results[name] = {"contender": name, "command": said[1:], "start_s": round(took, 1), "shapes": []}
            blocks = server.counters()["blocks"]
            self.results[name]["blocks"] = int(blocks)
            if blocks and blocks < self.asked.rows * (max(self.asked.contexts) + self.asked.steps) / 16:
                raise ServerError(f"the KV cache has {blocks:.0f} blocks, too few for all rows at once")
            # Whatever is compiled at first use; other prompts, so that nothing below is found in the cache.
            server.ask(prompts_of(self.asked.rows, 200, seed=9, vocabulary=self.vocabulary), 16, streamed=True)
        except BaseException:
            server.stop()
            raise
        print(self.dims, name, f"is up after {took:.0f} s", flush=True)
        return server

    def together(self, names: list[str], options: list[str]) -> None:
        """These servers, up at once, each measurement in turns."""
        servers: dict[str, Server] = {}
        try:
            for name in names:
                try:
                    servers[name] = self.start(name, options)
                except ServerError as error:
                    self.fail(name, error)
            for context in sorted(self.asked.contexts):
                if servers and time.monotonic() < self.end:
                    taken = measure(servers, context, self.asked, self.vocabulary)
                    for name, shape in taken.items():
                        self.results[name]["shapes"].append(shape)
                        print(self.dims, name, json.dumps(shape), flush=True)
                    self.save()
                else:
                    self.left_out.append([self.dims, *names, f"{context} tokens: no time left, or no server"])
        except ServerError as error:
            self.fail(" and ".join(servers), error)
        finally:
            for server in servers.values():
                server.stop()
            self.save()

    def fail(self, name: str, error: ServerError) -> None:
        self.left_out.append([self.dims, name, str(error)])
        print(self.dims, name, "FAILED", error, flush=True)


def summary(results: dict[str, dict[str, Any]]) -> None:
    """Delta to stock, as the issue asks for."""
    shapes = {name: {shape["context"]: shape for shape in row["shapes"]} for name, row in results.items()}
    for context, stock in shapes.get("stock", {}).items():
        if delta := shapes.get("delta", {}).get(context):
            ratios = {key: round(delta[key] / stock[key], 4) for key in ("ttft_ms", "tpot_ms", "tpot_whole_ms")}
            print(context, "tokens, delta to stock:", json.dumps(ratios), flush=True)


def gpu_bytes() -> float:
    asked = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits", "--id=0"]
    return float(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()[0]) * 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="a folder, for the JSON and the logs")
    parser.add_argument("--dims", nargs="+", choices=DIMS, default=["1.5b"])
    parser.add_argument("--contexts", nargs="+", type=int, default=[1000, 16000])
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--steps", type=int, default=STEPS, help="tokens of each answer")
    parser.add_argument("--single", type=int, default=SINGLE, help="fresh prompts for the time to the first token")
    parser.add_argument("--seconds", type=float, default=540, help="for all of it")
    parser.add_argument("--serve-options", default="", help="for both servers, as in '--stream-interval 10'")
    parser.add_argument("--one-at-a-time", action="store_true", help="never two servers at once")
    parser.add_argument("--cpu", action="store_true", help="try the script itself, on vLLM's CPU build")
    asked = parser.parse_args()
    end = time.monotonic() + asked.seconds
    asked.output.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp())
    advertise(work)
    environment = switched_off({**ENVIRONMENT, **os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"})
    environment["PYTHONPATH"] = os.pathsep.join([str(work), *filter(None, [os.environ.get("PYTHONPATH")])])
    failed = False
    for dims in asked.dims:
        folder = work / dims
        save_config(folder, dims)
        run = Run(asked, dims, folder, environment, end)
        longest = -(-(max(asked.contexts) + asked.steps + 1) // 128) * 128
        options = [
            *("--load-format", "dummy", "--skip-tokenizer-init", "--dtype", "bfloat16", "--seed", "0"),
            *("--max-model-len", str(longest), "--max-num-seqs", str(asked.rows), "--block-size", "16"),
            *("--enable-prefix-caching", "--disable-uvicorn-access-log", "--generation-config", "vllm"),
        ]
        try:
            share, beside = (0.0, True) if asked.cpu else memory_shares(gpu_bytes(), dims, asked.contexts, asked.rows)
        except ServerError as error:
            run.fail("all", error)
            run.save()
            failed = True
            continue
        beside = beside and not asked.one_at_a_time
        options += shlex.split(asked.serve_options)
        options += ["--enforce-eager"] if asked.cpu else ["--gpu-memory-utilization", str(share)]
        run.facts = {"options": options, "together": beside}
        for names in [["stock", "delta"]] if beside else [["stock"], ["delta"]]:
            run.together(names, options)
        for name in ("stock", "delta"):
            if beside and not run.results.get(name, {}).get("shapes") and end - time.monotonic() > START_SECONDS / 2:
                run.together([name], options)  # beside the other it has failed
        summary(run.results)
        failed |= bool(run.left_out)
        for what in run.left_out:
            print("left out:", *what, flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
