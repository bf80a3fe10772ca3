"""Errors for users; the command line prints them without a traceback."""

from __future__ import annotations


class CpoFastError(Exception):
    """Base of all errors whose message names the fault, its location and a remedy."""


class UsageError(CpoFastError):
    """An invalid flag, path or configuration."""


class DataError(CpoFastError):
    """An unreadable data set (missing folder, missing columns, no usable record)."""


def first_line(error: BaseException) -> str:
    """The first line of a library's error, or its class if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class RecordError(CpoFastError):
    """A record set aside; `reason` is counted, `detail` contains no text of the record."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail
