"""The command line: a command parses, a library function acts, the command renders."""

from stackwise.cli.app import main

__all__ = ["main"]
