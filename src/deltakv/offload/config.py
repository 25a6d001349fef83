"""What a user says about a KV cache in host memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from deltakv.errors import ConfigError

MEBIBYTE = 1 << 20
BITS = (4, 8, 16)
SCHEDULES = ("pipelined", "serial")


@dataclass(frozen=True, kw_only=True)
class Host:
    """K and V in host memory, on the GPU in chunks; part of them recomputed (KVPR, arXiv 2411.17089).

    recompute: the share of a row's first tokens that is recomputed: "auto" (the scheduler's, from rates measured on
        this machine once), or a number in [0, 1].
    schedule: "pipelined", or "serial" as in the paper.
    bits: of K and V in host memory: 16 keeps them as they are (32 where they are fp32), 8 and 4 quantise them.
    overlap: copies run beside the GPU's work; False is for comparison.
    pinned: host memory is page-locked, which the bus needs to be fast and copies to be asynchronous.
    chunk_mib, chunks: device memory for what crosses: MiB each, and how many, at least 2 (one in use, one on its
        way).
    limit_mib: the most host memory to take, in MiB; None for all that is free.
    profile: a file of measured rates, for `recompute="auto"`; None for the one kept in the cache folder.
    Raises `ConfigError` if a value is not allowed.
    """

    recompute: float | str = "auto"
    schedule: str = "pipelined"
    bits: int = 16
    overlap: bool = True
    pinned: bool = True
    chunk_mib: float = 32
    chunks: int = 8
    limit_mib: float | None = None
    profile: str | Path | None = None

    def __post_init__(self) -> None:
        share = self.recompute
        if share != "auto" and (isinstance(share, str | bool) or not 0 <= share <= 1):
            raise ConfigError(f"recompute={share!r} is neither 'auto' nor a share between 0 and 1")
        if self.schedule not in SCHEDULES:
            raise ConfigError(f"schedule={self.schedule!r} is not one of {', '.join(SCHEDULES)}")
        if type(self.bits) is not int or self.bits not in BITS:
            raise ConfigError(f"bits={self.bits!r} is not one of {', '.join(map(str, BITS))} (16 does not quantise)")
        for name in ("overlap", "pinned"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r} must be True or False")
        if type(self.chunks) is not int or self.chunks < 2:
            raise ConfigError(
                f"chunks={self.chunks!r} must be a whole number of at least 2: one in use, one on its way"
            )
        for name, least in (("chunk_mib", 0), ("limit_mib", 0)):
            value = getattr(self, name)
            if value is None and name == "limit_mib":
                continue
            if type(value) not in (int, float) or not least < value < float("inf"):
                raise ConfigError(f"{name}={value!r} must be a number of MiB above {least}")

    @property
    def chunk_bytes(self) -> int:
        return max(1, int(self.chunk_mib * MEBIBYTE))

    @property
    def together(self) -> int:
        """X of a round of the serial schedule, in chunks: the other half is for the K and V that cross meanwhile."""
        return max(1, self.chunks // 2)

    @property
    def limit_bytes(self) -> int | None:
        return None if self.limit_mib is None else int(self.limit_mib * MEBIBYTE)
