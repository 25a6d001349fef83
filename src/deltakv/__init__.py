"""deltakv makes long reasoning cheap to decode.

A decoding step of a long chain of thought reads the whole KV cache in every layer. deltakv reads it in a few layers,
lets those pick the pages that matter, and reads only these in all the others (DELTA, arXiv 2510.09883). Nothing is
trained, and DELTA evicts nothing. The field's other methods are here beside it.

    model = AutoModelForCausalLM.from_pretrained(...)
    with deltakv.apply(model, deltakv.Delta(budget=1024)) as handle:
        model.generate(**inputs, max_new_tokens=16384)
"""

from typing import TYPE_CHECKING, Any

from deltakv.config import Delta, Full, Method
from deltakv.errors import (
    ConfigError,
    DeltaKVError,
    InputError,
    MaskError,
    OffloadError,
    PlanError,
    UnsupportedModelError,
    UnsupportedUseError,
)
from deltakv.field import (
    A2SF,
    H2O,
    IndexCache,
    LazyEviction,
    LessIsMore,
    Quest,
    RefreshKV,
    StreamingLLM,
    Tactic,
    TidalDecode,
    TokenSelect,
)
from deltakv.offload.config import Host
from deltakv.plan import LayerPlan, Role
from deltakv.version import __version__

if TYPE_CHECKING:
    from deltakv.integrations.hf import Handle, PagedCache, Statistics, Trace, apply
    from deltakv.methods import from_plan

__all__ = [
    "A2SF",
    "H2O",
    "ConfigError",
    "Delta",
    "DeltaKVError",
    "Full",
    "Handle",
    "Host",
    "IndexCache",
    "InputError",
    "LayerPlan",
    "LazyEviction",
    "LessIsMore",
    "MaskError",
    "Method",
    "OffloadError",
    "PagedCache",
    "PlanError",
    "Quest",
    "RefreshKV",
    "Role",
    "Statistics",
    "StreamingLLM",
    "Tactic",
    "TidalDecode",
    "TokenSelect",
    "Trace",
    "UnsupportedModelError",
    "UnsupportedUseError",
    "__version__",
    "apply",
    "from_plan",
]

_FROM_HF = ("Handle", "PagedCache", "Statistics", "Trace", "apply")


def __getattr__(name: str) -> Any:
    """torch and transformers take seconds to import: they wait until something needs them."""
    if name in _FROM_HF:
        from deltakv.integrations import hf

        return getattr(hf, name)
    if name == "from_plan":
        from deltakv import methods

        return methods.from_plan
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
