"""Carries GGUF models to a machine that nothing can be fetched on, in pieces, and makes folders of them there.

python benchmarks/models.py pack qwen.gguf .gpu/q --name qwen   # here: .gpu/q0, .gpu/q1, ... of at most 59 MiB each
python benchmarks/models.py receive .gpu/q0 .gpu/q1             # there, as often as it takes; pieces are kept in /tmp
python benchmarks/models.py beside .gpu/qd qwen=FOLDER ...      # here: tokenizer and config of a folder converted here
python benchmarks/models.py convert .gpu/qd qwen smollm2        # there: /tmp/models/NAME, fp32: the file's numbers

Only `convert` needs more than Python's own library: torch, transformers, accelerate and gguf (a pure-Python wheel,
which travels too). Tokenizer and config are those made here: another version of transformers makes another tokenizer
of the same file (5.17 ends SmolLM2's answers at `<|im_start|>`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

#: What a call carries at most is 64 MiB, with the working tree; and one more place is left for small things.
PIECE = 59 * 2**20
HELD = Path("/tmp/pieces")
MODELS = Path("/tmp/models")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pack(source: Path, prefix: Path, name: str) -> None:
    """Writes PREFIX0, PREFIX1, ...: a folder each, with a piece of the file and what it is a piece of."""
    size, whole = source.stat().st_size, sha256(source)
    count = -(-size // PIECE)
    with source.open("rb") as file:
        for index in range(count):
            folder = prefix.with_name(f"{prefix.name}{index}")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "piece").write_bytes(file.read(-(-size // count)))
            told = {"name": name, "index": index, "count": count, "sha256": whole, "piece": sha256(folder / "piece")}
            (folder / "piece.json").write_text(json.dumps(told) + "\n", encoding="utf-8")
            print(f"{folder}: {(folder / 'piece').stat().st_size / 2**20:.1f} MiB")


def receive(folders: list[Path]) -> None:
    """Keeps pieces, and joins those of a model once all of them are there."""
    for folder in folders:
        told = json.loads((folder / "piece.json").read_text(encoding="utf-8"))
        if sha256(folder / "piece") != told["piece"]:
            sys.exit(f"{folder} has arrived damaged; carry it again")
        kept = HELD / told["name"]
        kept.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / "piece", kept / f"{told['index']}.part")
        (kept / f"{told['index']}.part").rename(kept / str(told["index"]))
        missing = [index for index in range(told["count"]) if not (kept / str(index)).exists()]
        print(
            f"{told['name']}: piece {told['index']} of {told['count']} is here, missing {missing or 'none'}", flush=True
        )
        if not missing:
            join(kept, told)


def join(kept: Path, told: dict[str, Any]) -> None:
    whole = HELD / f"{told['name']}.gguf"
    if whole.exists():
        return
    part = whole.with_suffix(".part")
    with part.open("wb") as out:
        for index in range(told["count"]):
            with (kept / str(index)).open("rb") as piece:
                shutil.copyfileobj(piece, out)
    if (found := sha256(part)) != told["sha256"]:
        sys.exit(f"{told['name']} joined has the SHA-256 {found}, not {told['sha256']}")
    part.rename(whole)
    print(f"{whole}: whole, {whole.stat().st_size:,} bytes", flush=True)


def beside(where: Path, name: str, folder: Path) -> None:
    """Packs all of a converted folder but its weights."""
    where.mkdir(parents=True, exist_ok=True)
    with tarfile.open(where / f"{name}.tgz", "w:gz") as tar:
        for file in sorted(folder.iterdir()):
            if file.suffix != ".safetensors":
                tar.add(file, file.name)


def convert(where: Path, name: str) -> None:
    """MODELS/name from HELD/name.gguf, in fp32: what the file's numbers are, whichever dtype they are loaded in. The
    rest is what `beside` packed."""
    folder, source = MODELS / name, HELD / f"{name}.gguf"
    if folder.is_dir():
        print(f"{folder}: there already")
        return
    if not source.exists():
        sys.exit(f"{source} is not there; receive its pieces first (this machine may be a fresh one)")
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))
    from deltakv.loading.gguf import _convert

    part = folder.with_name(f".{name}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    _convert(source, part)
    with tarfile.open(where / f"{name}.tgz") as tar:
        tar.extractall(part, filter="data")
    part.rename(folder)
    print(f"{folder}: {sum(file.stat().st_size for file in folder.iterdir()):,} bytes", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack")
    packing.add_argument("source", type=Path)
    packing.add_argument("prefix", type=Path)
    packing.add_argument("--name", required=True)
    commands.add_parser("receive").add_argument("folders", type=Path, nargs="+")
    for command in ("beside", "convert"):
        parsing = commands.add_parser(command)
        parsing.add_argument("where", type=Path)
        parsing.add_argument("names", nargs="+", help="of models; of beside: NAME=FOLDER")
    told = parser.parse_args()
    if told.command == "pack":
        pack(told.source, told.prefix, told.name)
    elif told.command == "receive":
        receive(told.folders)
    else:
        for name in told.names:
            if told.command == "convert":
                convert(told.where, name)
            else:
                name, _, folder = name.partition("=")
                beside(told.where, name, Path(folder))


if __name__ == "__main__":
    main()
