"""One sentence made fit to stand beside a target: kept as it is, trimmed, or dropped.

A sentence is cut into clauses. A denial ("no pneumothorax or pleural effusion is seen") loses the
items that name the target, a normal statement ("heart size and vascularity are normal") loses the
subjects that the target contradicts, and a clause that asserts what the target excludes is
dropped. Verbs are made to agree again. What can't be taken apart safely is dropped whole.
"""

from __future__ import annotations

import re

from cpo_fast.counterfactual.grammar import (
    agree,
    agree_tail,
    agree_there,
    plural,
    series,
    start_like,
)
from cpo_fast.counterfactual.lexicon import Lexicon
from cpo_fast.counterfactual.text import capitalised

_VERB = r"(?:is|are|was|were|appears?|remains?|has been|have been)"
_PREDICATE = re.compile(
    rf"\b(?:{_VERB}|has|have|shows?|demonstrates?|normal|clear|unremarkable|seen|noted|present|"
    r"represents?|midline|intact|enlarged|stable|unchanged)\b"
)
_CONNECTOR = re.compile(
    r"\s*;\s+|,?\s+(?:but|however|although|though|while|whereas)\s+|"
    r",?\s+(?:and|with)\s+(?=(?:there (?:is|are)|no|without|(?:grossly )?clear|normal)\b)|"
    r",?\s+otherwise,?\s+(?=(?:no|negative|without|clear|normal|unremarkable)\b)|"
    r",?\s+and\s+(?=(?:the |both )?(?:lungs?|heart|mediastin\w+|pulmonary vascul\w+|cardi\w+)\b)|"
    r",\s+(?=(?:no|without|negative for|the lungs|lungs|there (?:is|are))\b)|"
    r"\s+(?=without\b)|"
    r"\s+(?=(?:The (?:lungs|heart|cardi|mediastin)|Lungs|Heart|There (?:is|are)|"
    r"No )\b)"  # a lost full stop
)
_NEGATION = re.compile(
    r"^(?:(?:specifically|otherwise|also|again|currently|and|grossly|they are|are|which are|"
    r"there(?: is| are| was| were| has been|"
    r" have been)|(?:the |both )?lungs?(?: fields?)?(?: is| are| appear| remain| do not| show)*"
    r"(?: grossly| otherwise)?)\s*,?\s*)*"
    r"(?:no|without|negative for|free of|clear of|free from)\b"
    r"(?:\s+(?:definite|definitive|convincing|radiographic|evidence|evident|signs?|findings?|"
    r"x{4}|of|for|any|"
    r"visible|visualized|obvious|suggestion|discrete|gross|frank|typical|significant|demonstrated|"
    r"focal areas?|areas?)\b)*"
)
_TAIL = re.compile(
    rf",?\s+(?:{_VERB}\s+)?(?:seen|identified|noted|visualized|present|evident|appreciated|"
    rf"demonstrated|"
    r"detected|observed|suspected|visible|is|are)"
    r"(?:\s*$|\s+(?:in|on|within|at|by|to|as|with|today|currently|from|beneath|under|and|or)\b.*$)"
)
_ITEM = re.compile(r"\s*,\s*(?:and/or|and|or|nor)\s+|\s*,\s*|\s+(?:and/or|and|or|nor)\s+")
_FRAGMENT = re.compile(
    r"^(?:(?:pleural|pericardial|pulmonary|focal|acute|active|cardiac|interstitial|alveolar|bony|"
    r"lobar|large|"
    r"small|right|left|hilar|mediastinal|suspicious|vascular|confluent|patchy|lung|air ?space|"
    r"peripheral|"
    r"central|chronic|dense|sizable|bilateral|discrete|new|the|of|in|parenchymal|osseous|"
    r"significant)\s*)+$"
)
_BROAD = re.compile(
    r"\b(?:acute|active)\b(?!.*\b(?:bon[ey]\w*|osseous|skeletal|fracture|displaced|spin\w+|"
    r"abdom\w+|rib\w*|infiltrat\w+|"
    r"consolidation|effusion|pneumothorax|air ?space)\b).*"
    r"\b(?:disease|abnormalit\w+|process\w*|findings?|change\w*|patholog\w+|illness)\b|"
    r"\b(?:acute|active) (?:or active )?(?:cardio ?-?pulmonary|cardiac|pulmonary|intrathoracic|"
    r"cardiothoracic)\b|"
    r"^disease$"
)
_ALL_NORMAL = re.compile(
    r"^(?:normal|negative|unremarkable)(?: \w+)? (?:chest|examination|exam|study)\b|"
    r"^(?:the )?chest (?:radiograph|x-?\w+|examination|exam|"
    r"film)?\s*(?:is )?(?:within )?(?:normal|unremarkable|negative)|"
    r"^normal$|^negative$"
)
_NORMAL = (
    r"(?:normal|within (?:the )?(?:\w+ ){0,2}limits(?: of normal)?|unremarkable|clear(?! (?:of|"
    r"from)\b)|not (?:\w+ )?(?:enlarged|engorged|congested|widened|increased)|"
    r"(?:at )?(?:the )?upper limits of normal|top[- ]normal|borderline|of normal|(?:well[- ]|"
    r"normally |fully )?(?:expanded|inflated|aerated)|"
    r"sharp)\b"
)
_POST = re.compile(
    rf"^(?P<subject>.+?)(?P<verb>\s+{_VERB})?(?P<adverb>(?:\s+(?:both|all|grossly|again|also|"
    rf"still|within|now|"
    rf"stable|clear|normal|are|is|appear|and|at|in|to be|otherwise|borderline|probably|mildly))*?)"
    rf"\s+(?P<predicate>{_NORMAL}.*)$"
)
_PRE = re.compile(
    r"^(?P<predicate>(?:there (?:is|are) )?(?:grossly |essentially |well[- ]expanded and |"
    r"well[- ]inflated and )?"
    r"(?:normal(?:[- ]sized)?|unremarkable|clear(?! (?:of|from)\b)|borderline|"
    r"top normal))(?P<adverb>(?: appearing| appearance of| size of| size)?(?: the)?)"
    r"\s+(?P<subject>.+)$"
)
_VERBAL = re.compile(r"\b(?:shows?|demonstrates?|reveals?|is|are|was|were|has|have|seen|noted)\b")
_TOPICS: tuple[tuple[str, re.Pattern[str]], ...] = (
    (
        "cardiomediastinum",
        re.compile(r"cardio ?-?mediastin|cardiac and mediastin|cardio ?pericard"),
    ),
    ("vessels", re.compile(r"vascul|vessels")),
    ("mediastinum", re.compile(r"mediastin")),
    ("heart", re.compile(r"\bheart|\bcardiac|\bcardio")),
    ("inflation", re.compile(r"lung volumes?|inflation|aeration|expansion")),
    ("sulci", re.compile(r"costophrenic|sulci|\bcp angles")),
    ("pleura", re.compile(r"pleura")),
    ("lungs", re.compile(r"\blungs?\b|parenchyma|airspaces?|\bhemithora")),
)
_OPEN_END = re.compile(
    r"\b(?:is|are|was|were|appears?|remains?|be|have|has|shows?|reveals?|demonstrates?|the|of|"
    r"and|or)$"
)
_CONTRAST = re.compile(r"but|however|although|though|;")
_FILLER = re.compile(
    r"\b(?:otherwise|and|but|the|with|also|there|again|specifically|chest|grossly|impression)\b"
)
_CLEAR_LUNGS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"(\w+ed),?(?: but| and)? (?:grossly )?clear lungs\b", re.I), r"\1 lungs"),
    (re.compile(r",? (?:with|and) (?:grossly )?clear lungs\b", re.I), ""),
    (re.compile(r",? which are (?:grossly )?clear\b", re.I), ""),
    (re.compile(r"(?<=normal) (?:the )?lungs are clear\b", re.I), ""),  # a lost full stop
    (re.compile(r"^(?:grossly )?clear lungs with (?=heart|stable|normal|no|mild)", re.I), ""),
)
"""Ways to say in passing that the lungs are clear, and what is left without it."""
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
_EXEMPT = re.compile(r"\b(?:besides|except|apart from|aside from|other than)\b")
_INFLATED = re.compile(r"\b(?:expanded|inflated|aerated)\b")
_DENIES_BEFORE = re.compile(
    r"\b(?:no|not|without|negative|absence|absent|free of|resolved|resolution of|clear(?:ed|ing|"
    r"ance)(?: of)?|"
    r"rather than|removal of|nor|never|nonconsolidating)\b(?!.*\b(?:which|with|but|is|are|was|"
    r"were|and there|"
    r"change|changed|significantly|since|compared|excluded?)\b)"
)
_DENIES_AFTER = re.compile(
    r"^[^,;]{0,30}?\b(?:(?:is|are|was|were|has|have|been) (?:\w+ )?(?:not|no longer|resolved|"
    r"cleared|unlikely|absent|"
    r"normal|within normal|unremarkable)|(?:resolved|cleared))\b"
    r"(?! (?:significantly|well|definit\w+|entirely|completely|changed|as|excluded|evident on|"
    r"fully))"
)
_SIDE = re.compile(r"\b(right|left|bilateral\w*|both|bibasilar|bi)\b")


