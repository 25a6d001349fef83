"""What CUSTOM is where deltakv has no backend: another platform, or a vLLM version that is not checked on a GPU."""

from __future__ import annotations

from typing import Any, NoReturn

import vllm
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend

from deltakv.errors import UnsupportedUseError
from deltakv.integrations.vllm.versions import CHECKED, CHECKED_ON_GPU, advice, is_checked


def refusal() -> str | None:
    """Why deltakv does not run here, by vLLM's version and platform; None if it does."""
    checked = CHECKED_ON_GPU if current_platform.is_cuda() else CHECKED
    if not is_checked(vllm.__version__, checked):
        return advice(vllm.__version__, checked)
    if current_platform.is_cuda() or current_platform.is_cpu():
        return None
    return (
        f"deltakv runs inside vLLM on NVIDIA GPUs and on the CPU, and this platform is {current_platform.device_name!r}"
        '; leave out --attention-backend CUSTOM and the "deltakv" of --additional-config'
    )


def refuse(*_: Any, **__: Any) -> NoReturn:
    """Raises `UnsupportedUseError` with what to do."""
    raise UnsupportedUseError(refusal())


class RefusedBackend(AttentionBackend):
    """The first question that vLLM asks of it is answered with the refusal."""

    validate_configuration = supports_block_size = classmethod(refuse)
    get_name = get_impl_cls = get_builder_cls = get_kv_cache_shape = staticmethod(refuse)
