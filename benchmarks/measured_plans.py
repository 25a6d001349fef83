"""Writes src/deltakv/plans/, the plans that the package brings, from plan files of `deltakv calibrate` in results/.

    python benchmarks/measured_plans.py            # of several for a kind of model, the last one by name, so by date
    python benchmarks/measured_plans.py --check    # exit code 1 if they are not what benchmarks/results/ says

All that `calibrate` confirmed goes along, and where it was measured; what it tried on the way stays in results/.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PLANS = HERE.parent / "src" / "deltakv" / "plans"
LEFT_OUT = ("tried",)


def measured_plans() -> dict[str, str]:
    """By file name, what it says."""
    latest: dict[str, Path] = {}
    for path in sorted((HERE / "results").glob("*-plan.json")):
        latest[json.loads(path.read_text(encoding="utf-8"))["made_for"]] = path
    written = {}
    for path in latest.values():
        told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        kept = {name: value for name, value in told.items() if name not in LEFT_OUT}
        name = f"{Path(told['model']).name.lower()}.json"
        written[name] = json.dumps({**kept, "result": path.name}, indent=2) + "\n"
    return written


def main() -> None:
    wanted = measured_plans()
    if "--check" in sys.argv[1:]:
        found = {path.name: path.read_text(encoding="utf-8") for path in PLANS.glob("*.json")}
        if found != wanted:
            print("plans are not what benchmarks/results/ says; run python benchmarks/measured_plans.py")
            raise SystemExit(1)
        return
    for old in PLANS.glob("*.json"):
        old.unlink()
    for name, text in wanted.items():
        (PLANS / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
