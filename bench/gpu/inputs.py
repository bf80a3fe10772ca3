"""A workspace limit for the checks."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def workspace(mib: int) -> Iterator[None]:
    """Limits the workspace of the loss op within the block."""
    before = os.environ.get("CPO_FAST_WORKSPACE_MIB")
    os.environ["CPO_FAST_WORKSPACE_MIB"] = str(mib)
    try:
        yield
    finally:
        if before is None:
            del os.environ["CPO_FAST_WORKSPACE_MIB"]
        else:
            os.environ["CPO_FAST_WORKSPACE_MIB"] = before
