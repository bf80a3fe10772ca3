"""Report sentences that do not describe the images: notifications and signatures."""

from __future__ import annotations

import re
from collections.abc import Iterator

_ABBREVIATION = re.compile(r"\b(drs?|mrs?|ms|prof|st|vs|no|m\.d|a\.m|p\.m)\.")
_ABBREVIATED = (
    " dr.", " drs.", " mr.", " mrs.", " ms.", " prof.", " st.", " vs.", " m.d.", " a.m.", " p.m.",
)  # fmt: skip
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z_(\d])")

_NOTIFIED = (
    r"(?:notified|paged|informed|contacted|telephoned|phoned|e-?mailed|faxed|spoke|read back)"
)
_MAYBE_NOTIFIED = (
    r"(?:discussed|discussion|communicated|communication|conveyed|relayed|reported|called|posted|"
    r"entered|texted|transmitted|acknowledged|submitted|sent|given|provided|flagged|alerted|"
    r"reviewed|made aware|call|message|placed|notification)"
)
_RECIPIENT = (
    r"(?:with|to|by|via|at|into|in|on|over|from)\s+(?:(?:the|an?|his|her|patient'?s|covering|on.call)"
    r"\s+)*(?:drs?\b|doctor|___|team|clinical|clinicians?|referring|ordering|requesting|primary|"
    r"ed\b|er\b|emergency|icu\b|micu|sicu|ccu|nurs\w+|rn\b|np\b|physicians?|providers?|residents?|"
    r"house ?staff|interns?|attending|(?:tele)?phone|pager?\b|paging|e-?mail|dashboard|critical|"
    r"radiolog\w+|surg\w+|medic\w+|staff|floor|office|service|caregivers?|\d)"
)
_NOTICES = tuple(
    re.compile(pattern, re.DOTALL)
    for pattern in (
        rf"\b{_NOTIFIED}\b|\bd/w\b|\b(?:made|is|are|was|were) aware\b",
        rf"\b{_MAYBE_NOTIFIED}\b.{{0,200}}?\b{_RECIPIENT}",
        rf"^\W*{_MAYBE_NOTIFIED}\b",
        r"\bwet read\b.{0,200}?\b(?:given|provided|placed|posted|performed|available|entered)\b",
        r"^\W*drs?\b.{0,200}?\b(?:called|told|acknowledged|discussed|communicated|agrees?|phone|telephone)\b",
        r"\b(?:(?:reviewed|interpreted|approved|agrees?) .{0,200}?\bradiologist|"
        r"as (?:the |an )?attending radiologist|teaching physician|personally (?:reviewed|viewed|"
        r"interpreted)|electronically signed|agree with the (?:above|resident|preliminary|findings|"
        r"interpretation)|(?:dictated|transcribed|approved|signed) (?:by|on|at|but)|"
        r"this report (?:was|has been))\b",
        r"^\W*(?:over\W*$|end of (?:the )?(?:report|dictation|impression)\b|job ?#|thank you\b|"
        r"(?:interpreted|read|reviewed|dictated) by\b)",
        r"^\W*(?:cc|approved|signed|dictated|transcribed|job|time of (?:call|notification|"
        r"discovery|discussion|communication|dictation|observation)) ?:",
        r"^\W*(?:drs?|mrs?|ms)\s+\w[\w.'-]*(?:\s+\w[\w.'-]*){0,3}\W*$",
        r"^\W*\w[\w.'-]*(?:\s+\w[\w.'-]*){0,3},\s*(?:m\.?d|d\.?o|m\.?b|ph\.?d|r\.?n)\b[^a-z]*$",
    )
)

# Names are de-identified as "___", so a signature contains only titles and times.
_OF_A_SIGNATURE = re.compile(
    r"(?:\b(?:drs?|mrs?|ms|doctor|md|m\.d|do|d\.o|phd|ph\.d|np|rn|pa-?c|es|sgd|signed|electronically|"
    r"approved|dictated|transcribed|reviewed|by|at|on|and|attending|radiologists?|resident|fellow|"
    r"staff|physician|"
    r"(?:mon|tues?|wed(?:nes)?|thur?s?|fri|sat(?:ur)?|sun)(?:day)?|[ap]\.?m|est|edt|[a-z])\b|[\W\d_]++)*+",
)

_LETTER = re.compile(r"[a-z]")


def sentences(text: str) -> Iterator[str]:
    """Split `text` into sentences; abbreviations such as "Dr." do not end one."""
    start = 0
    for end in _SENTENCE_END.finditer(text):
        if not f" {text[max(start, end.start() - 5) : end.start()].lower()}".endswith(_ABBREVIATED):
            yield text[start : end.start()]
            start = end.end()
    if text[start:].strip():
        yield text[start:]


def is_signature(text: str) -> bool:
    """Whether `text` contains only titles, times and removed names: "DR. ___ (ES)"."""
    lower = text.lower()
    return _OF_A_SIGNATURE.fullmatch(lower) is not None and _LETTER.search(lower) is not None


def _is_notice(sentence: str) -> bool:
    plain = _ABBREVIATION.sub(r"\1", sentence.lower())
    return any(pattern.search(plain) for pattern in _NOTICES)


def describes(text: str) -> bool:
    """Whether any sentence is neither a signature nor a notification."""
    return any(not (is_signature(part) or _is_notice(part)) for part in sentences(text))
