"""docs/data.md names every reason for which a record is set aside, and every format."""

from __future__ import annotations

import re
from pathlib import Path

from cpo_fast.data import STUDY_FORMATS
from cpo_fast.data.export import FORMATS
from cpo_fast.data.preference_rows import PARSERS

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs/data.md").read_text(encoding="utf-8")


def test_every_reason_is_documented() -> None:
    reasons: set[str] = set()
    for path in (ROOT / "cpo_fast/data").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        calls = r"(?:RecordError|_reject|RejectedRecord|note)\([^\"()]*(?:\([^()]*\)[^\"()]*)*"
        reasons.update(re.findall(calls + r"\"([a-z0-9]+(?:-[a-z0-9]+)+)\"", text))
    assert len(reasons) > 40
    assert {reason for reason in reasons if f"`{reason}`" not in DOCS} == set()


def test_every_format_is_documented() -> None:
    for name in (*STUDY_FORMATS[1:], *PARSERS):
        assert f"| `{name}` |" in DOCS
    assert "|".join(sorted(FORMATS, key=["jsonl", "ccf", "trl", "swift"].index)) in DOCS
