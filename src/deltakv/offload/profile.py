"""What a machine can do for a model's cache, as measured there: bus, recomputation, attention.

Kept as JSON in the user's cache folder, by machine and model shape. Nothing here comes from a datasheet.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltakv.errors import InputError
from deltakv.folders import cache_folder
from deltakv.offload.scheduler import LayerShape, Rates

#: Changes when what is measured changes, so that older files are not taken for newer ones.
VERSION = 2


@dataclass(frozen=True)
class Timing:
    """One measurement. size: bytes for copies; rows * tokens for the GPU's work. seconds: the median of several."""

    size: int
    seconds: float

    @property
    def rate(self) -> float:
        """Size a second."""
        return self.size / self.seconds


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Measured on one machine for one layer shape and dtype. All timings ascend in size.

    machine, dtype: what was measured. shape: hidden, kv_heads, head_dim of the layer.
    to_device, to_host: copies by bytes, from and to pinned memory; to_device_pageable, to_host_pageable: not pinned.
    recompute: making K and V from X (projections, norm, RoPE), by tokens.
    attention: a chunk's attention at decode, by tokens. rest: a decode step of the layer without its cache, by rows.
    """

    machine: str
    dtype: str
    shape: tuple[int, int, int]
    to_device: tuple[Timing, ...]
    to_host: tuple[Timing, ...]
    to_device_pageable: tuple[Timing, ...]
    to_host_pageable: tuple[Timing, ...]
    recompute: tuple[Timing, ...]
    attention: tuple[Timing, ...]
    rest: tuple[Timing, ...]

    def __post_init__(self) -> None:
        for name in TIMINGS:
            timings = getattr(self, name)
            sizes = [timing.size for timing in timings]
            if not timings or sizes != sorted(set(sizes)) or min(sizes) < 1 or max(sizes) >= 1 << 63:
                raise InputError(f"a profile needs measurements of {name!r} in ascending size; measure it again")
            if any(not (math.isfinite(timing.seconds) and timing.seconds > 0) for timing in timings):
                raise InputError(f"a profile's {name!r} has times that are not above 0; measure it again")

    def rates(self, shape: LayerShape, batch: int, length: int, chunk_bytes: int, *, pinned: bool = True) -> Rates:
        """The rates for chunks of that size, and for the recomputation of one.

        batch, length: rows and their tokens, which attention has to read.
        Raises `InputError` if the profile is of another layer shape.
        """
        if self.shape != (shape.hidden, shape.kv_heads, shape.head_dim):
            raise InputError(
                f"the profile is of layers with hidden, KV heads and head_dim {self.shape}, but this model has "
                f"{(shape.hidden, shape.kv_heads, shape.head_dim)}; measure this one"
            )
        copies = self.to_device if pinned else self.to_device_pageable
        tokens = max(1, min(chunk_bytes // shape.alpha, batch * length))
        attention = seconds_of(self.attention, tokens) / tokens
        return Rates(
            bus=chunk_bytes / seconds_of(copies, chunk_bytes),
            gemm=tokens * shape.phi / seconds_of(self.recompute, tokens),
            other=seconds_of(self.rest, batch) + batch * length * attention,
            attention=attention,
        )

    def numbers(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)

    def save(self, path: Path) -> None:
        """Writes JSON; a reader never sees half of it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}")
        part.write_text(json.dumps({"version": VERSION, **self.numbers()}, indent=1) + "\n", encoding="utf-8")
        os.replace(part, path)

    @classmethod
    def load(cls, path: Path, dtype: object = None) -> Profile:
        """Reads what `save` wrote. dtype: torch's, that it must have been measured with. Raises `InputError` that says
        what is wrong with the file."""
        try:
            data: Any = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"the profile {path} cannot be read: {error.strerror}") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"the profile {path} is not JSON: {error}") from None
        if not isinstance(data, dict) or data.pop("version", None) != VERSION:
            raise InputError(f"{path} is not a profile of this version of deltakv; measure it again")
        try:
            for name in TIMINGS:
                data[name] = tuple(Timing(int(t["size"]), float(t["seconds"])) for t in data[name])
            hidden, kv_heads, head_dim = data.pop("shape")
            found = cls(shape=(int(hidden), int(kv_heads), int(head_dim)), **data)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"the profile {path} lacks a measurement ({error}); measure it again") from None
        wanted = str(dtype).removeprefix("torch.")
        if dtype is not None and found.dtype != wanted:
            raise InputError(
                f"the profile {path} was measured in {found.dtype}, but this model computes in {wanted}; measure it so"
            )
        return found


#: The measurements of a profile, by name.
TIMINGS = tuple(field.name for field in dataclasses.fields(Profile) if str(field.type).startswith("tuple[Timing"))


def seconds_of(timings: Sequence[Timing], size: float) -> float:
    """Seconds for `size`: between two measurements straight in logarithms (so a constant rate stays one and so does a
    constant time); below the first its time, beyond the last its rate."""
    if size <= timings[0].size:
        return timings[0].seconds
    for low, high in itertools.pairwise(timings):
        if size <= high.size:
            part = math.log(size / low.size) / math.log(high.size / low.size)
            return math.exp(math.log(low.seconds) + part * math.log(high.seconds / low.seconds))
    return timings[-1].seconds * size / timings[-1].size


def profile_path(machine: str, model: str) -> Path:
    """Where the profile of a machine and a model is kept. machine, model: any text that tells them apart."""
    words = re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")[:40]
    digest = hashlib.sha256(f"{VERSION}\n{machine}\n{model}".encode()).hexdigest()[:12]
    return cache_folder() / "offload" / f"{words}-{digest}.json"
