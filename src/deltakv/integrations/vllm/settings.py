"""What a server is asked for: the "deltakv" of vLLM's `--additional-config`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deltakv.config import Method, Sees
from deltakv.errors import ConfigError
from deltakv.methods import REGISTRY, MadeFor, from_options

#: The name under which `additional_config` holds it.
KEY = "deltakv"

#: What an example says, wherever a message needs one.
EXAMPLE = '--attention-backend CUSTOM --additional-config \'{"deltakv": {"algorithm": "delta", "budget": 1024}}\''

#: Ways to pick under tensor parallelism. "global": by all query heads, the same pick as on one device; "local": each
#: rank by its own heads, without communication.
TP_SELECTIONS = ("global", "local")


@dataclass(frozen=True)
class Settings:
    """A method, and how the ranks of a tensor-parallel group come to a pick. Raises `ConfigError`."""

    method: Method
    tp_selection: str = "global"

    def __post_init__(self) -> None:
        if self.tp_selection not in TP_SELECTIONS:
            raise ConfigError(f"tp_selection={self.tp_selection!r} is not one of {', '.join(TP_SELECTIONS)}")
        if not served(type(self.method)):
            allowed = ", ".join(sorted(name for name, config in REGISTRY.items() if served(config)))
            raise ConfigError(
                f"method {self.method.algorithm!r} is not served by vLLM yet, because its picks rest on more than the "
                f"softmax of one step, or on each head apart; allowed are {allowed}; deltakv.apply takes all"
            )


def served(config: type[Method]) -> bool:
    """Whether that method can pick in vLLM: from the softmax of a step alone, the same on all ranks of a group."""
    return config.sees is Sees.SOFTMAX and not config.remembers and not config.by_head


def settings_of(additional_config: Any, made_for: MadeFor = lambda: None) -> Settings | None:
    """The settings in vLLM's `additional_config`, or None if deltakv is not asked for.

    Raises `ConfigError` that says what is allowed.
    """
    if not isinstance(additional_config, dict) or KEY not in additional_config:
        return None
    asked = additional_config[KEY]
    if not isinstance(asked, dict):
        raise ConfigError(
            f'the "{KEY}" of --additional-config is {asked!r}, and must be an object, as in '
            '{"deltakv": {"algorithm": "delta", "budget": 1024}}'
        )
    options = dict(asked)
    algorithm, tp_selection = options.pop("algorithm", "delta"), options.pop("tp_selection", "global")
    return Settings(from_options(str(algorithm), options, made_for), tp_selection)
