"""Findings and impression out of the text of a radiology report.

Two rules by name. "careful" (the default) knows how the reports of MIMIC-CXR are written: headers
in capitals at the start of a line, often misspelt or replaced by the name of the view, addenda
above a line of underscores, sections that are missing. "authors" is the simpler rule of the authors
of CPO: the text from `FINDINGS:` to `IMPRESSION:`, set aside if it is empty.
"""

from __future__ import annotations

import re
from difflib import get_close_matches
from functools import lru_cache

from cpo_fast.errors import RecordError
from cpo_fast.types import Report

RULES = ("careful", "authors")

MAX_REPORT_CHARS = 200_000
"""Far above any report; keeps a mislabelled file from being parsed at length."""

# Capitals, then what headers are made of. Digits too ("CHEST, 2 VIEWS"); a colon inside a time of
# day is not followed by white space. The length bound keeps a line of capitals from backtracking.
_HEADER = re.compile(
    r"^[ \t]{0,8}([A-Z][A-Z0-9 ()\[\]/,&'.\-]{1,90}?)[ \t]*:(?=\s|$)", re.MULTILINE
)
# In mixed case only the plain names are headers: any word may begin a line of a sentence.
_TITLED = re.compile(
    r"^[ \t]{0,8}(Findings?(?: and impressions?)?|Impressions?|Conclusions?)[ \t]*:(?=\s|$)",
    re.MULTILINE,
)
_RULE_LINE = re.compile(r"^[ \t]*_{10,}[ \t]*$", re.MULTILINE)  # `___` alone is de-identified text
_TITLE_LINE = re.compile(r"^\s*(?:FINAL|PRELIMINARY|ADDENDUM)?\s*(?:REPORT|ADDENDUM)\s*:?\s*$")
_WORD = re.compile(r"\w")

_FINDINGS_WORDS = ("findings", "finding")
_IMPRESSION_WORDS = ("impression", "impressions", "conclusion", "conclusions")
_IMPRESSION_NAMES = frozenset(
    {"summary", "opinion", "interpretation", "final diagnosis", "assessment"}
)
_VIEW_WORDS = re.compile(
    r"\b(?:chest|views?|radiographs?|x-?ray|portable|frontal|lateral|ap|pa|cxr|films?)\b"
)
_ASKED = re.compile(r"\b(?:indications?|history|reason)\b")
_CONTEXT_WORDS = re.compile(
    r"\b(?:indications?|history|reason|comparisons?|techniques?|examination|exam|study|type|date|"
    r"procedure|clinical|information|notification|recommendations?|request|diagnosis|symptoms|"
    r"signs|question|addendum|dose|contrast|attending|referring|physicians?|"
    r"radiologists?|signed|dictated|transcribed|attestation)\b"
)


@lru_cache(maxsize=4096)
def _kind(header: str) -> str:
    """findings, impression, view, wet, context (what was asked and done) or other."""
    words = re.findall(r"[a-z]+", header.lower())
    for word in words:
        # One or two slips of the pen in these long words still leave a ratio above 0.86;
        # "compression" does not.
        if get_close_matches(word, _FINDINGS_WORDS, 1, 0.86):
            return "findings"  # also "FINDINGS AND IMPRESSION": the description leads
    for word in words:
        if get_close_matches(word, _IMPRESSION_WORDS, 1, 0.87):
            return "impression"
    if " ".join(words) in _IMPRESSION_NAMES:
        return "impression"
    if "wet" in words and "read" in words:
        return "wet"
    if _CONTEXT_WORDS.search(header.lower()):
        return "context"
    if _VIEW_WORDS.search(header.lower()):
        return "view"
    return "other"


def _unwrap(text: str) -> str:
    """One line with single spaces; "" when nothing but punctuation and `___` is in it."""
    joined = " ".join(text.split())
    return joined if _WORD.search(joined.replace("_", "")) else ""


def _sections(part: str) -> list[tuple[str, str, str]]:
    """(header, kind, text behind it as it stands) of `part`, in order; what comes before is left.

    A header of no known kind ("LUNGS:", "HEART:") belongs to the text of the section it stands in,
    and so does the name of a view within the findings.
    """
    found = {match.start(): match for match in _HEADER.finditer(part)}
    found |= {match.start(): match for match in _TITLED.finditer(part)}
    begun: list[tuple[re.Match[str], str]] = []
    for start in sorted(found):
        kind = _kind(found[start][1])
        inside = kind == "other" or (kind == "view" and begun[-1:] and begun[-1][1] == "findings")
        if not (begun and inside):
            begun.append((found[start], kind))
    ends = [match.start() for match, _ in begun[1:]] + [len(part)]
    return [
        (match[1], kind, part[match.end() : end])
        for (match, kind), end in zip(begun, ends, strict=False)
    ]


def _last_paragraph(part: str) -> str:
    """The last paragraph that describes: not a title, not behind a header of the request."""
    for paragraph in reversed(re.split(r"\n[ \t]*\n", part)):
        lines = [line for line in paragraph.split("\n") if not _TITLE_LINE.match(line)]
        kept = "\n".join(lines)
        _, kind, body = (_sections(kept) or [("", "other", kept)])[-1]
        said = _unwrap(kept if kind == "other" else body)
        if kind not in ("context", "wet") and said:
            return said
    return ""


def _careful(text: str) -> Report:
    stand_in = ""
    # What stands above a line of underscores is an addendum or a preliminary read: the report is
    # below.
    for part in reversed(_RULE_LINE.split(text)):
        found: dict[str, list[str]] = {}
        for _, kind, body in _sections(part):
            if said := _unwrap(body):
                found.setdefault(kind, []).append(said)
        # Two examinations dictated in one report repeat their sections; both describe this
        # patient's images.
        findings = " ".join(found.get("findings") or found.get("view") or ())
        impression = " ".join(found.get("impression", ()))
        if findings or impression:
            return Report(findings, impression)
        stand_in = stand_in or _last_paragraph(part) or " ".join(found.get("wet", ()))
    return Report(findings=stand_in)


def _authors(text: str) -> Report:
    _, _, rest = text.partition("FINDINGS:")
    findings, closed, _ = rest.partition("IMPRESSION:")
    return Report(findings=_unwrap(findings) if closed else "")


def parse_report(text: str, rule: str = "careful") -> Report:
    """Findings and impression of `text`, line wrapping undone, `___` left as it stands.

    Careful rule: the sections by their headers; a section named after the view ("PORTABLE CHEST:")
    is taken as the findings when there are none; if neither findings nor impression is present the
    last paragraph stands in, as findings. Authors' rule: findings only.

    Raises RecordError "no-findings-or-impression" when nothing is left and "report-too-long" beyond
    `MAX_REPORT_CHARS`; ValueError for an unknown rule.
    """
    if rule not in RULES:
        raise ValueError(f"sections must be one of {RULES}, not {rule!r}")
    if len(text) > MAX_REPORT_CHARS:
        raise RecordError("report-too-long", f"{len(text)} characters, at most {MAX_REPORT_CHARS}")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    report = _careful(text) if rule == "careful" else _authors(text)
    if not (report.findings or report.impression):
        raise RecordError("no-findings-or-impression", f"by the {rule} rule")
    return report


def indication(text: str) -> str:
    """Why the examination was asked for (INDICATION, HISTORY, REASON ...), or ""."""
    part = _RULE_LINE.split(text.replace("\r\n", "\n")[:MAX_REPORT_CHARS])[-1]
    for header, _, body in _sections(part):
        if _ASKED.search(header.lower()):
            return _unwrap(body)
    return ""
