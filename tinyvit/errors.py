"""Errors that the command line reports in one line, and that several rooms raise."""

from pathlib import Path


class ReportedError(Exception):
    """Work that failed; the message is one line that says what was found, what was expected and what would help."""


class UsageError(ReportedError):
    """An option that makes no sense, or not with the others."""


class Stopped(Exception):
    """A signal stopped the run at `out`, which was saved."""

    def __init__(self, signum: int, out: Path) -> None:
        super().__init__(signum, out)
        self.signum, self.out = signum, out
