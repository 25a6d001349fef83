"""Whether a cache that was passed fits, place included."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deltakv.errors import UnsupportedUseError
from deltakv.integrations.hf.cache import check_cache
from deltakv.integrations.hf.host_cache import HostCache


def check_place(cache: Any, page_size: int, windows: Sequence[int | None], *, in_host: bool) -> None:
    """As `check_cache`, and raises `UnsupportedUseError` for a cache whose K and V are elsewhere. in_host: whether they
    are to be in host memory."""
    check_cache(cache, page_size, windows)
    if isinstance(cache, HostCache) != in_host:
        raise UnsupportedUseError(
            f"the cache keeps K and V {'on the device' if in_host else 'in host memory'}, and "
            f"kv_device={'host' if in_host else 'device'!r} was applied; use handle.new_cache()"
        )
