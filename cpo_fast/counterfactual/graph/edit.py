"""Edit one sentence so that it is consistent with a target: keep it, trim it or drop it.

A sentence is cut into clauses. A denial ("no pneumothorax or pleural effusion is seen") loses the
items that name the target, a normal statement ("heart size and vascularity are normal") loses the
subjects that the target contradicts, and a clause that asserts a finding excluded by the target is
dropped. Verb agreement is then corrected. A clause that cannot be split safely is dropped whole.
"""

from __future__ import annotations

import re
from functools import lru_cache

from cpo_fast.counterfactual.graph.clauses import find_sides, split_clauses
from cpo_fast.counterfactual.graph.denial import BROAD, NEGATION, edit_denial, is_denied
from cpo_fast.counterfactual.graph.exemption import (
    Exemption,
    assert_exempted,
    drop_otherwise,
    find_exemption,
)
from cpo_fast.counterfactual.graph.grammar import capitalise_like
from cpo_fast.counterfactual.graph.lexicon import Lexicon
from cpo_fast.counterfactual.graph.normal import INFLATED, TOPICS, edit_normal
from cpo_fast.counterfactual.graph.scope import (
    AmbiguousError,
    Part,
    cut_clause,
    drop_items,
    leaves_verb_out,
    starts_unchanged,
)
from cpo_fast.counterfactual.graph.text import capitalise

_ALL_NORMAL = re.compile(
    r"^(?:(?:stable|grossly|essentially|radiographically|there is|this is|an?) )*"
    r"(?:normal|negative|unremarkable)(?: \w+)? "
    r"(?:chest(?! wall)|examination|exam|study|radiographs?|x-\w+|films?)\b|"
    r"^(?:the )?chest (?:radiograph|x-?\w+|examination|exam|"
    r"film)?\s*(?:is )?(?:within )?(?:normal|unremarkable|negative)|"
    r"^normal$|^negative$"
)
_FILLER = re.compile(
    r"\b(?:otherwise|and|but|the|with|also|there|again|specifically|chest|grossly|impression)\b"
)
_CLEAR_LUNGS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"(\w+ed),?(?: but| and)? (?:grossly )?clear lungs\b", re.I), r"\1 lungs"),
    (re.compile(r",? (?:with|and) (?:grossly )?clear lungs\b", re.I), ""),
    (re.compile(r",? which are (?:grossly )?clear\b", re.I), ""),
    (re.compile(r"(?<=normal) (?:the )?lungs are clear\b", re.I), ""),  # a missing full stop
    (re.compile(r"^(?:grossly )?clear,? (?=(?:hyper|hypo)\w+ lungs\b)", re.I), ""),
    (re.compile(r"^(?:grossly )?clear lungs with (?=heart|stable|normal|no|mild)", re.I), ""),
)
"""(incidental statement that the lungs are clear, its replacement)."""
_REST = re.compile(
    r"^(?:(?:they|lungs|the|which|is|are|but|otherwise|grossly|well|essentially|appear|remain|"
    r"both|still|also)\s+)*"
    r"(?:clear|normal|unremarkable)(?: bilaterally| lungs)?$"
)
_SAYS_NOTHING_ACUTE = re.compile(
    r"^(?P<subject>.+?)\s+(?:shows?|reveals?|demonstrates?|(?:is|are)(?= without)|with)\s+(?:no|"
    r"without)"
    r"(?: (?:evidence|convincing|definite|evident|of))*\s+(?:acute|active)\b(?:\s+\w+){1,3}$"
)
_BONES = re.compile(r"\bbon[ey]|osse|skelet|spin[ea]|\bribs?\b|fractur|abdom|soft tissue|cervical")
_CLEAR_OF = re.compile(
    r"(?:grossly )?(?:clear|free) (?:of|from)\b|"
    r"(?:(?:well|fully|grossly)[- ])*(?:expanded|inflated|aerated|hyper\w+|hypo\w+)$"
)
_LUNGS_ARE = re.compile(r"(?:(?:the|both) )?lungs? (?:is|are|appear|remain)\b", re.I)
_NOT_MEANT = re.compile(r"\b(?:no|without|not)\b|\bsubcutaneous $")


def edit_sentence(sentence: str, lex: Lexicon, where: frozenset[str]) -> str:
    """Edit `sentence` (single spaces) to be consistent with the target on the sides `where`.

    Returns the same string if no change is needed, "" if the sentence is dropped. Raises
    AmbiguousError if the part to be edited can be read both ways.
    """
    if not _needs_editing(sentence.lower(), lex):
        return sentence
    if sentence.isupper():
        written = capitalise(sentence.lower())
        edited = edit_sentence(written, lex, where)
        return sentence if edited == written else edited.upper()
    body = sentence.rstrip(" .!?")
    end = sentence[len(body) :]
    exemption = find_exemption(body)
    if exemption is not None:
        return _edit_exemption(sentence, exemption, end, lex, where)
    plain = body
    if "lungs" in lex.topics:
        plain = drop_otherwise(plain)
        for pattern, instead in _CLEAR_LUNGS:
            plain = pattern.sub(instead, plain)
        if plain != body and body[:1].isupper():
            plain = capitalise(plain)
    kept: list[tuple[str, str]] = []
    changed = plain != body
    context, dropped = "", False
    for part in _cut_clauses(plain):
        new = _edit_clause(part.text, lex, where, context)
        context += " " + part.text.lower()
        if new != part.text and part.unsure:
            raise AmbiguousError
        if dropped and _REST.match(new.lower()):  # "and clear", which described the dropped clause
            new = ""
        dropped = new == ""
        changed = changed or new != part.text
        if new and changed and leaves_verb_out(new.lower()):
            raise AmbiguousError
        if new:
            kept.append((part.connector, new))
    if not changed:
        return sentence
    if not kept or all(_is_hollow(clause) for _, clause in kept):
        return ""
    return _assemble(kept, body, dropped_head=kept[0][0] != "") + (end or "")


