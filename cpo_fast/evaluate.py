"""`cpo-fast evaluate`: evaluate a model on a data set; writes figures and a page."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpo_fast.command_line import program, report_error
from cpo_fast.console import run_command
from cpo_fast.errors import CpoFastError, UsageError
from cpo_fast.evaluate_options import EvaluateArguments, parse_arguments, resolve_model
from cpo_fast.evaluation.settings import IMAGES, PAIRS, STUDIES
from cpo_fast.folders import EVALUATION, check_free, make_private, write_json, write_jsonl
from cpo_fast.locks import check_folder, lock_folder

if TYPE_CHECKING:  # torch is imported after the flags are checked
    from cpo_fast.evaluation.cohort import Cohort
    from cpo_fast.evaluation.suites import Options
    from cpo_fast.model.checkpoint import Checkpoint


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, 1 for data that cannot be used, 2 for wrong usage."""
    try:
        print(f"report: {run(parse_arguments(argv))}")
    except CpoFastError as error:
        return report_error(
            program("evaluate"), error, flags=EvaluateArguments.__dataclass_fields__
        )
    return 0


def run(args: EvaluateArguments) -> Path:
    """Write config.json, summary.json, evaluation.json and report.html; returns the last."""
    check_paths(args)
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()  # of transformers
    with lock_folder(args.output_dir):
        make_private(args.output_dir)
        args = resolve_model(args)
        if args.kind is STUDIES:
            return evaluate_studies(args)
        return evaluate_file(args)


def evaluate_studies(args: EvaluateArguments) -> Path:
    """Evaluate on a split of a data set with reports."""
    from cpo_fast.evaluation.cohort import read_cohort
    from cpo_fast.evaluation.run import evaluate
    from cpo_fast.evaluation.summary import choose_examples, write_examples

    name, checkpoint, model = open_model(args)
    cohort = read_cohort(
        checkpoint,
        args.dataset,
        split=args.split,
        dataset_format=args.dataset_format,
        image_root=args.image_root,
        uncertain=args.uncertain_labels,
        max_samples=args.max_samples,
        max_length=args.max_length,
    )
    result = evaluate({name: lambda: model}, checkpoint, cohort, make_options(args))
    examples = choose_examples(
        cohort.studies, result.answers, count=args.num_examples, uncertain=args.uncertain_labels
    )
    write_examples(args.output_dir, examples, result.drift_examples)
    page = write_results(args, cohort, result.figures)
    if result.failure is not None:  # the other results are written
        raise result.failure
    return page


def evaluate_file(args: EvaluateArguments) -> Path:
    """Evaluate on a preference file or a CSV of images."""
    from cpo_fast.evaluation.evaluate_csv import CsvSource, evaluate_csv
    from cpo_fast.evaluation.preference_files import evaluate_preference_file

    name, checkpoint, model = open_model(args)
    options = make_options(args)
    if args.kind is PAIRS:
        figures, cohort = evaluate_preference_file(
            name,
            model,
            checkpoint,
            options,
            file=args.dataset,
            dataset_format=args.dataset_format,
            image_root=args.image_root,
            beta=args.beta or 1.0,  # a whole model has no rewards to scale
            max_samples=args.max_samples,
            max_length=args.max_length,
        )
    else:
        source = CsvSource(
            Path(args.dataset),
            Path(str(args.image_root)),
            uncertain=args.uncertain_labels,
            max_samples=args.max_samples,
            max_length=args.max_length,
        )
        figures, cohort = evaluate_csv(name, model, checkpoint, source, options)
    return write_results(args, cohort, figures)


def make_options(args: EvaluateArguments) -> Options:
    from cpo_fast.evaluation.suites import Options

    return Options(
        suites=args.suite or (),
        split=args.split,
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
        packing_length=args.packing_length,
        drift_samples=args.drift_samples,
        num_examples=args.num_examples,
        seed=args.seed,
    )


def check_paths(args: EvaluateArguments) -> None:
    """Raise UsageError for wrong paths, before torch is imported."""
    from cpo_fast.data import study_kind
    from cpo_fast.run.find_checkpoint import check_named

    if args.kind is STUDIES:
        study_kind(args.dataset, args.dataset_format)
    elif not Path(args.dataset).exists():
        raise UsageError(f"--dataset {args.dataset}: no such file")
    check_named(args.model, "--model", base_model=args.base_model)
    check_folder(args.output_dir)
    check_free(args.output_dir, EVALUATION)
    if args.image_root is None and args.kind is IMAGES:
        raise UsageError(f"--dataset {args.dataset} needs --image_root, the folder of its images")
    if args.image_root is not None and not Path(args.image_root).is_dir():
        raise UsageError(f"--image_root {args.image_root}: no such folder")


def write_results(args: EvaluateArguments, cohort: Cohort, figures: dict[str, Any]) -> Path:
    """Write summary.json, config.json, rejected_records.jsonl and the page."""
    from cpo_fast.machine import hardware, versions
    from cpo_fast.report import write_report
    from cpo_fast.report.headline import headline

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
    write_json(args.output_dir / "summary.json", {"evaluation": figures, "data": data, **facts})
    flags = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(args).items()}
    del flags["kind"]
    write_json(args.output_dir / "config.json", flags)
    rejected = (record.to_json() for record in cohort.rejected)
    write_jsonl(args.output_dir / "rejected_records.jsonl", rejected)
    if result := headline(figures):
        print(result)
    return write_report(args.output_dir)


def open_model(args: EvaluateArguments) -> tuple[str, Checkpoint, Any]:
    """(name, checkpoint, model) of `args.model`, in float32, or bfloat16 if `args.bf16`."""
    import torch

    from cpo_fast.loss.processor import warn_of_slow_bfloat16
    from cpo_fast.model.checkpoint import Checkpoint
    from cpo_fast.model.supported import check_vocabulary

    if args.bf16:
        warn_of_slow_bfloat16()
    path = Path(args.model)
    checkpoint = Checkpoint.open(path, base_model=args.base_model, max_pixels=args.max_pixels)
    if checkpoint.images is None and args.max_pixels is not None:
        raise UsageError(f"--max_pixels {args.max_pixels}: --model {path} takes no images")
    if not checkpoint.tokenizer.chat_template:
        raise UsageError(f"--model {path}: its tokenizer has no chat template; add one")
    model = checkpoint.load(dtype=torch.bfloat16 if args.bf16 else torch.float32)
    check_vocabulary(path, checkpoint.tokenizer, model)
    return path.resolve().name, checkpoint, model


if __name__ == "__main__":
    sys.exit(run_command(main))
