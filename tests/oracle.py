"""An independent dense reference: what DELTA means, in plain matrices, loops and sets (docs/design.md,
section 1).

It imports nothing of deltakv, so that a mistake there cannot hide here. Everything is computed in float64
over the whole sequence, with no cache, no pages in memory and no kernels; clarity before speed.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

#: The name under which the reference's attention is registered while a `DenseDelta` runs.
NAME = "oracle_dense"


def attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, sinks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Masked attention of one query row, in float64.

    q: [n_heads, d]; k, v: [T, n_kv, d]; visible: bool [T]; sinks: [n_heads], one learned logit a head that
    takes part in the softmax and has no value. Query head h reads KV head h // (n_heads / n_kv).
    Returns the output [n_heads, d] and the probabilities [n_heads, T], zero where invisible. A row that sees
    nothing gives zeros.
    """
    probabilities = torch.zeros(q.shape[0], k.shape[0], dtype=torch.float64)
    out = torch.zeros(q.shape[0], v.shape[-1], dtype=torch.float64)
    tokens = [t for t, seen in enumerate(visible.tolist()) if seen]
    if not tokens:
        return out, probabilities
    heads_per_kv = q.shape[0] // k.shape[1]
    for h in range(q.shape[0]):
        kv = h // heads_per_kv
        logits = k[tokens, kv].double() @ q[h].double() * scale
        if sinks is not None:
            logits = torch.cat([logits, sinks[h].double().reshape(1)])
        p = torch.softmax(logits, dim=0)[: len(tokens)]
        probabilities[h, tokens] = p
        out[h] = p @ v[tokens, kv].double()
    return out, probabilities


def page_scores(
    q: Tensor, k: Tensor, scale: float, seq_len: int, page_size: int, sinks: Tensor | None = None
) -> list[float]:
    """What each page is worth to one query: the sum over its tokens of the max over query heads of p[h, t].

    q: [n_heads, d]; k: [T, n_kv, d] with T >= seq_len. Returns ceil(seq_len / page_size) floats.
    """
    _, p = attention(q, k[:seq_len], k[:seq_len], torch.ones(seq_len, dtype=torch.bool), scale, sinks)
    best = p.amax(dim=0)
    return [best[start : start + page_size].sum().item() for start in range(0, seq_len, page_size)]


def pick(
    scores: Sequence[float],
    seq_len: int,
    page_size: int,
    budget_pages: int,
    recent_pages: int,
    sink_pages: int,
    min_context: int,
) -> list[int]:
    """The pages that DELTA keeps, ascending: sinks, recent ones and the best of the rest, `budget_pages` in
    all.

    A row at or below `min_context`, or with no more pages than the budget, keeps all. Ties go to the earlier
    page. `scores` needs one entry a page; entries from ceil(seq_len / page_size) on are not looked at.
    """
    n_pages = math.ceil(seq_len / page_size)
    if seq_len <= min_context or n_pages <= budget_pages:
        return list(range(n_pages))
    kept = set(range(sink_pages)) | set(range(n_pages - recent_pages, n_pages))
    rest = sorted((page for page in range(n_pages) if page not in kept), key=lambda page: (-float(scores[page]), page))
    kept |= set(rest[: budget_pages - len(kept)])
    return sorted(kept)


def window(seq_len: int, page_size: int, budget_pages: int, sink_pages: int, min_context: int) -> list[int]:
    """The pages that a WINDOW layer reads, ascending: sinks, and as many of the last ones as still fit the budget."""
    n_pages = math.ceil(seq_len / page_size)
    pages = list(range(n_pages))
    if seq_len <= min_context or n_pages <= budget_pages:
        return pages
    return pages[:sink_pages] + pages[n_pages - (budget_pages - sink_pages) :]


def picks_agree(got: Sequence[int], want: Sequence[int], scores: Sequence[float], tolerance: float) -> bool:
    """Whether two picks are the same up to the rounding of the scores.

    got: the pick under test; want: the oracle's; scores: the oracle's, one a page. Both must be ascending and
    of one size. Pages in one but not in the other are allowed only if every page left out and every page
    taken in its place differ by less than `tolerance` in score; all of them then lie that close to the
    threshold. A tolerance of 0 asks for equal picks, the way to compare exactly representable scores, ties
    included.
    """
    got, want = [int(page) for page in got], [int(page) for page in want]
    if got != sorted(set(got)) or len(got) != len(want):
        return False
    if any(not 0 <= page < len(scores) for page in got):
        return False
    left_out = [float(scores[page]) for page in set(want) - set(got)]
    taken = [float(scores[page]) for page in set(got) - set(want)]
    # |difference|, not the oracle's minus the other: a forced page of low score is no near-tie of a better
    # page.
    return all(abs(a - b) < tolerance for a in left_out for b in taken)


