"""The Triton ops as the tests call them: on the GPU where there is one, else in Triton's interpreter, on the CPU."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ON_GPU = torch.cuda.is_available()  # else tests/conftest.py has turned the interpreter on

#: The interpreter computes with numpy, which has no bfloat16: there such values pass as float32.
DTYPES = [torch.float16, torch.float32, *([torch.bfloat16] if ON_GPU else [])]


def triton_op(op: str, name: str | None = None) -> Callable[..., Any]:
    """The version of `deltakv.ops.<op>` in Triton: CPU tensors in, CPU tensors out."""

    def call(*arguments: Any) -> Any:
        version = getattr(importlib.import_module(f"deltakv.ops.{op}.triton"), name or op)
        result = version(*(_moved(x) if isinstance(x, Tensor) else x for x in arguments))
        if not isinstance(result, tuple):
            return result.to("cpu", arguments[0].dtype if op == "decode_attention" else result.dtype)
        first = result[0].to(arguments[0].dtype) if op == "decode_attention" else result[0]
        return (first.cpu(), *(x.cpu() for x in result[1:]))

    return call


def _moved(x: Tensor) -> Tensor:
    if ON_GPU:
        return x.cuda()
    return x.float() if x.dtype == torch.bfloat16 else x


attention = triton_op("decode_attention")
page_scores = triton_op("page_scores")
select_pages = triton_op("select_pages")
_stats = triton_op("decode_attention", "decode_attention_stats")


def attention_stats(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`decode_attention_stats`; what means nothing, beyond a row's end, is set to -inf and 0, to be compared whole."""
    out, logits, peaks, lse = _stats(*arguments)
    _, tiles, n_heads, tile = logits.shape
    lengths = arguments[4].repeat_interleave(n_heads // arguments[4].shape[1], dim=1)  # [rows, n_heads]
    token = torch.arange(tiles * tile).view(tiles, 1, tile)
    logits = logits.masked_fill(token >= lengths[:, None, :, None], float("-inf"))
    return out, logits, peaks.masked_fill(token[..., 0] >= lengths[:, None], 0.0), lse


def attention_into(*arguments: Any, expected: int) -> Tensor:
    """`decode_attention_into`, on queries that are a part of a wider tensor, as when they come from one QKV product."""
    from deltakv.ops.decode_attention.triton import decode_attention_into

    q, *rest = (_moved(x) if isinstance(x, Tensor) else x for x in arguments)
    strided = torch.cat([q, q, q], dim=1)[:, q.shape[1] : 2 * q.shape[1]]
    out = torch.full_like(q, float("nan"))
    decode_attention_into(strided, *rest, out, expected)
    return out.to("cpu", arguments[0].dtype)
