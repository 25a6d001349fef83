"""The command line. `deltakv.cli:main` is the entry point."""

from deltakv.cli.main import main

__all__ = ["main"]