def sides(text: str) -> frozenset[str]:
    """The sides of the body that a lower-case text names."""
    found: set[str] = set()
    for word in _SIDE.findall(text):
        found.update((word,) if word in ("right", "left") else ("right", "left"))
    return frozenset(found)


def edit_sentence(sentence: str, lex: Lexicon, where: frozenset[str]) -> str:
    """`sentence` (single spaces) as it may stand beside the target on the sides `where`; "" to
    drop it.

    Gives the very same string where nothing has to change.
    """
    if not _suspect(sentence.lower(), lex):
        return sentence
    if sentence.isupper():
        written = capitalised(sentence.lower())
        edited = edit_sentence(written, lex, where)
        return sentence if edited == written else edited.upper()
    body = sentence.rstrip(" .!?")
    end = sentence[len(body) :]
    plain = body
    if "lungs" in lex.topics:
        for pattern, instead in _CLEAR_LUNGS:
            plain = pattern.sub(instead, plain)
        if plain != body and body[:1].isupper():
            plain = capitalised(plain)
    pieces = _clauses(plain)
    kept: list[tuple[str, str]] = []
    changed = plain != body
    context = ""
    for connector, clause in pieces:
        new = _edit_clause(clause, lex, where, context)
        context += " " + clause.lower()
        changed = changed or new != clause
        if new:
            kept.append((connector, new))
    if not changed:
        return sentence
    if not kept or all(_hollow(clause) for _, clause in kept):
        return ""
    if kept[0][0] and _REST.match(kept[0][1].lower()):  # "but clear", of what was dropped
        return ""
    return _assemble(kept, body, dropped_head=kept[0][0] != "") + (end or "")


