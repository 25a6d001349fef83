"""`deltakv.apply(model, method)`: hooks a method into a stock transformers model, and out again."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import weakref
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from deltakv.config import Method
from deltakv.errors import ConfigError, UnsupportedUseError
from deltakv.integrations.hf.attention import PagedAttention
from deltakv.integrations.hf.cache import PagedCache
from deltakv.integrations.hf.positions import Positions, Trace
from deltakv.integrations.hf.stats import Statistics
from deltakv.integrations.hf.support import model_shape, unwrap
from deltakv.methods import selector
from deltakv.ops import native
from deltakv.plan import LayerPlan

_PREFIX = "deltakv_"
_numbers = itertools.count(1)
_applied: weakref.WeakKeyDictionary[PreTrainedModel, weakref.ref[Handle]] = weakref.WeakKeyDictionary()

#: Entry points of transformers' continuous batching, which replaces any custom attention in silence.
_CONTINUOUS_BATCHING = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")


def apply(model: nn.Module, method: Method) -> Handle:
    """Runs `model` with `method` until the handle is removed. Works as a context manager or without `with`.

    model: a stock transformers causal LM, also inside PEFT or `torch.compile`. method: `Delta(...)`, `Full()`, ...
    Raises `UnsupportedModelError`, `PlanError` or `ConfigError` before anything is changed.
    """
    if not isinstance(method, Method):
        raise ConfigError(f"{method!r} is not a method; give deltakv.Delta(...), deltakv.Full() or another config")
    return Handle(unwrap(model), method)


class Handle:
    """A method at work in a model.

    model, method: what was applied. plan: the resolved plan; planned_layers: the model's layers that it covers.
    stats: counts since `apply`.
    """

    def __init__(self, model: PreTrainedModel, method: Method) -> None:
        shape = model_shape(model.config)
        other = _applied[model]() if model in _applied else None
        if other is not None:
            raise UnsupportedUseError(
                f"{other.method} is already applied to this model; remove it first (handle.remove(), "
                "or leave the `with` block)"
            )
        if model.config._attn_implementation.startswith(_PREFIX):
            raise UnsupportedUseError(
                "this model shares its config object with another one that a method is applied to, and the config says "
                "which attention runs; remove that one first, or build this model from a "
                "copy of the config"
            )
        self.model = model
        self.method: Method = method
        self.planned_layers = shape.planned_layers
        self.plan: LayerPlan = method.layer_plan(len(self.planned_layers))
        self.stats = Statistics()
        self._windows = shape.windows
        self._selector = selector(method)
        self._cache: weakref.ref[PagedCache] | None = None
        roles = dict(zip(self.planned_layers, self.plan.roles, strict=True))
        self._attention = PagedAttention(roles, self._selector, model.config._attn_implementation)
        self._undo = contextlib.ExitStack()
        if any(parameter.device.type == "cpu" for parameter in model.parameters()):
            native.library()  # compiled now, or the first token would wait for it
        with contextlib.ExitStack() as undo:
            self._install(undo)
            self._undo = undo.pop_all()

    @property
    def cache(self) -> PagedCache | None:
        """The cache of the last forward, as long as someone holds it."""
        return None if self._cache is None else self._cache()

    def new_cache(self, max_length: int | None = None, *, croppable: bool = False) -> PagedCache:
        """A cache to pass as `past_key_values`.

        max_length: the tokens a row is expected to reach. croppable: layers with a sliding window keep what `crop`
        would need to go back to, up to the next `crop` (other layers can always be cropped).
        """
        cache = PagedCache(self._windows, self.method.page_size, max_length)
        if croppable:
            cache.activate_past_recording()
        return cache

    def __deepcopy__(self, memo: dict[int, Any]) -> Handle:
        raise UnsupportedUseError(
            f"{self.method} is applied to this model, and a copy would not work; remove it before copying the model"
        )

    @contextlib.contextmanager
    def positions(self, *, picks: bool = False, recall: bool = False) -> Iterator[Trace]:
        """Evaluation mode: a forward of several tokens onto a non-empty cache lets each position pick for itself.

        Gives the logits that decoding these tokens one at a time would give. picks, recall: what to record in the
        trace. Positions count in `stats` as decode steps do.
        """
        if self._attention.positions is not None:
            raise UnsupportedUseError("evaluation mode is already on; leave its `with` block first")
        self._attention.positions = Positions(self._selector, self.method.page_size, picks=picks, recall=recall)
        try:
            yield self._attention.positions.trace
        finally:
            self._attention.positions = None

    def remove(self) -> None:
        """Gives the model back as it was. Safe to call twice."""
        self._undo.close()
        if self._attention.cache is not None:  # its forward was interrupted, by something that passes hooks by
            self._attention.cache.abort()
            self._attention.cache = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _install(self, undo: contextlib.ExitStack) -> None:
        """Everything that `remove` undoes, in reverse."""
        model, name = self.model, f"{_PREFIX}{next(_numbers)}"
        _applied[model] = weakref.ref(self)
        undo.callback(_applied.pop, model, None)

        # A name of its own for each handle: nothing is looked up at run time, and compiled code that has seen
        # another handle, or none, is not mistaken for this one's.
        ALL_ATTENTION_FUNCTIONS.register(name, self._attention)
        undo.callback(type(ALL_ATTENTION_FUNCTIONS)._global_mapping.pop, name, None)
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, self._attention.mask)
        undo.callback(type(ALL_MASK_ATTENTION_FUNCTIONS)._global_mapping.pop, name, None)
        undo.callback(setattr, model.config, "_attn_implementation", model.config._attn_implementation)
        model.config._attn_implementation = name

        inner = model.get_decoder()  # where the layers are; OPT calls it past its base model
        self._parameters = list(inspect.signature(type(inner).forward).parameters)[1:]
        undo.callback(inner.register_forward_pre_hook(self._before, with_kwargs=True).remove)
        undo.callback(inner.register_forward_hook(self._after, always_call=True).remove)

        self._override(undo, "_prepare_cache_for_generation", self._prepare_cache)
        for entry in _CONTINUOUS_BATCHING:
            if hasattr(model, entry):
                self._override(undo, entry, self._refuse_continuous_batching)
        # `generate` keeps a compiled call on the model; one made under another attention must not outlive it.
        for attribute in ("_compiled_call", "_last_compile_config"):
            before = model.__dict__.pop(attribute, None)
            undo.callback(self._restore, attribute, before)

    def _override(self, undo: contextlib.ExitStack, name: str, value: Any) -> None:
        undo.callback(self._restore, name, self.model.__dict__.get(name))
        self.model.__dict__[name] = value

    def _restore(self, name: str, before: Any) -> None:
        self.model.__dict__.pop(name, None)
        if before is not None:
            self.model.__dict__[name] = before

    def _refuse_continuous_batching(self, *_: Any, **__: Any) -> Any:
        raise UnsupportedUseError(
            "transformers' continuous batching replaces custom attention, so no method would be at work; "
            "use generate() with a padded batch, or vLLM for serving"
        )

    def _prepare_cache(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch: int,
        max_length: int,
    ) -> None:
        """In the place of `generate`'s own: makes a `PagedCache`, or checks the one that was passed."""
        if generation_config.cache_implementation is not None:
            raise UnsupportedUseError(
                f"cache_implementation={generation_config.cache_implementation!r} cannot be used with deltakv, "
                "which brings its own paged cache; leave it out"
            )
        if generation_config.output_attentions:
            raise UnsupportedUseError("output_attentions=True is not supported: sparse layers have no full weights")
        if generation_config.use_cache is False or model_kwargs.get("use_cache") is False:
            raise UnsupportedUseError("use_cache=False leaves no cache to read sparsely; leave it out")
        cache = model_kwargs.get("past_key_values")
        if cache is None:
            croppable = bool(generation_config.is_assistant)
            model_kwargs["past_key_values"] = self.new_cache(max_length, croppable=croppable)
        else:
            self._check_cache(cache)
            cache._is_user_defined = True
            cache.kv.reserve(max_length)

    @torch.compiler.disable
    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the model's layers: finds or makes the cache and lays out the step."""
        kwargs = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        config = self.model.config
        cache = kwargs.get("past_key_values")
        use_cache = kwargs.get("use_cache")
        if kwargs.get("output_attentions", config.output_attentions):
            raise UnsupportedUseError("output_attentions=True is not supported: sparse layers have no full weights")
        if cache is None and (config.use_cache if use_cache is None else use_cache):
            cache = kwargs["past_key_values"] = self.new_cache()
        if cache is None:  # use_cache=False: one forward with the model's own attention
            self._attention.cache = None
            return (), kwargs
        self._check_cache(cache)
        inputs = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        if inputs is None:
            raise UnsupportedUseError("the model was called without input_ids or inputs_embeds")
        cache.begin(inputs.shape[0], inputs.shape[1], kwargs.get("attention_mask"))
        self._attention.cache = cache
        self._cache = weakref.ref(cache)
        return (), kwargs

    @torch.compiler.disable
    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After the model's layers: the step counts. A forward that failed (no output) leaves the cache as it was."""
        cache, self._attention.cache = self._attention.cache, None
        positions = self._attention.positions
        if cache is None:
            return
        if output is None:
            cache.abort()
            if positions is not None:
                positions.abort()
            return
        step = cache.state.step
        assert step is not None
        if step.decode and positions is None:
            self.stats.add(self.plan, step.seq_lens[:, 0], [pick.seq_lens[:, 0] for pick in step.picks])
            if self.stats.record_picks:
                number = self.stats.steps - 1
                self.stats.picks += [(number, p.layer, p.pages.pages, p.pages.n_kept) for p in step.picks]
        elif positions is not None and step.onto_past:
            spans = zip(step.append.past, step.append.lengths, strict=True)
            seq_lens = torch.cat([torch.arange(past + 1, end + 1, dtype=torch.int32) for past, end in spans])
            self.stats.add(self.plan, seq_lens, positions.commit())
        cache.commit()
        # Counting pages takes a while for many long rows, so only when a row has begun a new one.
        if any(
            new % cache.page_size == 1 or new - old > 1
            for old, new in zip(step.append.past, step.append.lengths, strict=True)
        ):
            self.stats.kv_bytes = cache.kv_bytes

    def _check_cache(self, cache: Any) -> None:
        if not isinstance(cache, PagedCache):
            raise UnsupportedUseError(
                f"past_key_values is a {type(cache).__name__}, but deltakv needs its own paged cache; "
                "leave it out, pass handle.new_cache(), or a cache that an earlier call returned"
            )
        if cache.page_size != self.method.page_size or cache.windows != self._windows:
            raise UnsupportedUseError(
                f"the cache has pages of {cache.page_size} tokens and {len(cache.windows)} layers, but this method "
                f"needs pages of {self.method.page_size} and {len(self._windows)} layers; use handle.new_cache()"
            )
