"""Denials: plain ("no pneumothorax or pleural effusion is seen") or by a word near a finding."""

from __future__ import annotations

import re

from cpo_fast.counterfactual.graph.clauses import FRAGMENT, ITEM, VERB
from cpo_fast.counterfactual.graph.grammar import agree_tail, agree_there, join_items
from cpo_fast.counterfactual.graph.lexicon import Lexicon
from cpo_fast.counterfactual.graph.scope import belongs_to_last, is_change, says_unchanged

NEGATION = re.compile(
    r"^(?:(?:specifically|otherwise|also|again|currently|and|grossly|they are|are|which are|"
    r"there(?: is| are| was| were| has been|"
    r" have been)|(?:the |both )?lungs?(?: fields?)?(?: is| are| appear| remain| do not| show)*"
    r"(?: grossly| otherwise)?)\s*,?\s*)*"
    r"(?:no|without|w/o|negative for|free of|clear of|free from)\b"
    r"(?:\s+(?:definite|definitive|convincing|radiographic|evidence|evident|signs?|findings?|"
    r"x{4}|of|for|any|"
    r"visible|visualized|obvious|suggestion|discrete|gross|frank|typical|significant|demonstrated|"
    r"focal areas?|areas?)\b)*"
)
_TAIL = re.compile(
    rf",?\s+(?:{VERB}\s+)?(?:seen|identified|noted|visualized|present|evident|appreciated|"
    rf"demonstrated|"
    r"detected|observed|suspected|visible|is|are)"
    r"(?:\s*$|\s+(?:in|on|within|at|by|to|as|with|today|currently|from|beneath|under|and|or)\b.*$)"
)
BROAD = re.compile(
    r"\b(?:acute|active)\b(?!.*\b(?:bon[ey]\w*|osseous|skeletal|fracture|displaced|spin\w+|"
    r"abdom\w+|rib\w*|infiltrat\w+|"
    r"consolidation|effusion|pneumothorax|air ?space)\b).*"
    r"\b(?:disease|abnormalit\w+|process\w*|findings?|change\w*|patholog\w+|illness)\b|"
    r"\b(?:acute|active) (?:or active )?(?:cardio ?-?pulmonary|cardiac|pulmonary|intrathoracic|"
    r"cardiothoracic)\b|"
    r"^disease$"
)
_DENIES_BEFORE = re.compile(
    r"\b(?:no|not|neither|without|negative|absence|absent|free of|resolved|resolution of|"
    r"clear(?:ed|ing|ance)(?: of)?|"
    r"rather than|removal of|nor|never|nonconsolidating)\b(?!.*\b(?:which|with|but|is|are|was|"
    r"were|and there|"
    r"change|changed|significantly|since|compared|excluded?|may|might|could|represent\w*)\b)"
)
_ADVICE = re.compile(r"\b(?:follow ?-?up|recommend\w*|advised)\b")
_DENIES_AFTER = re.compile(
    r"^[^,;]{0,30}?\b(?:(?:is|are|was|were|has|have|been) (?:\w+ )?(?:not|no longer|resolved|"
    r"cleared|unlikely|absent|"
    r"normal|within normal|unremarkable)|(?:resolved|cleared))\b"
    r"(?! (?:significantly|well|definit\w+|entirely|completely|changed|as|excluded|evident on|"
    r"fully))|"
    r"^\s*:\s*(?:none|no|negative|absent)\b"
)


def edit_denial(clause: str, cue_end: int, lex: Lexicon) -> str:
    """Remove the items that name the target from `clause`, a negation cue (up to `cue_end`) and a
    list."""
    rest = clause[cue_end:]
    tail_match = _TAIL.search(rest)
    tail = tail_match.group() if tail_match else ""
    listed = rest[: len(rest) - len(tail)] if tail else rest
    lower = listed.lower()
    if BROAD.search(lower.strip()) and not lex.denied.search(lower):
        return "" if lex.acute or not lower.strip() else clause
    if lex.denied.search(tail.lower()):
        return ""
    if not lex.denied.search(lower):
        if lower.strip() == "disease" and lex.acute:
            return ""
        return clause
    separators, items = _items(listed)
    changed = next((i for i, item in enumerate(items) if is_change(item.lower())), len(items))
    named = [
        index < changed and bool(lex.denied.search(item.lower()))
        for index, item in enumerate(items)
    ]
    if changed < len(items) and not any(named):
        return clause
    if len(items) == 1 or all(named) or any(len(item.split()) > 7 for item in items):
        return ""
    kept = [item for item, hit in zip(items, named, strict=True) if not hit and item]
    if not kept or any(FRAGMENT.match(item.lower()) for item in kept):
        return ""
    if lex.acute and all(BROAD.search(item.lower()) for item in kept):
        return ""
    if lex.acute:
        kept = [item for item in kept if not BROAD.search(item.lower())]
    word = next(
        (w for w in (re.search(r"and/or|and|or|nor", s) for s in reversed(separators)) if w), None
    )
    oxford = any("," in s and re.search(r"and|or", s) for s in separators)
    joined = join_items(kept, word.group() if word else "", oxford)
    head = clause[:cue_end]
    if named[0]:
        head = agree_there(head, kept[0])
    return head + (" " if not head.endswith(" ") else "") + joined + agree_tail(tail, kept)


def _items(listed: str) -> tuple[list[str], list[str]]:
    """(separators, items) of a list. A place ("and left lower lobe") belongs to the preceding
    item."""
    separators: list[str] = []
    items: list[str] = []
    start, before = 0, ""
    for match in [*ITEM.finditer(listed), None]:
        item = listed[start : match.start() if match else len(listed)]
        if items and belongs_to_last(item.lower().strip()):
            items[-1] += before + item.rstrip()
        else:
            separators += [before] if items else []
            items.append(item.strip())
        if match:
            before, start = match.group(), match.end()
    return separators, items


def is_denied(lower: str, lex: Lexicon) -> bool:
    """Whether a clause other than a plain denial denies the target by a word near its name.
    Advice ("follow up to confirm clearing") does not."""
    if _ADVICE.search(lower) or says_unchanged(lower):
        return False
    for match in lex.denied.finditer(lower):
        before, after = lower[: match.start()][-80:], lower[match.end() :][:60]
        if _DENIES_BEFORE.search(before) or _DENIES_AFTER.search(after):
            return True
    return False