@lru_cache(maxsize=1 << 16)
def _cut_clauses(body: str) -> tuple[Part, ...]:
    return tuple(
        part for connector, clause in split_clauses(body) for part in cut_clause(connector, clause)
    )


def _edit_exemption(
    sentence: str, exemption: Exemption, end: str, lex: Lexicon, where: frozenset[str]
) -> str:
    """Edit a sentence with an exemption; if its statement changes, assert the exempted finding."""
    head = edit_sentence(exemption.head, lex, where)
    exempt = edit_sentence(exemption.exempt, lex, where)
    rest = edit_sentence(exemption.rest, lex, where) if exemption.rest else ""
    if (head, exempt, rest) == (exemption.head, exemption.exempt, exemption.rest):
        return sentence
    assertion = assert_exempted(exempt, exemption.head) if exempt else ""
    stop = end.strip()[:1] or "."
    return f"{stop} ".join(capitalise(part) for part in (head, assertion, rest) if part) + (
        end if head or assertion or rest else ""
    )


@lru_cache(maxsize=64)
def _topic_patterns(names: frozenset[str]) -> tuple[re.Pattern[str], ...]:
    return tuple(pattern for name, pattern in TOPICS if name in names)


def _needs_editing(lower: str, lex: Lexicon) -> bool:
    return bool(
        lex.denied.search(lower)
        or (lex.excluded is not None and lex.excluded.search(lower))
        or (lex.excluded_here is not None and lex.excluded_here.search(lower))
        or any(p.search(lower) for p in _topic_patterns(lex.topics))
        or ("inflation" in lex.topics and INFLATED.search(lower))
        or ("lungs" in lex.topics and "otherwise" in lower)
        or BROAD.search(lower)
        or _ALL_NORMAL.search(lower.rstrip(" .!?"))
    )


def _assemble(kept: list[tuple[str, str]], body: str, *, dropped_head: bool) -> str:
    connector, first = kept[0]
    if dropped_head:
        if _CLEAR_OF.match(first.lower()):  # "the lungs are expanded and clear of ..."
            subject = _LUNGS_ARE.match(body)
            first = f"{subject.group() if subject else 'The lungs are'} {first}"
        first = re.sub(r"^(?:without|w/o)(?: any)?\b", "no", first, flags=re.I)
        if body[:1].isupper():
            first = capitalise(first)
    text = first
    for connector, clause in kept[1:]:
        goes_on = "and" in connector and clause.lower().startswith("without")
        if goes_on and "without" not in text.lower():
            connector = " "  # the clause that "and without" continued was dropped
        text += connector + clause
    return text


def _is_hollow(clause: str) -> bool:
    """Whether only connecting words are left."""
    return re.search(r"[a-z]{3,}", _FILLER.sub("", clause.lower())) is None


def _edit_clause(clause: str, lex: Lexicon, where: frozenset[str], context: str) -> str:
    """Remove what contradicts the target from `clause`; `context` is the preceding part of the
    sentence."""
    lower = clause.lower()
    if _REST.match(lower) and "lung" in context:
        named = find_sides(context)
        elsewhere = bool(named) and not named & where
        return clause if "lungs" not in lex.topics or "otherwise" in lower or elsewhere else ""
    quiet = _SAYS_NOTHING_ACUTE.match(lower)
    if quiet is not None:
        return _edit_quiet(clause, quiet.group("subject"), lex)
    cue = NEGATION.match(lower)
    if cue is not None and starts_unchanged(lower, cue.end()):
        names_excluded = lex.excluded is not None and lex.excluded.search(lower)
        return "" if names_excluded else clause
    if cue is not None:
        if _BONES.search(context) and not lex.denied.search(lower):
            return clause
        return edit_denial(clause, cue.end(), lex)
    if _ALL_NORMAL.search(lower):
        return ""
    new = edit_normal(clause, lex, where)
    if new is not None:
        return new
    if lex.denied.search(lower) and is_denied(lower, lex):
        return ""
    if lex.excluded is not None and _asserts(lex.excluded, lower):
        return capitalise_like(clause, drop_items(clause, lex.excluded))
    if lex.excluded_here is not None and _asserts(lex.excluded_here, lower):
        named = find_sides(lower)
        if not named or named & where:
            return ""
    return clause


def _edit_quiet(clause: str, subject: str, lex: Lexicon) -> str:
    """Edit "the lungs and pleural spaces show no acute abnormality": dropped if the target is a
    disease of a named structure."""
    if _BONES.search(subject):
        return clause
    topics = {name for name, pattern in TOPICS if pattern.search(subject)}
    return "" if lex.acute or topics & lex.topics else clause


def _asserts(pattern: re.Pattern[str], lower: str) -> bool:
    match = pattern.search(lower)
    return match is not None and _NOT_MEANT.search(lower[: match.start()]) is None