def _suspect(lower: str, lex: Lexicon) -> bool:
    return bool(
        lex.denied.search(lower)
        or (lex.excluded is not None and lex.excluded.search(lower))
        or (lex.excluded_here is not None and lex.excluded_here.search(lower))
        or any(p.search(lower) for name, p in _TOPICS if name in lex.topics)
        or ("inflation" in lex.topics and _INFLATED.search(lower))
        or _BROAD.search(lower)
        or _ALL_NORMAL.search(lower)
    )


def _clauses(body: str) -> list[tuple[str, str]]:
    """[(connector before, clause)]; a coordinator cuts only between two parts that say
    something."""
    out: list[tuple[str, str]] = []
    start, connector = 0, ""
    for match in _CONNECTOR.finditer(body):
        left, right = body[start : match.start()], body[match.end() :]
        tail = right.lstrip().lower()
        negative = tail.startswith(("no ", "without", "negative", "there "))
        contrast = _CONTRAST.search(match.group().lower()) and len(left.split()) > 1
        says = contrast or _PREDICATE.search(left.lower())
        if not left or not (negative or (says and _PREDICATE.search(tail))):
            continue
        if _OPEN_END.search(left.lower()):
            continue
        out.append((connector, left))
        connector, start = match.group(), match.end()
    out.append((connector, body[start:]))
    return out


