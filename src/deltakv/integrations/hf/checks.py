"""Whether a cache that was passed fits the method and the model."""

from __future__ import annotations

from typing import Any

from deltakv.errors import UnsupportedUseError
from deltakv.integrations.hf.cache import PagedCache
from deltakv.integrations.hf.host_cache import HostCache


def check_cache(cache: Any, windows: tuple[int | None, ...], page_size: int, *, in_host: bool) -> None:
    """Raises `UnsupportedUseError` if it does not. windows: of the model's layers. page_size: the method's.
    in_host: whether K and V are to be in host memory."""
    if not isinstance(cache, PagedCache):
        raise UnsupportedUseError(
            f"past_key_values is a {type(cache).__name__}, but deltakv needs its own paged cache; "
            "leave it out, pass handle.new_cache(), or a cache that an earlier call returned"
        )
    if isinstance(cache, HostCache) != in_host:
        raise UnsupportedUseError(
            f"the cache keeps K and V {'on the device' if in_host else 'in host memory'}, and "
            f"kv_device={'host' if in_host else 'device'!r} was applied; use handle.new_cache()"
        )
    if cache.page_size != page_size or cache.windows != windows:
        raise UnsupportedUseError(
            f"the cache has pages of {cache.page_size} tokens and {len(cache.windows)} layers, but this method "
            f"needs pages of {page_size} and {len(windows)} layers; use handle.new_cache()"
        )
