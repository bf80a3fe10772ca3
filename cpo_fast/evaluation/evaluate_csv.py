"""Evaluate a model on a CSV and a folder of images: data sets without reports.

ChestXray14, CheXpert and PadChest give the zero-shot AUC per finding; MS-CXR-T gives top-1 accuracy
under both protocols.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpo_fast.data.labels import parse_answer
from cpo_fast.data.labels import question as ask
from cpo_fast.errors import DataError, RecordError, UsageError
from cpo_fast.evaluation import ms_cxr_t
from cpo_fast.evaluation.cohort import Cohort
from cpo_fast.evaluation.csv_sets import read_csv, read_labelled_csv
from cpo_fast.evaluation.likelihood import score_answers
from cpo_fast.evaluation.suites import Options, generate_answers, score_zero_shot
from cpo_fast.model.checkpoint import Checkpoint
from cpo_fast.model.packed import PackedModel
from cpo_fast.types import ImageRef, Preference, Prompt, RejectedRecord, Report, Study

QUESTION = (
    "The first radiograph is the earlier one, the second the later one of the same patient. Is "
    "{finding} improving, stable or worsening?"
)
"""Question of protocol A of MS-CXR-T about both images; the candidates are ANSWER per class."""
ANSWER = "The {finding} is {progression}."


@dataclass(frozen=True)
class CsvSource:
    """Paths of images and labels, and limits; `max_length` is in tokens."""

    file: Path
    image_root: Path
    uncertain: str = "negative"
    max_samples: int | None = None
    max_length: int = 4096

    def find_image(self, dicom_id: str) -> ImageRef:
        """The image of a dicom id, which is a path with or without suffix."""
        name = dicom_id if Path(dicom_id).suffix else f"{dicom_id}.jpg"
        return ImageRef(name, str(self.image_root))


def evaluate_csv(
    name: str, model: Any, checkpoint: Checkpoint, source: CsvSource, options: Options
) -> tuple[dict[str, Any], Cohort]:
    """(`evaluation` of summary.json, the cohort). Raises UsageError for a text-only model and
    DataError for an unusable file.
    """
    if checkpoint.images is None:
        raise UsageError(f"{checkpoint.path} is a text-only model: {source.file} has images only")
    columns, _ = read_csv(source.file)
    evaluate = _evaluate_temporal if ms_cxr_t.is_ms_cxr_t(columns) else _evaluate_labelled
    return evaluate(name, model, checkpoint, source, options)


def _evaluate_labelled(
    name: str, model: Any, checkpoint: Checkpoint, source: CsvSource, options: Options
) -> tuple[dict[str, Any], Cohort]:
    found = read_labelled_csv(source.file, source.image_root, uncertain=source.uncertain)
    cohort = Cohort(read=len(found.images) + len(found.rejected), rejected=found.rejected)
    cohort.left_out = len(found.images[source.max_samples :]) if source.max_samples else 0
    for one in found.images[: source.max_samples]:
        study = Study(one.image.path, one.patient, Report(), (one.image,))
        if (prompt := _encode_question(checkpoint, source, cohort, study)) is not None:
            cohort.add(study, prompt, one.names)
    _check_not_empty(source, cohort)
    answers, _ = generate_answers(name, model, checkpoint, cohort, options)
    figures = score_zero_shot(model, checkpoint, cohort, answers, options, findings=found.findings)
    evaluation = {
        "split": found.kind,
        "studies": len(cohort.studies),
        "protocol": f"zero-shot on {found.kind}: likelihood of each finding's sentence after the "
        "model's own thought; 95 % intervals by bootstrap over patients",
        "zero_shot": {name: figures},
    }
    return evaluation, cohort


def _evaluate_temporal(
    name: str, model: Any, checkpoint: Checkpoint, source: CsvSource, options: Options
) -> tuple[dict[str, Any], Cohort]:
    cases, unusable = ms_cxr_t.read_ms_cxr_t(source.file)
    cohort = Cohort(read=len(cases) + len(unusable), rejected=unusable)
    cohort.left_out = len(cases[source.max_samples :]) if source.max_samples else 0
    questions: list[tuple[ms_cxr_t.TemporalCase, list[Prompt]]] = []
    for case in cases[: source.max_samples]:
        images = (source.find_image(case.previous_dicom_id), source.find_image(case.dicom_id))
        study = Study(case.study_id, case.subject_id, Report(), images[1:])
        prompt = _encode_question(checkpoint, source, cohort, study)
        if prompt is None:
            continue
        both = Study(case.study_id, case.subject_id, Report(), images)
        prompts = []
        for finding in case.progression:
            question = QUESTION.format(finding=finding.lower())
            one = _encode_question(checkpoint, source, cohort, both, question)
            if one is None:
                break
            prompts.append(one)
        if len(prompts) == len(case.progression):
            cohort.add(study, prompt, tuple(case.progression))
            questions.append((case, prompts))
    _check_not_empty(source, cohort)
    likeliest, failed = _score_progressions(model, checkpoint, questions, options)
    kept = cohort.drop(failed)
    answers, read = generate_answers(name, model, checkpoint, cohort, options)
    kept = [kept[i] for i in read]
    parsed = [parse_answer(text) or None for text in answers]
    only = [questions[i][0] for i in kept]
    progression = [likeliest[i] for i in kept]
    figures = {
        "A": ms_cxr_t.progression_accuracy(only, progression, seed=options.seed),
        "B": ms_cxr_t.presence_accuracy(only, parsed, seed=options.seed),
    }
    evaluation = {
        "split": "MS-CXR-T",
        "studies": len(only),
        "protocol": f"{ms_cxr_t.PROTOCOL_A}. Protocol {ms_cxr_t.PROTOCOL_B}. 95 % intervals by "
        "bootstrap over patients",
        "ms_cxr_t": {name: figures},
    }
    return evaluation, cohort


def _score_progressions(
    model: Any,
    checkpoint: Checkpoint,
    questions: Sequence[tuple[ms_cxr_t.TemporalCase, Sequence[Prompt]]],
    options: Options,
) -> tuple[list[dict[str, str]], dict[int, RecordError]]:
    """(The likeliest class of every labelled finding of every case, errors by index of the cases
    whose images failed).
    """
    prompts = [prompt for _, of_case in questions for prompt in of_case]
    case_of = [index for index, (_, of_case) in enumerate(questions) for _ in of_case]
    candidates = [
        [tuple(checkpoint.tokenizer(ANSWER.format(finding=finding.lower(), progression=one),
                                    add_special_tokens=False)["input_ids"])
         for one in ms_cxr_t.CLASSES]
        for case, _ in questions
        for finding in case.progression
    ]  # fmt: skip
    unread: dict[int, RecordError] = {}
    scores = score_answers(
        PackedModel(model),
        prompts,
        candidates,
        checkpoint.pixels,
        image_token_id=checkpoint.image_token_id,
        packing_length=options.packing_length,
        failed=unread,
    )
    best = iter(scores.argmax(dim=1).tolist())
    likeliest = [
        {finding: ms_cxr_t.CLASSES[next(best)] for finding in case.progression}
        for case, _ in questions
    ]
    return likeliest, {case_of[prompt]: error for prompt, error in unread.items()}


def _encode_question(
    checkpoint: Checkpoint,
    source: CsvSource,
    cohort: Cohort,
    study: Study,
    question: str | None = None,
) -> Prompt | None:
    """The tokenised question about the study's images; None, with a rejected record, on failure."""
    messages = ask(len(study.images), question) if question else ask(len(study.images))
    about = Preference(study.study_id, messages, "?", images=study.images)
    try:
        return checkpoint.encode_prompt(about, max_length=source.max_length)
    except RecordError as error:
        cohort.rejected.append(
            RejectedRecord(str(source.file), None, study.study_id, error.reason, error.detail)
        )
        return None


def _check_not_empty(source: CsvSource, cohort: Cohort) -> None:
    if not cohort.studies:
        reasons = sorted({record.reason for record in cohort.rejected})
        raise DataError(
            f"{source.file} has no usable image below {source.image_root}: {', '.join(reasons)}"
        )
