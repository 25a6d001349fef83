"""Which pages a row keeps (design, section 1): the oracle of the op."""

from __future__ import annotations

import torch
from torch import Tensor


def kept_width(width: int, page_size: int, budget_pages: int, min_context: int) -> int:
    """The most pages that a row can keep, of `width`."""
    return min(width, max(budget_pages, -(-min_context // page_size)))


def select_pages(
    scores: Tensor,
    seq_lens: Tensor,
    page_size: int,
    budget_pages: int,
    recent_pages: int,
    sink_pages: int,
    min_context: int,
) -> tuple[Tensor, Tensor]:
    """The sink pages, the recent pages and the best of the rest, `budget_pages` in all.

    scores: fp32 [rows, width], a value a logical page; what stands beyond a row's last page is not looked at.
    seq_lens: int32 [rows], tokens, the current one included; a row has ceil(seq_len / page_size) pages.
    A row of at most `min_context` tokens, or of at most `budget_pages` pages, keeps all. Recent pages are counted
    back from the last page, which counts as one even when partly filled. Ties go to the earlier page.
    Returns pages, int32 [rows, kept_width]: the kept logical pages in ascending order, 0 beyond; and n_kept, int32
    [rows].
    """
    rows, width = scores.shape
    room = kept_width(width, page_size, budget_pages, min_context)
    pages = torch.zeros((rows, room), dtype=torch.int32, device=scores.device)
    n_kept = torch.zeros(rows, dtype=torch.int32, device=scores.device)
    for row in range(rows):
        seq_len = int(seq_lens[row])
        n = -(-seq_len // page_size)
        if seq_len <= min_context or n <= budget_pages:
            kept = list(range(n))
        else:
            forced = set(range(sink_pages)) | set(range(n - recent_pages, n))
            rest = [page for page in range(n) if page not in forced]
            values = scores[row].tolist()
            rest.sort(key=lambda page: -values[page])  # sort() is stable: ties stay in ascending order
            kept = sorted(forced | set(rest[: budget_pages - len(forced)]))
        pages[row, : len(kept)] = torch.tensor(kept, dtype=torch.int32)
        n_kept[row] = len(kept)
    return pages, n_kept
