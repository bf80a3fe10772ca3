"""Data files for the tests of several folders."""

from __future__ import annotations

import json
from pathlib import Path

PHRASES = ("clear lungs", "a small effusion", "an enlarged heart", "basal atelectasis")


def write_pairs(path: Path, count: int, *, short: bool = False) -> Path:
    """Write a preference file of `count` rows without images; `short`: answers of a few words."""
    rows = [
        {"prompt": f"Patient {i}?", "chosen": f"Clear lungs, line {i}.", "rejected": "Effusion."}
        if short
        else {
            "prompt": f"Report of patient {i}?",
            "chosen": f"There are {PHRASES[i % 4]}, {PHRASES[(i * 7 + 1) % 4]} and line {i}.",
            "rejected": f"There is {PHRASES[(i + 1) % 4]} only, line {i * 3}.",
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
