"""Errors that the command line reports in one line, and that several rooms raise."""


class UsageError(Exception):
    """An option that makes no sense, or not with the others; the message is one line."""
