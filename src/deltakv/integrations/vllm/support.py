"""Whether a server's configuration and deltakv go together: what is refused by name, before weights are loaded.

`docs/vllm.md` has the same list as a table.
"""

from __future__ import annotations

from typing import Any

from vllm import envs
from vllm.config import VllmConfig
from vllm.distributed.utils import get_pp_indices
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from deltakv.config import PAGE_SIZES, Full
from deltakv.errors import PlanError, UnsupportedModelError, UnsupportedUseError
from deltakv.integrations.vllm.layout import Layout
from deltakv.integrations.vllm.ranks import NO_NCCL
from deltakv.integrations.vllm.settings import EXAMPLE, KEY, Settings, settings_of
from deltakv.plan import LayerPlan, Role, model_fingerprint

#: KV cache types that pages can be scored on.
CACHE_DTYPES = ("auto", "float16", "bfloat16")


def check(config: VllmConfig, backend: type[AttentionBackend]) -> Layout | None:
    """What the layers do under this configuration; None if deltakv is not asked for.

    backend: the class that serves CUSTOM on this platform. Raises `DeltaKVError` subclasses.
    """
    settings = settings_of(config.additional_config, lambda: model_fingerprint(config.model_config.hf_text_config))
    custom = config.attention_config.backend is AttentionBackendEnum.CUSTOM
    if settings is None:
        if custom:
            raise UnsupportedUseError(
                f'--attention-backend CUSTOM without "{KEY}" in --additional-config; give both ({EXAMPLE}), or neither'
            )
        return None
    refuse_beside(config)
    _check_model(config.model_config)
    _check_engine(config)
    _check_ranks(config, settings)
    _check_pages(config, settings, backend)
    return _layout(config, settings)


def refuse_beside(config: VllmConfig) -> None:
    """For a config that has settings. Raises `UnsupportedUseError` where CUSTOM is not what serves it."""
    attention = config.attention_config
    if attention.backend is not AttentionBackendEnum.CUSTOM or attention.backend_per_kind:
        raise UnsupportedUseError(
            f'"{KEY}" in --additional-config, but the attention backend is not CUSTOM for all layers; give both '
            f"({EXAMPLE}), or neither"
        )


def _check_model(model: Any) -> None:
    name, text = model.hf_config.model_type, model.hf_text_config
    refused = f"model type {name!r} is not supported"
    if model.runner_type != "generate":
        raise UnsupportedUseError(
            f"--runner {model.runner_type} has no decode steps to make sparse; leave deltakv out for it"
        )
    if model.use_mla:
        raise UnsupportedModelError(
            f"{refused}: multi-head latent attention (MLA) keeps a compressed cache that page scores do not cover; "
            "leave deltakv out, or set VLLM_MLA_DISABLE=1 if the model can run without MLA"
        )
    if model.is_encoder_decoder:
        raise UnsupportedModelError(f"{refused}: it is an encoder-decoder, and only decoder-only models are covered")
    if getattr(text, "attn_logit_softcapping", None):
        raise UnsupportedModelError(
            f"{refused}: logit soft-capping (attn_logit_softcapping={text.attn_logit_softcapping}) changes the softmax "
            "that pages are scored by"
        )
    others = sorted(set(_kinds(model)) - {"full_attention", "sliding_attention"})
    if others:
        raise UnsupportedModelError(
            f"{refused}: its layers include {', '.join(others)}; covered are full_attention and sliding_attention"
        )


def _check_engine(config: VllmConfig) -> None:
    parallel = config.parallel_config
    if config.cache_config.cache_dtype not in CACHE_DTYPES:
        raise UnsupportedUseError(
            f"--kv-cache-dtype {config.cache_config.cache_dtype} is not supported: pages are scored on K as the model "
            f"makes it; allowed are {', '.join(CACHE_DTYPES)}"
        )
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        raise UnsupportedUseError(
            "context parallelism spreads a row's pages over ranks, and a pick needs all of them in one place; use "
            "--tensor-parallel-size, with --decode-context-parallel-size 1 and --prefill-context-parallel-size 1"
        )
    if config.speculative_config is not None:
        raise UnsupportedUseError(
            "speculative decoding is not supported: its verification reads several tokens a row, which would run in "
            "full attention; leave out --speculative-config"
        )
    if parallel.enable_dbo or getattr(parallel, "ubatch_size", 0) > 1:
        raise UnsupportedUseError(
            "--enable-dbo and --ubatch-size split a batch, each part with picks of its own; leave them out"
        )


