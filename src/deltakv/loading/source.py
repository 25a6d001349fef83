"""What `--model` may be, and where its files are."""

from __future__ import annotations

import re
from pathlib import Path

from deltakv.errors import InputError
from deltakv.loading import gguf, smollm2

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def locate(model: str) -> str:
    """What `from_pretrained` takes for a model as the user names it: a folder's path, or a Hub name.

    `smollm2` is fetched and a GGUF file is converted on first use; both are kept in the cache folder.
    Raises `InputError` if there is no such folder or file, or if it does not hold a model.
    """
    if model.lower() == smollm2.NAME:
        return str(smollm2.folder())
    path = Path(model).expanduser()
    if path.is_file():
        return str(gguf.converted(path))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"the folder {model} holds no config.json; give one from save_pretrained, or a GGUF file")
        return str(path)
    if model.lower().endswith(".gguf") or path.is_absolute() or not _HUB_NAME.fullmatch(model):
        raise InputError(
            f"the model {model!r} does not exist; give a folder, a Hub name (owner/name), a GGUF file, "
            f"or {smollm2.NAME!r}"
        )
    return model
