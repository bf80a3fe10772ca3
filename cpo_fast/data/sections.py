"""Findings and impression from the text of a radiology report.

There are two rules. "careful" (default) handles the layout of MIMIC-CXR reports: headers in
capitals at the start of a line, often misspelt or replaced by the name of the view, addenda above a
line of underscores, missing sections. "authors" is the simpler rule of the CPO authors: the text
from `FINDINGS:` to `IMPRESSION:`; a report where it is empty is set aside.
"""

from __future__ import annotations

import re
from difflib import get_close_matches
from functools import lru_cache
from itertools import dropwhile

from cpo_fast.data.notices import describes, is_signature, sentences
from cpo_fast.errors import RecordError
from cpo_fast.types import Report

RULES = ("careful", "authors")

MAX_REPORT_CHARS = 200_000
"""Far above any report; limits the time spent on a mislabelled file."""

# Line patterns start with the preceding line break, which is faster to find than "^".
# A capital, then the characters of headers, digits included ("CHEST, 2 VIEWS"); a colon within a
# time of day is not followed by white space. The length bound limits backtracking in a line of
# capitals.
_MAX_HEADER = 140
_HEADER = re.compile(r"\n[ \t]{0,40}([A-Z][A-Z0-9 ()\[\]/,&'.\-]{1,90}?)[ \t]*:(?=\s|$)")
_FOUND = r"(?:findings?|impressions?|conclusions?)"
_FOUND = rf"(?:final[ \t]+)?{_FOUND}(?:[ \t]*(?:and|with|[&/,-])[ \t]*{_FOUND})?"
_CONTEXT = (
    r"comparisons?|techniques?|indications?|history|(?:clinical|patient) (?:history|information|"
    r"indication)|reason for (?:exam\w*|study)|examination|exam|procedure|recommendations?|"
    r"recommendation\(s\)|notifications?|addendum|critical (?:findings?|results?)|"
    r"(?:prior|previous|clinical) (?:findings?|impressions?)|findings? (?:were )?(?:discussed|"
    r"communicated|reported|conveyed|called|relayed)(?: (?:with|to|by))?"
)
# In mixed case only these names are headers, since any word can start a line of a sentence.
_TITLED = re.compile(rf"\n[ \t]{{0,40}}((?i:{_FOUND}|{_CONTEXT}))[ \t]*:(?=\D|$)")
# After the end of a sentence, another header or several spaces; in capitals after any word.
_INLINE = re.compile(
    rf"(?:[ \t](?=[A-Z])(?:(?<=[.!?:;)_ \t].)|(?<=[a-z0-9,].)(?=[A-Z]{{2}}))|"
    rf"(?<=[.;)])(?=[A-Z]{{6}}))"
    rf"((?i:{_FOUND}|{_CONTEXT})|[A-Z]{{6,12}})[ \t]*:(?=\D|$)"
)
# A separate line without a colon, of these words only: "FINDINGS", "Final Impression".
_ALONE = re.compile(r"\n[ \t*]{0,40}([A-Z][A-Za-z()/& \t]{2,50})([.;*-]*)[ \t]*(?=\n|$)")
_ALONE_WORDS = (
    "findings", "finding", "impression", "impressions", "conclusion", "conclusions", "comparison",
    "comparisons", "technique", "indication", "indications", "history", "examination", "clinical",
    "critical", "prior", "previous", "information", "reason", "for", "notification",
    "recommendation", "recommendations", "s", "and", "final", "chest", "radiographic", "of", "the",
)  # fmt: skip
_TITLE_LINE = re.compile(r"^\s*(?:FINAL|PRELIMINARY|ADDENDUM)?\s*(?:REPORT|ADDENDUM)\s*:?\s*$")
_PARAGRAPH = re.compile(r"\n[ \t]*\n")
_WORD = re.compile(r"\w")

