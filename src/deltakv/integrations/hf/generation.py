"""What `generate` meets in a model that a method is applied to: its cache, the inputs of a step, and when rows end."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from transformers import StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationMode

from deltakv.errors import UnsupportedUseError
from deltakv.integrations.hf.cache import PagedCache

#: Entry points of transformers' continuous batching, which replaces any custom attention in silence.
_CONTINUOUS_BATCHING = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")

#: Tokens that a static cache's room is a multiple of, at least; longer ones are rounded up by an eighth at most.
_LEAST_ROOM = 256


def bucket(tokens: int) -> int:
    """The room that a static cache for `tokens` tokens a row gets: few different ones, because each is compiled for."""
    step = max(_LEAST_ROOM, (1 << (tokens - 1).bit_length()) // 8)
    return -(-tokens // step) * step


class _Watched(StoppingCriteriaList):
    """Stopping criteria that tell the cache which rows have ended, without a look at the answer."""

    def __init__(self, criteria: StoppingCriteriaList, cache: PagedCache) -> None:
        super().__init__(criteria)
        self._cache = cache

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        done = super().__call__(input_ids, scores, **kwargs)
        self._cache.end(done)
        return done


class Generation:
    """Stands in for a few of the model's methods that `generate` calls.

    check: raises `UnsupportedUseError` for a cache that does not fit. announce: `Handle.announce`.
    """

    def __init__(
        self,
        model: Any,
        new_cache: Callable[..., PagedCache],
        check: Callable[[Any], None],
        announce: Callable[[PagedCache], bool],
    ) -> None:
        self._model = model
        self._new_cache, self._check, self._announce = new_cache, check, announce
        self._thread = threading.local()
        self._make_inputs = model.prepare_inputs_for_generation
        self._make_criteria = model._get_stopping_criteria

    def overrides(self) -> dict[str, Callable[..., Any]]:
        """What to put on the model, by name."""
        refused = {name: _refuse_continuous_batching for name in _CONTINUOUS_BATCHING if hasattr(self._model, name)}
        return {
            "_prepare_cache_for_generation": self._prepare_cache,
            # `generate` reads from its signature whether it takes embeddings.
            "prepare_inputs_for_generation": functools.wraps(self._make_inputs)(partial(self._prepare_inputs)),
            "create_masks_for_generate": _no_mask,
            "_get_stopping_criteria": self._stopping_criteria,
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
        self._thread.cache = weakref.ref(cache) if steady else None

    def _can_compile(self, config: Any) -> bool:
        """Whether `generate` would compile the forward, given a cache that allows it."""
        devices = {parameter.device for parameter in self._model.parameters()}
        everywhere = config.compile_config is not None and config.compile_config._compile_all_devices
        return len(devices) == 1 and (next(iter(devices)).type == "cuda" or bool(everywhere))

    def _prepare_inputs(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The inputs of a forward. A step of one token a row needs no mask: what it says has been on the device since
        the prompt."""
        inputs = self._make_inputs(input_ids, *args, **kwargs)
        steady, first = self._steady_cache(), kwargs.get("is_first_iteration", False)
        if steady is not None and inputs.get("past_key_values") is steady and not first and self._announce(steady):
            inputs.pop("attention_mask", None)
        return inputs

    def _stopping_criteria(self, *args: Any, **kwargs: Any) -> Any:
        criteria = self._make_criteria(*args, **kwargs)
        cache = self._steady_cache()
        # Without an end token `generate` goes on with rows that have ended until all have, and returns what they say.
        pads = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        return _Watched(criteria, cache) if cache is not None and pads else criteria

    def _steady_cache(self) -> PagedCache | None:
        """The cache of this thread's `generate`, if its rows grow by one token at each step, and in no other way."""
        known = getattr(self._thread, "cache", None)
        return None if known is None else known()


def _no_mask(*_: Any, attention_mask: Tensor | None, **__: Any) -> Tensor | None:
    """In the place of the mask that is made for a cache that compiles: the cache needs only to know the padding."""
    return attention_mask


def _refuse_continuous_batching(*_: Any, **__: Any) -> Any:
    raise UnsupportedUseError(
        "transformers' continuous batching replaces custom attention, so no method would be at work; "
        "use generate() with a padded batch, or vLLM for serving"
    )