def _assemble(kept: list[tuple[str, str]], body: str, *, dropped_head: bool) -> str:
    connector, first = kept[0]
    if dropped_head:
        first = re.sub(r"^without(?: any)?\b", "no", first, flags=re.I)
        if body[:1].isupper():
            first = capitalised(first)
    text = first
    for connector, clause in kept[1:]:
        text += connector + clause
    return text


def _hollow(clause: str) -> bool:
    """Whether nothing is said: only connecting words are left."""
    return re.search(r"[a-z]{3,}", _FILLER.sub("", clause.lower())) is None


def _edit_clause(clause: str, lex: Lexicon, where: frozenset[str], context: str) -> str:
    """`clause` without what contradicts the target; `context` is the sentence before it."""
    lower = clause.lower()
    if _EXEMPT.search(lower):
        return clause
    if _REST.match(lower) and "lung" in context:
        named = sides(context)
        elsewhere = bool(named) and not named & where
        return clause if "lungs" not in lex.topics or "otherwise" in lower or elsewhere else ""
    quiet = _SAYS_NOTHING_ACUTE.match(lower)
    if quiet is not None:
        return _edit_quiet(clause, quiet.group("subject"), lex)
    cue = _NEGATION.match(lower)
    if cue is not None:
        if _BONES.search(context) and not lex.denied.search(lower):
            return clause
        return _edit_denial(clause, cue.end(), lex)
    if _ALL_NORMAL.search(lower):
        return ""
    new = _edit_normal(clause, lex, where)
    if new is not None:
        return new
    if lex.denied.search(lower) and _denied_in(lower, lex):
        return ""
    if lex.excluded is not None and _asserts(lex.excluded, lower):
        return ""
    if lex.excluded_here is not None and _asserts(lex.excluded_here, lower):
        named = sides(lower)
        if not named or named & where:
            return ""
    return clause


def _edit_quiet(clause: str, subject: str, lex: Lexicon) -> str:
    """ "The lungs and pleural spaces show no acute abnormality": dropped for a disease of one of
    them."""
    if _BONES.search(subject):
        return clause
    topics = {name for name, pattern in _TOPICS if pattern.search(subject)}
    return "" if lex.acute or topics & lex.topics else clause


def _denied_in(lower: str, lex: Lexicon) -> bool:
    """Whether a clause that is no plain denial still denies the target by some word near its
    name."""
    for match in lex.denied.finditer(lower):
        before, after = lower[: match.start()][-80:], lower[match.end() :][:60]
        if _DENIES_BEFORE.search(before) or _DENIES_AFTER.search(after):
            return True
    return False


def _asserts(pattern: re.Pattern[str], lower: str) -> bool:
    match = pattern.search(lower)
    return (
        match is not None and re.search(r"\b(?:no|without|not)\b", lower[: match.start()]) is None
    )


def _edit_denial(clause: str, cue_end: int, lex: Lexicon) -> str:
    """`clause`, a cue of negation and a list of items, without those that name the target."""
    rest = clause[cue_end:]
    tail_match = _TAIL.search(rest)
    tail = tail_match.group() if tail_match else ""
    listed = rest[: len(rest) - len(tail)] if tail else rest
    lower = listed.lower()
    if _BROAD.search(lower.strip()) and not lex.denied.search(lower):
        return "" if lex.acute or not lower.strip() else clause
    if lex.denied.search(tail.lower()):
        return ""
    if not lex.denied.search(lower):
        if lower.strip() == "disease" and lex.acute:
            return ""
        return clause
    separators = _ITEM.findall(listed)
    items = [item.strip() for item in _ITEM.split(listed)]
    named = [bool(lex.denied.search(item.lower())) for item in items]
    if len(items) == 1 or all(named) or any(len(item.split()) > 7 for item in items):
        return ""
    kept = [item for item, hit in zip(items, named, strict=True) if not hit and item]
    if not kept or any(_FRAGMENT.match(item.lower()) for item in kept):
        return ""
    if lex.acute and all(_BROAD.search(item.lower()) for item in kept):
        return ""
    if lex.acute:
        kept = [item for item in kept if not _BROAD.search(item.lower())]
    word = next(
        (w for w in (re.search(r"and/or|and|or|nor", s) for s in reversed(separators)) if w), None
    )
    oxford = any("," in s and re.search(r"and|or", s) for s in separators)
    joined = series(kept, word.group() if word else "", oxford)
    head = clause[:cue_end]
    if named[0]:
        head = agree_there(head, kept[0])
    return head + (" " if not head.endswith(" ") else "") + joined + agree_tail(tail, kept)


