"""On a CPU with a vLLM version that is not checked: stock attention, and a clear refusal where deltakv is asked for.

Nothing here builds on an interface that a version may have changed, but the name of one class.
"""

from __future__ import annotations

from typing import Any

import vllm
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

from deltakv.errors import UnsupportedUseError
from deltakv.integrations.vllm.settings import KEY
from deltakv.integrations.vllm.versions import advice


class GuardedCPUBackend(CPUAttentionBackend):
    """vLLM's own CPU attention. Its platform would take CUSTOM for it without a word; here it is refused."""

    @staticmethod
    def get_impl_cls() -> Any:
        config = get_current_vllm_config()
        asked = isinstance(config.additional_config, dict) and KEY in config.additional_config
        if asked or getattr(config.attention_config.backend, "name", None) == "CUSTOM":
            raise UnsupportedUseError(advice(vllm.__version__))
        return CPUAttentionBackend.get_impl_cls()
