"""The command line: `app` puts the commands together, `commands` has a file for each."""

from vitlr.cli.app import main

__all__ = ["main"]
