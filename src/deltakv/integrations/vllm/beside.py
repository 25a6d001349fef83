"""Settings beside another backend than CUSTOM: nobody would ask deltakv, so they would be passed over in silence.

vLLM has no place for a plugin that sees every config, so one of its functions is wrapped: the platform's look at a
config that has just been made. The wrapper only ever refuses.
"""

from __future__ import annotations

import functools
from typing import Any

from deltakv.errors import UnsupportedUseError
from deltakv.integrations.vllm.refused import refusal
from deltakv.integrations.vllm.settings import KEY

_WRAPPED = "_deltakv_looks_at_it"


def watch(platform: Any) -> None:
    """Every config that is made from now on is looked at. platform: vLLM's `current_platform`. Safe to call again."""
    stock = platform.check_and_update_config
    if hasattr(stock, _WRAPPED):
        return

    @functools.wraps(stock)
    def check_and_update_config(vllm_config: Any) -> None:
        additional = vllm_config.additional_config
        if isinstance(additional, dict) and KEY in additional:
            if why := refusal():
                raise UnsupportedUseError(why)
            from deltakv.integrations.vllm.support import refuse_beside  # built on interfaces of checked versions

            refuse_beside(vllm_config)
        stock(vllm_config)

    setattr(check_and_update_config, _WRAPPED, True)
    # On the object, whose class stays as it is.
    platform.check_and_update_config = check_and_update_config
