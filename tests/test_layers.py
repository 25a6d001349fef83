"""The rooms of docs/design.md: imports point downwards only.

cli -> {evals, bench, report} -> integrations -> offload -> {methods, cache} -> {ops, plan, config, field}; errors,
folders, version and plans (files of measured ones) serve all. `loading` (files and names to models) stands beside the
integrations. `import deltakv` counts as one of the integrations, since that is what the package offers.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

import deltakv

SOURCE = Path(deltakv.__file__).parent

#: Rooms from the top down. Those in one line may know each other, but not both ways.
FLOORS: list[set[str]] = [
    {"__main__"},
    {"cli"},
    {"evals", "bench", "report"},
    {"integrations", "loading", "deltakv"},
    {"offload"},
    {"methods", "cache"},
    {"ops", "plan", "config", "field"},
    {"errors", "folders", "version", "plans"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}

#: Between rooms of one line: what may know what. All other pairs are strangers.
NEIGHBOURS = {
    ("config", "plan"),
    ("field", "config"),
    ("field", "plan"),
    ("evals", "bench"),
    ("report", "evals"),
    ("deltakv", "integrations"),
    ("plans", "errors"),
}

#: Rooms that never ask which engine they run in.
ENGINE_FREE = {"offload", "methods", "cache", "ops", "plan", "config", "field", "errors", "folders", "version", "plans"}
ENGINES = {"transformers", "vllm", "accelerate", "peft"}


def files() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def room_of(path: Path) -> str:
    """The folder or file of the package that a source file belongs to; the package's own `__init__` is `deltakv`."""
    first = path.relative_to(SOURCE).parts[0]
    return "deltakv" if first == "__init__.py" else first.removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Every module that a file imports, anywhere in it, with its line; relative ones made absolute."""
    package = ["deltakv", *path.relative_to(SOURCE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from deltakv import plan` imports the room, if there is one of that name.
            for alias in node.names:
                inside = module == "deltakv" and alias.name in FLOOR
                yield (f"deltakv.{alias.name}" if inside else module), node.lineno


def room_imports(path: Path) -> Iterator[tuple[str, int]]:
    """The rooms of the package that a file imports from, its own left out."""
    for module, line in imports(path):
        parts = module.split(".")
        if parts[0] == "deltakv":
            room = parts[1] if len(parts) > 1 else "deltakv"
            if room != room_of(path):
                yield room, line


def test_every_room_has_its_floor() -> None:
    assert {room_of(path) for path in files()} <= set(FLOOR)


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_downwards(path: Path) -> None:
    here = room_of(path)
    for room, line in room_imports(path):
        assert room in FLOOR, f"{path}:{line} imports deltakv.{room}, which is in no room of the design"
        down = FLOOR[room] > FLOOR[here] or (here, room) in NEIGHBOURS
        assert down, f"{path}:{line}: {here} must not import from {room}"


def test_neighbours_do_not_know_each_other_both_ways() -> None:
    for one, other in itertools.permutations(FLOOR, 2):
        assert not ((one, other) in NEIGHBOURS and (other, one) in NEIGHBOURS)
        if (one, other) in NEIGHBOURS:
            assert FLOOR[one] == FLOOR[other]


@pytest.mark.parametrize("room", sorted(ENGINE_FREE))
def test_engines_stay_in_their_integrations(room: str) -> None:
    for path in files():
        if room_of(path) == room:
            for module, line in imports(path):
                assert module.split(".")[0] not in ENGINES, f"{path}:{line}: {room} must not know {module}"


def test_transformers_and_vllm_do_not_know_each_other() -> None:
    for path in files():
        parts = path.relative_to(SOURCE).parts
        if parts[0] == "integrations" and len(parts) > 2:
            strange = {"hf": "vllm", "vllm": "transformers"}[parts[1]]
            for module, line in imports(path):
                assert strange not in module.split("."), f"{path}:{line}: {parts[1]} imports {module}"


def test_ops_know_tensors_only() -> None:
    """Nothing of the package but ops themselves, errors, and where compiled ones are kept."""
    for path in files():
        if room_of(path) == "ops":
            assert {room for room, _ in room_imports(path)} <= {"errors", "folders"}


def test_the_oracle_knows_nothing_of_the_package() -> None:
    oracle = Path(__file__).parent / "oracle.py"
    for node in ast.walk(ast.parse(oracle.read_text(encoding="utf-8"))):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not [name for name in names if name.split(".")[0] == "deltakv"]
