"""The prompt for a language model to write a counterfactual, and the parser of its answer.

The prompt is built from the report, the target and its neighbours in the concept graph. An answer
must have the sections of the original. Text before the first section ("Here is ...") and the
model's thinking are removed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from cpo_fast.concepts.labeller import label_report
from cpo_fast.errors import RecordError
from cpo_fast.types import ConceptGraph, Report

MAX_ANSWER = 16_000
"""Maximum characters of an answer; the longest report of Open-I has 2,000."""

_RULES = (
    "State {target} as a plain fact in {places}, without hedging and without naming a prior study.",
    "Where you describe it, use one or two of its radiographic signs: {signs}.",
    "Take out or reword every statement that rules it out: denials of it, statements that the "
    "region it affects is clear or normal.",
    "{excluded}",
    "{kept}",
    "Leave every other sentence exactly as it stands, with its wording, order, letter case and "
    "list numbers.",
    "Mention no finding that is neither in the report nor {target}.",
    "Write the section headings of the report and nothing before, between or after the sections.",
)
_FAULTS = {
    "differs": "the text was the same as before",
    "format": "the sections were not those of the report",
    "target": "the disease was not asserted in every section",
    "no_denial": "a sentence still ruled the disease out",
    "sides": "a lung was called clear on the side of the disease",
    "no_exclusion": "something that cannot stand beside the disease was left",
    "survivors": "a finding that had to stay was gone",
    "nothing_else": "a finding was added that nobody asked for",
    "assertions": "a finding that the report asserts was gone",
    "no_new_denial": "a finding that the report asserts was denied",
    "exemptions": "the lungs were called clear but for something else",
    "length": "the text was far shorter or longer than the report",
    "edits": "too many sentences were changed",
    "no_leak": "the text held more than the report",
}


@dataclass(frozen=True, slots=True)
class Task:
    """One counterfactual to write; `attempt` counts from 0, `failed` names the failed checks of
    the previous attempt."""

    report: Report
    target: str
    study_id: str
    seed: int
    attempt: int = 0
    failed: tuple[str, ...] = ()


def build_prompt(graph: ConceptGraph, task: Task) -> str:
    """The prompt of a task; contains a patient's report."""
    disease = graph.diseases[task.target]
    ruled_out = [graph.attributes[key].name for key in disease.exclusions]
    ruled_out += sorted(graph.excluded[task.target])
    present = [name for name, value in label_report(task.report.text).items() if value == 1]
    kept = [n for n in present if n != "No Finding" and n not in graph.excluded[task.target]]
    signs = [*disease.hallmarks, *(a for a in disease.associations if a not in disease.hallmarks)]
    sections = [s for s in ("findings", "impression") if getattr(task.report, s)]
    rules = [
        rule.format(
            target=task.target,
            places=" and in ".join(f"the {name}" for name in sections),
            signs="; ".join(graph.attributes[key].name for key in signs),
            excluded=f"Take out what cannot be true beside it: {'; '.join(ruled_out)}."
            if ruled_out
            else "",
            kept=f"Keep these findings of the patient: {', '.join(kept)}." if kept else "",
        )
        for rule in _RULES
    ]
    lines = [
        "You edit chest radiograph reports as an experienced thoracic radiologist. Below is a "
        f"report. Give it back as it would read if the same patient also had {task.target}.",
        "",
        *(f"- {rule}" for rule in rules if rule),
    ]
    faults = [_FAULTS[name] for name in task.failed if name in _FAULTS]
    if faults:
        lines += ["", f"An earlier try was refused: {'; '.join(faults)}."]
    return "\n".join([*lines, "", "<report>", task.report.text, "</report>"])


_THINKING = re.compile(r"\A.*</think>", re.DOTALL)
_HEADING = re.compile(
    r"^[\s*#_>]*(FINDINGS|IMPRESSION)[*_]*[ \t]*:[*_]*", re.IGNORECASE | re.MULTILINE
)
_FENCE = re.compile(r"^\s*(?:```\w*|</?report>)\s*$", re.MULTILINE)
_UNPRINTABLE = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f"
    r"\ud800-\udfff\ufeff\U000e0000-\U000e007f]"
)


def parse_rewrite(text: str, original: Report) -> Report:
    """Parse the report in a model's answer; it must have the sections of `original`.

    Raises RecordError "answer-empty", "answer-too-long", "answer-unprintable" (control characters,
    lone surrogates, marks that change the text direction) or "answer-sections" (other sections than
    the original, or a repeated one). No error repeats the text.
    """
    if len(text) > MAX_ANSWER:
        raise RecordError("answer-too-long", f"{len(text)} characters, at most {MAX_ANSWER}")
    text = _FENCE.sub("", _THINKING.sub("", text)).replace("\r\n", "\n").strip()
    if not text:
        raise RecordError("answer-empty")
    if _UNPRINTABLE.search(text):
        raise RecordError("answer-unprintable")
    marks = list(_HEADING.finditer(text))
    ends = [*(m.start() for m in marks[1:]), len(text)]
    found = {
        mark.group(1).lower(): text[mark.end() : end].strip()
        for mark, end in zip(marks, ends, strict=False)
    }
    wanted = {name for name in ("findings", "impression") if getattr(original, name)}
    if len(marks) != len(found) or {name for name, part in found.items() if part} != wanted:
        raise RecordError("answer-sections")
    return Report(found.get("findings", ""), found.get("impression", ""))


_LEAKS = re.compile(
    r"counterfactual|\brewrit|\b(?:as an|i am an|language) (?:ai|model)\b|\bai model\b|</?\w+>|"
    r"<\||```|\b(?:system|user|assistant)\s*:|\bhere(?: i|')s\b|\bhere are\b|\bi (?:have|changed|"
    r"added|removed|can't|cannot|am)\b|^\**note\b|the disease of this patient|"
    r"\bconcept graph\b|\binstruction|\bsorry\b|\bprompt\b|https?://"
)
_WORD = re.compile(r"[a-z]+")
_RUN = 6


def _word_runs(text: str) -> set[tuple[str, ...]]:
    words = _WORD.findall(text.lower())
    return set(zip(*(words[i:] for i in range(_RUN)), strict=False))


_OWN_RUNS = frozenset().union(*map(_word_runs, _RULES))


@lru_cache(maxsize=1 << 17)
def find_leaks(sentence: str) -> frozenset[object]:
    """Traces in a lower-case sentence of a prompt, a chat or a model's remarks: typical words, and
    runs of six words from the rules of the prompt."""
    return frozenset(_LEAKS.findall(sentence)) | (_OWN_RUNS & _word_runs(sentence))
