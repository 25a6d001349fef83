"""Storing new tokens in the pool, in place."""

from __future__ import annotations

from deltakv.ops.registry import register
from deltakv.ops.store_kv import vectorised


def _fake(*_: object) -> None:
    return None


store_kv = register(
    "store_kv(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor slots) -> ()",
    cpu=vectorised.store_kv,
    cuda=vectorised.store_kv,
    fake=_fake,
)
