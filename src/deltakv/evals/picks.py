"""What a method picks: pages at each SELECT layer over decode steps, and how much attention they hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

import deltakv
from deltakv.bench.runners import prefill
from deltakv.config import Full, Method
from deltakv.errors import ConfigError
from deltakv.evals.fidelity import CHUNK
from deltakv.plan import Role


@dataclass(frozen=True)
class PickRecord:
    """Picks over the last `steps` positions of a text, each position as if decoded.

    picks: by model layer, the pages kept at each step, ascending.
    recall: by model layer, the mean over heads and steps of full attention's mass inside the pick.
    sink_pages, recent_pages: how many are always kept. page_texts: what each page says.
    """

    method: str
    plan: str
    planned_layers: list[int]
    page_size: int
    context: int
    steps: int
    sink_pages: int
    recent_pages: int
    picks: dict[int, list[list[int]]]
    recall: dict[int, float]
    page_texts: list[str]

    def pages_at(self, step: int) -> int:
        """Pages that exist at a step."""
        return -(-(self.context - self.steps + step + 1) // self.page_size)

    def kind(self, page: int, step: int) -> str:
        """Why a kept page is kept: "sink", "recent" or "picked"."""
        if page < self.sink_pages:
            return "sink"
        return "recent" if page >= self.pages_at(step) - self.recent_pages else "picked"

    def most_picked(self, layer: int, count: int) -> list[tuple[int, float]]:
        """The pages that a layer picks most, neither sinks nor ever recent, with the share of steps."""
        times: dict[int, int] = {}
        ever_recent = range(self.pages_at(0) - self.recent_pages, self.pages_at(self.steps - 1))
        for pages in self.picks[layer]:
            for page in pages:
                if page >= self.sink_pages and page not in ever_recent:
                    times[page] = times.get(page, 0) + 1
        ranked = sorted(times.items(), key=lambda item: (-item[1], item[0]))
        return [(page, n / self.steps) for page, n in ranked[:count]]

    def numbers(self) -> dict[str, Any]:
        """For a JSON."""
        data = asdict(self)
        data["picks"] = {str(layer): pages for layer, pages in self.picks.items()}
        data["recall_by_layer"] = {str(layer): share for layer, share in data.pop("recall").items()}
        return data


def new_shares(picks: Sequence[Tensor]) -> Tensor:
    """How much of a pick the step before did not have, fp64 [steps - 1]: what a tier that holds the last pick alone has
    to bring. A page that has begun since counts as new, too.

    picks: int [pages kept], one at each of neighbouring steps of a row, none of them empty.
    """
    shares = [1 - torch.isin(now, last).double().mean().item() for last, now in pairwise(picks)]
    return torch.tensor(shares, dtype=torch.double)


def record_picks(
    model: Any,
    tokenizer: Any,
    name: str,
    method: Method,
    ids: Tensor,
    steps: int,
    advance: Callable[[int], None] = lambda tokens: None,
) -> PickRecord:
    """Runs a text, ids int64 [1, context], and records what its last `steps` positions pick.

    Raises `ConfigError` for a method that picks nothing on this model.
    """
    context = ids.shape[1]
    with deltakv.apply(model, method) as handle:
        if not handle.plan.layers(Role.SELECT):
            raise ConfigError(f"method {name!r} has no SELECT layer on this model, so there are no picks to show")
    with deltakv.apply(model, Full(page_size=method.page_size)) as handle:
        cache = handle.new_cache(max_length=context)
        prefill(model, cache, ids[:, : context - steps], advance)
    with deltakv.apply(model, method) as handle:
        with handle.positions(picks=True, recall=True) as trace:
            for chunk in ids[:, context - steps :].split(CHUNK, dim=1):
                model(chunk.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
                advance(chunk.shape[1])
        plan, planned = str(handle.plan), list(handle.planned_layers)
    size = method.page_size
    return PickRecord(
        method=name,
        plan=plan,
        planned_layers=planned,
        page_size=size,
        context=context,
        steps=steps,
        sink_pages=getattr(method, "sink_pages", 0),
        recent_pages=getattr(method, "recent_pages", 0),
        picks={layer: [pages.tolist() for pages in rows] for layer, rows in sorted(trace.picks.items())},
        recall=dict(sorted(trace.recall.items())),
        page_texts=[tokenizer.decode(page) for page in ids[0].split(size)],
    )
