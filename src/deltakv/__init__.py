"""deltakv makes long reasoning cheap to decode.

A decoding step of a long chain of thought reads the whole KV cache in every layer. deltakv reads it in a few layers,
lets those pick the pages that matter, and reads only these in all the others (DELTA, arXiv 2510.09883). Nothing is
trained, nothing is evicted.

    model = AutoModelForCausalLM.from_pretrained(...)
    with deltakv.apply(model, deltakv.Delta(budget=1024)) as handle:
        model.generate(**inputs, max_new_tokens=16384)
"""

from deltakv.config import Delta, Full, Method
from deltakv.errors import (
    ConfigError,
    DeltaKVError,
    InputError,
    MaskError,
    PlanError,
    UnsupportedModelError,
    UnsupportedUseError,
)
from deltakv.integrations.hf import Handle, PagedCache, Statistics, Trace, apply
from deltakv.plan import LayerPlan, Role
from deltakv.version import __version__

__all__ = [
    "ConfigError",
    "Delta",
    "DeltaKVError",
    "Full",
    "Handle",
    "InputError",
    "LayerPlan",
    "MaskError",
    "Method",
    "PagedCache",
    "PlanError",
    "Role",
    "Statistics",
    "Trace",
    "UnsupportedModelError",
    "UnsupportedUseError",
    "__version__",
    "apply",
]
