"""Errors that tell what was wrong, what is allowed and what to do.

Every refusal of this project is a `DeltaKVError`, raised before any work starts. The command line turns one into
a single line and exit code 2.
"""


class DeltaKVError(ValueError):
    """Base of all refusals. Subclasses `ValueError`, so code that guards against bad values catches it."""


class ConfigError(DeltaKVError):
    """A method's configuration does not hold together: budgets, pages, names, options."""


class PlanError(DeltaKVError):
    """A layer plan is malformed, or made for a model of another depth."""


class UnsupportedModelError(DeltaKVError):
    """The model has a mechanism that is not covered, such as MLA or logit soft-capping."""


class UnsupportedUseError(DeltaKVError):
    """A supported model was asked for something that cannot work together with a method."""


class MaskError(DeltaKVError):
    """An attention mask with holes, or one that disagrees with what the cache has stored."""


class InputError(DeltaKVError):
    """A file, prompt or option given to the command line cannot be used."""


class OffloadError(DeltaKVError):
    """The KV cache in host memory: no room for it, pinning refused, or a copy that failed."""
