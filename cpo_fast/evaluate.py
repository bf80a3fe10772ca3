"""`cpo-fast evaluate`: a model on a data set; writes figures and a page."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cpo_fast.command_line import failed, program
from cpo_fast.console import piped
from cpo_fast.counting import counted
from cpo_fast.errors import CpoFastError, DataError, RecordError, UsageError
from cpo_fast.evaluate_options import IMAGES, PAIRS, STUDIES, kind_of, parse_arguments, settle_model
from cpo_fast.evaluation.cohort import Cohort, Loaded, diagnose_cohort, zero_shot
from cpo_fast.folders import EVALUATION, check_free, make_private, write_json, write_private
from cpo_fast.locks import check_folder, lock_folder


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, 1 for data that cannot be used, 2 for wrong usage."""
    try:
        print(f"report: {evaluate(parse_arguments(argv))}")
    except CpoFastError as error:
        return failed(program("evaluate"), error)
    return 0


def evaluate(args: argparse.Namespace) -> Path:
    """Run the suites; writes config.json, summary.json, evaluation.json and report.html."""
    check_paths(args)
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()  # transformers' bars; ours know by themselves
    with lock_folder(args.output_dir):
        make_private(args.output_dir)
        return evaluate_suites(args)


def evaluate_suites(args: argparse.Namespace) -> Path:
    """The suites of `evaluate`, in a folder that this process alone writes."""
    from cpo_fast.evaluation.summary import (
        evaluation_examples,
        evaluation_summary,
        write_examples,
    )

    loaded = load(args, settle_model(args))
    kind = kind_of(args)
    if kind is PAIRS:
        from cpo_fast.evaluation.evaluate_preferences import evaluate_preferences

        evaluation, cohort = evaluate_preferences(args, loaded)
        return write_results(args, cohort, evaluation)
    if kind is IMAGES:
        from cpo_fast.evaluation.evaluate_csv import evaluate_csv

        evaluation, cohort = evaluate_csv(args, loaded)
        return write_results(args, cohort, evaluation)
    cohort = read(args, loaded)
    answers = diagnose_cohort(args, loaded, cohort)
    evaluation = evaluation_summary(
        truth=cohort.truth,
        training_truth=cohort.training_truth,
        answers={loaded.name: answers},
        reports=[study.report.text for study in cohort.studies],
        split=args.split,
        seed=args.seed,
    )
    if "classification" not in args.suite:
        del evaluation["classification"], evaluation["differences"]
    if "report" not in args.suite:
        del evaluation["text"]
    if "zero_shot" in args.suite:
        patients = [study.patient_id for study in cohort.studies]
        figures = zero_shot(args, loaded, cohort, answers, patients=patients)
        evaluation["zero_shot"] = {loaded.name: figures}
    probed: list[dict[str, Any]] = []
    no_drift: DataError | None = None
    if "drift" in args.suite:
        try:
            figures, probed = drift(args, loaded, cohort, answers)
            evaluation["drift"] = {loaded.name: figures}
        except DataError as error:  # the other suites are written first
            no_drift = error
    examples = evaluation_examples(
        cohort.studies,
        {loaded.name: answers},
        count=args.num_examples,
        uncertain=args.uncertain_labels,
    )
    write_examples(args.output_dir, examples, probed)
    page = write_results(args, cohort, evaluation)
    if no_drift is not None:
        raise no_drift
    return page


def check_paths(args: argparse.Namespace) -> None:
    """UsageError for a path that cannot be what its flag says, before torch is imported."""
    from cpo_fast.data import study_kind
    from cpo_fast.run.find_checkpoint import check_named

    kind = kind_of(args)
    if kind is STUDIES:
        study_kind(args.dataset, args.dataset_format)
    elif not Path(args.dataset).exists():
        raise UsageError(f"--dataset {args.dataset}: no such file")
    check_named(args.model, "--model", base_model=args.base_model)
    check_folder(args.output_dir)
    check_free(args.output_dir, EVALUATION)
    if args.image_root is None and kind is IMAGES:
        raise UsageError(f"--dataset {args.dataset} needs --image_root, the folder of its images")
    if args.image_root is not None and not Path(args.image_root).is_dir():
        raise UsageError(f"--image_root {args.image_root}: no such folder")


def write_results(args: argparse.Namespace, cohort: Cohort, evaluation: dict[str, Any]) -> Path:
    """summary.json, config.json, rejected_records.jsonl and the page of them."""
    from cpo_fast.machine import hardware, versions
    from cpo_fast.report import write_report

    reasons: dict[str, int] = {}
    samples: dict[str, dict[str, int]] = {}
    for record in cohort.rejected:
        found = samples.setdefault(record.stage, {}) if record.stage else reasons
        found[record.reason] = found.get(record.reason, 0) + 1
    for stage, found in {"data": reasons, **samples}.items():
        for reason, count in sorted(found.items()):
            print(f"{stage}: {count} set aside: {reason} (rejected_records.jsonl)")
    data = {
        "read": cohort.read,
        "used": cohort.used,
        "rejected": reasons,
        "left_out": cohort.left_out,
        "samples_set_aside": samples,
    }
    facts = {"versions": versions(), "hardware": hardware()}
    write_json(args.output_dir / "summary.json", {"evaluation": evaluation, "data": data, **facts})
    shown = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    write_json(args.output_dir / "config.json", shown)
    lines = "".join(json.dumps(record.to_json()) + "\n" for record in cohort.rejected)
    write_private(args.output_dir / "rejected_records.jsonl", lines)
    return write_report(args.output_dir)


