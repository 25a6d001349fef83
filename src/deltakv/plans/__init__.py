"""Plans that were measured, one JSON file a model: what `deltakv calibrate` has confirmed, as the package brings it.

`benchmarks/measured_plans.py` makes them of stored results. A plan is for a kind of model, told by its dimensions
(`deltakv.plan.model_fingerprint`), and brings its budget along; nothing takes one unless it is asked for by `MEASURED`.
"""

from __future__ import annotations

import json
from pathlib import Path

from deltakv.errors import PlanError

FOLDER = Path(__file__).parent

#: In place of a plan file: the one that was measured for the kind of model at hand.
MEASURED = "measured"


def plan_files() -> dict[str, Path]:
    """By the kind of model that they were measured on."""
    return {json.loads(path.read_text(encoding="utf-8"))["made_for"]: path for path in sorted(FOLDER.glob("*.json"))}


def measured_plan(made_for: str) -> Path:
    """The plan file for a kind of model, as `model_fingerprint` tells it. Raises `PlanError` that says what to do where
    there is none."""
    known = plan_files()
    if made_for not in known:
        names = ", ".join(path.stem for path in known.values()) or "none"
        raise PlanError(
            f"no plan was measured for this kind of model ({made_for}); deltakv calibrate finds one, and without a "
            f"plan it is the paper's, by depth; measured are {names}"
        )
    return known[made_for]
