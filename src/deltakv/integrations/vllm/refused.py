"""What CUSTOM is where deltakv has no backend: a GPU, for now, and any vLLM version there that is not checked."""

from __future__ import annotations

from typing import Any, NoReturn

import vllm
from vllm.v1.attention.backend import AttentionBackend

from deltakv.errors import UnsupportedUseError
from deltakv.integrations.vllm.versions import advice, is_checked


def refuse(*_: Any, **__: Any) -> NoReturn:
    """Raises `UnsupportedUseError` with what to do."""
    if not is_checked(vllm.__version__):
        raise UnsupportedUseError(advice(vllm.__version__))
    raise UnsupportedUseError(
        "deltakv runs inside vLLM on the CPU only, so far; leave out --attention-backend CUSTOM and the "
        '"deltakv" of --additional-config'
    )


class RefusedBackend(AttentionBackend):
    """The first question that vLLM asks of it is answered with the refusal."""

    validate_configuration = supports_block_size = classmethod(refuse)
    get_name = get_impl_cls = get_builder_cls = get_kv_cache_shape = staticmethod(refuse)
