"""Decode steps of several batches, column by column: a layer's weights cross the bus once and serve them all.

The throughput-oriented schedule of KVPR (arXiv 2411.17089), for a model whose weights are in host memory beside K, V
and X. A layer's weights cross as a whole, W_K and W_V first, before the first batch's pieces; two layers have room.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from deltakv.errors import UnsupportedUseError
from deltakv.integrations.hf.apply import Handle
from deltakv.integrations.hf.host_cache import HostCache
from deltakv.offload.lanes import Lanes, lanes_of
from deltakv.offload.loads import Fetch, Load, Loads
from deltakv.offload.memory import HostMemory
from deltakv.offload.weights import HostWeights

#: Model types whose way from tokens to the first layer, and from the last one to logits, is repeated here.
COVERED = ("llama", "mistral", "opt", "phi3", "qwen2", "qwen3")


class Column:
    """A model whose layers' weights are in host memory until `remove`, for steps of the batches in `caches`. A context
    that removes it at its end. Until then the model answers by `step` alone: its own forward is refused.

    handle: of the model, applied with `fuse=False` and K and V in host memory. caches: filled by ordinary forwards
    before; of rows without padding. lanes: for tests that delay copies.
    Raises `UnsupportedUseError`, `OffloadError`.
    """

    def __init__(self, handle: Handle, caches: Sequence[HostCache], lanes: Lanes | None = None) -> None:
        model = handle.model
        if model.config.model_type not in COVERED:
            raise UnsupportedUseError(
                f"steps column by column are covered for {', '.join(COVERED)}, not for {model.config.model_type!r}"
            )
        if handle.offload is None or handle._forwards.fused:
            raise UnsupportedUseError("weights in host memory need apply(..., kv_device='host', fuse=False)")
        self.handle, self.model, self.caches = handle, model, list(caches)
        self._lanes = lanes_of(model.device) if lanes is None else lanes
        self._memory = HostMemory(pinned=handle.offload.host.pinned and model.device.type == "cuda")
        layers = [_in_order(layer) for layer in model.get_decoder().layers]
        self._weights = HostWeights(layers, self._lanes, self._memory)
        self._refusal = model.get_decoder().register_forward_pre_hook(_refuse)
        self._loads: Loads | None = None

    def remove(self) -> None:
        """Gives the model its weights back. Safe to call twice."""
        if self._refusal is not None:
            self._refusal.remove()
            self._refusal = None
            self._weights.restore()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    @property
    def weight_bytes(self) -> int:
        """Bytes of a layer's weights, which cross once a step."""
        return self._weights.nbytes

    def share_chunks(self) -> None:
        """Lets all caches cross through one set of chunks, as the first one's `Host` says; again after a `change`."""
        host = self.caches[0].host_rows.host
        self._loads = Loads(self._lanes, self.model.device, host.chunks, host.chunk_bytes)
        for cache in self.caches:
            cache.host_rows.join(self._loads)

    def step(self, tokens: Sequence[Tensor]) -> list[Tensor]:
        """tokens: int64 [batch, 1] for each cache. Returns the logits, [batch, 1, vocabulary] each."""
        if self._loads is None:
            self.share_chunks()
        assert self._loads is not None
        attention, weights = self.handle._attention, self._weights
        where = [torch.full_like(ids, cache.get_seq_length()) for ids, cache in zip(tokens, self.caches, strict=True)]
        try:
            for ids, cache in zip(tokens, self.caches, strict=True):
                cache.begin(len(ids), 1, None)
            weights.begin()
            self._loads.start(self._jobs())
            hidden = [self._embedded(ids, at) for ids, at in zip(tokens, where, strict=True)]
            options = [self._options(x, at) for x, at in zip(hidden, where, strict=True)]
            for number, layer in enumerate(self.model.get_decoder().layers):
                weights.wait(number)
                for index, cache in enumerate(self.caches):
                    attention.cache = cache
                    out = layer(hidden[index], past_key_values=cache, use_cache=True, **options[index])
                    hidden[index] = out[0] if isinstance(out, tuple) else out
                weights.end()
                self._loads.proceed()
            result = [self._logits(x) for x in hidden]
        except BaseException:
            for cache in self.caches:
                cache.abort()
            raise
        finally:
            attention.cache = None
        for cache in self.caches:
            cache.commit()
        return result

    def _jobs(self) -> Iterator[Load | Fetch]:
        for layer in range(len(self.model.get_decoder().layers)):
            yield self._weights.fetch(layer)
            for cache in self.caches:
                yield from cache.host_rows.jobs(layer)

    def _embedded(self, ids: Tensor, positions: Tensor) -> Tensor:
        decoder = self.model.get_decoder()
        x: Tensor = decoder.embed_tokens(ids)
        if self.model.config.model_type == "opt":
            if decoder.project_in is not None:
                x = decoder.project_in(x)
            x = x + decoder.embed_positions(None, position_ids=positions)
        return x

    def _options(self, x: Tensor, positions: Tensor) -> dict[str, Any]:
        rotary = getattr(self.model.get_decoder(), "rotary_emb", None)
        found: dict[str, Any] = {"attention_mask": None, "position_ids": positions}
        return found if rotary is None else {**found, "position_embeddings": rotary(x, positions)}

    def _logits(self, x: Tensor) -> Tensor:
        decoder = self.model.get_decoder()
        norm = decoder.final_layer_norm if self.model.config.model_type == "opt" else decoder.norm
        x = x if norm is None else norm(x)
        if getattr(decoder, "project_out", None) is not None:
            x = decoder.project_out(x)
        logits: Tensor = self.model.lm_head(x)
        return logits


def _refuse(*_: object) -> None:
    raise UnsupportedUseError(
        "the layers have their weights in host memory, for steps column by column; call the Column's step(), or its "
        "remove() first"
    )


def _in_order(layer: Any) -> list[Any]:
    """A layer's weights as they cross: those that make K and V first."""
    named = list(layer.named_parameters())
    first = [weight for name, weight in named if any(part in name for part in ("k_proj", "v_proj", "qkv_proj"))]
    return first + [weight for name, weight in named if not any(weight is one for one in first)]
