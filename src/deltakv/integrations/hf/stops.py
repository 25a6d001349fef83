"""When `generate` learns that all rows have ended: a step late, while the device goes on.

Reading that flag after every step, the host stands still until the device is done, and then the device until the host
has launched the next step. transformers has the remedy, one more forward at the end whose results it takes back, and
uses it on Apple's GPUs alone; here it is used for deltakv's caches on CUDA too.
"""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import torch
from transformers.generation import utils

from deltakv.integrations.hf.cache import PagedCache

_lock = threading.Lock()
_users = 0
_original = utils.DeferredStopCheck.is_supported


def defer_stops(undo: contextlib.ExitStack) -> None:
    """Lets `generate` read its flag late where the cache is deltakv's. undo: takes it back with the last who asked."""
    global _users
    with _lock:
        _users += 1
        utils.DeferredStopCheck.is_supported = staticmethod(_is_supported)
    undo.callback(_leave)


def _leave() -> None:
    global _users
    with _lock:
        _users -= 1
        if not _users:
            utils.DeferredStopCheck.is_supported = staticmethod(_original)


def _is_supported(device: torch.device, cache: Any, cache_is_returned: bool, is_assistant: bool) -> bool:
    if isinstance(cache, PagedCache) and device.type == "cuda":
        return not is_assistant and not any(cache.windows)  # a window would have to remember what it has dropped
    return _original(device, cache, cache_is_returned, is_assistant)