def load(args: argparse.Namespace, path: Path) -> Loaded:
    """The model in `path` on the GPU if there is one, fp32 unless --bf16."""
    import torch

    from cpo_fast.loss.processor import warn_of_slow_bfloat16
    from cpo_fast.model.build import load_model
    from cpo_fast.model.supported import check_vocabulary
    from cpo_fast.run.named_model import companions

    if args.bf16:
        warn_of_slow_bfloat16()
    tokenizer, images = companions(path, base_model=args.base_model, max_pixels=args.max_pixels)
    if images is None and args.max_pixels is not None:
        raise UsageError(f"--max_pixels {args.max_pixels}: --model {path} takes no images")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not tokenizer.chat_template:
        raise UsageError(f"--model {path}: its tokenizer has no chat template; put one beside it")
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    model: Any = load_model(path, dtype=dtype, base_model=args.base_model)
    check_vocabulary(path, tokenizer, model)
    return Loaded(path.resolve().name, model.to(device), tokenizer, images)


def read(args: argparse.Namespace, loaded: Loaded) -> Cohort:
    """The studies of the split with their prompts, as training would tokenise them."""
    from tqdm import tqdm

    from cpo_fast.counterfactual import sft_preference, study_labels
    from cpo_fast.data import open_studies
    from cpo_fast.data.labels import diagnosis
    from cpo_fast.types import RejectedRecord

    source = open_studies(
        args.dataset, dataset_format=args.dataset_format, image_root=args.image_root
    )
    cohort = Cohort([], [], [], [], 0, [])
    for found in tqdm(source, desc="read", unit="study", disable=None):
        images = found.images[:1] if loaded.images else ()
        study = replace(found, images=images, labels=study_labels(found))
        names = diagnosis(study.labels, uncertain=args.uncertain_labels)
        if study.split == "train":
            cohort.training_truth.append(names)
        if study.split != args.split or len(cohort.studies) == args.max_samples:
            cohort.left_out += 1
            continue
        asked = sft_preference(study, uncertain=args.uncertain_labels)
        try:
            prompt = loaded.prompt(asked, max_length=args.max_length)
        except RecordError as error:
            cohort.rejected.append(
                RejectedRecord.of(study.study_id, study.origin, error, file=str(args.dataset))
            )
            continue
        cohort.studies.append(study)
        cohort.prompts.append(prompt)
        cohort.truth.append(names)
    cohort.read = source.read
    cohort.rejected[:0] = source.rejected
    if not cohort.studies:
        raise DataError(f"{args.dataset} has no usable study in its {args.split} split (--split)")
    return cohort


def drift(
    args: argparse.Namespace, loaded: Loaded, cohort: Cohort, answers: Sequence[str]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The drift probe and swaps on the model's own thoughts: (figures, examples for the page).

    Answers without a thought are counted and left out. Raises DataError where no answer has one.
    """
    from tqdm import tqdm

    from cpo_fast.concepts import load_graph
    from cpo_fast.evaluation.drift import (
        drift_example,
        drift_figures,
        find_swaps,
        own_thought,
        probe,
        swap_effects,
    )
    from cpo_fast.model.packed import PackedModel
    from cpo_fast.packing import image_token_id

    packed, graph = PackedModel(loaded.model), load_graph()
    image = image_token_id(loaded.tokenizer)
    drifts, effects = [], []
    examples: list[dict[str, Any]] = []
    studies = list(zip(cohort.studies, cohort.prompts, map(own_thought, answers), strict=True))
    studies = studies[: args.drift_samples]
    without = sum(not thought for *_, thought in studies)
    if without == len(studies):
        raise DataError(
            f"--suite drift: none of {counted(without, 'answer')} of {loaded.name} has a thought "
            "(<think> ... </think>); leave drift out, or give a model that was trained on thoughts"
        )
    if without:
        answered = counted(len(studies), "answer")
        print(f"drift: {without} of {answered} left out, without a thought")
    for number, (study, prompt, thought) in enumerate(
        tqdm(studies, desc="drift", unit="study", disable=None)
    ):
        if not thought:
            continue
        about = (packed, loaded.tokenizer, prompt, thought)
        swaps = find_swaps(thought, graph)
        try:
            moved = probe(*about, loaded.pixels, image_token_id=image)
            end, found = swap_effects(*about, swaps, loaded.pixels, image_token_id=image)
        except RecordError as error:  # its image is gone since the answers
            cohort.rejected.append(cohort.named(number, error, "drift"))
            continue
        drifts.append(moved)
        effects += found
        if len(examples) < args.num_examples:
            shown = drift_example(study.study_id, drifts[-1], end, found)
            examples.append({"model": loaded.name} | shown)
    return drift_figures(drifts, effects) | {"without_thought": without}, examples


if __name__ == "__main__":
    sys.exit(piped(main))
