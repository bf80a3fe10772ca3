"""Scope of a denial within a clause: "no pneumothorax, small left effusion" denies and asserts.

A comma, "and" or "with" after a denial cue ends its scope if the following text is an assertion:
it has a finite verb, a word of change or persistence ("stable", "increased"), or starts with an
article, size or side. Text after "or" remains denied. A list that can be read both ways is
reported as ambiguous (`Part.unsure`), not resolved by a guess.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from cpo_fast.counterfactual.graph.clauses import FRAGMENT, SEEN
from cpo_fast.errors import RecordError

AMBIGUOUS = "ambiguous_denial"
"""Name of the failed check of a report with a sentence that cannot be split reliably."""


class AmbiguousError(RecordError):
    """A sentence that must be edited has a denial of unclear scope."""

    def __init__(self) -> None:
        super().__init__(AMBIGUOUS, "a sentence may deny or assert a part that has to be edited")


_WEAK = (
    r"(?:(?:any|significant\w*|interval|definit\w+|appreciabl\w+|substantial\w*|gross\w*|great|"
    r"major|marked\w*|relevant|convincing|evidence|of|for|further|obvious|radiographic|apparent|"
    r"much|yet|been|the|a|notable|considerable|short-term|clear)\s+)*"
)
_CHANGE_NOUN = (
    r"(?:changes?|increase|decrease|worsening|improvement|progression|regression|resolution|"
    r"clearing|clearance|reduction|difference|deterioration)"
)
_UNCHANGED = re.compile(
    rf"\b(?:no|without|w/o)\s+{_WEAK}(?:{_CHANGE_NOUN}\s+(?:in|of|to|for)\b|"
    rf"(?:interval\s+)?change\s+(?!or\b|and\b|no\b|without\b|but\b|with\b|since\b|from\b|compared\b|noted\b|"
    rf"seen\b|is\b|identified\b|evident\b|demonstrated\b|at\b|on\b|when\b|over\b|as\b)\w)|"
    r"\bnot\s+(?:(?:\w+ly|yet|been|quite|as)\s+)*(?:changed|resolved|cleared|improved|worsened|"
    r"progressed|regressed|gone)\b"
)
_CHANGE_IN = re.compile(rf"^{_WEAK}{_CHANGE_NOUN}\s+(?:in|of|to)\b")
_DENIES = re.compile(
    r"\b(?:no|not|without|w/o|negative|free of|clear of|free from|absence|absent|nor|never|none|"
    r"resol(?:ved|ution)|clear(?:ed|ing|ance)(?! (?:lungs?|space))|rather than)\b"
)
_NORMAL = re.compile(r"\b(?:clear(?! space)|normal|unremarkable|within (?:\w+ )?limits)\b")
_SEPARATOR = re.compile(
    r",?\s+(?:although|though|however|while|whereas|yet),?\s+|\s*;\s+(?:however,?\s+)?|"
    r"\s*,\s*(?:(?:and|but|with)\s+)?|\s+(?:and|with|but)\s+|\s*(?:--|\()\s*|\s+-\s+|"
    r"\s+(?=status post\b)"
)
_NEXT = re.compile(r"\s*[,(]\s*|\s+(?:and/or|and|or|nor|with|but)\s+")
_LIST_GOES_ON = re.compile(r"(?:^|\s)(?:or|nor|and/or)\s")
_CONTRAST = re.compile(r"\b(?:but|although|though|however|while|whereas|yet)\b|;")
_DENIABLE = re.compile(
    r"\b(?:effusions?|pneumo ?thora\w+|consolidations?|infiltrat\w+|o?edema|opaci\w+|nodul\w+|"
    r"mass(?:es)?|lesions?|disease|process\w*|abnormalit\w+|findings?|fractures?|adenopathy|"
    r"lymphadenopathy|pneumonia|congestion|failure|atelectasis|collapse|fluid|air|malignancy|"
    r"metasta\w+|infection|thickening|widening|enlargement|x{4}|granulomas?|cardiomegaly|"
    r"emphysema|organomegaly|pneumoperitoneum|blunting|engorgement|foreign bod\w+|tuberculosis|"
    r"changes?|tumou?rs?|cavit\w+|displacement|deformity|focus|foci|calcifications?)"
    r"(?: (?:is|are|in|on|at|within|of|to|identified|seen|noted|present|evident|visuali\w+|"
    r"appreciated|demonstrated|detected|observed|bilaterally)\b.*)?$"
)
"""Items that continue a denied list without "or"."""
_LOCATED = re.compile(
    r"\b(?:left|right|bilateral\w*|(?:at|in|on|within|over|of) the|is|are|lingul\w+|retrocardiac)\b"
)
"""Words rarely found with an item of a denied list."""
_ACCOMPANIES = re.compile(r"^(?:air bronchogram|the patient|patient|mediastinal shift|this|arms)")
_DEVICE = re.compile(
    r"\b(?:tubes?|catheters?|lines?|picc|pacemaker|pacer|wires?|clips?|ports?|leads?|sternotomy|"
    r"stents?|hardware|device|tip)\b(?! (?:to|malposition))"
)
_NEGATIVE = re.compile(
    r"^(?:and/)?n?or\b|^(?:also\s+|there (?:is|are)\s+)?(?:no|not|without|w/o|negative)\b"
)
_CHANGED = re.compile(
    r"\b(?:(?:un)?changed|stable|persist\w*|residual|redemonstrat\w*|again|improv\w+|worsen\w*|"
    r"increas(?:e|ing)|decreas\w+|progress\w+|(?:re)?accumulat\w+|similar|status post|s/p|"
    r"still|remain\w*)\b|\bincreased$"
)
_FRONT = re.compile(
    r"^(?:also\s+|but\s+)?(?:a|an|the|there|this|these|it|old|healed|chronic\w*|known|trace|tiny|"
    r"minimal\w*|mild\w*|slight\w*|subtle|small|moderate\w*|bibasilar|bibasal|biapical|low|"
    r"scattered|multiple|few|several|left|right|bilateral\w*|bilat|possibl[ey]|probabl[ey]|"
    r"likely|questionable|suspected|interval|post\w*|degenerative|calcified|tortuo\w+|"
    r"atherosclero\w+|partial\w*|elevat\w+|borderline|prominent|unfold\w*|increased|"
    r"enlarged|hyper(?:inflat|expan)\w+|hypo(?:inflat|ventilat|expan)\w+|streaky|linear|"
    r"platelike|plate-like|subsegmental|layering|loculated|median|surgical|\d+(?:\.\d+)? (?:mm|cm))"
    r"(?!\w)"
)
_SIDE = re.compile(r"\b(?:left|right|bilateral|both)\b")
_SIDE_ONLY = re.compile(r"^(?:left|right|bilateral)\b(?! (?:small|mild|moderate|tiny|minimal))")
_ARTICLE_ONLY = re.compile(r"^(?:also |but )?(?:the|a|an|this|these|it)\b")
_FINITE = re.compile(
    r"\b(?:is|are|was|were|has|have|had|may|might|could|appears?|represents?|shows?|"
    r"demonstrates?|suggests|measures?|reflects?|contains?|extends?|overl(?:ies|ie)|terminates?|"
    r"ends|projects?|remains?|persists?)\b"
)
_MEANS = re.compile(r"\b(?:compatible|consistent) with\b|\bsuggestive of\b|\bin (?:place|situ)\b")
_REFERS = re.compile(r"^(?:please )?(?:see|as|per|described|given|allowing)\b")
_COORDINATED = re.compile(r"\s*,\s*(?:and\s+)?|\s+and\s+", re.I)
_EXPLAINS = re.compile(
    r"^(?:likely|probabl[ey]|possibl[ey]|perhaps|consistent|compatible|represent\w*|suggest\w*|which|"
    r"due|from|most|reflect\w*|secondary|related|caus\w+|favor\w*|concerning|may|thought)\b"
)
_RELATIVE = re.compile(r"\b(?:that|which|to|if|whether)\b")
_PLACE = re.compile(
    r"^(?:the |also |in |at |both )*(?:(?:left|right|upper|middle|mid|lower|bilateral|lung|"
    r"costophrenic|hemi|retrocardiac|perihilar|apical|basilar|minor|major|lateral|posterior|"
    r"frontal)[ -]?)*(?:lungs?|lobes?|bas(?:e|es|is)|apex|apices|"
    r"zones?|fields?|sides?|hemithora\w+|hilum|hila|angles?|views?|upright|patient|exam\w*|film|"
    r"study|chest|thorax|mediastinum|spine|abdomen|(?:left|right)$)(?!\w| (?:\w+ )*(?:is|are|"
    r"stable|unchanged|opaci\w+|densit\w+|atelectasis|consolidation|effusion|nodules?|scar\w*|"
    r"tube|pain))"
)
_RESOLVES = re.compile(
    r"^(?:(?:interval|near|nearly|almost|complete\w*|partial\w*|now|since|the|an)\s+)*"
    r"(?:resol(?:ved|ution)|clear(?:ed|ing|ance)|disappear\w+)\b"
)
_ELLIPTIC = re.compile(
    r"^(?:(?:is|are|was|were|has|have|had|may|might|could|appears?|remains?)\b|(?:\w+ly )?"
    r"(?:stable|unchanged|similar|improved|chronic|small|mild)(?:\s+(?:in|from|since|compared|to|"
    r"when|with|as|at|for)\b|$))"
)
"""Text that continues the subject before the separator."""
_VERB_LEFT_OUT = re.compile(r"\b(?:is|are|was|were|has|have|had|does|do|did)(?: not|n't)?$")
_PREDICATE_ONLY = re.compile(
    r"^(?:(?:well|fully|grossly|otherwise)[- ])*"
    r"(?:expanded|inflated|aerated|clear|hyper\w+|hypo\w+)$"
)
_ENDS_SEEN = re.compile(rf"{SEEN}$")


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a clause: the connector before it, its text, and whether the scope of its denial
    is unclear."""

    connector: str
    text: str
    unsure: bool = False


