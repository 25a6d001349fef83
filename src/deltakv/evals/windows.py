"""Places in texts at which a method's next tokens are held against full attention's, again and again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import deltakv
from deltakv.bench.runners import prefill
from deltakv.config import Full, Method
from deltakv.errors import InputError
from deltakv.evals.fidelity import Differences, Reference, differences, reference
from deltakv.evals.picks import new_shares

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Window:
    """A place in a text. cache: the tokens before it, read once with full attention. ids: int64 [1, positions], those
    at it; targets: int64 [positions], the token after each. full: what full attention says there."""

    cache: Any
    ids: Tensor
    targets: Tensor
    full: Reference

    def first(self, count: int) -> Window:
        """Of its positions the first ones."""
        part = Reference(self.full.logits[:count])
        return Window(self.cache, self.ids[:, :count], self.targets[:count], part)


def cut(texts: Sequence[Tensor], names: Sequence[str], context: int, most: int) -> tuple[list[Tensor], list[Tensor]]:
    """Pieces of context + 1 tokens to calibrate on, and others to confirm on: those of a text by turns.

    texts: int64 [tokens]. most: pieces of each kind. Both kinds take from every text before they take from one again.
    Raises `InputError` if there is not a piece of each kind.
    """
    pieces = [list(text.split(context + 1)) for text in texts]
    pieces = [[piece for piece in own if len(piece) == context + 1] for own in pieces]
    kinds: tuple[list[Tensor], list[Tensor]] = [], []
    for kind, found in enumerate(kinds):
        turns = max((len(own[kind::2]) for own in pieces), default=0)
        for turn in range(turns):
            found += [own[kind::2][turn] for own in pieces if turn < len(own[kind::2])]
        del found[most:]
    if not all(kinds):
        tokens = sum(len(text) for text in texts)
        raise InputError(
            f"{', '.join(names)}: {tokens:,} tokens, of which one piece of {context + 1:,} is to calibrate on and "
            "another to confirm on; give a longer text, or a smaller --context"
        )
    return kinds


def open_window(
    model: Any, piece: Tensor, positions: int, page_size: int, advance: Advance = lambda tokens: None
) -> Window:
    """The last `positions` of a piece, int64 [context + 1], that have a token after them."""
    ids = piece[None]
    with deltakv.apply(model, Full(page_size=page_size)) as handle:
        cache = handle.new_cache(max_length=len(piece))
        prefill(model, cache, ids[:, : -1 - positions], advance)
        at = ids[:, -1 - positions : -1]
        full = reference(model, cache, at, handle, advance)
    return Window(cache, at, piece[-positions:], full)


@dataclass(frozen=True)
class Found:
    """What a method makes of some windows. attended: tokens a position, summed over layers; recall: full attention's
    mass inside the pick, mean over layers that reuse, None if none does; new_pages: by layer that picks, the share of
    its pick that its pick one position before did not have, mean over positions."""

    differences: Differences
    attended: float
    recall: float | None
    new_pages: dict[int, float]

    def numbers(self) -> dict[str, Any]:
        """For JSON, with how sure the mean of KL is."""
        found = self.differences.summary()
        return {
            "attended_tokens": self.attended,
            "positions": found.positions,
            "kl_mean": found.kl_mean,
            "kl_interval": interval(self.differences.kl),
            "kl_p99": found.kl_p99,
            "top1": found.top1,
            "perplexity": found.perplexity,
        }


def measure_windows(
    model: Any,
    method: Method,
    windows: Sequence[Window],
    advance: Advance = lambda tokens: None,
    *,
    picks: bool = False,
) -> Found:
    """A method at all positions of the windows, one window behind the other. picks: find recall and new pages, too."""
    parts: list[Differences] = []
    shares: list[float] = []
    new: dict[int, list[Tensor]] = {}
    with deltakv.apply(model, method) as handle:
        for window in windows:
            with handle.positions(picks=picks, recall=picks) as trace:
                parts.append(differences(model, window.cache, window.ids, window.targets, window.full, advance))
            shares += trace.recall.values()
            for layer, rows in trace.picks.items():
                new.setdefault(layer, []).append(new_shares(rows))
        attended = handle.stats.attended_per_row_step
    together = Differences(
        *(torch.cat([getattr(part, name) for part in parts]) for name in ("kl", "agree", "surprise"))
    )
    new_pages = {layer: torch.cat(new[layer]).mean().item() for layer in sorted(new)}
    return Found(together, attended, sum(shares) / len(shares) if shares else None, new_pages)


def interval(
    values: Tensor, statistic: Callable[[Tensor], Tensor] | None = None, block: int = 16
) -> tuple[float, float]:
    """Where the mean of [positions] (or a statistic of [draws, positions, ...]) lies with 95%, by bootstrap over blocks
    of neighbours, which are alike. The draws are the same every time."""
    count = -(-len(values) // block)
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(max(1, len(values) - block + 1), (2000, count), generator=generator)
    at = (starts[:, :, None] + torch.arange(min(block, len(values)))).flatten(1)[:, : len(values)]
    drawn = values[at]
    found = drawn.mean(1) if statistic is None else statistic(drawn)
    low, high = found.double().quantile(torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
    return low, high
