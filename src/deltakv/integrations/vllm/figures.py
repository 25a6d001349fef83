"""Live figures: what decode steps attended to, for vLLM's log and its metrics endpoint.

The workers know them, and the endpoint is another process. vLLM has no channel from one to the other, so a worker
leaves its counts in a small file, and the endpoint's process reads it when asked. Counts follow from the rows' lengths
and the method's budget, which the host knows before a step runs: nothing waits for a device.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from vllm.config import ParallelConfig
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.logger import init_logger

from deltakv.config import Method
from deltakv.integrations.vllm.layout import NamedLayout
from deltakv.plan import Role

logger = init_logger("vllm.deltakv")  # below "vllm", where its log is set up

#: The folder of the files; every process of a server inherits it from the first.
_FOLDER = "DELTAKV_FIGURES"
LOG_SECONDS = 10.0


@dataclass
class Counts:
    """Since the start, over planned layers and decode rows. A row counts once a step; tokens count in each layer."""

    decode_rows: int = 0
    sparse_rows: int = 0
    picks: int = 0
    attended_tokens: int = 0
    full_tokens: int = 0


class Figures:
    """The counts of one worker.

    worker: what names its file. method: says how much of a row is kept. roles: of the layers counted.
    with_rows: whether rows are counted, too; where layers lie in several groups, the first one's do.
    seconds: how often they are shown at most. The last ones before a pause are shown when it ends.
    """

    def __init__(
        self, worker: str, method: Method, roles: Sequence[Role], with_rows: bool, seconds: float = 0.0
    ) -> None:
        self.counts = Counts()
        self._worker, self._method, self._with_rows, self._seconds = worker, method, with_rows, seconds
        self._shown = float("-inf")
        self._kept = np.zeros(0, dtype=np.int64)  # pages by length, looked up: the method answers for one at a time
        self._sparse = roles.count(Role.REUSE) + roles.count(Role.WINDOW)
        self._selecting = roles.count(Role.SELECT)
        self._layers = len(roles)
        self._logged = time.monotonic()

    def step(self, lengths: Sequence[int] | np.ndarray) -> None:
        """One step. lengths: tokens of each decode row, the current one included."""
        if not len(lengths):
            return
        counts, page_size = self.counts, self._method.page_size
        tokens = np.asarray(lengths, dtype=np.int64)
        pages = -(-tokens // page_size)
        left_out = pages - self._kept_pages(tokens)
        sparse, total = int((left_out > 0).sum()), int(tokens.sum())
        counts.decode_rows += self._with_rows * len(tokens)
        counts.sparse_rows += self._with_rows * sparse
        counts.picks += sparse * self._selecting
        counts.attended_tokens += total * self._layers - int(left_out.sum()) * page_size * self._sparse
        counts.full_tokens += total * self._layers
        self._publish()

    def _kept_pages(self, tokens: np.ndarray) -> np.ndarray:
        longest = int(tokens.max())
        if longest >= len(self._kept):
            more = range(len(self._kept), 2 * longest + 1)
            self._kept = np.append(self._kept, [self._method.kept_pages(length) for length in more])
        kept: np.ndarray = self._kept[tokens]
        return kept

    def _publish(self) -> None:
        now = time.monotonic()
        if now - self._shown < self._seconds:
            return
        self._shown = now
        self._write()
        if now - self._logged >= LOG_SECONDS:
            self._logged = now
            logger.info("%s", self)

    def __str__(self) -> str:
        counts = self.counts
        share = counts.attended_tokens / max(1, counts.full_tokens)
        return (
            f"deltakv: {counts.sparse_rows:,} of {counts.decode_rows:,} decoded rows were sparse, "
            f"{counts.picks:,} picks; attended to {share:.1%} of what full attention would have"
        )

    def _write(self) -> None:
        folder = os.environ.get(_FOLDER)
        if folder is None:
            return
        Path(folder).mkdir(mode=0o700, exist_ok=True)
        part = Path(folder) / f".{self._worker}"
        part.write_text(json.dumps(asdict(self.counts)), encoding="utf-8")
        os.replace(part, Path(folder) / f"{self._worker}.json")


def figures_of(
    layout: NamedLayout, layer_names: Sequence[str], parallel: ParallelConfig, seconds: float = 0.0
) -> Figures | None:
    """The counts of a worker's layers that share a block table; None where another one counts for it: the ranks of a
    tensor-parallel group see the same rows. seconds: as in `Figures`."""
    counted = [role for name, role in layout.roles.items() if name in layer_names]
    if not counted or get_tensor_model_parallel_rank():
        return None
    first = layout.first() in layer_names
    # Ranks count from 0 in each replica of data parallelism, whose index tells them apart.
    replica = f"replica{parallel.data_parallel_index}-" if parallel.data_parallel_index else ""
    worker = f"{replica}rank{parallel.rank}{'' if first else f'-{layer_names[0]}'}"
    return Figures(worker, layout.settings.method, counted, first, seconds)


def announce() -> None:
    """In each process of a server, before it has others: where files are, and the endpoint that reads them."""
    from prometheus_client import REGISTRY

    if _FOLDER in os.environ:
        return
    folder = Path(tempfile.gettempdir()) / f"deltakv-{os.getpid()}-{time.time_ns()}"
    os.environ[_FOLDER] = str(folder)
    REGISTRY.register(_Endpoint(folder))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)


class _Endpoint:
    """A collector of prometheus_client. Where no worker counts, it shows nothing."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def collect(self) -> Iterable[Any]:
        from prometheus_client.core import CounterMetricFamily

        files = sorted(self._folder.glob("*.json"))
        counts = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}
        for name in Counts.__dataclass_fields__ if counts else ():
            family = CounterMetricFamily(f"deltakv_{name}", f"deltakv: {name.replace('_', ' ')}", labels=["worker"])
            for worker, values in counts.items():
                family.add_metric([worker], values[name])
            yield family
