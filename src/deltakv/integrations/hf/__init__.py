"""Hugging Face transformers: attention and mask registration, the cache, and `apply`."""

from deltakv.integrations.hf.apply import Handle, apply
from deltakv.integrations.hf.cache import PagedCache
from deltakv.integrations.hf.positions import Trace
from deltakv.integrations.hf.stats import Statistics

__all__ = ["Handle", "PagedCache", "Statistics", "Trace", "apply"]
