"""Exit of a command whose output pipe is closed: `cpo-fast data check ... | head`."""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Callable

READER_GONE = 128 + signal.SIGPIPE
"""The shell's status of a command ended by SIGPIPE."""


def _reader_is_gone() -> bool:
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def run_command(command: Callable[[], int]) -> int:
    """Run a command and return its exit status; `READER_GONE`, without a message, if standard
    output is a closed pipe. Other broken pipes are raised."""
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
