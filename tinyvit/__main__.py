"""`python -m tinyvit`: the same as the command `tinyvit`."""

from tinyvit.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
