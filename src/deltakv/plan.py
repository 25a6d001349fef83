"""Layer plans: what each layer does at a decode step (DELTA, arXiv 2510.09883, section 3).

A plan has one role for each layer that joins it, in the model's order. In ordinary models these are all the layers;
in hybrids (Gemma-3, gpt-oss) the layers with a sliding window stay as they are and do not count.
"""

from __future__ import annotations

import enum
import itertools
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from deltakv.errors import PlanError
from deltakv.plans import MEASURED


class Role(enum.Enum):
    """What a layer does at a decode step; the value is its letter in a plan string."""

    FULL = "F"  #: attends to the whole cache
    SELECT = "S"  #: attends to the whole cache and picks pages (the paper's Δ-layer)
    REUSE = "R"  #: attends to the last pick alone
    WINDOW = "W"  #: attends to the first tokens and the latest ones alone, as many as a pick has; ends no pick's reuse


@dataclass(frozen=True)
class LayerPlan:
    """One role a layer.

    roles: a tuple of `Role`, at least one. A REUSE needs a SELECT somewhere before it; a WINDOW needs nothing.
    made_for: the `model_fingerprint` of the model that it was calibrated on, or None.
    Raises `PlanError` if that does not hold.
    """

    roles: tuple[Role, ...]
    made_for: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not self.roles:
            raise PlanError("a plan needs at least one layer; give one letter a layer, such as 'FFSRRR'")
        seen_select = False
        for index, role in enumerate(self.roles):
            seen_select |= role is Role.SELECT
            if role is Role.REUSE and not seen_select:
                raise PlanError(
                    f"layer {index} is REUSE, but no layer before it is SELECT, so there is no pick to reuse; "
                    f"make layer {index} 'F', 'S' or 'W', or put an 'S' before it (plan: {self})"
                )

    @classmethod
    def from_string(cls, letters: str) -> LayerPlan:
        """`"FFSRRR"` to a plan. Raises `PlanError` for letters other than F, S, R and W."""
        wrong = sorted(set(letters) - {role.value for role in Role})
        if wrong:
            raise PlanError(
                f"plan {letters!r} has the letters {wrong}; allowed are F (full), S (select), R (reuse), W (window)"
            )
        return cls(tuple(Role(letter) for letter in letters))

    @classmethod
    def from_layers(
        cls, depth: int, *, full: Iterable[int] = (), select: Iterable[int], window: Iterable[int] = ()
    ) -> LayerPlan:
        """The plan of `depth` layers in which `full`, `select` and `window` name layers (from 0); all others REUSE."""
        named = {Role.FULL: set(full), Role.SELECT: set(select), Role.WINDOW: set(window)}
        for one, other in itertools.combinations(named, 2):
            if both := named[one] & named[other]:
                raise PlanError(
                    f"layers {sorted(both)} are named as {one.name.lower()} and as {other.name.lower()}; name each once"
                )
        role_of = {layer: role for role, layers in named.items() for layer in layers}
        if outside := {i for i in role_of if not 0 <= i < depth}:
            raise PlanError(
                f"the plan names layers {sorted(outside)}, but the model has {depth} layers to plan (0 to {depth - 1})"
            )
        return cls(tuple(role_of.get(i, Role.REUSE) for i in range(depth)))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LayerPlan:
        """Reads a plan file: JSON with `plan` (letters), or with `depth`, `full`, `select` and `window` (lists of
        layers); and with `made_for`, if it was calibrated."""
        path = Path(path)
        try:
            data: Any = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise PlanError(f"plan file {path} does not exist") from None
        except OSError as error:
            raise PlanError(f"plan file {path} cannot be read: {error.strerror}") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise PlanError(f"plan file {path} is not JSON: {error}") from None
        try:
            if isinstance(data, dict) and isinstance(data.get("plan"), str):
                made_for = data.get("made_for")
                return replace(cls.from_string(data["plan"]), made_for=None if made_for is None else str(made_for))
            if isinstance(data, dict) and isinstance(data.get("depth"), int):
                full, window = data.get("full", []), data.get("window", [])
                return cls.from_layers(data["depth"], full=full, select=data["select"], window=window)
        except (KeyError, TypeError):
            pass
        raise PlanError(
            f'plan file {path} must hold {{"plan": "FFSR..."}} or '
            '{"depth": 28, "full": [0, 1], "select": [2, 14, 22]}'
        )

    def save(self, path: str | os.PathLike[str], **notes: Any) -> None:
        """Writes the plan as JSON; `notes` (model, data, versions) are kept beside it."""
        Path(path).write_text(json.dumps({"plan": str(self), **notes}, indent=2) + "\n", encoding="utf-8")

    def check_made_for(self, fingerprint: str) -> None:
        """Raises `PlanError` if it was calibrated on a model of another kind. fingerprint: see `model_fingerprint`."""
        if self.made_for not in (None, fingerprint):
            raise PlanError(
                f"the plan {self} was calibrated on another kind of model ({self.made_for}; this is {fingerprint}); "
                "run deltakv calibrate on this model, or give the plan's letters themselves"
            )

    def __str__(self) -> str:
        return "".join(role.value for role in self.roles)

    def __len__(self) -> int:
        return len(self.roles)

    def layers(self, role: Role) -> list[int]:
        """The layers of that role, in order."""
        return [i for i, r in enumerate(self.roles) if r is role]

    @property
    def reads_in_full(self) -> int:
        """How many layers read the whole cache at each step."""
        return len(self.layers(Role.FULL)) + len(self.layers(Role.SELECT))