# Start of another text: an addendum, the report, a preliminary report.
_BLOCK = re.compile(
    r"\n[ \t*]{0,60}(?:_{10,}[ \t]*(?=\n|$)|"  # `___` alone is de-identified text
    r"(?=(?:(?:FINAL|PRELIMINARY)[ \t]+)?REPORT[ \t]*:?[ \t]*(?:\n|$)|"
    r"(?:(?:FINAL|Final|FIRST|SECOND|THIRD|NEW|REPORT)[ \t]+)?(?:"
    r"ADDENDUM\b(?![ \t]+(?i:is|was|will|below|above)\b)|"
    r"Addendum\b(?:[ \t]*(?:[:#(\d\n-]|$)|[ \t]{2,}|[ \t]+(?:by\b|[A-Z])))))"
)
_ADDENDUM = re.compile(
    r"[\s*]*(?:(?:final|first|second|third|new|report)\s+)?addendum\b", re.IGNORECASE
)
_PRELIMINARY = re.compile(r"\s*(?:preliminary\s+report|wet\s+read)\b", re.IGNORECASE)

_FINDINGS_WORDS = ("findings", "finding")
_IMPRESSION_WORDS = ("impression", "impressions", "conclusion", "conclusions")
_IMPRESSION_NAMES = frozenset(
    {"summary", "opinion", "interpretation", "final diagnosis", "assessment"}
)
# Text of the clinician or an earlier report, and notifications.
_NOTIFIED = (
    r"\b(?:discussed|communicat\w*|notif\w*|convey\w*|relay\w*|reported|called|(?:tele)?phoned|paged|"
    r"e-?mailed|informed|acknowledged|reviewed|critical)\b"
)
_EARLIER = "(?:prior|previous|earlier|old|past|outside)"
_NOT_OF_THIS_REPORT = re.compile(
    rf"{_NOTIFIED}|\b(?:clinical|physical|operative|surgical|laboratory|{_EARLIER}\b.*\b(?:finding|"
    rf"impression|conclusion|report)|(?:findings?|impressions?) (?:on|of|from) (?:the )?{_EARLIER})"
)
_VIEW_WORDS = re.compile(
    r"\b(?:chest|views?|radiographs?|x-?ray|portable|frontal|lateral|ap|pa|cxr|films?)\b"
)
_VIEW_NAMES = frozenset({"view", "views", "number of views", "views obtained"})
_ASKED = re.compile(r"\b(?:indications?|history|reason)\b")
_ASIDE = re.compile(r"\b(?:comparisons?|techniques?|views?|contrast|dose)\b")
_CONTEXT_WORDS = re.compile(
    r"\b(?:indications?|history|reason|comparisons?|techniques?|examination|exam|study|type|date|"
    r"procedure|clinical|information|notification|recommendations?|request|diagnosis|symptoms|"
    r"signs|question|addendum|dose|contrast|attending|referring|physicians?|"
    r"radiologists?|signed|dictated|transcribed|attestation|critical|cc|approved)\b"
)
# Sentences that belong to COMPARISON, TECHNIQUE or HISTORY if findings follow in the same section.
_A_STUDY = r"(?:compar|prior|previous|radiograph|film|stud(?:y|ies)|exam|view|available|dated)"
_OWN = re.compile(
    rf"^\W*(?:none\b|no (?:prior|previous|comparison|relevant)\b.*{_A_STUDY}|(?:please|evaluate|"
    r"assess|rule out|r/o|question|concern|\?)|(?:and|also|chest|radiographs?|ct|mri?|frontal|"
    r"portable|pa|ap|lateral|single|two|prior|previous|multiple|reference|stud(?:y|ies)|_+|\d+)"
    r"(?!.*\b(?:is|are|was|were|has|have|shows?|remains?|there)\b))",
    re.IGNORECASE,
)
_NAMES_A_STUDY = re.compile(rf"\b(?:none|cta?|mri?|{_A_STUDY})|___|\d{{4}}", re.IGNORECASE)


