"""The entry point `vllm.general_plugins`: vLLM calls `register` in each of its processes, before it has a config.

So nothing is decided here but by version and platform; the backends decide when a config is at hand.
"""

from __future__ import annotations

from deltakv.integrations.vllm.versions import is_checked

_HERE = "deltakv.integrations.vllm"


def register() -> None:
    """Makes deltakv known to vLLM's attention registry. Safe to call again."""
    import vllm
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    checked = is_checked(vllm.__version__)
    if current_platform.is_cpu():
        # The CPU platform ignores CUSTOM: whoever asks for it gets this one.
        path = f"{_HERE}.cpu.SparseCPUBackend" if checked else f"{_HERE}.guard.GuardedCPUBackend"
        register_backend(AttentionBackendEnum.CPU_ATTN, path)
    else:
        path = f"{_HERE}.refused.RefusedBackend"
    register_backend(AttentionBackendEnum.CUSTOM, path)
    if checked:
        from deltakv.integrations.vllm import figures

        figures.announce()
