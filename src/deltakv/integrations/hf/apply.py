"""`deltakv.apply(model, method)`: hooks a method into a stock transformers model, and out again."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import weakref
from collections.abc import Iterator
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
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
from deltakv.integrations.hf.fused import Fused, fuse_projections
from deltakv.integrations.hf.generation import Generation
from deltakv.integrations.hf.offload import Offload, host_config
from deltakv.integrations.hf.positions import Positions, Trace
from deltakv.integrations.hf.selecting import Selecting
from deltakv.integrations.hf.stats import Statistics
from deltakv.integrations.hf.step import Chunk, Step
from deltakv.integrations.hf.stops import defer_stops
from deltakv.integrations.hf.support import model_shape, unwrap
from deltakv.methods import selector
from deltakv.offload.config import Host
from deltakv.ops import native
from deltakv.plan import LayerPlan, Role

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
        self.stats = Statistics(self.plan, own_pick=method.attends_to_own_pick)
        self._name = f"{_PREFIX}{next(_numbers)}"
        self._windows = shape.windows
        self._check_cache = partial(
            check_cache, windows=shape.windows, page_size=method.page_size, in_host=host is not None
        )
        self._selector = selector(method)
        self._cache: weakref.ref[PagedCache] | None = None
        self.offload = None if host is None else Offload(model, method, host, self.planned_layers)
        recompute = {} if self.offload is None else self.offload.recompute
        roles = dict(zip(self.planned_layers, self.plan.roles, strict=True))
        self._select = [layer for layer, role in roles.items() if role is Role.SELECT]
        selecting = Selecting(method, self._selector)
        self._attention = PagedAttention(roles, selecting, model.config._attn_implementation, recompute)
        self._fused: list[Fused] = []
        self._undo = contextlib.ExitStack()
        if any(parameter.device.type == "cpu" for parameter in model.parameters()):
            native.library()  # compiled now, or the first token would wait for it
        with contextlib.ExitStack() as undo:
            self._install(undo)
            if model.device.type == "cuda" if fuse is None else fuse:
                self._fused = fuse_projections(model, undo)
            self._undo = undo.pop_all()

    @property
    def cache(self) -> PagedCache | None:
        """The cache of the last forward, as long as someone holds it."""
        return None if self._cache is None else self._cache()

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
        self._check_cache(cache)
        if not cache.can_decode or self._is_watched:
            return False
        books = cache.state.decoding
        if books.started and not cache.state.known.ready(self._name, len(books.lengths), 0):
            cache.settle()  # another method has decoded until now
        started, room = books.started, books.capacity if books.started else 0
        cache.announce(self.model.device, finished)
        if not started or books.capacity != room:
            self._prepare(cache, books.block_table.shape[2])
        books.owner = self._name
        books.meter = self.stats.meter(len(books.lengths), books.lengths.device, static=books.static)
        self.stats.kv_reader = books.kv_reader()
        self._cache = weakref.ref(cache)
        return True

    def _prepare(self, cache: PagedCache, width: int) -> None:
        """Brings what the method knows of the cache's rows up to date, for block tables of `width` pages."""
        state, heads = cache.state, self.model.config.get_text_config().num_attention_heads
        static = state.decoding.static
        state.known.prepare(
            self._name,
            self.method,
            self._select,
            heads,
            state.pool,
            cache.rows_of,
            width,
            static=static,
            numbers=getattr(self._selector, "numbers", 0),
        )

    @property
    def _is_watched(self) -> bool:
        """Whether somebody wants to see what only forwards show that the host lays out."""
        return self._attention.positions is not None or self.stats.record_picks

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

        inner = model.get_decoder()  # where the layers are; OPT calls it past its base model
        self._parameters = list(inspect.signature(type(inner).forward).parameters)[1:]
        undo.callback(inner.register_forward_pre_hook(self._before, with_kwargs=True).remove)
        undo.callback(inner.register_forward_hook(self._after, always_call=True).remove)

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

    @torch.compiler.disable
    def _lay_out(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Before the model's layers, where the host has a say: finds or makes the cache and lays out the forward."""
        config = self.model.config
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        use_cache = kwargs.get("use_cache")
        if kwargs.get("output_attentions", config.output_attentions):
            raise UnsupportedUseError("output_attentions=True is not supported: sparse layers have no full weights")
        if cache is None and (config.use_cache if use_cache is None else use_cache):
            cache = kwargs["past_key_values"] = self.new_cache()
        if cache is None:  # use_cache=False: one forward with the model's own attention
            self._attention.cache = None
            return kwargs
        self._check_cache(cache)
        for product in self._fused:
            product.check()
        inputs = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        if inputs is None:
            raise UnsupportedUseError("the model was called without input_ids or inputs_embeds")
        batch, width = inputs.shape[:2]
        self._cache = weakref.ref(cache)
        if width == 1 and mask is None and cache.is_unpadded(batch) and self.announce(cache):
            return kwargs
        if isinstance(cache, EvictingCache):
            cache.gives_up = self.method.evicts and self._attention.positions is None
            cache.check_layers(self._select if cache.gives_up else [])
        step = cache.begin(batch, width, mask)
        if self.offload is None and step.onto_past:
            self._prepare(cache, step.block_table.shape[2])
        self._attention.cache = cache
        return kwargs

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the model's layers. Can be traced if the forward was announced and is what was announced."""
        kwargs = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        cache, ids = kwargs.get("past_key_values"), kwargs.get("input_ids")
        if (
            not isinstance(cache, PagedCache)
            or not cache.announced
            or cache.state.decoding.owner != self._name
            or kwargs.get("attention_mask") is not None
            or ids is None
            or ids.shape != cache.state.decoding.lengths.shape
            or self._is_watched
        ):
            kwargs = self._lay_out(kwargs)
            cache = kwargs.get("past_key_values")
        if cache is not None and cache.announced:
            cache.state.step = cache.state.decoding.step()
            self._attention.cache = cache
            if "position_ids" in self._parameters and kwargs.get("position_ids") is None:
                kwargs["position_ids"] = cache.state.decoding.lengths.long()
            # Nobody looks at it; but without one OPT makes one, longer in every step.
            lens = cache.state.step.seq_lens
            kwargs["attention_mask"] = torch.ones_like(lens, dtype=torch.bool)
        return (), kwargs

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After the model's layers: the step counts. A forward that failed (no output) leaves the cache as it was."""
        cache = self._attention.cache
        if cache is None:
            return
        step = cache.state.step
        if output is None or isinstance(step, Chunk):
            self._close(output is None)
        elif step is not None:
            self._attention.cache = None
            cache.state.decoding.meter.add(step.seq_lens[:, 0], *_counts(step))
            cache.commit()

    @torch.compiler.disable
    def _close(self, failed: bool) -> None:
        """After a forward that failed, or that the host has laid out."""
        cache, self._attention.cache = self._attention.cache, None
        positions = self._attention.positions
        assert cache is not None
        if failed:
            cache.abort()
            if positions is not None:
                positions.abort()
            return
        step = cache.state.step
        assert isinstance(step, Chunk)
        if step.decode and positions is None:
            meter = self.stats.meter(len(step.real), step.seq_lens.device, static=False)
            meter.add(step.seq_lens[:, 0], *_counts(step))
            if self.stats.record_picks:
                number = self.stats.steps - 1
                self.stats.picks += [(number, p.layer, p.pages.pages, p.pages.n_kept) for p in step.picks]
        elif positions is not None and step.onto_past:
            spans = zip(step.append.past, step.append.lengths, strict=True)
            seq_lens = torch.cat([torch.arange(past + 1, end + 1, dtype=torch.int32) for past, end in spans])
            self.stats.add_positions(seq_lens, *positions.commit())
        cache.commit()
        # Counting pages takes a while for many long rows, so only when a row has begun a new one, or may have lost one.
        if isinstance(cache, EvictingCache) or any(
            new % cache.page_size == 1 or new - old > 1
            for old, new in zip(step.append.past, step.append.lengths, strict=True)
        ):
            kv_bytes = cache.kv_bytes
            self.stats.kv_reader = lambda: kv_bytes


def _counts(step: Step) -> tuple[list[Tensor], list[Tensor]]:
    """What a `Meter` adds up of a decode step: the tokens of each pick, and what was read to pick it."""
    looked_at = [pick.looked_at for pick in step.picks if pick.looked_at is not None]
    return [pick.seq_lens[:, 0] for pick in step.picks], looked_at
