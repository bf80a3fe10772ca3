"""The training data of each arm of the study: one file per arm, with the same studies.

SFT learns two questions about every study: the default one, answered by thought and diagnosis, and
`DIRECT`, answered by the diagnosis only. A randomly initialised vision tower hardly learns from
reports, whose words are mostly predictable from the words before. The short answers train it, and
also query the model without the thought, as in the paper's table 5.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cpo_fast.concepts import load_graph
from cpo_fast.counterfactual import pair_with_counterfactuals, study_labels
from cpo_fast.counterfactual.perception import build_pool, perception_counterfactuals
from cpo_fast.data.labels import DEFAULT_PROMPT, answer, diagnosis, question, thought
from cpo_fast.errors import DataError
from cpo_fast.folders import write_jsonl
from cpo_fast.types import Answer, Counterfactual, Study

DIRECT = "Name the diseases of this patient."
"""The question whose answer has no thought."""

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
"""Arm -> name in tables, as in the paper's tables 2 and 5. The first two arms are one model, asked
both questions.
"""

PLUS = "cpo_plus"
MORE = {PLUS: "CPO++"}
"""The optional arm."""

QUESTIONS = dict.fromkeys([*ARMS, *MORE], DEFAULT_PROMPT) | dict.fromkeys(
    (SFT_ANSWERS, ANSWERS), DIRECT
)

Sides = tuple[Answer, Sequence[Answer]]


def write_arms(
    folder: Path, studies: Sequence[Study], cfs: Sequence[Counterfactual], *, seed: int
) -> dict[str, Path]:
    """Write one .jsonl per trained arm, mode 0600; returns {arm: path}.

    Only training studies with counterfactuals are used; each row has as many rejected answers as
    its study has counterfactuals. Row i has the same study in all files except that of SFT, which
    has the rows of CPO with and without the thought and uses their chosen answers. Raises DataError
    if no study has a counterfactual.
    """
    of_study: dict[str, list[Counterfactual]] = {}
    for one in cfs:
        of_study.setdefault(one.study_id, []).append(one)
    used = [
        replace(study, images=study.images[:1])  # the frontal view, as in training
        for study in studies
        if study.split == "train" and study.study_id in of_study
    ]
    if not used:
        raise DataError("no training study has a counterfactual")
    draw = random.Random(seed)
    makers: dict[str, Callable[[Study], Sides]] = {
        RANDOM: lambda study: _pair_random(study, used, len(of_study[study.study_id]), draw),
        ANSWERS: lambda study: _pair_diagnoses(study, of_study[study.study_id]),
        CPO: lambda study: _pair_counterfactuals(study, of_study[study.study_id]),
    }
    paths = {}
    rows = {
        arm: [_build_row(study, QUESTIONS[arm], sides(study)) for study in used]
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
    """Write the file of CPO++: every row of CPO's file, then its chosen answer with the own image
    against the same answer with another patient's image."""
    rows = {row["id"]: row for row in map(json.loads, cpo.open(encoding="utf-8"))}
    used = [replace(study, images=study.images[:1]) for study in studies if study.study_id in rows]
    graph = load_graph()
    pool = build_pool(used, graph)

    def generate_rows() -> Iterator[dict[str, Any]]:
        for one in perception_counterfactuals(used, pool, graph, seed=seed):
            row = rows[one.study_id]
            yield row
            if one.passed:
                answers, shown = [row["chosen"]], list(one.rejected_images)
                yield row | {"rejected_responses": answers, "rejected_images": shown}

    write_jsonl(path, generate_rows())


def _build_row(study: Study, prompt: str, sides: Sides) -> dict[str, Any]:
    chosen, rejected = sides
    return {
        "id": study.study_id,
        "images": [image.path for image in study.images],
        "prompt": list(question(len(study.images), prompt)),
        "chosen": chosen,
        "rejected_responses": list(rejected),
    }


def _diagnose(study: Study) -> tuple[str, ...]:
    return diagnosis(study_labels(study))


def _pair_counterfactuals(study: Study, cfs: Sequence[Counterfactual]) -> Sides:
    both = pair_with_counterfactuals(study, cfs)
    return both.chosen, both.rejected


def _pair_diagnoses(study: Study, cfs: Sequence[Counterfactual]) -> Sides:
    """The diagnosis against the target diseases, without thoughts."""
    return answer(_diagnose(study)), [answer((one.target,)) for one in cfs]


def _pair_random(study: Study, others: Sequence[Study], count: int, draw: random.Random) -> Sides:
    """Reports and diagnoses of `count` other patients, all texts different."""
    chosen = thought(study.report.text, _diagnose(study))
    rejected: list[str] = []
    for other in draw.sample(others, len(others)):
        text = thought(other.report.text, _diagnose(other))
        if other.patient_id != study.patient_id and text not in (chosen, *rejected):
            rejected.append(text)
        if len(rejected) == count:
            return chosen, rejected
    raise DataError(f"{len(others)} training studies are too few for {count} random negatives each")
