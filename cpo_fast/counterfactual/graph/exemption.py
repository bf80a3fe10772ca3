"""Normal statements and denials with an exemption: "clear except for a calcified granuloma"."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from cpo_fast.counterfactual.graph.grammar import is_plural
from cpo_fast.counterfactual.graph.scope import is_own_clause
from cpo_fast.counterfactual.graph.text import capitalise

_CUE = (
    r"(?:with the (?:sole |only )?exception of|except(?:ing)?(?: for)?(?: that)?|apart from|"
    r"aside from|other than|besides|save for|outside of)"
)
_BEHIND = re.compile(rf"^(?P<head>.+?),?\s+{_CUE}\s+(?P<tail>.+)$", re.I)
_BEFORE = re.compile(
    rf"^{_CUE}\s+(?P<tail>.+?)(?:,\s+|\s+(?=there (?:is|are)\b))(?P<head>.+)$", re.I
)
_END = re.compile(r"\s*[,;]\s*(?:and\s+|but\s+)?|\s+(?:and|but|with)\s+", re.I)
_DENIES = re.compile(r"(?:no|without|negative|there (?:is|are))\b")
_VERB = re.compile(
    r"\b(?:is|are|was|were|has|have|appears?|remains?|may|shows?|demonstrates?|represents?)\b"
)
_ARTICLE = re.compile(r"^(?:an?|some)\s", re.I)
_DEFINITE = re.compile(r"^(?:the|this|these|those|his|her)\s", re.I)

_CLEAR = r"(?:\w+ly )?(?:clear|normal|unremarkable|negative)"
_LUNGS = r"(?:the )?lungs?(?: fields?)?(?: (?:are|appear))?"
_OTHERWISE = re.compile(
    rf",\s*(?:(?:and|but|with) )?(?:{_LUNGS} )?otherwise,?\s+(?:{_LUNGS} |appear )?{_CLEAR}"
    r"(?: (?:lungs?|chest|exam\w*|study|radiographs?|x-\w+|bilaterally))*$|"
    rf"\s+(?:(?:but|with) )?otherwise,?\s+(?:{_LUNGS} {_CLEAR}|{_CLEAR} (?:lungs|"
    r"chest|exam\w*|study))(?: bilaterally)?$",
    re.I,
)


@dataclass(frozen=True, slots=True)
class Exemption:
    """A statement (`head`), the finding it exempts, and the rest of the sentence."""

    head: str
    exempt: str
    rest: str


@lru_cache(maxsize=1 << 16)
def find_exemption(body: str) -> Exemption | None:
    """The exemption in a sentence (given without its full stop), or None."""
    match = _BEFORE.match(body)
    if match is not None:
        return Exemption(capitalise(match["head"]), match["tail"], "")
    match = _BEHIND.match(body)
    if match is None:
        return None
    tail = match["tail"]
    for end in _END.finditer(tail):
        rest = tail[end.end() :].lower()
        if is_own_clause(rest) or _DENIES.match(rest):
            return Exemption(match["head"], tail[: end.start()], tail[end.end() :])
    return Exemption(match["head"], tail, "")


def drop_otherwise(body: str) -> str:
    """Remove a trailing "otherwise clear lungs" or the like from `body`."""
    match = _OTHERWISE.search(body)
    return body[: match.start()] if match and match.start() else body


def assert_exempted(exempt: str, head: str) -> str:
    """State an exempted finding as a separate sentence, without the full stop."""
    if _VERB.search(exempt.lower()) or not _VERB.search(head.lower()):
        return capitalise(re.sub(r"^an? ", "", exempt) if not _VERB.search(exempt) else exempt)
    several = is_plural(re.split(r",| and ", exempt)[0])
    if _DEFINITE.match(exempt):
        return capitalise(f"{exempt} {'are' if several else 'is'} present")
    several = several and not _ARTICLE.match(exempt)
    return f"There {'are' if several else 'is'} {exempt}"
