"""The decode rows of one step, on the device: tensors in, tensors out, so that a CUDA graph holds all of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from deltakv.integrations.vllm.layout import NamedLayout
from deltakv.integrations.vllm.ranks import across_ranks
from deltakv.integrations.vllm.rows import narrowed
from deltakv.methods import Picks, Selector, SoftmaxStats
from deltakv.ops import decode_attention, decode_attention_stats
from deltakv.plan import Role


@dataclass
class DecodeStep:
    """Rows with one token each. No value is looked at: what a row keeps, and that a row keeps all, is data.

    layout: of the layers in this process.
    block_table: int32 [rows, width]; seq_lens: int32 [rows], the current token included; 0 for the padding of a
        captured batch, whose output is zeros. Both are vLLM's own, which it writes in place before each replay.
    picks: by the name of the SELECT layer, in logical pages. tables: the same for the REUSE layers of this block
        table, as physical pages int32 [rows, kept] and tokens int32 [rows].
    """

    layout: NamedLayout
    selector: Selector
    block_table: Tensor
    seq_lens: Tensor
    picks: dict[str, Picks] = field(default_factory=dict)
    tables: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

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
        """One planned layer, after it has stored the current token. What it returns goes to `out`.

        step_of: the step of another layer, by its name; where vLLM has several block tables it may be another one.
        q, out: [rows, n_heads, head_dim]; k_cache, v_cache and the rest as `ops.decode_attention` takes them.
        """
        role, table, lens = self.layout.roles[layer], self.block_table, self.seq_lens
        if role is Role.REUSE:
            source = self.layout.sources[layer]
            if source not in self.tables:
                picks = step_of(source).picks[source]
                self.tables[source] = narrowed(table, lens, picks, self._page_size)
            table, lens = self.tables[source]
        run = (q, k_cache, v_cache, table[:, None], lens[:, None], scale, sinks)
        if role is not Role.SELECT:
            out.copy_(decode_attention(*run))
            return
        attended, logits, peaks, lse = decode_attention_stats(*run)
        out.copy_(attended)
        across = across_ranks(self.layout.settings.tp_selection)
        self.picks[layer] = self.selector.pick(SoftmaxStats(logits, peaks, lse, lens, self._page_size, across))

    @property
    def _page_size(self) -> int:
        return self.layout.settings.method.page_size