def _topic(subject: str) -> str:
    lower = subject.lower()
    return next((name for name, pattern in _TOPICS if pattern.search(lower)), "other")


def _contradicted(subject: str, predicate: str, lex: Lexicon, where: frozenset[str]) -> bool:
    topic = _topic(subject)
    named = sides(subject.lower())
    if named and where and not named & where:
        return False
    if "otherwise" in predicate:
        return False
    if topic == "lungs" and "inflation" in lex.topics and _INFLATED.search(predicate):
        return True
    if topic == "lungs" and not re.search(r"\b(?:clear|normal|unremarkable)\b", predicate):
        return False
    if topic == "lungs" and "inflation" in lex.topics and re.search(r"^\s*normal\b", predicate):
        return True
    return topic in lex.topics


def _edit_normal(clause: str, lex: Lexicon, where: frozenset[str]) -> str | None:
    """A normal statement without the subjects that the target contradicts; None if it is none."""
    lower = clause.lower()
    match = _PRE.match(lower)
    prefix = match is not None
    if match is None:
        match = _POST.match(lower)
    if match is None:
        return None
    start, stop = match.span("subject")
    subject = clause[start:stop]
    predicate = match.group("predicate") + " " + (match.group("adverb") or "")
    if (
        re.search(r"\b(?:no|without|not|however|but)\b", subject.lower())
        or len(subject.split()) > 16
    ):
        return None
    if _VERBAL.search(subject.lower()) or re.search(r" The\b", subject):
        return "" if _contradicted(subject, predicate, lex, where) else None
    separators = _ITEM.findall(subject)
    items = [item.strip() for item in _ITEM.split(subject)]
    bad = [_contradicted(item, predicate, lex, where) for item in items]
    if not any(bad):
        return None if _names_target(lower, lex) else clause
    kept = [item for item, hit in zip(items, bad, strict=True) if not hit]
    if any(re.fullmatch(r"(?:size|contours?|configuration)", item.lower()) for item in kept):
        return ""
    if not kept or all(_topic(item) == "other" and _FRAGMENT.match(item.lower()) for item in kept):
        return ""
    if bad[-1] and re.fullmatch(
        r"(?:the )?(?:cardiac|mediastinal|hilar|pulmonary|cardio)", kept[-1].lower()
    ):
        kept[-1] += " " + items[-1].split()[-1]
    if re.fullmatch(r"(?:the )?(?:cardiac|mediastinal|hilar|pulmonary|aortic)", kept[-1].lower()):
        return ""
    if (
        re.search(r"\bboth\b|\bsize\b", match.group("adverb") or "")
        or "otherwise" in subject.lower()
    ):
        return ""
    word = next((w for w in (re.search(r"and|or", s) for s in reversed(separators)) if w), None)
    if (
        bad[0]
        and re.match(r"the\s", items[0].lower())
        and not kept[0].lower().startswith(("the ", "xxxx"))
    ):
        kept[0] = "the " + kept[0]
    joined = series(
        kept, word.group() if word else "and", any("," in s and "and" in s for s in separators)
    )
    several = len(kept) > 1 or plural(kept[0])
    if prefix:
        return clause[:start] + joined
    return start_like(clause, joined) + agree(clause[stop:], several)


def _names_target(lower: str, lex: Lexicon) -> bool:
    return bool(
        lex.denied.search(lower) or (lex.excluded is not None and lex.excluded.search(lower))
    )
