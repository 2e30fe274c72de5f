"""`python -m stackwise` is the command `stackwise`."""

from stackwise.cli import main

if __name__ == "__main__":
    main(prog_name="stackwise")
