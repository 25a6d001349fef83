"""What `generate` meets in a model that a method is applied to: its cache, the inputs of a step, and when rows end."""

from __future__ import annotations

import copy
import functools
import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig, StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationMode

from deltakv.errors import UnsupportedUseError
from deltakv.integrations.hf.cache import PagedCache

#: Entry points of transformers' continuous batching, which replaces any custom attention in silence.
_CONTINUOUS_BATCHING = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")

#: Tokens that a static cache's room is a multiple of, at least; longer ones are rounded up by a sixteenth at most.
_LEAST_ROOM = 256

#: How a decode step is compiled on a GPU: mode "reduce-overhead" in `torch.compile`'s words, and what is independent in
#: one kernel (RoPE of the queries with RoPE and storing of the keys, one kernel a layer fewer).
COMPILE_OPTIONS = {"triton.cudagraphs": True, "combo_kernels": True}


def bucket(tokens: int) -> int:
    """The room that a static cache for `tokens` tokens a row gets: few different ones, because each is compiled for."""
    step = max(_LEAST_ROOM, (1 << (tokens - 1).bit_length()) // 32)
    return -(-tokens // step) * step


class _Criteria(StoppingCriteriaList):
    """The stopping criteria of one `generate` whose rows grow by one token at each step, and in no other way. They
    remember which rows have ended, without a look at the answer, and live as long as that `generate`.

    finished: bool [rows], those whose last token has been fed, so that padding is what comes now; None for no row.
    """

    def __init__(self, criteria: StoppingCriteriaList) -> None:
        super().__init__(criteria)
        # Without an end token `generate` goes on with rows that have ended until all have, and returns what they say.
        self._pads = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        self.finished: Tensor | None = None
        self._ended: Tensor | None = None  # their last token has been made; the next forward is fed it

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        done = super().__call__(input_ids, scores, **kwargs)
        if self._pads:
            self.finished, self._ended = self._ended, done if self._ended is None else self._ended | done
        return done


class Generation:
    """Stands in for a few of the model's methods that `generate` calls.

    new_cache, announce: the handle's. check: raises `UnsupportedUseError` for a cache that does not fit it.
    """

    def __init__(
        self,
        model: Any,
        new_cache: Callable[..., PagedCache],
        check: Callable[[Any], None],
        announce: Callable[[PagedCache, Tensor | None], bool],
    ) -> None:
        self._model = model
        self._new_cache, self._check, self._announce = new_cache, check, announce
        self._thread = threading.local()
        self._running: weakref.WeakKeyDictionary[PagedCache, weakref.ref[_Criteria]] = weakref.WeakKeyDictionary()
        self._make_inputs = model.prepare_inputs_for_generation
        self._make_criteria = model._get_stopping_criteria
        self._compile = model.get_compiled_call

    def overrides(self) -> dict[str, Callable[..., Any]]:
        """What to put on the model, by name."""
        refused = {name: _refuse_continuous_batching for name in _CONTINUOUS_BATCHING if hasattr(self._model, name)}
        return {
            "_prepare_cache_for_generation": self._prepare_cache,
            # `generate` reads from its signature whether it takes embeddings.
            "prepare_inputs_for_generation": functools.wraps(self._make_inputs)(partial(self._prepare_inputs)),
            "create_masks_for_generate": _no_mask,
            "_get_stopping_criteria": self._stopping_criteria,
            "get_compiled_call": self._compiled_call,
            **refused,
        }

    def _prepare_cache(self, config: Any, model_kwargs: dict[str, Any], mode: Any, batch: int, max_length: int) -> None:
        """In the place of `generate`'s own: makes a `PagedCache`, or checks the one that was passed."""
        if config.cache_implementation is not None:
            raise UnsupportedUseError(
                f"cache_implementation={config.cache_implementation!r} cannot be used with deltakv, "
                "which brings its own paged cache; leave it out"
            )
        if config.output_attentions:
            raise UnsupportedUseError("output_attentions=True is not supported: sparse layers have no full weights")
        if config.use_cache is False or model_kwargs.get("use_cache") is False:
            raise UnsupportedUseError("use_cache=False leaves no cache to read sparsely; leave it out")
        cache: Any = model_kwargs.get("past_key_values")
        steady = mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE) and not config.is_assistant
        if cache is None:
            static = steady and self._can_compile(config)
            room = bucket(max_length) if static else max_length
            cache = self._new_cache(room, croppable=bool(config.is_assistant), static=static)
            model_kwargs["past_key_values"] = cache
        else:
            self._check(cache)
            cache._is_user_defined = True
            cache.kv.reserve(max_length)
        self._thread.steady = weakref.ref(cache) if steady else None

    def _can_compile(self, config: Any) -> bool:
        """Whether `generate` would compile the forward, given a cache that allows it."""
        devices = {parameter.device for parameter in self._model.parameters()}
        everywhere = config.compile_config is not None and config.compile_config._compile_all_devices
        return len(devices) == 1 and (next(iter(devices)).type == "cuda" or bool(everywhere))

    def _prepare_inputs(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The inputs of a forward. A step of one token a row needs no mask: what it says has been on the device since
        the prompt."""
        inputs = self._make_inputs(input_ids, *args, **kwargs)
        cache: Any = inputs.get("past_key_values")
        ids = inputs.get("input_ids")
        known = self._running.get(cache) if isinstance(cache, PagedCache) else None
        criteria = None if known is None else known()
        decodes = ids is not None and ids.shape[1] == 1 and not kwargs.get("is_first_iteration", False)
        if criteria is not None and decodes:
            if self._announce(cache, criteria.finished):
                inputs.pop("attention_mask", None)
            elif criteria.finished is not None and not any(cache.windows):
                inputs["attention_mask"] = cache.mask(criteria.finished)
        return inputs

    def _stopping_criteria(self, *args: Any, **kwargs: Any) -> Any:
        criteria = self._make_criteria(*args, **kwargs)
        steady, self._thread.steady = getattr(self._thread, "steady", None), None
        cache = None if steady is None else steady()
        if cache is None:
            return criteria
        criteria = _Criteria(criteria)
        self._running[cache] = weakref.ref(criteria)
        return criteria

    def _compiled_call(self, config: CompileConfig | None) -> Callable[..., Any]:
        """In the place of `get_compiled_call`: a forward that the host lays out (a chunk of the prompt, recorded picks)
        runs as it is."""
        compiled = self._compile(_in_fewer_kernels(config, self._model.device))

        def call(*args: Any, **kwargs: Any) -> Any:
            cache = kwargs.get("past_key_values")
            announced = isinstance(cache, PagedCache) and cache.announced
            return compiled(*args, **kwargs) if announced else self._model(*args, **kwargs)

        return call


def _in_fewer_kernels(config: CompileConfig | None, device: torch.device) -> CompileConfig | None:
    """`generate`'s way to compile with `COMPILE_OPTIONS`, where the user has not chosen another."""
    usual = CompileConfig()
    chosen = usual if config is None else config
    if device.type != "cuda" or (chosen.backend, chosen.mode, chosen.options) != (usual.backend, usual.mode, None):
        return config
    chosen = copy.copy(chosen)
    chosen.mode, chosen.options = None, dict(COMPILE_OPTIONS)  # torch.compile takes one or the other
    return chosen


def _no_mask(*_: Any, attention_mask: Tensor | None, **__: Any) -> Tensor | None:
    """In the place of the mask that is made for a cache that compiles: the cache needs only to know the padding."""
    return attention_mask


def _refuse_continuous_batching(*_: Any, **__: Any) -> Any:
    raise UnsupportedUseError(
        "transformers' continuous batching replaces custom attention, so no method would be at work; "
        "use generate() with a padded batch, or vLLM for serving"
    )