def cut_clause(connector: str, clause: str) -> list[Part]:
    """Cut `clause`, which follows `connector`, into parts that each only deny or only assert."""
    lower = clause.lower()
    if not (_DENIES.search(lower) or _NORMAL.search(lower)):
        return [Part(connector, clause)]
    parts: list[Part] = []
    start, unsure = 0, False
    for match in _SEPARATOR.finditer(lower):
        left, right = lower[start : match.start()], lower[match.end() :]
        if not left.strip() or not right:
            continue
        if says_unchanged(left):
            verdict: bool | None = bool(_FINITE.search(right)) and not _LIST_GOES_ON.search(right)
        elif _DENIES.search(left):
            verdict = _asserts(left, right, match.group())
        elif _NORMAL.search(left):
            verdict = not _PREDICATE_ONLY.match(right) and bool(_asserts(left, right, ","))
        else:
            verdict = bool(_RESOLVES.match(right))
        if verdict:
            parts.append(Part(connector, clause[start : match.start()], unsure))
            connector, start, unsure = clause[match.start() : match.end()], match.end(), False
        unsure = unsure or verdict is None
    return [*parts, Part(connector, clause[start:], unsure)]


def drop_items(clause: str, gone: re.Pattern[str]) -> str:
    """Remove the items that match `gone` from `clause`, an asserted list; "" if a remaining item
    cannot stand alone."""
    pieces = _COORDINATED.split(clause)
    kept = [piece for piece in pieces if not gone.search(piece.lower())]
    alone = all(
        piece is pieces[0] or _FRONT.match(piece.lower()) or is_own_clause(piece.lower())
        for piece in kept
    )
    if not alone or any(_EXPLAINS.match(piece.lower()) for piece in pieces[1:]):
        return ""
    return " and ".join(kept)


