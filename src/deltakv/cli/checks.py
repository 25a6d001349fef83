"""Checks that need the model's config alone, made before its weights are loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from deltakv.config import Method
from deltakv.plan import model_fingerprint


def check_methods(
    model: str,
    methods: Sequence[Method | str],
    check: Callable[[Any], None] = lambda config: None,
    by_dims: bool = False,
) -> Any:
    """Refuses what does not fit the model: its kind, a plan for another depth, what `check` finds.

    by_dims: whether a name of `bench`'s dimensions will do, because nothing but the config is wanted.
    Gives back the text model's config. Raises `DeltaKVError` subclasses.
    """
    from deltakv import loading
    from deltakv.bench.dims import find_config
    from deltakv.integrations.hf.support import model_shape

    config = find_config(model) if by_dims else loading.load_config(loading.locate(model)).get_text_config()
    shape = model_shape(config)
    for method in methods:
        if isinstance(method, Method):
            method.layer_plan(len(shape.planned_layers)).check_made_for(model_fingerprint(config))
    check(config)
    return config
