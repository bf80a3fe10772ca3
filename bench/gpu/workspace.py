"""Workspace limit of the loss op."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def limit_workspace(mib: int) -> Iterator[None]:
    """Limit the workspace of the loss op within the block."""
    before = os.environ.get("CPO_FAST_WORKSPACE_MIB")
    os.environ["CPO_FAST_WORKSPACE_MIB"] = str(mib)
    try:
        yield
    finally:
        if before is None:
            del os.environ["CPO_FAST_WORKSPACE_MIB"]
        else:
            os.environ["CPO_FAST_WORKSPACE_MIB"] = before