@lru_cache(maxsize=4096)
def _kind(header: str) -> str:
    """findings, impression, view, wet, context (request, technique, notification) or other."""
    lower = " ".join(header.lower().split())
    words = re.findall(r"[a-z]+", lower)
    names = {
        "findings": any(get_close_matches(word, _FINDINGS_WORDS, 1, 0.86) for word in words),
        # One or two typos in these long words leave a ratio above 0.87; "compression" is below.
        "impression": any(get_close_matches(word, _IMPRESSION_WORDS, 1, 0.87) for word in words),
    }
    if any(names.values()) and _NOT_OF_THIS_REPORT.search(lower):
        return "context"
    for name, named in names.items():
        if named:
            return name  # "FINDINGS AND IMPRESSION" is findings
    if " ".join(words) in _IMPRESSION_NAMES:
        return "impression"
    if "wet" in words and "read" in words:
        return "wet"
    if _CONTEXT_WORDS.search(lower) or re.search(_NOTIFIED, lower) or lower in _VIEW_NAMES:
        return "context"
    if _VIEW_WORDS.search(lower):
        return "view"
    return "other"


def _join_lines(text: str) -> str:
    """One line with single spaces; "" if it has only punctuation and `___`."""
    joined = " ".join(text.split())
    return joined if _WORD.search(joined.replace("_", "")) else ""


@lru_cache(maxsize=4096)
def _is_header_word(word: str) -> bool:
    return bool(get_close_matches(word, _ALONE_WORDS, 1, 0.86))


def _stands_alone(match: re.Match[str], part: str) -> bool:
    """Whether a line without a colon is a header and not the end of a wrapped sentence."""
    if not all(map(_is_header_word, re.findall(r"[a-z]+", match[1].lower()))):
        return False
    if _kind(match[1]) not in ("findings", "impression", "context"):
        return False
    line = _line_before(match, part)
    if not line or line[-1] in ".!?:;)_" or _TITLE_LINE.match(line):
        return True
    if match[2] or not match[1].isupper():
        return False
    return not line.isupper() or _HEADER.match("\n" + line) is not None


def _line_before(match: re.Match[str], part: str) -> str:
    end = match.start()
    return part[part.rfind("\n", 0, end) + 1 : end].strip()


def _headers(part: str) -> dict[int, re.Match[str]]:
    """Position -> match of every header of `part`; group 1 is its name."""
    lines = {match.start(1): match for match in _HEADER.finditer(part)}
    for match in _TITLED.finditer(part):
        if match[1][0].isupper() or not _line_before(match, part):
            lines[match.start(1)] = match
    found = {}
    for match in _INLINE.finditer(part):
        # "Impression" within "Findings and Impression:" is not a separate header
        near = range(match.start(1) - _MAX_HEADER, match.start(1))
        begun = [lines[place] for place in near if place in lines]
        within = any(match.start(1) < line.end() for line in begun)
        if not within and _kind(match[1]) in ("findings", "impression", "context"):
            found[match.start(1)] = match
    alone = (match for match in _ALONE.finditer(part) if _stands_alone(match, part))
    return {match.start(1): match for match in alone} | found | lines


def _sections(part: str) -> list[tuple[str, str, str]]:
    """(header, kind, text after it) of `part`, in order; text before the first header is dropped.

    A header of unknown kind ("LUNGS:", "HEART:") belongs to the text of its section, and so does
    the name of a view within the findings.
    """
    part = "\n" + part
    found = _headers(part)
    begun: list[tuple[re.Match[str], str]] = []
    for start in sorted(found):
        kind = _kind(found[start][1])
        inside = kind == "other" or (kind == "view" and begun[-1:] and begun[-1][1] == "findings")
        if not (begun and inside):
            begun.append((found[start], kind))
    ends = [match.start(1) for match, _ in begun[1:]] + [len(part)]
    return [
        (match[1], kind, part[match.end() : end])
        for (match, kind), end in zip(begun, ends, strict=False)
    ]