def _check_ranks(config: VllmConfig, settings: Settings) -> None:
    """On a GPU NCCL itself is asked for what vLLM's collectives cannot do."""
    several = config.parallel_config.tensor_parallel_size > 1 and settings.tp_selection == "global"
    if several and envs.VLLM_DISABLE_PYNCCL and current_platform.is_cuda():
        raise UnsupportedUseError(NO_NCCL)


def _check_pages(config: VllmConfig, settings: Settings, backend: type[AttentionBackend]) -> None:
    page_size, block_size = settings.method.page_size, config.cache_config.block_size
    if not backend.supports_block_size(page_size):
        allowed = ", ".join(str(size) for size in PAGE_SIZES if backend.supports_block_size(size))
        raise UnsupportedUseError(
            f"page_size={page_size} is not a block size of this vLLM's attention here; allowed are {allowed}"
        )
    if block_size != page_size:
        raise UnsupportedUseError(
            f"the KV cache has blocks of {block_size} tokens, but page_size={page_size}, and a page is a block; "
            f"give --block-size {page_size} (`deltakv serve` does), or the page size {block_size}"
        )


def _layout(config: VllmConfig, settings: Settings) -> Layout:
    planned = planned_layers(config.model_config)
    plan = settings.method.layer_plan(len(planned))
    plan.check_made_for(model_fingerprint(config.model_config.hf_text_config))
    if settings.method.algorithm != Full.algorithm and plan.reads_in_full == len(plan):
        raise PlanError(
            f"plan={plan} has no layer that attends to a pick ('R') or to a window ('W'), so nothing would be saved; "
            f"give another plan for the {len(planned)} layers without a sliding window, or leave deltakv out"
        )
    layout = Layout.of(settings, plan, planned)
    stages, depth = config.parallel_config.pipeline_parallel_size, config.model_config.hf_text_config.num_hidden_layers
    lost: dict[int, str] = {}  # the first layer of each stage that has no pick, and where that is
    for stage in range(stages):
        first, end = get_pp_indices(depth, stage, stages)
        without = [layer for layer, source in layout.sources.items() if first <= layer < end and source < first]
        if without:
            lost[without[0]] = f"pipeline stage {stage} (layers {first} to {end - 1})"
    if lost:
        raise _no_picks(plan, planned, lost)
    return layout


def _no_picks(plan: LayerPlan, planned: tuple[int, ...], lost: dict[int, str]) -> PlanError:
    pairs = zip(planned, plan.roles, strict=True)
    letters = "".join((Role.SELECT if index in lost else role).value for index, role in pairs)
    layer, where = next(iter(lost.items()))
    others = f" (so have {len(lost) - 1} more stages)" if len(lost) > 1 else ""
    layers = " and ".join(str(layer) for layer in lost)
    return PlanError(
        f"{where} has the REUSE layer {layer} before any SELECT layer of its own{others}, and picks do not travel "
        f"between stages (plan: {plan}); make layer {layers} 'S', as in plan={letters}"
    )


def planned_layers(model: Any) -> tuple[int, ...]:
    """The layers that join the plan, by their index in the model: those without a sliding window.

    model: vLLM's `ModelConfig`. Raises `UnsupportedModelError` if there is none.
    """
    full = tuple(index for index, kind in enumerate(_kinds(model)) if kind == "full_attention")
    if not full:
        raise UnsupportedModelError(
            f"model type {model.hf_config.model_type!r} with this config is not supported: every layer has a sliding "
            f"window ({model.get_sliding_window()} tokens), so no layer is left for a plan; "
            "--disable-sliding-window, with a --max-model-len of at most the window, makes it a model without"
        )
    return full


def _kinds(model: Any) -> list[str]:
    """The kind of each layer, as transformers' configs name them."""
    text = model.hf_text_config
    kinds = getattr(text, "layer_types", None)
    if kinds and not model.disable_sliding_window:
        return list(kinds)
    windowed = model.get_sliding_window() is not None and not model.disable_sliding_window
    return ["sliding_attention" if windowed else "full_attention"] * text.num_hidden_layers
