"""Engines for what is measured inside vLLM: their settings, models of random weights, prompts, and where it ran."""

from __future__ import annotations

import functools
import json
import os
import random
import time
from pathlib import Path
from typing import Any

#: What keeps vLLM from looking for a network, or for packages that are not there.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_USE_DEEP_GEMM": "0",
    "TVM_FFI_DISABLE_TORCH_C_DLPACK": "1", "VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo", "TOKENIZERS_PARALLELISM": "false",
}  # fmt: skip

#: NVLink multicast can put a host's GPUs out of service for others: off in NCCL, PyTorch and NVSHMEM, and in the parts
#: of vLLM that would ask for it.
WITHOUT_MULTICAST = {
    "NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0", "VLLM_USE_NCCL_SYMM_MEM": "0", "VLLM_ALLREDUCE_USE_FLASHINFER": "0",
}  # fmt: skip

#: The paper's plan for 28 layers, and one sink page.
DELTA = {"algorithm": "delta", "budget": 1024, "plan": "FFS" + "R" * 11 + "S" + "R" * 7 + "S" + "R" * 5}
CONTENDERS: dict[str, dict[str, Any] | None] = {
    "stock": None, "full": {"algorithm": "full"}, "covers": {**DELTA, "budget": 16384}, "delta": DELTA,
    "local": {**DELTA, "tp_selection": "local"},
}  # fmt: skip

#: hidden, intermediate, heads, KV heads, tied embeddings, vocabulary; of Qwen2.
DIMS = {
    "1.5b": (1536, 8960, 12, 2, True, 151936),
    "7b": (3584, 18944, 28, 4, False, 152064),
    "tiny": (256, 512, 4, 2, False, 1024),
}
#: Tokens of short and long answers: a step is what the longer ones take more, so that neither the prompts nor the start
#: are in it.
SHORT, LONG = 64, 448


def switched_off(environment: dict[str, str]) -> dict[str, str]:
    """Without multicast, whatever the environment says."""
    return {**environment, **WITHOUT_MULTICAST}


def advertise(folder: Path) -> None:
    """Makes the plugin found: deltakv lies on PYTHONPATH, and is not installed."""
    info = folder / "deltakv-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: deltakv\nVersion: 0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(
        "[vllm.general_plugins]\ndeltakv = deltakv.integrations.vllm.plugin:register\n", encoding="utf-8"
    )


def save_config(folder: Path, dims: str) -> None:
    hidden, intermediate, heads, kv_heads, tied, vocabulary = DIMS[dims]
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "hidden_size": hidden,
        "intermediate_size": intermediate, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "num_hidden_layers": 28, "max_position_embeddings": 32768, "max_window_layers": 28, "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0, "sliding_window": None, "use_sliding_window": False, "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": vocabulary, "initializer_range": 0.02,
        "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def save_tiny(folder: Path) -> None:
    """28 layers with weights that make attention peaked, so that a wrong page shows."""
    import torch
    import transformers

    save_config(folder, "tiny")
    config = transformers.AutoConfig.from_pretrained(folder)
    config.initializer_range = 0.06
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def start(dims: str, folder: Path, name: str, longest: int, **engine: Any) -> tuple[Any, dict[str, Any]]:
    """An engine, and what it took to start. engine: further arguments for vLLM, which come before those here."""
    began = time.time()
    from vllm import LLM

    settings = CONTENDERS[name]
    engine["attention_config"] = {"backend": "FLASH_ATTN" if settings is None else "CUSTOM"}
    if settings is not None:
        engine["additional_config"] = {"deltakv": settings}
    # The tiny model's cache is small and of a given size: what else the GPU is used for does not matter then.
    memory: dict[str, Any] = {"gpu_memory_utilization": 0.85}
    if dims == "tiny":
        memory = {"gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": 2 << 30}
    memory.update(engine)
    llm = LLM(
        model=str(folder), load_format="auto" if dims == "tiny" else "dummy", skip_tokenizer_init=True, seed=0,
        dtype="bfloat16", max_model_len=longest, max_num_seqs=64, enable_prefix_caching=True, block_size=16,
        max_logprobs=-1, **memory,
    )  # fmt: skip
    return llm, {"contender": name, "dims": dims, "settings": settings, "start_s": round(time.time() - began, 1)}


def generate(llm: Any, prompts: list[list[int]], tokens: int, **sampling: Any) -> tuple[float, list[Any]]:
    """Seconds, and vLLM's outputs."""
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False, **sampling)
    began = time.perf_counter()
    rows = llm.generate([{"prompt_token_ids": one} for one in prompts], parameters, use_tqdm=False)
    return time.perf_counter() - began, rows


def prompts_of(count: int, length: int, seed: int, vocabulary: int = 150000) -> list[list[int]]:
    chooser = random.Random(seed)
    return [[chooser.randrange(3, vocabulary) for _ in range(length)] for _ in range(count)]


@functools.cache
def provenance() -> dict[str, Any]:
    import torch
    import vllm

    from deltakv.bench.provenance import provenance as facts_of

    if gpu := torch.cuda.is_available():
        os.environ.setdefault("DELTAKV_NATIVE", "0")  # nobody needs the CPU ops here: they are not compiled
    facts = facts_of()
    facts["versions"]["vllm"] = vllm.__version__
    return {**facts, "dtype": "bfloat16", "device": torch.cuda.get_device_name() if gpu else "cpu"}
