"""Finding labels and the sentence that states them.

A label is 1 present, 0 absent, -1 uncertain or None not mentioned (`cpo_fast.types.Labels`). The
sentence is the one of the CPO paper (arXiv 2505.13081, section 3): "The disease of this patient is
A, B.", behind the report in `<think>` tags.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from cpo_fast.types import FINDINGS, Labels

LABEL_NAMES: tuple[str, ...] = (*FINDINGS, "Emphysema")
"""The 14 CheXpert names and Emphysema, which the concept graph and Open-I have besides."""

NO_FINDING = "No Finding"

DEFAULT_PROMPT = (
    "You are reading a chest radiograph. Describe what it shows the way a radiologist reports it, "
    "then name the diseases of this patient."
)
"""What is asked of the model where a data set brings no prompt of its own."""

UNCERTAIN_POLICIES: dict[str, frozenset[int]] = {
    "negative": frozenset({1}),
    "positive": frozenset({1, -1}),
}
"""Which label values count as present. "negative", the default: only asserted findings are
named."""

_KNOWN = frozenset(LABEL_NAMES)
_ANSWER = re.compile(r"\s*The disease of this patient is ([^\n]+)\.\s*")


def diagnosis(labels: Labels, *, uncertain: str = "negative") -> tuple[str, ...]:
    """The names to be stated for `labels`, in the order of `LABEL_NAMES`.

    `uncertain` names the policy for -1: "negative" (default) leaves hedged findings out, "positive"
    names them. Not mentioned (None or missing) is never present. "No Finding" stands alone: it is
    returned exactly when no other finding is present, so also for a study without labels (test
    `study.labels` for those). Raises ValueError for an unknown policy.
    """
    if uncertain not in UNCERTAIN_POLICIES:
        raise ValueError(
            f"uncertain must be one of {sorted(UNCERTAIN_POLICIES)}, not {uncertain!r}"
        )
    values = UNCERTAIN_POLICIES[uncertain]
    names = (name for name in LABEL_NAMES if name != NO_FINDING and labels.get(name) in values)
    return tuple(names) or (NO_FINDING,)


def question(images: int, prompt: str = DEFAULT_PROMPT) -> tuple[Mapping[str, Any], ...]:
    """The messages of `Preference.prompt` that ask `prompt` about so many images."""
    content = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": prompt}]
    return ({"role": "user", "content": content},)


def answer(names: Iterable[str]) -> str:
    """`The disease of this patient is A, B.` Raises ValueError when there is no name."""
    listed = ", ".join(names)
    if not listed:
        raise ValueError('an answer names at least one finding; "No Finding" is one')
    return f"The disease of this patient is {listed}."


def thought(report_text: str, names: Iterable[str]) -> str:
    """`<think> {report} </think> The disease of this patient is A, B.`: what SFT learns."""
    return f"<think> {report_text} </think> {answer(names)}"


def parse_answer(text: str) -> tuple[str, ...]:
    """The names that a generated text states after its last `</think>`; () when it states none
    properly.

    The strict inverse of `answer` for names of `LABEL_NAMES`: the sentence must be all that is
    left, each name must be known and stated once. A text that opens `<think>` and never closes it
    has no answer; one without any thinking may be the bare sentence.
    """
    _, closed, tail = text.rpartition("</think>")
    if not closed and "<think>" in text:
        return ()
    match = _ANSWER.fullmatch(tail)
    if match is None:
        return ()
    names = tuple(match[1].split(", "))
    return names if _KNOWN.issuperset(names) and len(set(names)) == len(names) else ()
