"""What a method has done so far: attended tokens, sparse rows, picks."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from deltakv.plan import LayerPlan, Role


@dataclass
class Statistics:
    """Counts over all decode steps (and evaluated positions) since `apply` or `reset`, planned layers only.

    steps: decode forwards. rows: row-steps, one a row and step. kv_bytes: what K and V of the last forward's cache
    take, all layers. picks: while `record_picks` is on, for each
    step and SELECT layer (step, layer, pages int32 [rows, width], n_kept int32 [rows]).
    """

    steps: int = 0
    rows: int = 0
    kv_bytes: int = 0
    record_picks: bool = False
    picks: list[tuple[int, int, Tensor, Tensor]] = field(default_factory=list)
    _read_in_full: int = 0
    _full: int = 0
    _reused: list[Tensor] = field(default_factory=list)
    _sparse: list[Tensor] = field(default_factory=list)

    @property
    def sparse_rows(self) -> int:
        """Row-steps in which a REUSE layer attended to less than the whole row."""
        return self._settle(self._sparse)

    @property
    def attended_tokens(self) -> int:
        """Tokens attended to, summed over rows, steps and layers."""
        return self._read_in_full + self._settle(self._reused)

    @property
    def full_tokens(self) -> int:
        """What full attention would have attended to."""
        return self._full

    @property
    def attended_per_row_step(self) -> float:
        return self.attended_tokens / self.rows if self.rows else 0.0

    @property
    def full_per_row_step(self) -> float:
        return self.full_tokens / self.rows if self.rows else 0.0

    def reset(self) -> None:
        """Back to zero; `record_picks` stays."""
        self.__init__(record_picks=self.record_picks)  # type: ignore[misc]

    def add(self, plan: LayerPlan, seq_lens: Tensor, kept_tokens: list[Tensor]) -> None:
        """Counts one step: tokens of each row, and for each SELECT layer what its REUSE layers attend to.

        seq_lens: int32 [rows]; kept_tokens: one int32 [rows] a SELECT layer, in order. Sums stay on the device.
        """
        total = int(seq_lens.sum())
        self.steps += 1
        self.rows += len(seq_lens)
        self._read_in_full += total * plan.reads_in_full
        self._full += total * len(plan)
        selects = plan.layers(Role.SELECT)
        ends = [*selects, len(plan)][1:]
        sparse = torch.zeros((), dtype=torch.bool)
        for first, end, kept in zip(selects, ends, kept_tokens, strict=True):
            reusing = sum(plan.roles[layer] is Role.REUSE for layer in range(first, end))
            self._reused.append(kept.sum(dtype=torch.long) * reusing)
            if reusing:
                sparse = sparse.to(kept.device) | (kept < seq_lens.to(kept.device))
        self._sparse.append(sparse.sum())

    @staticmethod
    def _settle(parts: list[Tensor]) -> int:
        """The sum of the parts, kept as one."""
        total = sum(int(part) for part in parts)
        parts[:] = [torch.tensor(total)]
        return total
