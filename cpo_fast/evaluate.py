"""Evaluate a model on a data set; writes figures and a page.

Suites: "classification" (accuracy of the diagnosis per finding) and "report" (the thought against
the radiologist's report) from generated answers, "zero_shot" (AUC from the likelihood of each
finding's sentence) and "drift" (how the diagnosis moves along the thought) by scoring. A preference
file gives how often the chosen answer is preferred.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cpo_fast.command_line import Parser, program
from cpo_fast.console import piped
from cpo_fast.data import DATASET_FORMATS, is_preference_file
from cpo_fast.errors import CpoFastError, DataError, RecordError, UsageError
from cpo_fast.evaluation.cohort import Cohort, Loaded, diagnose_cohort, zero_shot
from cpo_fast.flags import COUNT, POSITIVE, SEED, Choices, Number, split
from cpo_fast.locks import lock_folder

SUITES = ("classification", "report", "zero_shot", "drift")
DEFAULT_SUITE = "classification,report"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, 1 for data that cannot be used, 2 for wrong usage."""
    try:
        print(f"report: {evaluate(parse_arguments(argv))}")
    except CpoFastError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        prog=program("evaluate"),
        description=__doc__,
    )
    add = parser.add_argument
    add("--model", required=True, help="folder of a model, an adapter or a training stage")
    add("--base_model", help="folder of an adapter's base (default: what the adapter names)")
    add("--dataset", required=True, help="MIMIC-CXR folder, open-i, a CSV, or a preference file")
    add("--output_dir", required=True, type=Path, help="folder of the results (mode 0700)")
    add("--suite", help=f"for studies: of {','.join(SUITES)} (default: {DEFAULT_SUITE})")
    add("--split", default="test", choices=("train", "validate", "test"), help="which studies")
    add("--dataset_format", default="auto", choices=DATASET_FORMATS, metavar="NAME",
        help=f"format (auto: detected automatically): {', '.join(DATASET_FORMATS)}")  # fmt: skip
    add("--image_root", help="folder of the images where the data set does not hold them")
    add("--uncertain_labels", default="negative", choices=("negative", "positive"),
        help="how uncertain labels count")  # fmt: skip
    add("--max_samples", type=POSITIVE, help="limit of studies")
    add("--max_length", type=POSITIVE, default=4096, help="longest prompt + report in tokens")
    add("--max_pixels", type=POSITIVE, help="largest image area (default: the model's own)")
    add("--beta", type=Number(above=0), default=0.1, help="scale of the rewards of pairs")
    add("--max_new_tokens", type=POSITIVE, default=256, help="longest generated answer")
    add("--batch_size", type=POSITIVE, default=32, help="studies per generation batch")
    add("--packing_length", type=POSITIVE, default=4096, help="tokens per pack when scoring")
    add("--drift_samples", type=POSITIVE, default=32, help="studies of the drift suite")
    add("--num_examples", type=COUNT, default=4, help="example studies on the page")
    add("--bf16", action="store_true", help="bfloat16 weights")
    add("--seed", type=SEED, default=42, help="seed of the bootstrap")
    arguments = parser.parse_args(argv)
    if is_pairs(arguments):
        if arguments.suite is not None:
            raise UsageError(
                f"--suite {arguments.suite} is for studies; {arguments.dataset} is a preference "
                "file, which gives how often the chosen answer is preferred: leave --suite out"
            )
        return arguments
    arguments.suite = DEFAULT_SUITE if arguments.suite is None else arguments.suite
    if fault := Choices(SUITES).fault(arguments.suite):
        raise UsageError(f"--suite {arguments.suite}: {fault}")
    arguments.suite = split(arguments.suite)
    return arguments


def is_pairs(args: argparse.Namespace) -> bool:
    """Whether `--dataset` is a preference file. A CSV is not: it holds images and labels."""
    from cpo_fast.evaluate_csv import is_csv

    return not is_csv(args.dataset) and is_preference_file(args.dataset, args.dataset_format)


def evaluate(args: argparse.Namespace) -> Path:
    """Run the suites; writes config.json, summary.json, evaluation.json and report.html."""
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()  # transformers' bars; ours know by themselves
    check_paths(args)
    with lock_folder(args.output_dir):
        make_private(args.output_dir)
        return evaluate_suites(args)


def evaluate_suites(args: argparse.Namespace) -> Path:
    """The suites of `evaluate`, in a folder that this process alone writes."""
    from cpo_fast.evaluate_csv import evaluate_csv, is_csv
    from cpo_fast.evaluation.summary import (
        evaluation_examples,
        evaluation_summary,
        write_examples,
    )

    loaded = load(args)
    if is_pairs(args):
        from cpo_fast.evaluate_preferences import evaluate_preferences

        evaluation, cohort = evaluate_preferences(args, loaded)
        return write_results(args, cohort, evaluation)
    if is_csv(args.dataset):
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
    """UsageError for a data set or an image folder that is missing, before the model is read."""
    from cpo_fast.data import study_format
    from cpo_fast.evaluate_csv import is_csv

    if not is_csv(args.dataset) and not is_pairs(args) and args.dataset_format == "auto":
        study_format(args.dataset)
    if args.image_root is None and is_csv(args.dataset):
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
        counted = samples.setdefault(record.stage, {}) if record.stage else reasons
        counted[record.reason] = counted.get(record.reason, 0) + 1
    for stage, counted in {"data": reasons, **samples}.items():
        for reason, count in sorted(counted.items()):
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
    (args.output_dir / "rejected_records.jsonl").write_text(lines, encoding="utf-8")
    return write_report(args.output_dir)


def load(args: argparse.Namespace) -> Loaded:
    """The model on the GPU if there is one, fp32 unless --bf16."""
    import torch

    from cpo_fast.loss.processor import warn_of_slow_bfloat16
    from cpo_fast.model.build import load_model
    from cpo_fast.model.supported import check_vocabulary
    from cpo_fast.training.named_model import companions, find_checkpoint

    path = find_checkpoint(args.model, "--model")
    if args.bf16:
        warn_of_slow_bfloat16()
    tokenizer, images = companions(path, base_model=args.base_model, max_pixels=args.max_pixels)
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
            f"--suite drift: none of the {without} answers of {loaded.name} has a thought "
            "(<think> ... </think>); leave drift out, or give a model that was trained on thoughts"
        )
    if without:
        print(f"drift: {without} of {len(studies)} answers have no thought; they are left out")
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


def make_private(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
    except OSError as error:
        raise UsageError(f"--output_dir {folder} cannot be written: {error}") from error


def write_json(path: Path, value: Any) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    sys.exit(piped(main))
