"""Around each forward of a model that a method is applied to: what comes before its layers, and what after them."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltakv.config import Method
from deltakv.errors import UnsupportedUseError
from deltakv.integrations.hf.attention import PagedAttention
from deltakv.integrations.hf.cache import PagedCache
from deltakv.integrations.hf.evicting_cache import EvictingCache
from deltakv.integrations.hf.fused import Fused
from deltakv.integrations.hf.stats import Statistics
from deltakv.integrations.hf.step import Chunk, Step
from deltakv.plan import Role


class Forwards:
    """Hooks before and after the layers of one model.

    name: the handle's. numbers: as in `methods.base.Evictor`, 0 for others. in_host: K and V are in host memory.
    fused: products that take the place of several, to be checked. cache: the last forward's, while someone holds it.
    """

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        method: Method,
        numbers: int,
        attention: PagedAttention,
        stats: Statistics,
        new_cache: Callable[[], PagedCache],
        check_cache: Callable[[Any], None],
        *,
        in_host: bool,
    ) -> None:
        self._name, self._model, self._method, self._numbers = name, model, method, numbers
        self._attention, self._stats = attention, stats
        self._new_cache, self._check_cache, self._in_host = new_cache, check_cache, in_host
        self._select = [layer for layer, role in attention.roles.items() if role is Role.SELECT]
        self._sharing = [layer for layer, role in attention.roles.items() if role in (Role.REUSE, Role.WINDOW)]
        self._cache: weakref.ref[PagedCache] | None = None
        self.fused: list[Fused] = []

    @property
    def cache(self) -> PagedCache | None:
        return None if self._cache is None else self._cache()

    def install(self, undo: ExitStack) -> None:
        """undo: takes the hooks out again."""
        inner = self._model.get_decoder()  # where the layers are; OPT calls it past its base model
        self._parameters = list(inspect.signature(type(inner).forward).parameters)[1:]
        undo.callback(inner.register_forward_pre_hook(self._before, with_kwargs=True).remove)
        undo.callback(inner.register_forward_hook(self._after, always_call=True).remove)

    def announce(self, cache: PagedCache, finished: Tensor | None) -> bool:
        """See `Handle.announce`."""
        self._check_cache(cache)
        if not cache.can_decode or self._is_watched:
            return False
        books = cache.state.decoding
        if books.started and not cache.state.known.ready(self._name, len(books.lengths), 0):
            cache.settle()  # another method has decoded until now
        started, room = books.started, books.capacity if books.started else 0
        cache.announce(self._model.device, finished)
        if not started or books.capacity != room:
            self._prepare(cache, books.block_table.shape[2])
        books.owner = self._name
        books.meter = self._stats.meter(len(books.lengths), books.lengths.device, static=books.static)
        self._stats.kv_reader = books.kv_reader()
        self._cache = weakref.ref(cache)
        return True

    def _prepare(self, cache: PagedCache, width: int) -> None:
        """Brings what the method knows of the cache's rows up to date, for block tables of `width` pages."""
        state, heads = cache.state, self._model.config.get_text_config().num_attention_heads
        static = state.decoding.static
        state.known.prepare(
            self._name,
            self._method,
            self._select,
            heads,
            state.pool,
            cache.rows_of,
            width,
            static=static,
            numbers=self._numbers,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Forwards:
        raise UnsupportedUseError(
            f"{self._method} is applied to this model, and a copy would not work; remove it before copying the model"
        )

    @property
    def _is_watched(self) -> bool:
        """Whether somebody wants to see what only forwards show that the host lays out."""
        return self._attention.positions is not None or self._stats.record_picks

    @torch.compiler.disable
    def _lay_out(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Before the model's layers, where the host has a say: finds or makes the cache and lays out the forward."""
        config = self._model.config
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        use_cache = kwargs.get("use_cache")
        if kwargs.get("output_attentions", config.output_attentions):
            raise UnsupportedUseError("output_attentions=True is not supported: sparse layers have no full weights")
        if cache is None and (config.use_cache if use_cache is None else use_cache):
            cache = kwargs["past_key_values"] = self._new_cache()
        if cache is None:  # use_cache=False: one forward with the model's own attention
            self._attention.cache = None
            return kwargs
        self._check_cache(cache)
        for product in self.fused:
            product.check()
        inputs = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        if inputs is None:
            raise UnsupportedUseError("the model was called without input_ids or inputs_embeds")
        batch, width = inputs.shape[:2]
        self._cache = weakref.ref(cache)
        if width == 1 and mask is None and cache.is_unpadded(batch) and self.announce(cache, None):
            return kwargs
        if isinstance(cache, EvictingCache):
            cache.gives_up = self._method.evicts and self._attention.positions is None
            cache.check_layers(self._select if cache.gives_up else [])
            if self._sharing and width == 1 and cache.state.seen and self._attention.positions is None:
                raise UnsupportedUseError(
                    f"this cache is of a method that evicts, whose layers have pages of their own, and layer "
                    f"{self._sharing[0]} would attend to pages that another layer names; use handle.new_cache()"
                )
        step = cache.begin(batch, width, mask)
        if not self._in_host and step.onto_past:
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
            meter = self._stats.meter(len(step.real), step.seq_lens.device, static=False)
            meter.add(step.seq_lens[:, 0], *_counts(step))
            if self._stats.record_picks:
                number = self._stats.steps - 1
                self._stats.picks += [(number, p.layer, p.pages.pages, p.pages.n_kept) for p in step.picks]
        elif positions is not None and step.onto_past:
            spans = zip(step.append.past, step.append.lengths, strict=True)
            seq_lens = torch.cat([torch.arange(past + 1, end + 1, dtype=torch.int32) for past, end in spans])
            self._stats.add_positions(seq_lens, *positions.commit())
        cache.commit()
        # Counting pages takes a while for many long rows, so only when a row has begun a new one, or may have lost one.
        if isinstance(cache, EvictingCache) or any(
            new % cache.page_size == 1 or new - old > 1
            for old, new in zip(step.append.past, step.append.lengths, strict=True)
        ):
            kv_bytes = cache.kv_bytes
            self._stats.kv_reader = lambda: kv_bytes


def _counts(step: Step) -> tuple[list[Tensor], list[Tensor]]:
    """What a `Meter` adds up of a decode step: the tokens of each pick, and what was read to pick it."""
    looked_at = [pick.looked_at for pick in step.picks if pick.looked_at is not None]
    window = [] if step.window is None else [step.window]
    return [pick.seq_lens[:, 0] for pick in (*window, *step.picks)], looked_at
