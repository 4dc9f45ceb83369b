"""The program `tinyvit`, also `python -m tinyvit`."""

import sys


def run() -> None:
    """Run the command line and end the process; also an interrupt while modules are imported takes one line."""
    try:
        from tinyvit.cli import main

        status = main()
    except KeyboardInterrupt:
        print("tinyvit: interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)


if __name__ == "__main__":
    run()
