"""What the subcommands of `deltakv bench` share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deltakv.cli import options
from deltakv.errors import InputError

#: Stock transformers with a static cache, as the command line calls it.
STATIC = "stock-static"


class Job:
    """What the subcommands share: everything is checked first, and the model made last.

    bandwidth: bytes a second of a copy on the device, once `work` or `measure_bandwidth` has run.
    """

    bandwidth: float

    def __init__(
        self,
        model: str,
        methods: list[str],
        device: str,
        dtype: str,
        output_json: Path | None,
        plot: Path | None,
    ) -> None:
        self.left_out: list[str] = []
        names = list(dict.fromkeys(methods))
        parsed = [name if name == STATIC else options.parse_method(name, model, [STATIC]) for name in names]
        self.methods = list(zip(names, parsed, strict=True))
        self._json, self._plot = output_json, plot
        if plot is None and output_json is not None:
            self._plot = output_json.with_suffix(".png")
        options.check_picture(self._plot, (".png", ".svg", ".pdf"))
        options.check_output(self._json, self._plot)
        if self._plot is not None:
            import matplotlib  # noqa: F401  now, and not after minutes of measuring

        import torch

        from deltakv.bench.dims import find_config
        from deltakv.integrations.hf.support import model_shape
        from deltakv.loading.model import DTYPES, find_device

        if dtype not in DTYPES:
            raise InputError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
        self.device = find_device(device)
        self.name, self.config = model, find_config(model)
        default = "bfloat16" if self.device.type == "cuda" else "float32"
        self.dtype = getattr(torch, default if dtype == "auto" else dtype)
        shape = model_shape(self.config)
        if any(shape.windows):
            raise InputError(f"{model} has layers with a sliding window, whose caches bench cannot fill at random")
        for name, method in self.methods:
            if not isinstance(method, str):
                method.layer_plan(len(shape.planned_layers))
                if method.evicts:
                    raise InputError(
                        f"method {name!r} evicts, and a cache that bench fills at random has no past to evict by; "
                        "use `deltakv compare`"
                    )

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def device_name(self) -> str:
        import torch

        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"

    def compiled(self, wanted: bool | None) -> bool:
        return self.device.type == "cuda" if wanted is None else wanted

    def extend_positions(self, length: int) -> None:
        """Lets the model, whose weights are random anyway, reach `length` tokens."""
        from deltakv.bench.dims import resized

        self.config = resized(self.config, length)

    def measure_bandwidth(self) -> None:
        from deltakv.bench.clock import copy_bandwidth

        self.bandwidth = copy_bandwidth(self.device)

    @contextmanager
    def work(self, what: str, count: int) -> Iterator[tuple[Any, Callable[[str], None]]]:
        """Makes the model and shows progress. Gives the model, and what to tell what is begun."""
        from deltakv.bench.dims import make_model

        self.measure_bandwidth()
        with options.status("making the model"):
            model = make_model(self.config, self.dtype, self.device)
        with options.progress() as bars:
            task = bars.add_task(what, total=count)

            def advance(name: str) -> None:
                bars.update(task, description=f"{what}: {name}", advance=1)

            yield model, advance

    def leave_out(self, what: str) -> None:
        """Notes that `what` ran out of the device's memory."""
        self.left_out.append(what)

    def require(self, results: Sequence[Any]) -> None:
        """Says what was left out, or raises `InputError` if that is everything."""
        if not results:
            raise InputError("nothing fits the device's memory; give a smaller --batch-size or --input-len")
        if self.left_out:
            options.say(f"left out, for it does not fit the device's memory: {'; '.join(self.left_out)}")

    def show(self, table: Any, title: str) -> None:
        from deltakv.report.tables import print_table

        print_table(table, title)

    def write(self, facts: dict[str, Any], results: Iterable[dict[str, Any]], *, say: bool = True) -> None:
        from deltakv.bench.provenance import provenance

        header = {**provenance(), "model": self.name, "dtype": self.dtype_name, "device": self.device_name}
        header["left_out"] = self.left_out
        options.write_json(self._json, {**header, "copy_bandwidth": self.bandwidth, **facts, "results": list(results)})
        if self._json is not None and say:
            options.say(f"json: {self._json}")

    def draw(self, plot: Callable[[Sequence[Any], str, Path], None], results: list[Any], title: str) -> None:
        if self._plot is not None:
            plot(results, title, self._plot)
            options.say(f"plot: {self._plot}")
