"""The one-token rows of a step, on the device: tensors in, tensors out, so that a CUDA graph holds all of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from deltakv.integrations.vllm.aside import Later, aside
from deltakv.integrations.vllm.layout import NamedLayout
from deltakv.integrations.vllm.ranks import across_ranks
from deltakv.methods import Lengths, Picks, Selector, SoftmaxStats, window_of
from deltakv.ops import decode_attention_into, decode_attention_stats, narrow_table
from deltakv.plan import Role


@dataclass(frozen=True)
class Narrow:
    """What REUSE and WINDOW layers run on. table: int32 [rows, width]; lens: int32 [rows]; expected: tokens that all
    rows but exceptions have at most."""

    table: Tensor
    lens: Tensor
    expected: int


@dataclass
class DecodeStep:
    """Rows with one token each. No value is looked at: what a row keeps, and that a row keeps all, is data.

    layout: of the layers in this process.
    block_table: int32 [rows, width]; seq_lens: int32 [rows], the current token included; 0 for the padding of a
        captured batch, whose output is zeros. prompts: bool [rows], the token is the last of a prompt, and so attends
        to all before it. All three are written in place before each replay.
    picks: by the name of the SELECT layer, in logical pages; made while what lies between it and the next layer's
        attention runs. narrow: the same for the REUSE layers of this table; and under None for its WINDOW layers, made
        by the first of them.
    """

    layout: NamedLayout
    selector: Selector
    block_table: Tensor
    seq_lens: Tensor
    prompts: Tensor
    picks: dict[str, Later[Picks]] = field(default_factory=dict)
    narrow: dict[str | None, Narrow] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return self.seq_lens.shape[0]

    def attend(
        self,
        layer: str,
        step_of: Callable[[str], DecodeStep],
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        scale: float,
        sinks: Tensor | None,
        out: Tensor,
    ) -> None:
        """One planned layer, after it has stored the current token. The result is written to `out`.

        step_of: the step of another layer, by its name; where vLLM has several block tables it may be another one.
        q, out: [rows, n_heads, head_dim]; k_cache, v_cache and the rest as `ops.decode_attention` takes them.
        """
        role, table, lens, expected = self.layout.roles[layer], self.block_table, self.seq_lens, 0
        if role is Role.SELECT:
            attended, logits, peaks, lse = decode_attention_stats(
                q, k_cache, v_cache, table[:, None], lens[:, None], scale, sinks
            )
            out.copy_(attended)
            if layer in self.layout.sources.values():
                across = across_ranks(self.layout.settings.tp_selection)
                stats = SoftmaxStats(logits, peaks, lse, lens, self._page_size, across)
                self.picks[layer] = aside(self.selector.pick, stats, q)
            return
        if role in (Role.REUSE, Role.WINDOW):
            source = self.layout.sources.get(layer)
            if source not in self.narrow:
                picks = self._window() if source is None else step_of(source).picks[source].result()
                self.narrow[source] = self._narrowed(picks)
            narrow = self.narrow[source]
            table, lens, expected = narrow.table, narrow.lens, narrow.expected
        decode_attention_into(q, k_cache, v_cache, table[:, None], lens[:, None], scale, sinks, out, expected)

    def _window(self) -> Picks:
        """What WINDOW layers attend to, from lengths alone: on every block table, and on every rank, the same."""
        width = self.block_table.shape[1]
        return window_of(self.layout.settings.method, Lengths(self.seq_lens, self._page_size, width))

    def _narrowed(self, picks: Picks) -> Narrow:
        """A pick on this block table. It has room for whole rows: a graph replays for prompts' last tokens, too."""
        table, lens = narrow_table(
            self.block_table, self.seq_lens, picks.pages, picks.n_kept, self.prompts, self._page_size
        )
        return Narrow(table, lens, picks.pages.shape[1] * self._page_size)

    @property
    def _page_size(self) -> int:
        return self.layout.settings.method.page_size
