"""The methods by name: their configs, their selectors, and how they are written on a command line."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deltakv.config import Delta, Full, Method
from deltakv.errors import ConfigError, PlanError
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
from deltakv.methods.a2sf import A2SFEvictor
from deltakv.methods.base import Evictor, Lengths, PageBounds, Picks, Refresher, Selector, SoftmaxStats, listed, marked
from deltakv.methods.delta import DeltaSelector
from deltakv.methods.full import FullSelector
from deltakv.methods.h2o import H2OEvictor
from deltakv.methods.indexcache import IndexCacheSelector
from deltakv.methods.lazyeviction import LazyEvictor
from deltakv.methods.lessismore import LessIsMoreSelector
from deltakv.methods.memory import Memory, Tally
from deltakv.methods.quest import QuestSelector
from deltakv.methods.refreshkv import RefreshKVSelector
from deltakv.methods.streaming import StreamingSelector
from deltakv.methods.tactic import TacticSelector
from deltakv.methods.tidal import TidalSelector
from deltakv.methods.tokenselect import TokenSelectSelector
from deltakv.methods.unscored import window_of
from deltakv.plan import LayerPlan, load_settings, model_fingerprint
from deltakv.plans import MEASURED, measured_plan

#: Config classes by the name that a command line or a server's config gives them.
REGISTRY: dict[str, type[Method]] = {}

_SELECTORS: dict[type[Method], Callable[[Any], Selector | Refresher | Evictor]] = {}


def register(config: type[Method], selector: Callable[[Any], Selector | Refresher | Evictor]) -> None:
    """Makes a method known under its `algorithm` name.

    selector: called with a config, gives its `Selector`; a `Refresher` where the config `remembers`, and an `Evictor`
        where it `evicts`.
    """
    REGISTRY[config.algorithm] = config
    _SELECTORS[config] = selector


register(Full, FullSelector)
register(Delta, DeltaSelector)
register(StreamingLLM, StreamingSelector)
register(Quest, QuestSelector)
register(TidalDecode, TidalSelector)
register(LessIsMore, LessIsMoreSelector)
register(Tactic, TacticSelector)
register(TokenSelect, TokenSelectSelector)
register(RefreshKV, RefreshKVSelector)
register(IndexCache, IndexCacheSelector)
register(H2O, H2OEvictor)
register(A2SF, A2SFEvictor)
register(LazyEviction, LazyEvictor)


def selector(config: Method) -> Any:
    """The `Selector` (or `Refresher`) that carries out `config`. Raises `ConfigError` if its class is not
    registered."""
    if type(config) not in _SELECTORS:
        raise ConfigError(f"{config!r} is not a method; allowed are {', '.join(c.__name__ for c in _SELECTORS)}")
    return _SELECTORS[type(config)](config)


#: Gives the `model_fingerprint` of the model that a method is for: asked only for the plan "measured".
MadeFor = Callable[[], str | None]


def from_options(algorithm: str, options: dict[str, Any], made_for: MadeFor = lambda: None) -> Method:
    """The config of that name with these options; what they leave open, a plan file of that method says, if there is
    one.

    Raises `ConfigError` that lists what is allowed, or `PlanError` where no plan was measured.
    """
    if algorithm not in REGISTRY:
        raise ConfigError(f"unknown method {algorithm!r}; allowed are {', '.join(sorted(REGISTRY))}")
    config = REGISTRY[algorithm]
    if options.get("plan") == MEASURED:
        options = {**options, "plan": str(_measured(made_for))}
    settings = load_settings(options.get("plan"))
    if (found_for := settings.pop("algorithm", algorithm)) != algorithm:
        raise PlanError(
            f"the plan file {options['plan']} was calibrated for {found_for!r}, and this is {algorithm!r}, whose "
            f"layers read other things; use {found_for}:plan=..., or give the plan's letters themselves"
        )
    options = {**settings, **options}
    allowed = option_types(config)
    if unknown := sorted(set(options) - set(allowed)):
        raise ConfigError(f"method {algorithm!r} has no option {unknown[0]!r}; allowed are {', '.join(allowed)}")
    return config(**options)


def from_plan(path: str | os.PathLike[str], model: Any = None) -> Method:
    """The method that a plan file was calibrated with, its budget and all; "measured" for the one that the package has
    for the kind of this transformers model. Raises `PlanError` or `ConfigError`."""
    if path == MEASURED:
        path = _measured(lambda: None if model is None else model_fingerprint(model.config.get_text_config()))
    LayerPlan.load(path)
    return from_options(load_settings(path).get("algorithm", "delta"), {"plan": os.fspath(path)})


def _measured(made_for: MadeFor) -> Path:
    kind = made_for()
    if kind is None:
        raise PlanError(
            f"the plan {MEASURED!r} is for a kind of model, and no model is at hand; "
            f"give deltakv.from_plan({MEASURED!r}, model), or a plan file"
        )
    return measured_plan(kind)


def parse(text: str, made_for: MadeFor = lambda: None) -> Method:
    """A method as a command line writes it: `full`, or `delta:budget=512,sinks=0,plan=FFSRRR`.

    Options are the fields of the config: `plan`, and numbers, whole ones unless the field says float. Raises
    `ConfigError` otherwise.
    """
    return from_options(*read(text), made_for)


def read(text: str) -> tuple[str, dict[str, Any]]:
    """The name and the options of what `parse` takes, for `from_options`. Raises `ConfigError`."""
    algorithm, _, rest = text.strip().partition(":")
    types = option_types(REGISTRY[algorithm]) if algorithm in REGISTRY else {}
    options: dict[str, Any] = {}
    for part in filter(None, (piece.strip() for piece in rest.split(","))):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not value:
            raise ConfigError(f"{part!r} in method {text!r} is not of the form option=value")
        if name in options:
            raise ConfigError(f"method {text!r} gives the option {name!r} twice")
        options[name] = value if name == "plan" else _number(name, value, types.get(name), text)
    return algorithm, options


def option_types(config: type[Method]) -> dict[str, Any]:
    """The options of a method by name, with their types as the config writes them."""
    return {field.name: field.type for field in dataclasses.fields(config)}


def _number(name: str, value: str, kind: Any, text: str) -> int | float:
    whole = kind not in (float, "float")
    try:
        return int(value.replace("_", "")) if whole else float(value)
    except ValueError:
        raise ConfigError(f"{name}={value!r} in method {text!r} is not a {'whole ' if whole else ''}number") from None


__all__ = [
    "REGISTRY",
    "Evictor",
    "Lengths",
    "MadeFor",
    "Memory",
    "PageBounds",
    "Picks",
    "Refresher",
    "Selector",
    "SoftmaxStats",
    "Tally",
    "from_options",
    "from_plan",
    "listed",
    "marked",
    "option_types",
    "parse",
    "read",
    "register",
    "selector",
    "window_of",
]
