"""A bench for ideas: what a sparse setting does to a model, whether or not the package can serve it yet.

Nothing of the package is used, so that the two can be held against each other. Windows of a text are prefilled once,
with full attention; a setting is then one forward over their last positions, each of which picks for itself.

A setting is {"roles": a letter a layer, "all": options, "layers": {layer: options}}:

    F  reads everything                    W  reads sinks and recent tokens
    S  reads everything, and picks pages   B  picks for itself by the bounds of pages (Quest)
    R  reads what the last S has picked    M  picks for itself by the means of pages, which stand for all other pages

    budget, recent, sinks  in tokens       score   how heads come together: max, mean, tokmax, pmax, sqrt, log
    group    a pick a KV head              smooth  how much of a score stays for the next step (half the score is that)
    mix      how much of the scores of the S layer before counts, too
    heads    heads of an S layer that have no say           follow  the S layer whose pick an R layer reads
    means    what was not picked counts by the mean K and V of its pages
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PAGE = 16
DEFAULTS: dict[str, Any] = {
    "budget": 1024, "recent": 128, "sinks": 16, "score": "max", "group": False, "smooth": 0.0, "mix": 0.0, "heads": (),
    "means": False, "follow": None,
}  # fmt: skip


class Lab:
    """A model, on a device. hold: all settings from here on are about these windows."""

    def __init__(self, path: str, device: str) -> None:
        torch.set_grad_enabled(False)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa")
        self.model.to(device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.device = device
        config = self.model.config
        self.depth, self.n_heads, self.n_kv = (
            config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads,
        )  # fmt: skip
        ALL_ATTENTION_FUNCTIONS.register("lab", self._attend)

    def open(self, pieces: list[Tensor], positions: int) -> Windows:
        """pieces: int64 [context + 1] each. The last `positions` that have a token after them are what is measured."""
        return Windows(self, pieces, positions)

    def logits(self, windows: Windows, setting: dict[str, Any], count: int) -> Tensor:
        """Hidden states [windows, count, hidden] of the first `count` positions under a setting."""
        self.windows, self.setting, self.scores = windows, setting, {}
        self.start = windows.context - windows.positions
        self.end = self.start + count
        self.model.config._attn_implementation = "lab"
        at = torch.arange(self.start, self.end, device=self.device)[None].expand(len(windows.ids), -1)
        mask = {"full_attention": None}
        hidden = self.model.model(windows.ids[:, :count], position_ids=at, use_cache=False, attention_mask=mask)
        self.model.config._attn_implementation = "sdpa"
        return hidden.last_hidden_state

    def option(self, layer: int) -> dict[str, Any]:
        return options(self.setting, layer)

    def _attend(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        layer, windows = module.layer_idx, self.windows
        k = torch.cat([windows.keys[layer][:, :, : self.start], k], 2)
        v = torch.cat([windows.values[layer][:, :, : self.start], v], 2)
        role, own = self.setting["roles"][layer], self.option(layer)
        if role in "FS":
            batch, heads, m, dim = q.shape
            p = self._logits(q, k, scaling).softmax(-1)
            if role == "S":
                self.scores[layer] = self._score(p, own)
            out = (p.view(batch, self.n_kv, -1, self.end) @ v).view(batch, heads, m, dim)
            return out.transpose(1, 2), None
        return self._sparse(role, q, k, v, scaling, own).transpose(1, 2), None

    def _logits(self, q: Tensor, k: Tensor, scaling: float) -> Tensor:
        batch, heads, m, dim = q.shape
        x = (q.reshape(batch, self.n_kv, -1, dim) @ k.transpose(2, 3)).view(batch, heads, m, -1) * scaling
        return x.masked_fill_(self._tokens() > self._now()[:, None], float("-inf"))

    def _tokens(self) -> Tensor:
        return torch.arange(self.end, device=self.device)

    def _now(self) -> Tensor:
        return torch.arange(self.start, self.end, device=self.device)

    def _pages(self) -> int:
        return -(-self.end // PAGE)

    def _by_page(self, p: Tensor) -> Tensor:
        return F.pad(p, (0, self._pages() * PAGE - p.shape[-1])).unflatten(-1, (self._pages(), PAGE))

    def _score(self, p: Tensor, own: dict[str, Any]) -> Tensor:
        """p [windows, heads, m, tokens] to [windows, groups, m, pages]."""
        if own["heads"]:
            silent = torch.zeros(p.shape[1], dtype=torch.bool, device=p.device)
            silent[list(own["heads"])] = True
            p = p.masked_fill(silent[None, :, None, None], 0.0)
        kind = own["score"]
        grouped = p.unflatten(1, (self.n_kv if own["group"] else 1, -1))
        if kind == "max":
            scores = self._by_page(grouped.amax(2)).sum(-1)
        elif kind == "tokmax":
            scores = self._by_page(grouped.amax(2)).amax(-1)
        else:
            masses = self._by_page(grouped).sum(-1)
            if kind == "mean":
                scores = masses.mean(2)
            elif kind == "pmax":
                scores = masses.amax(2)
            elif kind == "sqrt":
                scores = masses.sqrt().mean(2)
            else:
                scores = (masses + 1e-4).log().mean(2).exp()
        if own["smooth"]:
            kept, all_kept = scores[:, :, 0], []
            for index in range(scores.shape[2]):
                kept = own["smooth"] * kept + (1 - own["smooth"]) * scores[:, :, index]
                all_kept.append(kept)
            scores = scores / 2 + torch.stack(all_kept, 2) / 2
        if own["mix"] and self.scores:
            scores = scores + own["mix"] * self.scores[max(self.scores)]
        return scores

    def _own(self, role: str, q: Tensor, k: Tensor, scaling: float, own: dict[str, Any]) -> Tensor:
        """Scores of a layer that picks for itself, without reading tokens."""
        batch, heads, m, dim = q.shape
        if role == "W":
            return torch.zeros((batch, 1, m, self._pages()), device=q.device)
        pages = F.pad(k, (0, 0, 0, self._pages() * PAGE - k.shape[2])).unflatten(2, (-1, PAGE))
        stacked = q.reshape(batch, self.n_kv, -1, dim)
        if role == "B":
            x = stacked.clamp_min(0) @ pages.amax(3).transpose(2, 3) + stacked.clamp_max(0) @ pages.amin(3).transpose(
                2, 3
            )
        else:
            x = stacked @ pages.mean(3).transpose(2, 3)
        hidden = torch.arange(self._pages(), device=q.device) >= (self._now()[:, None] // PAGE)
        x = (x.view(batch, heads, m, -1) * scaling).masked_fill(hidden, float("-inf"))
        p = (x - x.amax(-1, keepdim=True)).exp() if role == "B" else x.softmax(-1)
        p = p.unflatten(1, (self.n_kv if own["group"] else 1, -1))
        return p.amax(2) if own["score"] == "max" else p.mean(2)

    def _choose(self, scores: Tensor, own: dict[str, Any]) -> Tensor:
        """[windows, groups, m, pages a pick]: sinks, recent pages, the best of the rest."""
        page, now = torch.arange(scores.shape[-1], device=scores.device), self._now()[:, None] // PAGE
        forced = ((page <= now) & (page > now - own["recent"] // PAGE)) | (page < own["sinks"] // PAGE)
        ranked = scores.masked_fill(forced, float("inf")).masked_fill(page > now, float("-inf"))
        return ranked.topk(min(scores.shape[-1], own["budget"] // PAGE), -1).indices

    def _sparse(self, role: str, q: Tensor, k: Tensor, v: Tensor, scaling: float, own: dict[str, Any]) -> Tensor:
        batch, heads, m, dim = q.shape
        if role == "R":
            scores = self.scores[max(self.scores) if own["follow"] is None else own["follow"]]
        else:
            scores = self._own(role, q, k, scaling, own)
        if role == "W":
            own = {**own, "recent": own["budget"] - own["sinks"]}
        pages = self._choose(scores, own)
        at = (pages[..., None] * PAGE + torch.arange(PAGE, device=q.device)).flatten(-2)
        wrong = (at > self._now()[:, None]).expand(-1, self.n_kv, -1, -1)
        at = at.clamp_max(self.end - 1).expand(-1, self.n_kv, -1, -1)
        means = own["means"] or role == "M"
        out, size = torch.empty_like(q), at.shape[-1]
        block = max(1, 2**27 // (batch * self.n_kv * size * dim))
        for first in range(0, m, block):
            rows = slice(first, min(m, first + block))
            count = rows.stop - first
            index = at[:, :, rows].reshape(batch, self.n_kv, -1, 1).expand(-1, -1, -1, dim)
            k_at, v_at = (x.gather(2, index).view(batch, self.n_kv, count, size, dim) for x in (k, v))
            one = q[:, :, rows].view(batch, self.n_kv, -1, count, dim).transpose(2, 3)
            x = (one @ k_at.transpose(3, 4) * scaling).masked_fill(wrong[:, :, rows, None], float("-inf"))
            if means:
                x = torch.cat([x, self._rest(one, k, scaling, pages[:, :, rows], rows)], -1)
            w = x.softmax(-1)
            found = w[..., :size] @ v_at
            if means:
                found = found + (w[..., size:].flatten(2, 3) @ self._mean(v)).view(found.shape)
            out[:, :, rows] = found.transpose(2, 3).reshape(batch, heads, count, dim)
        return out

    def _mean(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, self._pages() * PAGE - x.shape[2])).unflatten(2, (-1, PAGE)).mean(3)

    def _rest(self, q: Tensor, k: Tensor, scaling: float, pages: Tensor, rows: slice) -> Tensor:
        """Logits of the pages that are not picked, each as 16 tokens like its mean: [windows, kv, m, group, pages]."""
        x = (q.flatten(2, 3) @ self._mean(k).transpose(2, 3)).view(*q.shape[:4], -1) * scaling + math.log(PAGE)
        taken = torch.zeros((*pages.shape[:3], self._pages()), dtype=torch.bool, device=q.device).scatter_(
            3, pages, True
        )
        hidden = torch.arange(self._pages(), device=q.device) >= (self._now()[rows, None] // PAGE)
        return x.masked_fill((taken | hidden)[:, :, :, None], float("-inf"))


class Windows:
    """Places in texts, of one length, side by side. keys, values: by layer, [windows, kv, context - positions, dim]."""

    def __init__(self, lab: Lab, pieces: list[Tensor], positions: int) -> None:
        self.lab, self.positions, self.context = lab, positions, len(pieces[0]) - 1
        start = self.context - positions
        ids = torch.stack(pieces).to(lab.device)
        self.ids, self.targets = ids[:, start:-1], ids[:, start + 1 :]
        caches = []
        for row in ids:
            cache = DynamicCache(config=lab.model.config)
            for part in row[None, :start].split(2048, dim=1):
                lab.model.model(part, past_key_values=cache, use_cache=True)
            caches.append([(layer.keys, layer.values) for layer in cache.layers])
        self.keys, self.values = ([torch.cat([c[n][i] for c in caches]) for n in range(lab.depth)] for i in (0, 1))
        hidden = lab.logits(self, {"roles": "F" * lab.depth}, positions)
        self.full = [self._log_probabilities(one) for one in hidden]

    def _log_probabilities(self, hidden: Tensor) -> Tensor:
        return self.lab.model.lm_head(hidden).float().log_softmax(-1)

    def measure(self, setting: dict[str, Any], count: int | None = None) -> dict[str, Any]:
        """A setting at the first `count` positions of each window."""
        count = count or self.positions
        kl, agree, surprise = [], [], []
        for row, hidden in enumerate(self.lab.logits(self, setting, count)):
            ours, full = self._log_probabilities(hidden), self.full[row][:count]
            kl.append((full.exp() * (full - ours)).sum(-1).clamp_min(0))
            agree.append((full.argmax(-1) == ours.argmax(-1)).float())
            surprise.append(-ours.gather(-1, self.targets[row, :count, None])[:, 0])
        kls, surprises = torch.stack(kl), torch.stack(surprise)
        return {
            "kl": kls.mean().item(), "p99": kls.flatten().quantile(0.99).item(), "by_window": kls.mean(1).tolist(),
            "top1": torch.stack(agree).mean().item(), "perplexity": surprises.mean().exp().item(),
            "positions": kls.numel(), "cost": cost(setting, self.context),
        }  # fmt: skip


def options(setting: dict[str, Any], layer: int) -> dict[str, Any]:
    return {**DEFAULTS, **setting.get("all", {}), **setting.get("layers", {}).get(layer, {})}


def cost(setting: dict[str, Any], context: int) -> float:
    """Tokens' worth of K and V that a step reads."""
    total = 0.0
    for layer, role in enumerate(setting["roles"]):
        own = options(setting, layer)
        if role in "FS":
            total += context
        else:
            total += own["budget"] + (context / PAGE if role in "BM" or own["means"] else 0)
    return total
