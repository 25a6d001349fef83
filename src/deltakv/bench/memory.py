"""Peak memory of one method, in a process of its own: `python -m deltakv.bench.memory` prints a JSON line.

The process loads the model, prefills one row in chunks, makes it a batch and decodes a few steps; stock
baselines do the same, so what differs is where K and V lie and what a step needs.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from deltakv.errors import DeltaKVError, InputError


def measure_memory(
    path: str, method: str, ids: list[int], batch: int, steps: int, dtype: str, device: str, threads: int
) -> dict[str, int]:
    """Runs this module in a new process: `peak_memory_bytes` and `kv_bytes`. Raises `InputError` if it fails.

    path: what `from_pretrained` takes. method: as on the command line. ids: the row's tokens.
    """
    with tempfile.TemporaryDirectory() as temp:
        tokens = Path(temp) / "tokens.json"
        tokens.write_text(json.dumps(ids), encoding="utf-8")
        command = [sys.executable, "-m", "deltakv.bench.memory", "--model", path, "--method", method]
        command += ["--tokens", str(tokens), "--batch", str(batch), "--steps", str(steps)]
        command += ["--dtype", dtype, "--device", device, "--threads", str(threads)]
        # glibc learns during a run which blocks it had better keep, and what it has learnt by when is a matter of
        # chance: up to 150 MiB. With a fixed threshold, large blocks that are freed go back at once.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 17)}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise InputError(f"measuring the memory of {method} failed: {said}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m deltakv.bench.memory", description=__doc__)
    for name in ("model", "method", "tokens"):
        parser.add_argument(f"--{name}", required=True)
    for name, default in (("batch", 1), ("steps", 4), ("threads", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name in ("dtype", "device"):
        parser.add_argument(f"--{name}", default="auto")
    args = parser.parse_args()
    try:
        print(json.dumps(_run(args)))
    except DeltaKVError as error:
        sys.exit(f"deltakv: {error}")


def _run(args: argparse.Namespace) -> dict[str, int]:
    import torch

    from deltakv.bench import runners
    from deltakv.loading import load_model
    from deltakv.methods import parse

    if args.threads:
        torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    ids = torch.tensor([json.loads(Path(args.tokens).read_text(encoding="utf-8"))])
    model = load_model(args.model, args.dtype, args.device)
    length = ids.shape[1] + args.steps

    def decode(cache: Any) -> None:
        token = ids[:, -1:].expand(args.batch, 1).to(model.device)
        for _ in range(args.steps):
            logits = model(token, past_key_values=cache, use_cache=True).logits
            token = logits[:, -1].argmax(-1, keepdim=True)

    if args.method in runners.BASELINES:
        from transformers import DynamicCache, StaticCache

        static = args.method == "stock-static"
        if static and args.batch == 1:
            cache = StaticCache(config=model.config, max_cache_len=length)
            runners.prefill(model, cache, ids)
        else:
            cache = DynamicCache(config=model.config)
            runners.prefill(model, cache, ids)
            if static:
                cache = runners.static_cache(model.config, cache, args.batch, length)
            else:
                runners.repeat_rows(cache, args.batch)
        decode(cache)
        kv_bytes = runners.layer_bytes(cache)
    else:
        import deltakv

        with deltakv.apply(model, parse(args.method)) as handle:
            cache = handle.new_cache(max_length=length)
            runners.prefill(model, cache, ids)
            runners.repeat_rows(cache, args.batch)
            decode(cache)
            kv_bytes = cache.kv_bytes
    return {"peak_memory_bytes": _peak(model.device), "kv_bytes": kv_bytes}


def _peak(device: Any) -> int:
    """The process's peak, in bytes; on a GPU what torch allocated there."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    try:
        # Linux hands ru_maxrss on from the process that started this one; VmHWM is this program's own.
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    main()