def says_unchanged(lower: str) -> bool:
    """Whether a lower-case text states that a finding has not changed ("no change in")."""
    return _UNCHANGED.search(lower) is not None


def starts_unchanged(lower: str, cue_end: int) -> bool:
    """Whether a lower-case clause with a denial cue up to `cue_end` starts "no change in"."""
    match = _UNCHANGED.search(lower)
    return match is not None and match.start() < cue_end


def is_change(lower: str) -> bool:
    """Whether an item of a denied list is a change of an existing finding."""
    return _CHANGE_IN.match(lower) is not None


def _asserts(left: str, right: str, separator: str) -> bool | None:
    """Whether `right` is asserted after the denial `left`; None if it can be read both ways."""
    if _NEGATIVE.match(right) or _RESOLVES.match(right):
        return False
    following = _NEXT.search(right)
    item = right[: following.start()] if following else right
    rest = right[len(item) :]
    if _PREDICATE_ONLY.match(item):
        return "lung" in left
    if _PLACE.match(item) or _ELLIPTIC.match(item) or _REFERS.match(item):
        return False
    if ":" in item or _MEANS.search(right.partition(",")[0]):
        return True
    last = _NEXT.split(left)[-1]
    denial = list(_DENIES.finditer(last))
    head = last[denial[-1].end() :] if denial else last
    if FRAGMENT.match(head.strip() + " "):
        return False  # "no right and left effusion": adjectives of one noun
    if _CONTRAST.search(separator):
        return True
    verb = _has_own_verb(item)
    change = _CHANGED.search(item) is not None
    front = _FRONT.match(item)
    if "with" in separator and not change and _ARTICLE_ONLY.match(item):
        front = None
    closed = _ENDS_SEEN.search(left) is not None
    goes_on = _LIST_GOES_ON.search(rest)
    if not (verb or change or front):
        if goes_on or ("with" in separator and _ACCOMPANIES.match(item)):
            return False
        if _DEVICE.search(item):
            return True
        bare = separator.strip() in (",", "and", ", and") and not _LOCATED.search(item)
        return False if bare and not closed and _DENIABLE.search(item) else None
    if verb:
        return True
    if goes_on and not _FINITE.search(rest):
        return None
    if not change and _SIDE_ONLY.match(item) and _SIDE.search(left) and not closed:
        return None
    return True


def leaves_verb_out(lower: str) -> bool:
    """Whether a lower-case clause omits a verb of its predecessor ("the effusion has not")."""
    return _VERB_LEFT_OUT.search(lower) is not None


def belongs_to_last(item: str) -> bool:
    """Whether a list item is a place or a state of the preceding item."""
    return bool(_PLACE.match(item) or _ELLIPTIC.match(item))


def is_own_clause(lower: str) -> bool:
    """Whether a lower-case text starts with a subject and its verb."""
    following = _NEXT.search(lower)
    item = lower[: following.start()] if following else lower
    return _has_own_verb(item) and not _ELLIPTIC.match(item)


def _has_own_verb(item: str) -> bool:
    """Whether an item is a separate clause, not the last item of a list before "is seen"."""
    for match in _FINITE.finditer(item):
        if _RELATIVE.search(item[: match.start()]):
            return False
        if not re.match(rf"\s*(?:\w+ly )?{SEEN}", item[match.end() :]):
            return True
    return False