def _text_after(body: str, *, by_sentences: bool) -> str:
    """What follows the text that belongs to a header within the findings: all paragraphs but the
    first; with `by_sentences` also the first paragraph's sentences after the header's own."""
    own, *rest = _PARAGRAPH.split(body.strip())
    if not by_sentences:
        return "\n\n".join(rest)
    parts = list(sentences(own))
    # A header followed by an empty line can be without own text.
    first = int(bool(parts) and bool(_NAMES_A_STUDY.search(parts[0]) or not _PARAGRAPH.match(body)))
    others = dropwhile(_OWN.match, parts[first:])
    return "\n\n".join([" ".join(others), *rest])


def _body(text: str) -> str:
    """The paragraphs of a section on one line, without signatures; "" if it has only
    notifications."""
    paragraphs = [_join_lines(paragraph) for paragraph in _PARAGRAPH.split(text)]
    said = " ".join(part for part in paragraphs if part and not is_signature(part))
    return said if said and describes(said) else ""


def _by_kind(part: str) -> dict[str, str]:
    """Kind of section -> text of all sections of that kind."""
    found: dict[str, list[str]] = {}
    sections = _sections(part)
    last = {kind: place for place, (_, kind, _) in enumerate(sections)}
    within = ""
    for place, (header, kind, text) in enumerate(sections):
        if kind != "context":
            within = kind
            found.setdefault(kind, []).append(_body(text))
            continue
        name = header.lower()
        aside = _ASIDE.search(name) is not None
        plain = aside or _ASKED.search(name) is not None
        if within == "findings":  # of this examination, unless a second one follows
            more = last["findings"] > place
            back = aside or (not more and (plain or last.get("impression", 0) > place))
        else:
            back = within == "impression" and plain and not any(found[within])
        if back:
            found[within].append(_body(_text_after(text, by_sentences=plain)))
    return {kind: " ".join(filter(None, parts)) for kind, parts in found.items()}


def _last_paragraph(part: str) -> str:
    """The last descriptive paragraph: no title, no text after a context header, no signature and no
    notification."""
    for paragraph in reversed(_PARAGRAPH.split(part)):
        lines = [line for line in paragraph.split("\n") if not _TITLE_LINE.match(line)]
        kept = "\n".join(lines)
        _, kind, body = (_sections(kept) or [("", "other", kept)])[-1]
        said = _join_lines(kept if kind == "other" else body)
        if kind not in ("context", "wet") and said and describes(said):
            return said
    return ""


def _blocks(text: str) -> list[str]:
    """The texts of a file: the report, then preliminary reports, then addenda; within each kind the
    last comes first, since the text below a line of underscores replaces the text above it.
    """
    parts = [part for part in _BLOCK.split("\n" + text) if part.strip()][::-1]

    def rank(part: str) -> int:
        return 2 if _ADDENDUM.match(part) else 1 if _PRELIMINARY.match(part) else 0

    return sorted(parts, key=rank)


def _careful(text: str) -> Report:
    stand_in = ""
    for part in _blocks(text):
        found = _by_kind(part)
        # Two examinations in one report repeat their sections; both describe this patient's images.
        findings = found.get("findings") or found.get("view", "")
        impression = found.get("impression", "")
        if findings or impression:
            return Report(findings, impression)
        stand_in = stand_in or _last_paragraph(part) or found.get("wet", "")
    return Report(findings=stand_in)


def _authors(text: str) -> Report:
    _, _, rest = text.partition("FINDINGS:")
    findings, closed, _ = rest.partition("IMPRESSION:")
    return Report(findings=_join_lines(findings) if closed else "")


def parse_report(text: str, rule: str = "careful") -> Report:
    """Findings and impression of `text`, with lines joined and `___` unchanged.

    Careful rule: the sections by their headers; without findings, a section named after the view
    ("PORTABLE CHEST:") is used; without findings and impression, the last paragraph is the
    findings. Authors' rule: findings only.

    Raises RecordError "no-findings-or-impression" if both are empty and "report-too-long" beyond
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
    """The reason for the examination (INDICATION, HISTORY, REASON ...), or ""."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")[:MAX_REPORT_CHARS]
    for part in _blocks(text):
        for header, _, body in _sections(part):
            if _ASKED.search(header.lower()):
                return _join_lines(body)
    return ""
