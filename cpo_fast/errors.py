"""Errors that a user can act on; the command line prints them without a traceback."""

from __future__ import annotations


class CpoFastError(Exception):
    """Base of all errors whose message says what was wrong, where, and what to do."""


class UsageError(CpoFastError):
    """A flag, path or configuration that cannot work."""


class DataError(CpoFastError):
    """A data set that cannot be read at all (missing folder, missing columns, nothing usable)."""


def first_line(error: BaseException) -> str:
    """The first line of an error of a library, or its class where it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class RecordError(CpoFastError):
    """One record that is set aside; `reason` is what is counted, `detail` holds no text."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail
