"""`python -m cpo_fast.evaluate` on a CSV and a folder of images: sets that hold no reports.

ChestXray14, CheXpert and PadChest give the zero-shot AUC per finding; MS-CXR-T gives both protocols
of its top-1 accuracy. Images lie below --image_root.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpo_fast.errors import DataError, RecordError, UsageError
from cpo_fast.evaluation.cohort import Cohort, Loaded, diagnose_cohort, zero_shot

if TYPE_CHECKING:
    from cpo_fast.evaluation.ms_cxr_t import TemporalCase
    from cpo_fast.types import Prompt, Study

QUESTION = (
    "The first radiograph is the earlier one, the second the later one of the same patient. Is "
    "{finding} improving, stable or worsening?"
)
"""Protocol A of MS-CXR-T asks this, with both images; the answers are ANSWER for each class."""
ANSWER = "The {finding} is {progression}."


def evaluate_csv(args: argparse.Namespace, loaded: Loaded) -> tuple[dict[str, Any], Cohort]:
    """(`evaluation` of summary.json, what was read). Raises UsageError for a text-only model,
    DataError for a file that cannot be used.
    """
    from cpo_fast.evaluation.csv_sets import rows
    from cpo_fast.evaluation.ms_cxr_t import is_ms_cxr_t

    if loaded.images is None:
        raise UsageError(f"--model {args.model} cannot see: {args.dataset} has images only")
    columns, _ = rows(Path(args.dataset))
    if is_ms_cxr_t(columns):
        return _temporal(args, loaded)
    return _labelled(args, loaded)


def _labelled(args: argparse.Namespace, loaded: Loaded) -> tuple[dict[str, Any], Cohort]:
    from cpo_fast.evaluation.csv_sets import read_labelled_csv
    from cpo_fast.types import Report, Study

    found = read_labelled_csv(
        Path(args.dataset), Path(args.image_root), uncertain=args.uncertain_labels
    )
    cohort = Cohort([], [], [], [], len(found.images) + len(found.rejected), found.rejected)
    cohort.left_out = len(found.images[args.max_samples :]) if args.max_samples else 0
    for one in found.images[: args.max_samples]:
        study = Study(one.image.path, one.patient, Report(), (one.image,), split=args.split)
        if (prompt := _prompt(args, loaded, cohort, study)) is not None:
            cohort.studies.append(study)
            cohort.prompts.append(prompt)
            cohort.truth.append(one.names)
    _stop_if_empty(args, cohort)
    answers = diagnose_cohort(args, loaded, cohort)
    patients = [study.patient_id for study in cohort.studies]
    figures = zero_shot(args, loaded, cohort, answers, findings=found.findings, patients=patients)
    evaluation = {
        "split": found.kind,
        "studies": len(cohort.studies),
        "protocol": f"zero-shot on {found.kind}: likelihood of each finding's sentence after the "
        "model's own thought; 95 % intervals by bootstrap over patients",
        "zero_shot": {loaded.name: figures},
    }
    return evaluation, cohort


def _temporal(args: argparse.Namespace, loaded: Loaded) -> tuple[dict[str, Any], Cohort]:
    from cpo_fast.data.labels import parse_answer
    from cpo_fast.evaluation import ms_cxr_t
    from cpo_fast.types import Report, Study

    cases, unusable = ms_cxr_t.read_ms_cxr_t(Path(args.dataset))
    cohort = Cohort([], [], [], [], len(cases) + len(unusable), unusable)
    cohort.left_out = len(cases[args.max_samples :]) if args.max_samples else 0
    kept = []
    for case in cases[: args.max_samples]:
        images = tuple(_path(args.image_root, one)
                       for one in (case.previous_dicom_id, case.dicom_id))  # fmt: skip
        study = Study(case.study_id, case.subject_id, Report(), images[1:], split=args.split)
        prompt = _prompt(args, loaded, cohort, study)
        both = Study(case.study_id, case.subject_id, Report(), images)
        asked = []
        for name in case.progression if prompt else ():
            one = _prompt(args, loaded, cohort, both, QUESTION.format(finding=name.lower()))
            if one is None:
                break
            asked.append(one)
        if prompt is not None and len(asked) == len(case.progression):
            cohort.studies.append(study)
            cohort.prompts.append(prompt)
            cohort.truth.append(tuple(case.progression))
            kept.append((case, asked))
    _stop_if_empty(args, cohort)
    failed: dict[int, RecordError] = {}
    likeliest = _progressions(args, loaded, kept, failed)
    told = {id(s): (kept[i][0], likeliest[i]) for i, s in enumerate(cohort.studies)}
    cohort.drop(failed)
    parsed = [parse_answer(text) or None for text in diagnose_cohort(args, loaded, cohort)]
    only = [told[id(study)][0] for study in cohort.studies]
    progression = [told[id(study)][1] for study in cohort.studies]
    figures = {
        "A": ms_cxr_t.progression_accuracy(only, progression, seed=args.seed),
        "B": ms_cxr_t.presence_accuracy(only, parsed, seed=args.seed),
    }
    evaluation = {
        "split": "MS-CXR-T",
        "studies": len(only),
        "protocol": f"{ms_cxr_t.PROTOCOL_A}. Protocol {ms_cxr_t.PROTOCOL_B}. 95 % intervals by "
        "bootstrap over patients",
        "ms_cxr_t": {loaded.name: figures},
    }
    return evaluation, cohort


def _progressions(
    args: argparse.Namespace,
    loaded: Loaded,
    kept: Sequence[tuple[TemporalCase, Sequence[Any]]],
    failed: dict[int, RecordError],
) -> list[dict[str, str]]:
    """The likeliest class of every labelled finding of every case; `failed` gets the numbers of the
    cases whose images cannot be read any more.
    """
    from cpo_fast.evaluation.likelihood import score_answers
    from cpo_fast.evaluation.ms_cxr_t import CLASSES
    from cpo_fast.model.packed import PackedModel
    from cpo_fast.packing import image_token_id

    prompts = [prompt for _, asked in kept for prompt in asked]
    of_case = [number for number, (_, asked) in enumerate(kept) for _ in asked]
    unread: dict[int, RecordError] = {}
    candidates = [
        [tuple(loaded.tokenizer(ANSWER.format(finding=name.lower(), progression=one),
                                add_special_tokens=False)["input_ids"]) for one in CLASSES]
        for case, _ in kept
        for name in case.progression
    ]  # fmt: skip
    scores = score_answers(
        PackedModel(loaded.model),
        prompts,
        candidates,
        loaded.pixels,
        image_token_id=image_token_id(loaded.tokenizer),
        packing_length=args.packing_length,
        failed=unread,
    )
    failed |= {of_case[prompt]: error for prompt, error in unread.items()}
    best = iter(scores.argmax(dim=1).tolist())
    return [{name: CLASSES[next(best)] for name in case.progression} for case, _ in kept]


def _path(root: str, dicom_id: str) -> Any:
    """The image of a path-like dicom id, with or without its file name's ending."""
    from cpo_fast.types import ImageRef

    return ImageRef(dicom_id if Path(dicom_id).suffix else f"{dicom_id}.jpg", root)


def _prompt(
    args: argparse.Namespace,
    loaded: Loaded,
    cohort: Cohort,
    study: Study,
    question: str | None = None,
) -> Prompt | None:
    """The tokenised question about the study's images; None, and set aside, if that fails."""
    from cpo_fast.data.labels import question as ask
    from cpo_fast.types import Preference, RejectedRecord

    messages = ask(len(study.images), question) if question else ask(len(study.images))
    about = Preference(study.study_id, messages, "?", images=study.images)
    try:
        return loaded.prompt(about, max_length=args.max_length)
    except RecordError as error:
        cohort.rejected.append(
            RejectedRecord(str(args.dataset), None, study.study_id, error.reason, error.detail)
        )
        return None


def _stop_if_empty(args: argparse.Namespace, cohort: Cohort) -> None:
    if not cohort.studies:
        reasons = sorted({record.reason for record in cohort.rejected})
        raise DataError(f"{args.dataset} has no usable image below {args.image_root}: "
                        f"{', '.join(reasons)}")  # fmt: skip
