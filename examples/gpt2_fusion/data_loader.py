"""Step 1: text becomes a prepared data set, by default this machine's Python library.

python data_loader.py --prepare [PATH…]
"""

import argparse
import sysconfig

from steps import stackwise


def main() -> None:
    """Prepare it, or say what it holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", default=[sysconfig.get_paths()["stdlib"]], metavar="PATH")
    parser.add_argument("--prepare", action="store_true", help="tokenize it into ./prepared")
    parser.add_argument("--vocab-size", default="4096")
    parser.add_argument("--max-bytes", default="8000000")
    options = parser.parse_args()
    if not options.prepare:
        parser.error("nothing to do: give --prepare")
    sizes = ["--vocab-size", options.vocab_size, "--max-bytes", options.max_bytes]
    stackwise("data", "prepare", *options.paths, "--out", "prepared", *sizes)


if __name__ == "__main__":
    main()
