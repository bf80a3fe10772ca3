"""All figures of one model in the study; figures only, no text of any study."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cpo_fast.counterfactual import build_sft_preference
from cpo_fast.counting import counted
from cpo_fast.data.labels import DEFAULT_PROMPT, LABEL_NAMES, parse_answer
from cpo_fast.errors import DataError
from cpo_fast.evaluation.cohort import Cohort, read_cohort
from cpo_fast.evaluation.run import evaluate
from cpo_fast.evaluation.suites import Options
from cpo_fast.model.checkpoint import Checkpoint
from cpo_fast.phantom.reports import DRIFTS

PAPER_FINDINGS = {
    "Con": "Consolidation",
    "PE": "Pleural Effusion",
    "Pna": "Pneumonia",
    "Pnx": "Pneumothorax",
    "Ede": "Edema",
}
"""The five findings of MS-CXR-T by their abbreviations in the paper's tables."""

DRIFTING = tuple(dict.fromkeys(name for drift in DRIFTS for name in drift.findings))
"""Findings whose wording changes over the years of the phantom."""

Answers = Sequence[tuple[str, ...] | None]


@dataclass(frozen=True)
class Scale:
    """The size of the evaluation of each model."""

    max_samples: int  # test studies
    drift_samples: int  # of these, studies whose reports are probed by swaps
    max_new_tokens: int
    max_pixels: int


def measure(
    model: Path, data: Path, scale: Scale, *, prompt: str = DEFAULT_PROMPT
) -> dict[str, float | None]:
    """The figures of one model on the test split of the phantom in `data`, for one prompt.

    "accuracy/F", "f1/F" per finding F, "/mean5" (the paper's five) and "/mean" (all that occur);
    "exact", "unparsable" (shares); "drifted/accuracy" (all findings), "drifted/pairs" (the drifting
    findings) and "drifted/studies" for the studies whose reports use a drifting word; "swap/K" and
    "flip/K", mean total variation and share of changed likeliest findings under swaps of kind K in
    the radiologist's report after the default prompt. None where undefined.
    """
    checkpoint = Checkpoint.open(model, max_pixels=scale.max_pixels)
    loaded = checkpoint.load(dtype=torch.float32)
    cohort = read_cohort(checkpoint, str(data), max_samples=scale.max_samples)
    reports = cohort.prompts  # the default prompt, for the swaps
    cohort.prompts = [
        checkpoint.encode_prompt(build_sft_preference(study, prompt=prompt), max_length=4096)
        for study in cohort.studies
    ]
    options = Options(suites=(), max_new_tokens=scale.max_new_tokens, batch_size=160)
    result = evaluate({"model": lambda: loaded}, checkpoint, cohort, options)
    # All models must be compared on the same studies, so none can be dropped.
    if cohort.rejected:
        first = cohort.rejected[0]
        raise DataError(
            f"{counted(len(cohort.rejected), 'study', 'studies')} of the phantom in {data} cannot "
            "be read, the first: "
            f"{first.id} ({first.reason}: {first.detail}); delete {data.parent} to create it again"
        )
    parsed = [parse_answer(text) or None for text in result.answers["model"]]
    drifted = find_drifted_studies(data)
    where = [i for i, s in enumerate(cohort.studies) if s.study_id.lstrip("s") in drifted]
    cohort.prompts = reports  # none was dropped
    return measure_answers(cohort.truth, parsed, where) | measure_swaps(
        loaded, checkpoint, cohort, scale.drift_samples
    )