def model_fingerprint(config: Any) -> str:
    """What kind of model a text config describes: its type and dimensions. Weights do not count, so that a plan serves
    what was fine-tuned from the model it was calibrated on."""
    names = (
        "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
        "head_dim", "vocab_size",
    )  # fmt: skip
    sizes = (f"{name}={value}" for name in names if (value := getattr(config, name, None)) is not None)
    return ", ".join([str(config.model_type), *sizes])


def all_full(depth: int) -> LayerPlan:
    """Every layer FULL: the plan of full attention."""
    return LayerPlan((Role.FULL,) * depth)


def paper(depth: int) -> LayerPlan:
    """The paper's settings for 28-layer Qwen models (0, 1 FULL; 2, 14, 22 SELECT), scaled to `depth` layers.

    The two first layers stay FULL and the third SELECTs; the later Δ-layers keep their relative place. Models of
    fewer than 4 layers have nothing to reuse from and stay FULL.
    """
    if depth < 4:
        return all_full(depth)
    return LayerPlan.from_layers(
        depth, full=(0, 1), select={2, max(2, round(depth * 14 / 28)), max(2, round(depth * 22 / 28))}
    )


def every(depth: int) -> LayerPlan:
    """Every layer SELECTs: for methods in which each picks for itself."""
    return LayerPlan((Role.SELECT,) * depth)


def first(depth: int) -> LayerPlan:
    """The first layer SELECTs and all others follow it: for picks that do not depend on the layer."""
    return LayerPlan.from_layers(depth, select=(0,))


def quest(depth: int) -> LayerPlan:
    """Quest's settings (arXiv 2406.10774, section 3.3): the first two layers FULL, the others SELECT."""
    return LayerPlan.from_layers(depth, full=range(min(2, depth)), select=range(2, depth))


def tidal(depth: int) -> LayerPlan:
    """TidalDecode's settings for 32-layer Llama models (arXiv 2410.05076, section 3.2: 0, 1 FULL; 2, 13 SELECT), scaled
    to `depth` layers. Models of fewer than 4 layers stay FULL."""
    if depth < 4:
        return all_full(depth)
    return LayerPlan.from_layers(depth, full=(0, 1), select={2, max(2, round(depth * 13 / 32))})


def interleaved(depth: int) -> LayerPlan:
    """One layer in four SELECTs, the first one included (IndexCache, arXiv 2603.12201: its uniform pattern)."""
    return LayerPlan.from_layers(depth, select=range(0, depth, 4))


def load_settings(spec: PlanSpec) -> dict[str, Any]:
    """The options that a plan file was calibrated with (`settings`: algorithm, budget, ...); none for what is no file.

    Raises `PlanError` if they are not an object of names and numbers.
    """
    if spec is None or isinstance(spec, LayerPlan) or str(spec) in PRESETS or not os.path.isfile(spec):
        return {}
    try:
        data = json.loads(Path(spec).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # `LayerPlan.load` says what is wrong with it
    settings = data.get("settings", {}) if isinstance(data, dict) else {}
    if not isinstance(settings, dict) or not all(isinstance(x, int | float | str) for x in settings.values()):
        raise PlanError(f'"settings" of the plan file {spec} must be an object of options, as calibrate writes it')
    return settings


#: Presets by name: each makes a plan for a depth. `docs/design.md` says where each comes from.
PRESETS = {
    "paper": paper,
    "full": all_full,
    "every": every,
    "first": first,
    "interleaved": interleaved,
    "quest": quest,
    "tidal": tidal,
}

#: What `plan=None` means.
DEFAULT_PRESET = "paper"

PlanSpec = LayerPlan | str | os.PathLike[str] | None


def resolve(spec: PlanSpec, depth: int) -> LayerPlan:
    """Turns what a user gives as `plan` into a plan for `depth` layers.

    `None` is the default by depth; a string is a preset's name, then letters, then a file's path.
    Raises `PlanError` if it is none of these, or a plan for another depth.
    """
    if spec is None:
        spec = DEFAULT_PRESET
    if not isinstance(spec, LayerPlan | str | os.PathLike):
        raise PlanError(f"plan={spec!r} is not a LayerPlan, a preset's name, a string of F, S, R and W, or a file")
    if isinstance(spec, str) and spec in PRESETS:
        return PRESETS[spec](depth)
    if spec == MEASURED:
        raise PlanError(
            f"plan={MEASURED!r} is for a kind of model, and has a budget of its own: deltakv.from_plan({MEASURED!r}, "
            f"model) gives the method; --method delta:plan={MEASURED} and a server's settings take the name"
        )
    if isinstance(spec, LayerPlan):
        plan = spec
    elif isinstance(spec, str) and spec and set(spec) <= {role.value for role in Role}:
        plan = LayerPlan.from_string(spec)
    elif isinstance(spec, os.PathLike) or os.path.exists(spec) or spec.endswith(".json"):
        plan = LayerPlan.load(spec)
    else:
        raise PlanError(
            f"plan {spec!r} is not a preset ({', '.join(sorted([*PRESETS, MEASURED]))}), not one letter a layer "
            "(F, S, R, W) and not a file"
        )
    if len(plan) != depth:
        raise PlanError(
            f"the plan {plan} is for {len(plan)} layers, but the model has {depth} layers to plan "
            "(layers with a sliding window do not count); give one letter for each"
        )
    return plan
