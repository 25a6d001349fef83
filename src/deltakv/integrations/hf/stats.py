"""What a method has done so far: attended tokens, sparse rows, picks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deltakv.integrations.hf.decoding import mark_static
from deltakv.plan import LayerPlan, Role


class Meter:
    """Counts of one batch, added up on its device; a forward that counts can be one CUDA graph.

    plan: what is counted for. own_pick: its SELECT layers attend to what they pick. counts: int64 [4 + picks, rows]:
    steps; those in which the row took part; those in which it was sparse; tokens of the row; what WINDOW layers attend
    to, if there are any; and the pick of each SELECT layer. With own_pick a row more: what SELECT layers read beside
    their pick, in tokens' worth.
    """

    def __init__(
        self, plan: LayerPlan, rows: int, device: torch.device, *, static: bool = False, own_pick: bool = False
    ) -> None:
        selects, windows = plan.layers(Role.SELECT), plan.layers(Role.WINDOW)
        ends = [*selects, len(plan)][1:]
        self._plan = plan
        self._own_pick = own_pick and bool(selects)
        self._attending = [len(windows)] if windows else []
        self._attending += [
            self._own_pick + sum(plan.roles[layer] is Role.REUSE for layer in range(first, end))
            for first, end in zip(selects, ends, strict=True)
        ]
        with torch.inference_mode(False):  # made in inference mode, it could not be written outside of it
            counted = 4 + len(self._attending) + self._own_pick
            self.counts = torch.zeros((counted, rows), dtype=torch.long, device=device)
        if static:
            mark_static(self.counts)

    def add(self, seq_lens: Tensor, kept_tokens: Sequence[Tensor], looked_at: Sequence[Tensor] = ()) -> None:
        """One step. seq_lens: int32 [rows], 0 for a row that took no part; kept_tokens: int32 [rows] each, the tokens
        that WINDOW layers attend to, if there are any, and those of the pick of each SELECT layer, in order; looked_at:
        with own_pick, what each SELECT layer reads beside its pick. No value is looked at, so it can be traced."""
        kept = [tokens.to(seq_lens.device) for tokens in kept_tokens]
        sparse = torch.zeros_like(seq_lens, dtype=torch.bool)
        for tokens, attending in zip(kept, self._attending, strict=True):
            if attending:
                sparse = sparse | (tokens < seq_lens)
        if self._own_pick:
            kept.append(torch.stack([tokens.to(seq_lens.device) for tokens in looked_at]).sum(0))
        self.counts.add_(torch.stack([torch.ones_like(seq_lens), seq_lens > 0, sparse, seq_lens, *kept]))

    def read(self) -> dict[str, int]:
        """What the statistics say of it. Waits for the device."""
        steps = int(self.counts[0].max()) if self.counts.numel() else 0
        _, rows, sparse, tokens, *kept = self.counts.sum(1).tolist()
        looked_at = kept.pop() if self._own_pick else 0
        picked = sum(count * attending for count, attending in zip(kept, self._attending, strict=True))
        in_full = len(self._plan.layers(Role.FULL)) if self._own_pick else self._plan.reads_in_full
        return {
            "steps": steps,
            "rows": rows,
            "sparse_rows": sparse,
            "attended_tokens": tokens * in_full + picked + looked_at,
            "full_tokens": tokens * len(self._plan),
        }


@dataclass
class Statistics:
    """Counts over all decode steps (and evaluated positions) since `apply` or `reset`, planned layers only.

    own_pick: SELECT layers attend to what they pick.
    picks: while `record_picks` is on, for each step and SELECT layer (step, layer, pages int32 [rows, width], n_kept
    int32 [rows]); what WINDOW layers attend to follows from lengths, and is not recorded. The counts are on the model's
    device until they are asked for.
    """

    plan: LayerPlan
    record_picks: bool = False
    own_pick: bool = False
    picks: list[tuple[int, int, Tensor, Tensor]] = field(default_factory=list)
    kv_reader: Callable[[], int] = field(default=lambda: 0, repr=False)
    _positions: dict[str, int] = field(default_factory=dict, repr=False)
    _meters: dict[tuple[int, torch.device, bool], Meter] = field(default_factory=dict, repr=False)

    @property
    def steps(self) -> int:
        """Decode forwards."""
        return self._total("steps")

    @property
    def rows(self) -> int:
        """Row-steps: one for each step and row that had not finished."""
        return self._total("rows")

    @property
    def sparse_rows(self) -> int:
        """Row-steps in which a layer attended to less than the whole row."""
        return self._total("sparse_rows")

    @property
    def attended_tokens(self) -> int:
        """Tokens attended to, summed over rows, steps and layers. What is read to pick, without attending, counts by
        its bytes: K of a token is half a token's worth, bounds of a page are one."""
        return self._total("attended_tokens")

    @property
    def full_tokens(self) -> int:
        """What full attention would have attended to."""
        return self._total("full_tokens")

    @property
    def attended_per_row_step(self) -> float:
        return self.attended_tokens / self.rows if self.rows else 0.0

    @property
    def full_per_row_step(self) -> float:
        return self.full_tokens / self.rows if self.rows else 0.0

    @property
    def kv_bytes(self) -> int:
        """What K and V of the last forward's cache take, in bytes, all layers."""
        return self.kv_reader()

    def reset(self) -> None:
        """Back to zero; `record_picks` stays."""
        self.picks.clear()
        self._positions.clear()
        for meter in self._meters.values():
            meter.counts.zero_()

    def meter(self, rows: int, device: torch.device, *, static: bool) -> Meter:
        """The meter of batches of that size, kept, because a captured graph goes on adding to it.

        static: it may be one that a graph adds to.
        """
        if (rows, device, static) not in self._meters:
            made = Meter(self.plan, rows, device, static=static, own_pick=self.own_pick)
            self._meters[rows, device, static] = made
        return self._meters[rows, device, static]

    def add_positions(self, seq_lens: Tensor, kept_tokens: Sequence[Tensor], looked_at: Sequence[Tensor] = ()) -> None:
        """One forward of evaluated positions, each a row."""
        meter = Meter(self.plan, len(seq_lens), seq_lens.device, own_pick=self.own_pick)
        meter.add(seq_lens, kept_tokens, looked_at)
        for name, count in meter.read().items():
            self._positions[name] = self._positions.get(name, 0) + count

    def _total(self, name: str) -> int:
        # Meters are read and left as they are: another thread may be adding to them.
        return self._positions.get(name, 0) + sum(meter.read()[name] for meter in list(self._meters.values()))
