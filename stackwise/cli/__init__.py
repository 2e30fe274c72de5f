"""The command line: a command parses, a library function acts, the command renders."""

import sys

try:
    from stackwise.cli.app import main
except ModuleNotFoundError as error:  # before anything can be shown in a better way
    if error.name != "click":
        raise
    sys.exit("stackwise: click is not installed\n  pip install stackwise installs what it needs")
except KeyboardInterrupt:
    sys.exit(130)

__all__ = ["main"]
