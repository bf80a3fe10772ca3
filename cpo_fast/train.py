"""`cpo-fast train`: the full pipeline, from files to a report, in one readable pass.

Without arguments it runs the embedded default: phantom data, a tiny random Qwen2.5-VL, SFT, CPO,
evaluation and report in runs/phantom. Flags change the settings, not the pipeline.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
import warnings
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpo_fast.command_line import failed, program
from cpo_fast.console import piped
from cpo_fast.counting import counted
from cpo_fast.errors import CpoFastError, DataError, RecordError, UsageError
from cpo_fast.locks import lock_folder
from cpo_fast.run.arguments import TrainArguments
from cpo_fast.run.flag_rules import TINY, check_machine
from cpo_fast.run.report_to import tracker_names, trackers
from cpo_fast.run.settings import read_settings
from cpo_fast.training.interrupt import EXIT_STATUS, Interrupted, StopRequest

if TYPE_CHECKING:  # torch is imported after the flags are checked
    from cpo_fast.run.base import Base
    from cpo_fast.run.corpus import Corpus, Texts
    from cpo_fast.run.run_folder import RunFolder
    from cpo_fast.run.samples import Samples
    from cpo_fast.training.distributed import World


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 finished, 1 data or numbers stop the run, 2 wrong usage, 3 saved early."""
    who = f"rank {rank}: " if (rank := int(os.environ.get("RANK", "0"))) else ""
    name = f"{who}{program('train')}"
    try:
        settings = read_settings(argv)
    except UsageError as error:
        return failed(name, error)
    if not who:
        print(*settings.lines(), sep="\n", flush=True)
    try:
        run(settings.args)
    except Interrupted as stopped:
        print(f"{who}{stopped}", file=sys.stderr)
        return EXIT_STATUS
    except CpoFastError as error:
        return failed(name, error)
    return 0


def run(args: TrainArguments) -> dict[str, Any]:
    """Run the stages that `args` names; returns what summary.json holds (the plan in a dry run).

    Of several processes (torchrun), all train; the first one prepares, evaluates and reports.
    """
    reported = tracker_names(args.report_to)
    check_machine(args)  # wrong paths are refused before anything heavy is imported

    from transformers.utils import logging

    os.umask(0o077)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    if not sys.stderr.isatty():
        logging.disable_progress_bar()  # transformers' bars; ours know by themselves
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the feed's workers are forked
    if args.dry_run:  # an exception, so that its temporary folder goes
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    with ExitStack() as locks:
        return run_stages(args, reported, locks)


def run_stages(args: TrainArguments, reported: list[str], locks: ExitStack) -> dict[str, Any]:
    """The stages of one run, with its folder locked by rank 0 (in `locks`) unless it is a dry run.

    Raises UsageError when another process writes into the folder.
    """
    from cpo_fast.machine import hardware, versions
    from cpo_fast.report import write_report
    from cpo_fast.report.model_card import write_cards
    from cpo_fast.run.dry_run import dry_run
    from cpo_fast.run.stages import train_cpo, train_sft
    from cpo_fast.training.distributed import joined

    with joined(args.ddp_timeout) as world:
        if not args.dry_run:
            world.on_main(lambda: locks.enter_context(lock_folder(args.output_dir)))
        args, folder, corpus, texts, base, samples = prepare(args, world)
        with ExitStack() as stack:
            stop = stack.enter_context(StopRequest(args.max_minutes))
            if args.dry_run:
                return dry_run(args, folder, samples, base, stop)
            if folder.writes:
                folder.metrics.also = stack.enter_context(trackers(reported, folder.path))
            if "sft" in args.stage_names:
                train_sft(args, folder, samples, base, stop)
            if "cpo" in args.stage_names:
                train_cpo(args, folder, samples, base, stop)
    if not world.is_main:
        return {}
    failure: DataError | None = None
    if "evaluate" in args.stage_names:
        begun = time.perf_counter()
        try:
            evaluate(args, folder, corpus, samples, texts, base)
        except DataError as error:  # what was trained has its summary and report all the same
            failure = error
        seconds = round(time.perf_counter() - begun, 2)
        folder.summary["stages"]["evaluate"] = {"seconds": seconds}
    folder.summary["hardware"] = hardware(world.size)
    folder.finish(versions())
    write_cards(folder.path)
    print(f"report: {write_report(folder.path)}")
    if failure is not None:
        raise failure
    return folder.summary


def prepare(
    args: TrainArguments, world: World
) -> tuple[TrainArguments, RunFolder, Corpus, Texts, Base, Samples]:
    """What training needs, made by rank 0 and read from its files by the others."""
    from cpo_fast.run.base import base_model
    from cpo_fast.run.corpus import write_preferences
    from cpo_fast.run.image_check import ImageCheck, leave_out_samples, leave_out_studies
    from cpo_fast.run.samples import check_samples, tokenise

    args, folder, corpus = world.main_first(lambda: read(args, world))
    check = ImageCheck(args, folder)
    leave_out_studies(args, folder, corpus, check)
    texts = world.main_first(lambda: write_preferences(args, folder, corpus))
    leave_out_samples(args, folder, corpus, texts, check)

    def encoded() -> tuple[Base, Samples]:
        base = base_model(args, folder, texts)
        samples = tokenise(args, folder, texts, base)
        check_samples(args, samples)
        return base, samples

    base, samples = world.main_first(encoded)
    return args, folder, corpus, texts, base, samples


