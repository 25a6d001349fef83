"""The methods by name: their configs, their selectors, and how they are written on a command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from deltakv.config import Delta, Full, Method
from deltakv.errors import ConfigError
from deltakv.methods.base import Picks, Selector, SoftmaxStats
from deltakv.methods.delta import DeltaSelector
from deltakv.methods.full import FullSelector

#: Config classes by the name that a command line or a server's config gives them.
REGISTRY: dict[str, type[Method]] = {}

_SELECTORS: dict[type[Method], Callable[[Any], Selector]] = {}


def register(config: type[Method], selector: Callable[[Any], Selector]) -> None:
    """Makes a method known under its `algorithm` name. selector: called with a config, gives its `Selector`."""
    REGISTRY[config.algorithm] = config
    _SELECTORS[config] = selector


register(Full, FullSelector)
register(Delta, DeltaSelector)


def selector(config: Method) -> Selector:
    """The selector that carries out `config`. Raises `ConfigError` if its class is not registered."""
    if type(config) not in _SELECTORS:
        raise ConfigError(f"{config!r} is not a method; allowed are {', '.join(c.__name__ for c in _SELECTORS)}")
    return _SELECTORS[type(config)](config)


def from_options(algorithm: str, options: dict[str, Any]) -> Method:
    """The config of that name with these options. Raises `ConfigError` that lists what is allowed."""
    if algorithm not in REGISTRY:
        raise ConfigError(f"unknown method {algorithm!r}; allowed are {', '.join(sorted(REGISTRY))}")
    config = REGISTRY[algorithm]
    allowed = [field.name for field in dataclasses.fields(config)]
    if unknown := sorted(set(options) - set(allowed)):
        raise ConfigError(f"method {algorithm!r} has no option {unknown[0]!r}; allowed are {', '.join(allowed)}")
    return config(**options)


def parse(text: str) -> Method:
    """A method as a command line writes it: `full`, or `delta:budget=512,sinks=0,plan=FFSRRR`.

    Options are the fields of the config; all but `plan` are whole numbers. Raises `ConfigError` otherwise.
    """
    algorithm, _, rest = text.strip().partition(":")
    options: dict[str, Any] = {}
    for part in filter(None, (piece.strip() for piece in rest.split(","))):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not value:
            raise ConfigError(f"{part!r} in method {text!r} is not of the form option=value")
        if name in options:
            raise ConfigError(f"method {text!r} gives the option {name!r} twice")
        options[name] = value if name == "plan" else _whole_number(name, value, text)
    return from_options(algorithm, options)


def _whole_number(name: str, value: str, text: str) -> int:
    try:
        return int(value.replace("_", ""))
    except ValueError:
        raise ConfigError(f"{name}={value!r} in method {text!r} is not a whole number") from None


__all__ = ["REGISTRY", "Picks", "Selector", "SoftmaxStats", "from_options", "parse", "register", "selector"]
