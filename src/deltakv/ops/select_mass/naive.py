"""As many pages as hold a share of the attention (Tactic, arXiv 2502.12216, section 3): the oracle of the op."""

from __future__ import annotations

import torch
from torch import Tensor

from deltakv.ops.select_pages.naive import kept_width


def select_mass(
    masses: Tensor,
    seq_lens: Tensor,
    page_size: int,
    share: float,
    budget_pages: int,
    recent_pages: int,
    sink_pages: int,
    min_context: int,
) -> tuple[Tensor, Tensor]:
    """The sink pages, the recent pages, and the best of the rest until `share` of the row's mass is kept, or
    `budget_pages`.

    masses: fp32 [rows, width], 0 or more; what stands beyond a row's last page is not looked at. A page is taken while
    the pages before it, forced ones first and then by mass (ties: the earlier), hold less than `share` of the sum over
    all. A row of at most `min_context` tokens keeps all. Other arguments and results: see `select_pages`.
    """
    rows, width = masses.shape
    room = kept_width(width, page_size, budget_pages, min_context)
    pages = torch.zeros((rows, room), dtype=torch.int32, device=masses.device)
    n_kept = torch.zeros(rows, dtype=torch.int32, device=masses.device)
    for row in range(rows):
        seq_len = int(seq_lens[row])
        n = -(-seq_len // page_size)
        values = masses[row].tolist()
        forced = sorted({*range(min(sink_pages, n)), *range(max(n - recent_pages, 0), n)})
        order = forced + sorted(set(range(n)) - set(forced), key=lambda page: (-values[page], page))
        total = sum(values[page] for page in order)
        kept, held = [], 0.0
        for rank, page in enumerate(order):
            if seq_len <= min_context or page in forced or (rank < budget_pages and held < share * total):
                kept.append(page)
            held += values[page]
        pages[row, : len(kept)] = torch.tensor(sorted(kept), dtype=torch.int32)
        n_kept[row] = len(kept)
    return pages, n_kept
