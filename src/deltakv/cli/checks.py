"""Checks that need the model's config alone, made before its weights are loaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from deltakv.cli import options
from deltakv.config import Delta, Method
from deltakv.plan import model_fingerprint
from deltakv.plans import MEASURED, plan_files


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


def hint(config: Any, model: str, methods: Sequence[Method | str]) -> None:
    """Says where a better plan is to be had, if DELTA is asked for with its default by depth."""
    if any(isinstance(method, Delta) and method.plan is None for method in methods):
        options.say(f"deltakv: {measured(config, model)}")


def measured(config: Any, model: str) -> str:
    """Whether the package has a plan for that kind of model, and where to get one."""
    path = plan_files().get(model_fingerprint(config))
    if path is None:
        return f"no plan was measured for this kind of model: deltakv calibrate --model {model} finds one"
    told = json.loads(path.read_text(encoding="utf-8"))
    paper, ours = (one["kl_mean"] for one in told["confirmed"][-2:])
    return (
        f"a plan was measured for this kind of model: --method delta:plan={MEASURED} (KL {ours:.4f} against "
        f"{paper:.4f} of the paper's plan, after {told['context']:,} tokens)"
    )