@dataclass
class DenseRun:
    """What one `DenseDelta` forward gives. Layers are the model's layer indices; positions count from
    `start`.

    logits: [T, vocab], the model's dtype.
    picks: for each SELECT layer, one ascending list of logical pages a decode position (all pages if dense).
    scores: for each SELECT layer, the page scores behind each pick.
    recall: for each REUSE or WINDOW layer, the share of full attention's mass on tokens that lies in what it reads,
        the mean over heads and decode positions. (A learned sink's mass is on no token and does not count.)
    attended, full: tokens attended to, and tokens that full attention would have attended to, summed over
        decode positions and planned layers.
    """

    logits: Tensor
    picks: dict[int, list[list[int]]] = field(default_factory=dict)
    scores: dict[int, list[list[float]]] = field(default_factory=dict)
    recall: dict[int, float] = field(default_factory=dict)
    attended: int = 0
    full: int = 0


class DenseDelta:
    """DELTA on a stock causal language model by masks alone: one forward over the whole row, without a cache.

    Each position's K and V follow from its own hidden state, so one teacher-forced forward in which every
    decode position has its own mask is the same mathematics as decoding one token at a time.

    model: a stock model (Llama, Qwen2, Qwen3, Mistral, Phi3, OPT, gpt_oss, gemma3_text), in eval mode.
    roles: one letter for each planned layer, F (full), S (select), R (reuse) or W (window). Layers that
        `config.layer_types` calls "sliding_attention" keep their window and take no letter.
    budget, recent, sinks, min_context: in tokens, as in `deltakv.Delta`.
    """

    def __init__(
        self,
        model: Any,
        roles: str,
        *,
        budget: int,
        recent: int,
        sinks: int,
        page_size: int = 16,
        min_context: int = 0,
    ) -> None:
        config = model.config
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        planned = [layer for layer, kind in enumerate(kinds) if kind != "sliding_attention"]
        assert len(roles) == len(planned), f"{roles} is not one letter for each of the layers {planned}"
        assert not {budget % page_size, recent % page_size, sinks % page_size} - {0}, "whole pages only"
        self.model = model
        self.planned = planned
        self.roles = dict(zip(planned, roles, strict=True))
        self.page_size = page_size
        self.limits = (budget // page_size, recent // page_size, sinks // page_size, min_context)

    def __call__(self, ids: Tensor, start: int, picks: dict[int, Sequence[Sequence[int]]] | None = None) -> DenseRun:
        """Runs the row `ids` [T], unpadded; positions from `start` on are decode steps, those before are
        prefill.

        picks: to be used instead of the layers' own, for comparing outputs given the same pick: one list a
        decode position for each SELECT layer. What the layers would have picked is returned all the same.
        """
        assert ids.ndim == 1 and 0 <= start <= len(ids) and not self.model.training
        self._start, self._given = start, picks
        self._last: list[list[int]] | None = None
        self._run = DenseRun(logits=torch.empty(0))
        with self._registered(), torch.no_grad():
            self._run.logits = self.model(input_ids=ids[None], use_cache=False).logits[0]
        return self._run

    @contextlib.contextmanager
    def _registered(self) -> Iterator[None]:
        """Makes the model call `_forward`, with no mask from outside; all is put back afterwards."""
        config = self.model.config
        before = config._attn_implementation
        AttentionInterface.register(NAME, self._forward)
        AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
        config._attn_implementation = NAME
        try:
            yield
        finally:
            config._attn_implementation = before
            del AttentionInterface._global_mapping[NAME]
            del AttentionMaskInterface._global_mapping[NAME]

    def _forward(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        s_aux: Tensor | None = None,
        softcap: float | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """transformers' attention function: query [1, n_heads, T, d], key and value [1, n_kv, T, d]."""
        assert attention_mask is None and softcap is None and scaling is not None and query.shape[0] == 1
        layer, role = module.layer_idx, self.roles.get(module.layer_idx)
        assert (role is None) == (sliding_window is not None), f"layer {layer}: role {role}, window {sliding_window}"

        device = query.device
        query, key, value = query.cpu(), key.cpu(), value.cpu()
        s_aux = None if s_aux is None else s_aux.cpu()
        groups = query.shape[1] // key.shape[1]
        q = query[0].double()
        k, v = (x[0].double().repeat_interleave(groups, dim=0) for x in (key, value))
        logits = q @ k.transpose(1, 2) * scaling
        at = torch.arange(q.shape[1])
        visible = at[None, :] <= at[:, None]
        if sliding_window is not None:
            visible &= at[None, :] > at[:, None] - sliding_window
        if role == "S":
            everything, own = _softmax(logits, visible, s_aux), self._select(layer, query[0], key[0], scaling, s_aux)
            if own is not None:
                self._run.recall[layer] = self._recall(everything, self._reuse(visible))
                visible = self._reuse(visible, own)
        if role == "R":
            everything = _softmax(logits, visible, s_aux)
            visible = self._reuse(visible)
            self._run.recall[layer] = self._recall(everything, visible)
        if role == "W":
            everything = _softmax(logits, visible, s_aux)
            visible = self._cut(visible, self._windows(q.shape[1]))
            self._run.recall[layer] = self._recall(everything, visible)
        if role is not None:
            decode = slice(self._start, None)
            self._run.attended += int(visible[decode].sum())
            self._run.full += int((at[decode] + 1).sum())
        out = _softmax(logits, visible, s_aux) @ v
        return out.transpose(0, 1)[None].to(device, query.dtype), None

    def _select(self, layer: int, q: Tensor, k: Tensor, scale: float, sinks: Tensor | None) -> list[bool] | None:
        """Every decode position picks from its own query; q [n_heads, T, d], k [n_kv, T, d].

        None: the layer itself attends to everything; otherwise to its pick, but for positions that say True.
        """
        scores, own = [], []
        for position in range(self._start, q.shape[1]):
            seq_len = position + 1
            row = page_scores(q[:, position], k.transpose(0, 1), scale, seq_len, self.page_size, sinks)
            scores.append(row)
            own.append(pick(row, seq_len, self.page_size, *self.limits))
        self._run.scores[layer], self._run.picks[layer] = scores, own
        self._take(layer, own)
        return None

    def _take(self, layer: int, own: list[list[int]]) -> None:
        """What the layers from here on attend to: `own`, or the pick that was given instead."""
        self._last = own if self._given is None else [[int(p) for p in row] for row in self._given[layer]]

    def _reuse(self, causal: Tensor, everything: Sequence[bool] = ()) -> Tensor:
        """The causal mask [T, T] with each decode position's row cut down to the last pick, but for those of
        `everything`."""
        assert self._last is not None, "REUSE before any SELECT"
        return self._cut(causal, self._last, everything)

    def _windows(self, end: int) -> list[list[int]]:
        """What a WINDOW layer keeps at each decode position before `end`."""
        budget, _, sinks, min_context = self.limits
        return [window(at + 1, self.page_size, budget, sinks, min_context) for at in range(self._start, end)]

    def _cut(self, causal: Tensor, kept: list[list[int]], everything: Sequence[bool] = ()) -> Tensor:
        """The same, down to `kept`, the pages of each decode position."""
        visible = causal.clone()
        for position, pages in zip(range(self._start, len(causal)), kept, strict=True):
            if everything and everything[position - self._start]:
                continue
            for page in set(range(math.ceil(len(causal) / self.page_size))) - set(pages):
                visible[position, page * self.page_size : (page + 1) * self.page_size] = False
        return visible

    def _recall(self, probabilities: Tensor, visible: Tensor) -> float:
        """The share of `probabilities` [n_heads, T, T] inside `visible`, the mean over decode positions."""
        decode = probabilities[:, self._start :]
        inside = decode.masked_fill(~visible[self._start :], 0).sum(-1) / decode.sum(-1)
        return inside.mean().item()


def _softmax(logits: Tensor, visible: Tensor, sinks: Tensor | None) -> Tensor:
    """Probabilities [n_heads, T, T] over the visible tokens, with the heads' sinks in the denominator."""
    logits = logits.masked_fill(~visible, -math.inf)
    if sinks is None:
        return torch.softmax(logits, dim=-1)
    sink = sinks.double()[:, None, None].expand(*logits.shape[:2], 1)
    return torch.softmax(torch.cat([logits, sink], dim=-1), dim=-1)[..., :-1]
