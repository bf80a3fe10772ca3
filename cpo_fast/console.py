"""The end of a command whose reader has gone: `cpo-fast data check ... | head`."""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Callable

READER_GONE = 128 + signal.SIGPIPE
"""What a shell reports of a command that SIGPIPE ended."""


def _reader_is_gone() -> bool:
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def piped(command: Callable[[], int]) -> int:
    """The command's exit status; `READER_GONE`, without a message, where standard output is a pipe
    that nobody reads any more. Other broken pipes are raised."""
    try:
        try:
            return command()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        # Python flushes once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_GONE
