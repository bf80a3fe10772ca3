"""`cpo-fast train`: the full pipeline from files to a report.

Without arguments it runs the embedded default: phantom data, a tiny random Qwen2.5-VL, SFT, CPO,
evaluation and report in runs/phantom. Flags change the settings, not the pipeline.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import warnings
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cpo_fast.command_line import program, report_error, show_flags
from cpo_fast.console import run_command
from cpo_fast.errors import CpoFastError, DataError, UsageError
from cpo_fast.locks import lock_folder
from cpo_fast.run.arguments import TrainArguments
from cpo_fast.run.flag_rules import TINY, check_machine
from cpo_fast.run.report_to import open_trackers, parse_trackers
from cpo_fast.run.settings import FLAGS, read_settings
from cpo_fast.training.interrupt import EXIT_STATUS, Interrupted, StopRequest

if TYPE_CHECKING:  # torch is imported after the flags are checked
    from cpo_fast.run.context import RunContext
    from cpo_fast.run.corpus import Corpus, Texts
    from cpo_fast.run.samples import Samples
    from cpo_fast.training.distributed import World


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 finished, 1 bad data or non-finite steps, 2 wrong usage, 3 saved early."""
    who = f"rank {rank}: " if (rank := int(os.environ.get("RANK", "0"))) else ""
    name = f"{who}{program('train')}"
    try:
        settings = read_settings(argv)
    except UsageError as error:
        return report_error(name, error)
    if not who:
        print(*settings.describe(), sep="\n", flush=True)
    try:
        run(settings.args)
    except Interrupted as stopped:
        print(f"{who}{show_flags(str(stopped), FLAGS)}", file=sys.stderr)
        return EXIT_STATUS
    except CpoFastError as error:
        return report_error(name, error, flags=FLAGS)
    return 0


def run(args: TrainArguments) -> dict[str, Any]:
    """Run the stages that `args` names; returns the content of summary.json (a dry run: its plans).

    With several processes (torchrun) all of them train; rank 0 prepares, evaluates and reports.
    """
    tracker_names = parse_trackers(args.report_to)
    check_machine(args)  # rejects wrong paths before heavy imports

    from transformers.utils import logging

    os.umask(0o077)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    if not sys.stderr.isatty():
        logging.disable_progress_bar()  # of transformers
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the feed's workers are forked
    if args.dry_run:  # SIGTERM must raise, so that the temporary folder is deleted
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    with ExitStack() as locks:
        return run_stages(args, tracker_names, locks)


def run_stages(args: TrainArguments, tracker_names: list[str], locks: ExitStack) -> dict[str, Any]:
    """The stages of one run. Rank 0 locks the folder (in `locks`) unless it is a dry run.

    Raises UsageError when another process writes into the folder.
    """
    from cpo_fast.machine import hardware, versions
    from cpo_fast.report import write_report
    from cpo_fast.report.headline import headline
    from cpo_fast.report.model_card import write_cards
    from cpo_fast.run.dry_run import dry_run
    from cpo_fast.run.evaluation import evaluate_run
    from cpo_fast.run.stages import train_cpo, train_sft
    from cpo_fast.training.distributed import World, join_processes

    with join_processes(args.ddp_timeout) as world:
        if not args.dry_run:
            world.on_main(lambda: locks.enter_context(lock_folder(args.output_dir)))
        run, corpus, texts, samples = prepare_run(args, world)
        folder, stages = run.folder, run.folder.summary["stages"]
        with ExitStack() as stack:
            run.stop = stack.enter_context(StopRequest(args.max_minutes))
            if args.dry_run:
                return dry_run(run, samples)
            if folder.is_writer:
                folder.metrics.also = stack.enter_context(open_trackers(tracker_names, folder.path))
            if "sft" in args.stage_names:
                stages["sft"] = train_sft(run, samples)
            if "cpo" in args.stage_names:
                stages["cpo"] = train_cpo(run, samples)
    if not world.is_main:
        return {}
    run.world = World()  # the other processes have left
    failure: DataError | None = None
    if "evaluate" in args.stage_names:
        begun = time.perf_counter()
        try:
            folder.summary["evaluation"] = evaluate_run(run, corpus, texts, samples)
        except DataError as error:  # the trained models get their summary and report first
            failure = error
        stages["evaluate"] = {"seconds": round(time.perf_counter() - begun, 2)}
    folder.summary["hardware"] = hardware(world.size)
    folder.finish(versions())
    write_cards(folder.path)
    if result := headline(folder.summary.get("evaluation", {})):
        print(result)
    print(f"report: {write_report(folder.path)}")
    if failure is not None:
        raise failure
    return folder.summary


def prepare_run(args: TrainArguments, world: World) -> tuple[RunContext, Corpus, Texts, Samples]:
    """Context, corpus, texts and samples; rank 0 creates the files that the other ranks read."""
    from cpo_fast.loss.processor import warn_of_slow_bfloat16
    from cpo_fast.run.corpus import build_texts
    from cpo_fast.run.image_check import ImageCheck, reject_samples, reject_studies
    from cpo_fast.run.samples import check_samples, tokenise
    from cpo_fast.run.start import find_start, open_start

    if args.bf16 and world.is_main:
        warn_of_slow_bfloat16()
    if args.sft_checkpoint and args.model_name_or_path != TINY and world.is_main:
        print("note: CPO starts from --sft_checkpoint; --model_name_or_path is not used")
    start = world.on_main(lambda: find_start(args))
    run, corpus = world.main_first(lambda: read_data(args, world))
    stages = run.folder.summary["stages"]
    images = ImageCheck(run)
    reject_studies(run, corpus, images)
    texts = world.main_first(lambda: build_texts(run, corpus))
    if texts.seconds is not None:
        stages["counterfactual"] = {"seconds": texts.seconds}
    reject_samples(run, corpus, texts, images)
    if images.decoded or images.known:
        stages["images"] = images.summary()

    def encode() -> Samples:
        run.checkpoint = open_start(run, texts, start)
        samples = tokenise(run, texts)
        check_samples(args, samples)
        return samples

    return run, corpus, texts, world.main_first(encode)


def read_data(args: TrainArguments, world: World) -> tuple[RunContext, Corpus]:
    """Open the run's folder and read its data set."""
    from cpo_fast.phantom import write_phantom
    from cpo_fast.run.context import RunContext
    from cpo_fast.run.corpus import read_corpus

    run = RunContext(args, world)
    if args.dataset == "phantom":
        home = run.folder.scratch_dir / "data"
        data = write_phantom(home, num_studies=args.num_studies, seed=args.seed)
        run.args = replace(args, dataset=str(data))
    return run, read_corpus(run)


if __name__ == "__main__":
    sys.exit(run_command(main))
