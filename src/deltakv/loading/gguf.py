"""GGUF files, converted once to a folder that `from_pretrained` loads in a second.

transformers reads GGUF by dequantising it tensor by tensor, 14-18 s for a model of 135M parameters; the
folder it is saved to, in fp32, holds the same numbers.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from deltakv.errors import InputError, UnsupportedModelError
from deltakv.folders import cache_folder

_SAMPLES, _SAMPLE_BYTES = 16, 65536


def converted(path: Path) -> Path:
    """The folder with the model of the GGUF file `path`, made now if it is not there yet.

    Raises `InputError` if the file is no GGUF file, the extra is missing or the disk is full, and
    `UnsupportedModelError` if transformers cannot read the file's architecture.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise InputError(f"{path} is not a GGUF file; give a GGUF file, or a folder that save_pretrained wrote")
    return convert_once(path, f"{path.stem}-{_fingerprint(path)}")


def convert_once(path: Path, key: str) -> Path:
    """`cache_folder()/key`, converted from `path` if it does not exist.

    The folder appears by a rename of a finished one, so a killed conversion leaves nothing that looks
    complete. A lock lets a second process wait for the first; the kernel frees it when its holder dies.
    """
    folder = cache_folder() / key
    if folder.is_dir():
        return folder
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"reading GGUF files needs {' and '.join(missing)}: pip install 'deltakv[gguf]'")
    from filelock import FileLock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{key}.lock"):
            if folder.is_dir():
                return folder
            for stale in folder.parent.glob(f".{key}.part-*"):
                shutil.rmtree(stale, ignore_errors=True)
            part = Path(tempfile.mkdtemp(prefix=f".{key}.part-", dir=folder.parent))
            try:
                _convert(path, part)
                os.chmod(part, 0o755)  # mkdtemp and safetensors write for their owner alone
                for file in part.iterdir():
                    file.chmod(0o644)
                os.rename(part, folder)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise InputError(f"cannot convert {path} into {folder.parent} ({error}); set DELTAKV_CACHE elsewhere") from None
    return folder


def _convert(path: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from deltakv.loading.model import quiet

    quiet()
    print(f"deltakv: converting {path.name} once, for fast starts later (about 15 s for 135M)", file=sys.stderr)
    # Its bar for each tensor is of use on a terminal alone.
    bars = sys.stderr if sys.stderr.isatty() else io.StringIO()
    try:
        with contextlib.redirect_stderr(bars):
            model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a broken file shows as whatever its reader stumbles over
        raise UnsupportedModelError(f"transformers cannot read {path}: {' '.join(str(error).split())[:300]}") from None
    need = sum(p.numel() * p.element_size() for p in model.parameters())
    free = shutil.disk_usage(folder).free
    if need > free:
        raise InputError(
            f"{path.name} needs {need / 1e9:.1f} GB in {folder.parent}, and {free / 1e9:.1f} GB are free; "
            "set DELTAKV_CACHE to another folder"
        )
    # The loaded model still says that it is quantised, though its numbers are not any more.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    note = {"converted_from": path.name, "bytes": path.stat().st_size, "dtype": "float32"}
    (folder / "deltakv_source.json").write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")


def _fingerprint(path: Path) -> str:
    """16 hex digits of the file's size, time and samples of its content: a moved file is known again."""
    stat = path.stat()
    digest = hashlib.sha256(f"{stat.st_size} {stat.st_mtime_ns}".encode())
    with path.open("rb") as file:
        for i in range(_SAMPLES):
            file.seek(max(0, stat.st_size - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]
