"""A process of its own that runs vLLM engines one after the other, as tests ask: JSON in, JSON out, one line each.

A request: {"engine": arguments of `vllm.LLM`, "runs": [{"prompts": [[token, ...], ...],
"sampling": [{...}, ...]}, ...]}; the engine lives for one request. The answer: {"runs": [[{"tokens": [...],
"logprobs": [[one a vocabulary entry], ...],
"cached": prompt tokens that came from the prefix cache}, ...], ...]}, or {"error": "Kind: message"}. Of {"check":
arguments} the config alone is made and checked; the answer is {"plan": letters}.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from typing import Any


def pretend(version: str) -> None:
    """Makes this vLLM one of another version, with the plugin loaded."""
    import vllm

    from deltakv.integrations.vllm.plugin import register

    vllm.__version__ = version
    register()


def pretend_gpu() -> None:
    """Makes CUSTOM the GPU backend, on CPU tensors. vLLM registers the plugin again with each engine: not any more."""
    import pretended_gpu

    from deltakv.integrations.vllm import plugin

    plugin.register()
    plugin.register.__code__ = (lambda: None).__code__
    pretended_gpu.install()


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM logs to stdout
    if version := os.environ.get("DELTAKV_TEST_VLLM_VERSION"):
        pretend(version)
    if os.environ.get("DELTAKV_TEST_GPU_BACKEND"):
        pretend_gpu()
    for line in sys.stdin:
        try:
            request = json.loads(line)
            answer = check(request["check"]) if "check" in request else run(request)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def check(engine: dict[str, Any]) -> dict[str, Any]:
    """The letters of the plan that an engine would run, its config built and nothing loaded; None without settings."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from deltakv.integrations.vllm.support import check as check_config

    config = EngineArgs(**engine).create_engine_config()
    layout = check_config(config, AttentionBackendEnum.CUSTOM.get_class())
    return {"plan": None if layout is None else str(layout.plan)}


def run(request: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = None
    try:
        llm = LLM(**request["engine"])
        return {"runs": [generate(llm, **wanted) for wanted in request["runs"]]}
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()


def generate(llm: Any, prompts: list[list[int]], sampling: list[dict[str, Any]]) -> list[dict[str, Any]]:
    from vllm import SamplingParams

    size = llm.llm_engine.vllm_config.model_config.get_vocab_size()
    parameters = [SamplingParams(temperature=0, detokenize=False, ignore_eos=True, **one) for one in sampling]
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    rows = llm.generate(asked, parameters, use_tqdm=False)
    return [
        {
            "tokens": list(row.outputs[0].token_ids),
            "logprobs": [[step[token].logprob for token in range(size)] for step in row.outputs[0].logprobs or []],
            "cached": row.num_cached_tokens,
        }
        for row in rows
    ]


if __name__ == "__main__":
    serve()
