"""`deltakv.apply(model, method)`: hooks a method into a stock transformers model, and out again."""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Iterator
from functools import partial
from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from deltakv.config import Method
from deltakv.errors import ConfigError, UnsupportedUseError
from deltakv.integrations.hf.attention import PagedAttention
from deltakv.integrations.hf.cache import PagedCache
from deltakv.integrations.hf.checks import check_cache
from deltakv.integrations.hf.evicting_cache import EvictingCache
from deltakv.integrations.hf.forwards import Forwards
from deltakv.integrations.hf.fused import fuse_projections
from deltakv.integrations.hf.generation import Generation
from deltakv.integrations.hf.offload import Offload, host_config
from deltakv.integrations.hf.positions import Positions, Trace
from deltakv.integrations.hf.selecting import Selecting
from deltakv.integrations.hf.stats import Statistics
from deltakv.integrations.hf.stops import defer_stops
from deltakv.integrations.hf.support import model_shape, unwrap
from deltakv.methods import selector
from deltakv.offload.config import Host
from deltakv.ops import native
from deltakv.plan import LayerPlan, model_fingerprint

_PREFIX = "deltakv_"
_numbers = itertools.count(1)
_applied: weakref.WeakKeyDictionary[PreTrainedModel, weakref.ref[Handle]] = weakref.WeakKeyDictionary()


def apply(model: nn.Module, method: Method, *, kv_device: str | Host = "device", fuse: bool | None = None) -> Handle:
    """Runs `model` with `method` until the handle is removed. Works as a context manager or without `with`.

    model: a stock transformers causal LM, also inside PEFT or `torch.compile`. method: `Delta(...)`, `Full()`, ...
    kv_device: where K and V are: on the model's "device"; or in "host" memory, with `Full()`, for a cache that does not
        fit the device (KVPR, arXiv 2411.17089); `Host(...)` says how.
    fuse: whether decode steps take projections of one input (QKV; gate and up) as one product. The weights stay as
        many, under their names. None: on a GPU, where it is faster.
    Raises `UnsupportedModelError`, `UnsupportedUseError`, `PlanError` or `ConfigError` before anything is changed.
    """
    if not isinstance(method, Method):
        raise ConfigError(f"{method!r} is not a method; give deltakv.Delta(...), deltakv.Full() or another config")
    return Handle(unwrap(model), method, host_config(kv_device), fuse)


class Handle:
    """A method at work in a model.

    model, method: what was applied. offload: how K and V are kept in host memory, or None.
    plan: the resolved plan; planned_layers: the model's layers that it covers.
    stats: counts since `apply`.
    """

    def __init__(
        self, model: PreTrainedModel, method: Method, host: Host | None = None, fuse: bool | None = None
    ) -> None:
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
        self.plan.check_made_for(model_fingerprint(model.config.get_text_config()))
        self.stats = Statistics(self.plan, own_pick=method.attends_to_own_pick)
        self._name = f"{_PREFIX}{next(_numbers)}"
        self._windows = shape.windows
        self._check_cache = partial(
            check_cache, windows=shape.windows, page_size=method.page_size, in_host=host is not None
        )
        self._selector = selector(method)
        self.offload = None if host is None else Offload(model, method, host, self.planned_layers)
        recompute = {} if self.offload is None else self.offload.recompute
        roles = dict(zip(self.planned_layers, self.plan.roles, strict=True))
        selecting = Selecting(method, self._selector)
        self._attention = PagedAttention(roles, selecting, model.config._attn_implementation, recompute)
        self._forwards = Forwards(
            self._name,
            model,
            method,
            getattr(self._selector, "numbers", 0),
            self._attention,
            self.stats,
            self.new_cache,
            self._check_cache,
            in_host=host is not None,
        )
        self._undo = contextlib.ExitStack()
        if any(parameter.device.type == "cpu" for parameter in model.parameters()):
            native.library()  # compiled now, or the first token would wait for it
        with contextlib.ExitStack() as undo:
            self._install(undo)
            if model.device.type == "cuda" if fuse is None else fuse:
                self._forwards.fused = fuse_projections(model, undo)
                # First of all, so that joint weights go as layers get their own: whoever keeps the handle for its
                # statistics would keep half of the model twice.
                undo.callback(self._forwards.fused.clear)
            self._undo = undo.pop_all()

    @property
    def cache(self) -> PagedCache | None:
        """The cache of the last forward, as long as someone holds it."""
        return self._forwards.cache

    def new_cache(self, max_length: int | None = None, *, croppable: bool = False, static: bool = False) -> PagedCache:
        """A cache to pass as `past_key_values`.

        max_length: the tokens a row is expected to reach. croppable: layers with a sliding window keep what `crop`
        would need to go back to, up to the next `crop` (other layers can always be cropped). static: forwards of one
        token may be captured as CUDA graphs, as long as no row outgrows `max_length`; models whose layers have a
        window cannot, and get an ordinary cache. Under a method that evicts, memory follows what it keeps, and the host
        lays forwards out; on any other cache such a method leaves pages unread that it would drop.
        """
        static = static and not any(self._windows)
        if self.method.evicts:
            cache: PagedCache = EvictingCache(self._windows, self.method.page_size)
        elif self.offload is not None:
            cache = self.offload.new_cache(self._windows, self.method.page_size, max_length)
        else:
            cache = PagedCache(self._windows, self.method.page_size, max_length, static=static)
        if croppable:
            cache.activate_past_recording()
        return cache

    def announce(self, cache: PagedCache, finished: Tensor | None = None) -> bool:
        """Makes ready for one forward of one token a row, without a mask; the forward then looks at nothing on the
        host, and can be compiled in one piece (`torch.compile(fullgraph=True)`) and captured.

        finished: bool [batch], rows that only keep their place in the batch: what they are fed is not stored, and
        attends to nothing. None for no row.
        `generate` and plain calls do this themselves. Returns False, and does nothing, where the host has to lay the
        forward out after all: an empty cache, layers with a window, evaluation mode, recorded picks.
        """
        return self._forwards.announce(cache, finished)

    @contextlib.contextmanager
    def positions(self, *, picks: bool = False, recall: bool = False) -> Iterator[Trace]:
        """Evaluation mode: a forward of several tokens onto a non-empty cache lets each position pick for itself.

        Gives the logits that decoding these tokens one at a time would give. picks, recall: what to record in the
        trace. Positions count in `stats` as decode steps do.
        """
        if self.offload is not None:
            raise UnsupportedUseError("evaluation mode reads K and V on the device; apply without kv_device='host'")
        if self._attention.positions is not None:
            raise UnsupportedUseError("evaluation mode is already on; leave its `with` block first")
        self._attention.positions = Positions(self.method, self._selector, picks=picks, recall=recall)
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
        model, name = self.model, self._name
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

        self._forwards.install(undo)
        defer_stops(undo)
        if self.offload is not None:
            self.offload.install(model, undo)
        for method, override in Generation(model, self.new_cache, self._check_cache, self.announce).overrides().items():
            self._override(undo, method, override)
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