def read(args: TrainArguments, world: World) -> tuple[TrainArguments, RunFolder, Corpus]:
    """The run's folder, and what its data set holds."""
    from cpo_fast.loss.processor import warn_of_slow_bfloat16
    from cpo_fast.phantom import write_phantom
    from cpo_fast.run.base import check_start
    from cpo_fast.run.corpus import read_corpus
    from cpo_fast.run.run_folder import RunFolder

    if args.bf16 and world.is_main:
        warn_of_slow_bfloat16()
    if args.sft_checkpoint and args.model_name_or_path != TINY and world.is_main:
        print("note: --sft_checkpoint is where CPO starts; --model_name_or_path is not used")
    check_start(args)
    folder = RunFolder(args, world)
    if args.dataset == "phantom":
        data = write_phantom(folder.made / "data", num_studies=args.num_studies, seed=args.seed)
        args = replace(args, dataset=str(data))
    return args, folder, read_corpus(args, folder)


def evaluate(
    args: TrainArguments,
    folder: RunFolder,
    corpus: Corpus,
    samples: Samples,
    texts: Texts,
    base: Base,
) -> None:
    """Diagnoses of the untrained, SFT and CPO models on the test split; rewards on held-out pairs.

    Every model is loaded from its files, as a user would load it. A study whose image cannot be
    read any more is left out for all models; DataError when none is left.
    """
    from cpo_fast.data.labels import diagnosis
    from cpo_fast.evaluation.generate import diagnose
    from cpo_fast.evaluation.preference import both_models
    from cpo_fast.evaluation.summary import (
        evaluation_examples,
        evaluation_summary,
        write_examples,
    )
    from cpo_fast.run.stages import left_out, load, pair_logps, sft_model
    from cpo_fast.training.checkpoint import result_checkpoint
    from cpo_fast.types import RejectedRecord

    models: dict[str, Path] = {"sft" if args.sft_checkpoint else "untrained": base.path}
    if (sft := sft_model(args, folder, base)) != base.path:
        models["sft"] = sft
    if cpo := result_checkpoint(folder.path / "cpo", best=args.load_best_model_at_end):
        models["cpo"] = cpo
    tested = {group.id: group for group in samples.sft["test"]}
    studies = [study for study in corpus.studies["test"] if study.study_id in tested]
    studies = studies[: args.max_eval_samples]
    answers: dict[str, list[str]] = {}
    failed: dict[int, RecordError] = {}
    rewards: dict[str, dict[str, Any]] = {}
    pairs_of = "test" if samples.cpo["test"] else "validate"
    held_out = samples.cpo[pairs_of][: args.max_eval_samples]
    for name, path in models.items():
        model = load(args, path)
        if studies:
            answers[name] = diagnose(
                model,
                base.tokenizer,
                [tested[study.study_id].prompt for study in studies],
                base.pixels,
                max_new_tokens=args.max_new_tokens,
                batch_size=args.eval_batch_size,
                failed=failed,
                description=f"answers of {name}",
            )
        if name == "cpo" and held_out:
            scored = pair_logps(args, folder, base, model, held_out)
            before = list(models)[-2]
            both = both_models(scored, beta=args.beta, seed=args.seed)
            for of, figures in zip(("cpo", before), both, strict=True):
                rewards[of] = figures | {"split": pairs_of}
        del model
        gc.collect()
    if failed:
        unread = [(studies[i], error) for i, error in failed.items()]
        left_out(folder, "evaluation", [
            RejectedRecord.of(study.study_id, study.origin, error, stage="evaluate")
            for study, error in unread
        ])  # fmt: skip
        studies = [study for i, study in enumerate(studies) if i not in failed]
        answers = {
            name: [answer for i, answer in enumerate(texts) if i not in failed]
            for name, texts in answers.items()
        }
        if not studies:
            raise DataError(
                "evaluation: no test sample of "
                f"{counted(len(failed), 'study', 'studies')} could be read"
            )
    if studies:
        truth, training_truth = (
            [diagnosis(study.labels, uncertain=args.uncertain_labels) for study in part]
            for part in (studies, corpus.studies["train"])
        )
        folder.summary["evaluation"] = evaluation_summary(
            truth=truth,
            training_truth=training_truth,
            answers=answers,
            reports=[study.report.text for study in studies],
            preference=rewards,
            seed=args.seed,
        )
        examples = evaluation_examples(
            studies,
            answers,
            [one for one in texts.counterfactuals if one.kind == "thinking"],
            count=args.num_examples,
            uncertain=args.uncertain_labels,
        )
        write_examples(folder.path, examples)
    else:
        folder.summary["evaluation"] = {"preference": rewards}


if __name__ == "__main__":
    sys.exit(piped(main))