def measure_answers(
    truth: Sequence[Sequence[str]], parsed: Answers, drifted: Sequence[int]
) -> dict[str, float | None]:
    """Accuracy and F1 of N answers; `drifted`: indices of the studies with a drifting word."""
    from cpo_fast.evaluation.classification import classification

    found = classification(truth, parsed, bootstrap=1)
    figures: dict[str, float | None] = {}
    for metric in ("accuracy", "f1"):
        for name in LABEL_NAMES:
            figures[f"{metric}/{name}"] = found["findings"][name][metric]["value"]
        five = [figures[f"{metric}/{name}"] for name in PAPER_FINDINGS.values()]
        known = [value for value in five if value is not None]
        figures[f"{metric}/mean5"] = sum(known) / len(known) if known else None
        figures[f"{metric}/mean"] = found["macro"][metric]["value"]
    figures["exact"] = found["exact_match"]["value"]
    figures["unparsable"] = found["unparsable"] / found["studies"]
    figures["drifted/studies"] = float(len(drifted))
    figures |= {"drifted/accuracy": None, "drifted/pairs": None}
    if drifted:
        part = classification([truth[i] for i in drifted], [parsed[i] for i in drifted],
                              bootstrap=1)  # fmt: skip
        pairs = [part["findings"][name]["accuracy"]["value"] for name in DRIFTING]
        figures["drifted/accuracy"] = part["macro"]["accuracy"]["value"]
        figures["drifted/pairs"] = sum(pairs) / len(pairs)
    return figures


def measure_swaps(
    model: Any, checkpoint: Checkpoint, cohort: Cohort, count: int
) -> dict[str, float | None]:
    """Effects of swaps in the reports of the first `count` studies, the same for all models.

    "swap/drifting": synonyms whose association changes over the years of the phantom.
    """
    from tqdm import tqdm

    from cpo_fast.concepts import load_graph
    from cpo_fast.evaluation.drift import find_swaps, swap_effects
    from cpo_fast.model.packed import PackedModel

    packed, image, graph = PackedModel(model), checkpoint.image_token_id, load_graph()
    moved: dict[str, list[float]] = {}
    flipped: dict[str, list[float]] = {}
    pairs = list(zip(cohort.prompts, cohort.studies, strict=True))[:count]
    for prompt, study in tqdm(pairs, desc="swaps", unit="study", disable=None):
        swaps = find_swaps(study.report.text, graph)
        before, effects = swap_effects(
            packed, checkpoint.tokenizer, prompt, study.report.text, swaps, checkpoint.pixels,
            image_token_id=image,
        )  # fmt: skip
        for effect in effects:
            kinds = [effect.swap.kind]
            if {effect.swap.before.lower(), effect.swap.after.lower()} in DRIFTING_WORDS:
                kinds.append("drifting")
            for kind in kinds:
                moved.setdefault(kind, []).append(effect.variation)
                flip = effect.distribution.argmax() != before.argmax()
                flipped.setdefault(kind, []).append(float(flip))
    figures: dict[str, float | None] = {}
    for kind in ("synonym", "drifting", "side", "negation", "hallmark"):
        for name, values in (("swap", moved), ("flip", flipped)):
            own = values.get(kind)
            figures[f"{name}/{kind}"] = sum(own) / len(own) if own else None
    return figures


DRIFTING_WORDS = [set(drift.words) for drift in DRIFTS]


def find_drifted_studies(data: Path) -> set[str]:
    """Ids of the studies whose reports use a drifting word, from the phantom's truth."""
    path = data / "phantom_truth.jsonl"
    try:
        rows: list[dict[str, Any]] = [json.loads(line) for line in path.open(encoding="utf-8")]
        return {str(row["study_id"]) for row in rows if row["drift"]}
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{path}: not the truth file of a phantom ({type(error).__name__})"
        ) from None


def measure_majority(data: Path, max_samples: int) -> dict[str, float | None]:
    """The figures of the majority guess, the most frequent diagnosis of the training split."""
    from cpo_fast.counterfactual import study_labels
    from cpo_fast.data import open_studies
    from cpo_fast.data.labels import diagnosis
    from cpo_fast.evaluation.classification import majority_guess

    train: list[tuple[str, ...]] = []
    test: list[tuple[str, ...]] = []
    ids: list[str] = []
    for study in open_studies(str(data)):
        names = diagnosis(study_labels(study))
        if study.split == "train":
            train.append(names)
        elif study.split == "test" and len(test) < max_samples:
            test.append(names)
            ids.append(study.study_id.lstrip("s"))
    if not train or not test:
        raise DataError(f"{data} has no training or no test study: enlarge the phantom")
    drifted = find_drifted_studies(data)
    where = [i for i, one in enumerate(ids) if one in drifted]
    return measure_answers(test, [majority_guess(train)] * len(test), where)
