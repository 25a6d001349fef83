"""The entry point: registers the commands, and turns every refusal into one line and exit code 2."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

from deltakv.errors import DeltaKVError

_EXTRAS = {
    "typer": "cli", "rich": "cli", "matplotlib": "plot", "gguf": "gguf", "accelerate": "gguf", "vllm": "vllm",
    "lm_eval": "eval", "math_verify": "eval", "datasets": "eval",
}  # fmt: skip


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line on `args` (default: the process's own) and exits.

    0 is done, 2 bad input, 130 interrupted.
    """
    # Both talk on import, of files built for other machines and of deprecations that are not the user's.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        code = _run(args)
        sys.stdout.flush()
    except DeltaKVError as error:
        code = _refuse(str(error))
    except ModuleNotFoundError as error:
        if (extra := _EXTRAS.get(str(error.name).split(".")[0])) is None:
            raise
        code = _refuse(f"{error.name} is not installed; it comes with: pip install 'deltakv[{extra}]'")
    except KeyboardInterrupt:
        code = _refuse("interrupted", code=130)
    except BrokenPipeError:
        # Whoever read our output has left; python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)


def _run(args: Sequence[str] | None) -> int:
    import typer

    from deltakv.cli.app import app

    command = typer.main.get_command(app)
    try:
        return command.main(args=args, prog_name="deltakv", standalone_mode=False) or 0
    except Exception as error:
        if "torch" in sys.modules and isinstance(error, sys.modules["torch"].OutOfMemoryError):
            said = ". ".join(str(error).split(". ")[:2])  # and then it tells of its allocator
            return _refuse(f"the device's memory is not enough for this ({said.rstrip('.')}); give it less to do")
        if isinstance(error, RuntimeError) and "can't allocate memory" in str(error):
            return _refuse("the host's memory is not enough for this; give it less to do")
        # A wrong option, whichever click typer stands on: both give these two.
        if not hasattr(error, "format_message") or not hasattr(error, "exit_code"):
            raise
        context = getattr(error, "ctx", None)
        return _refuse(f"{error.format_message()} (see: {context.command_path if context else 'deltakv'} --help)")


def _refuse(message: str, code: int = 2) -> int:
    print(f"deltakv: {' '.join(message.split())}", file=sys.stderr)
    return code
