"""One step's picks. They live in the metadata that vLLM makes for a step, and go with it."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from deltakv.integrations.vllm.layout import NamedLayout
from deltakv.integrations.vllm.ranks import across_ranks
from deltakv.integrations.vllm.rows import Rows
from deltakv.methods import Lengths, Picks, Selector, SoftmaxStats, window_of


@dataclass
class Step:
    """The sparse rows of one forward, and what its SELECT layers picked for them.

    layout: of the layers in this process. picks: by the name of the SELECT layer, in logical pages, so that layers
    with another block table (vLLM may spread a model's layers over several) can follow them too.
    """

    layout: NamedLayout
    selector: Selector
    rows: Rows
    picks: dict[str, Picks] = field(default_factory=dict)

    @property
    def page_size(self) -> int:
        return self.layout.settings.method.page_size

    def window(self) -> Picks:
        """What WINDOW layers attend to, from the sparse rows' lengths alone."""
        width = self.rows.block_table.shape[1]
        return window_of(self.layout.settings.method, Lengths(self.rows.seq_lens, self.page_size, width))

    def pick(self, layer: str, logits: Tensor, peaks: Tensor, lse: Tensor) -> None:
        """A SELECT layer's pick, from the softmax of the sparse rows; arguments as in `SoftmaxStats`."""
        across = across_ranks(self.layout.settings.tp_selection)
        self.picks[layer] = self.selector.pick(
            SoftmaxStats(logits, peaks, lse, self.rows.seq_lens, self.page_size, across)
        )
