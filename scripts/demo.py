"""`make demo`: SmolLM2 answers a question over a long real text with DELTA beside full attention.

Runs the same commands that a user would type, and prints each of them.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

OUT = Path("demo-output")
#: What Python's own language reference says of its debugger, cut at a paragraph: about 4,300 tokens.
TOPIC, LENGTH = "debugger", 16500
QUESTION = "What is the pdb module?"
CONTEXT, POSITIONS = 4000, 256
METHODS = ("full", "delta")


def deltakv(*args: str) -> None:
    """Prints a command and runs it; ends the demo if it fails."""
    print(f"\n$ deltakv {shlex.join(args)}", flush=True)
    code = subprocess.run([sys.executable, "-m", "deltakv", *args], check=False).returncode
    if code:
        sys.exit(code)


def main() -> None:
    start = time.monotonic()
    OUT.mkdir(exist_ok=True)
    text = OUT / "text.txt"
    text.write_text(topics[TOPIC][:LENGTH].rpartition("\n\n")[0], encoding="utf-8")
    print(f"The text: Python's own documentation of its {TOPIC} ({text})")

    for method in METHODS:
        deltakv("generate", QUESTION, "--file", str(text), "--method", method, "-n", "60")
    methods = [word for method in (*METHODS, "stock-static") for word in ("--method", method)]
    results = OUT / "compare.json"
    sizes = ["--context", str(CONTEXT), "--positions", str(POSITIONS)]
    deltakv("compare", *methods, "--text", str(text), *sizes, "--json", str(results))
    picture = OUT / "inspect.png"
    deltakv("inspect", "--method", METHODS[1], "--text", str(text), "--context", str(CONTEXT), "--out", str(picture))

    print(f"\nDone in {time.monotonic() - start:.0f} s. Look at")
    for path, what in (
        (results.with_suffix(".png"), "speed beside fidelity"),
        (picture, "which pages each Δ-layer picks"),
        (picture.with_suffix(".html"), "the same to touch, with the text of each page"),
        (results, "all numbers"),
    ):
        print(f"  {path}  {what}")


if __name__ == "__main__":
    main()
