"""Finding labels and the sentence that states them.

A label is 1 present, 0 absent, -1 uncertain or None not mentioned (`cpo_fast.types.Labels`). The
sentence follows the CPO paper (arXiv 2505.13081, section 3): "The disease of this patient is A,
B.", after the report in `<think>` tags.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from cpo_fast.types import FINDINGS, Labels

LABEL_NAMES: tuple[str, ...] = (*FINDINGS, "Emphysema")
"""The 14 CheXpert names and Emphysema, an additional label of the concept graph and Open-I."""

NO_FINDING = "No Finding"

DEFAULT_PROMPT = (
    "You are reading a chest radiograph. Describe what it shows the way a radiologist reports it, "
    "then name the diseases of this patient."
)
"""The prompt for data sets without one."""

UNCERTAIN_POLICIES: dict[str, frozenset[int]] = {
    "negative": frozenset({1}),
    "positive": frozenset({1, -1}),
}
"""Label values that count as present. "negative" (default): asserted findings only."""

_KNOWN = frozenset(LABEL_NAMES)
ANSWER = re.compile(r"The disease of this patient is ([^\n]+)\.")
"""The sentence of `answer` and the names in it."""


def diagnosis(labels: Labels, *, uncertain: str = "negative") -> tuple[str, ...]:
    """The findings present in `labels`, in the order of `LABEL_NAMES`.

    `uncertain` is the policy for -1: "negative" (default) omits uncertain findings, "positive"
    includes them. None or missing is never present. ("No Finding",) is returned if and only if no
    other finding is present, also for a study without labels (check `study.labels`). Raises
    ValueError for an unknown policy.
    """
    if uncertain not in UNCERTAIN_POLICIES:
        raise ValueError(
            f"uncertain must be one of {sorted(UNCERTAIN_POLICIES)}, not {uncertain!r}"
        )
    values = UNCERTAIN_POLICIES[uncertain]
    names = (name for name in LABEL_NAMES if name != NO_FINDING and labels.get(name) in values)
    return tuple(names) or (NO_FINDING,)


def question(images: int, prompt: str = DEFAULT_PROMPT) -> tuple[Mapping[str, Any], ...]:
    """The messages of `Preference.prompt`: the images, then `prompt`."""
    content = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": prompt}]
    return ({"role": "user", "content": content},)


def answer(names: Iterable[str]) -> str:
    """`The disease of this patient is A, B.` Raises ValueError without a name."""
    listed = ", ".join(names)
    if not listed:
        raise ValueError('an answer names at least one finding; "No Finding" is one')
    return f"The disease of this patient is {listed}."


def thought(report_text: str, names: Iterable[str]) -> str:
    """`<think> {report} </think> The disease of this patient is A, B.`: the target of SFT."""
    return f"<think> {report_text} </think> {answer(names)}"


def parse_answer(text: str) -> tuple[str, ...]:
    """The findings stated after the last `</think>` of a generated text; () if not well-formed.

    The strict inverse of `answer` for names of `LABEL_NAMES`: the text after the tag must be this
    sentence alone, with known names, each once. A text with an unclosed `<think>` has no answer;
    one without `<think>` can be the sentence itself.
    """
    _, closed, tail = text.rpartition("</think>")
    if not closed and "<think>" in text:
        return ()
    match = ANSWER.fullmatch(tail.strip())
    if match is None:
        return ()
    names = tuple(match[1].split(", "))
    return names if _KNOWN.issuperset(names) and len(set(names)) == len(names) else ()
