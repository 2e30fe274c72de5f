"""`python -m stackwise` is the command `stackwise`."""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    del sys.path[0]  # the current directory: a random.py that lies there is not to be run

from stackwise.cli import main

if __name__ == "__main__":
    main(prog_name="stackwise")
