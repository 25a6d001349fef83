"""The entry point `vllm.general_plugins`: vLLM calls `register` in each of its processes, before it has a config.

So nothing is decided here but by version and platform; the backends decide when a config is at hand.
"""

from __future__ import annotations

from deltakv.integrations.vllm.versions import CHECKED, CHECKED_ON_GPU, is_checked

_HERE = "deltakv.integrations.vllm"

#: As the package's metadata has it: where vLLM looks, and what it finds there.
GROUP, ENTRY_POINT = "vllm.general_plugins", f"{_HERE}.plugin:register"


def register() -> None:
    """Makes deltakv known to vLLM's attention registry. Safe to call again."""
    import vllm

    try:
        from vllm.platforms import current_platform
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    except ImportError:
        if is_checked(vllm.__version__):
            raise
        return  # that vLLM has moved them: its own backends run as they are, and nothing has asked for deltakv

    gpu = current_platform.is_cuda()
    checked = is_checked(vllm.__version__, CHECKED_ON_GPU if gpu else CHECKED)
    if current_platform.is_cpu():
        # The CPU platform ignores CUSTOM: whoever asks for it gets this one.
        path = f"{_HERE}.cpu.SparseCPUBackend" if checked else f"{_HERE}.guard.GuardedCPUBackend"
        register_backend(AttentionBackendEnum.CPU_ATTN, path)
    else:
        from deltakv.integrations.vllm.beside import watch

        path = f"{_HERE}.gpu.SparseGPUBackend" if gpu and checked else f"{_HERE}.refused.RefusedBackend"
        watch(current_platform)
    register_backend(AttentionBackendEnum.CUSTOM, path)
    if checked:
        from deltakv.integrations.vllm import figures

        figures.announce()
