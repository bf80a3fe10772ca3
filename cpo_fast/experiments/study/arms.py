"""What each arm of the study learns from: one file per arm, the same studies in each.

SFT learns two questions about every study: the default one, answered by thought and diagnosis, and
`DIRECT`, answered by the diagnosis alone. A tower that starts from random weights hardly learns
from reports, whose words can mostly be guessed from the words before; the short answers teach it to
see, and ask the model without the thought, as the paper's table 5 does.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cpo_fast.concepts import load_graph
from cpo_fast.counterfactual import build_preference, study_labels
from cpo_fast.counterfactual.perception import build_pool, perception_counterfactuals
from cpo_fast.data.labels import DEFAULT_PROMPT, answer, diagnosis, question, thought
from cpo_fast.errors import DataError
from cpo_fast.folders import write_jsonl
from cpo_fast.types import Answer, Counterfactual, Study

DIRECT = "Name the diseases of this patient."
"""The question that is answered without a thought."""

SFT_ANSWERS, SFT, RANDOM, ANSWERS, CPO = (
    "sft_answers", "sft", "dpo_random", "cpo_answers", "cpo"
)  # fmt: skip
ARMS = {
    SFT_ANSWERS: "SFT without the thought",
    SFT: "SFT",
    RANDOM: "DPO, random negatives",
    ANSWERS: "CPO without the thought",
    CPO: "CPO",
}
"""Arm -> how it is called in tables; the paper's names are those of its tables 2 and 5.
The first two are one model, asked both questions.
"""

PLUS = "cpo_plus"
MORE = {PLUS: "CPO++"}
"""The arm that is trained when it is asked for."""

QUESTIONS = dict.fromkeys([*ARMS, *MORE], DEFAULT_PROMPT) | dict.fromkeys(
    (SFT_ANSWERS, ANSWERS), DIRECT
)

Sides = tuple[Answer, Sequence[Answer]]


def write_arms(
    folder: Path, studies: Sequence[Study], cfs: Sequence[Counterfactual], *, seed: int
) -> dict[str, Path]:
    """One .jsonl per arm that is trained: {arm: path}, mode 0600.

    Only training studies with counterfactuals count; each row has as many rejected answers as its
    study has counterfactuals. Row i is about the same study in each but SFT's, which holds the rows
    of CPO with and without the thought; it learns their chosen sides. Raises DataError when there
    are none.
    """
    of_study: dict[str, list[Counterfactual]] = {}
    for one in cfs:
        of_study.setdefault(one.study_id, []).append(one)
    used = [
        replace(study, images=study.images[:1])  # as training reads them: the frontal view
        for study in studies
        if study.split == "train" and study.study_id in of_study
    ]
    if not used:
        raise DataError("no training study has a counterfactual: nothing to learn from")
    draw = random.Random(seed)
    makers: dict[str, Callable[[Study], Sides]] = {
        RANDOM: lambda study: _random(study, used, len(of_study[study.study_id]), draw),
        ANSWERS: lambda study: _answers(study, of_study[study.study_id]),
        CPO: lambda study: _counterfactual(study, of_study[study.study_id]),
    }
    paths = {}
    rows = {
        arm: [_row(study, QUESTIONS[arm], sides(study)) for study in used]
        for arm, sides in makers.items()
    }
    thinking, direct = ([one | {"id": f"{one['id']}/{kind}"} for one in rows[kind]]
                        for kind in (CPO, ANSWERS))  # fmt: skip
    rows = {SFT: thinking + direct} | rows
    for arm, own in rows.items():
        paths[arm] = folder / f"{arm}.jsonl"
        write_jsonl(paths[arm], own)
    return paths


def write_plus(path: Path, cpo: Path, studies: Sequence[Study], *, seed: int) -> None:
    """CPO++'s file: the rows of CPO's, each followed by its chosen answer before its own image
    against the same answer before another patient's."""
    rows = {row["id"]: row for row in map(json.loads, cpo.open(encoding="utf-8"))}
    used = [replace(study, images=study.images[:1]) for study in studies if study.study_id in rows]
    graph = load_graph()
    pool = build_pool(used, graph)

    def both() -> Iterator[dict[str, Any]]:
        for one in perception_counterfactuals(used, pool, graph, seed=seed):
            row = rows[one.study_id]
            yield row
            if one.passed:
                answers, shown = [row["chosen"]], list(one.rejected_images)
                yield row | {"rejected_responses": answers, "rejected_images": shown}

    write_jsonl(path, both())


def _row(study: Study, asked: str, sides: Sides) -> dict[str, Any]:
    chosen, rejected = sides
    return {
        "id": study.study_id,
        "images": [image.path for image in study.images],
        "prompt": list(question(len(study.images), asked)),
        "chosen": chosen,
        "rejected_responses": list(rejected),
    }


def _names(study: Study) -> tuple[str, ...]:
    return diagnosis(study_labels(study))


def _counterfactual(study: Study, cfs: Sequence[Counterfactual]) -> Sides:
    both = build_preference(study, cfs)
    return both.chosen, both.rejected


def _answers(study: Study, cfs: Sequence[Counterfactual]) -> Sides:
    """The diagnosis alone against the targets alone."""
    return answer(_names(study)), [answer((one.target,)) for one in cfs]


def _random(study: Study, others: Sequence[Study], count: int, draw: random.Random) -> Sides:
    """Reports and diagnoses of other patients, each with a text of its own."""
    chosen = thought(study.report.text, _names(study))
    rejected: list[str] = []
    for other in draw.sample(others, len(others)):
        text = thought(other.report.text, _names(other))
        if other.patient_id != study.patient_id and text not in (chosen, *rejected):
            rejected.append(text)
        if len(rejected) == count:
            return chosen, rejected
    raise DataError(f"{len(others)} training studies are too few for {count} random negatives each")
