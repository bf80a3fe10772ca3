"""Pseudo-random numbers that depend on a seed and names only, not on order or shard."""

from __future__ import annotations

import hashlib


def hash_seed(seed: int, *names: str) -> int:
    """A 64-bit integer determined by `seed` and `names` (BLAKE2b)."""
    digest = hashlib.blake2b("\x1f".join((str(seed), *names)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")
