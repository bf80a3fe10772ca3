"""Compare SFT, DPO with random negatives, CPO without the thought, and CPO on the phantom, with
several seeds; writes study.json, study.md and study.html to --output_dir.

Finished models and figures are reused: the same command continues a stopped study.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpo_fast.command_line import Parser, program, report_error
from cpo_fast.console import run_command
from cpo_fast.errors import CpoFastError, UsageError
from cpo_fast.flags import POSITIVE, SEED, Number
from cpo_fast.folders import make_private, write_json, write_private
from cpo_fast.locks import lock_folder
from cpo_fast.run.arguments import EMBEDDED, TrainArguments
from cpo_fast.run.settings import merge_settings


@dataclass(frozen=True)
class StudySettings:
    """The flags of the study, without `--quick`."""

    output_dir: Path
    sft_from: Path | None
    seeds: int
    first_seed: int
    num_studies: int
    sft_epochs: float
    steps: int
    learning_rate: float
    beta: float
    test_samples: int
    reports: int
    cpo_plus: bool


SHARED = ("num_studies", "sft_epochs", "test_samples", "reports")
"""Settings on which the figures of an SFT model depend."""

QUICK = {"seeds": 2, "num_studies": 1600, "sft_epochs": 3.0, "test_samples": 100, "reports": 24}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, 1 for data that cannot be used, 2 for wrong usage."""
    try:
        print(f"study: {run_study(parse_arguments(argv))}")
    except CpoFastError as error:
        return report_error(program("study"), error)
    return 0


def parse_arguments(argv: Sequence[str] | None = None) -> StudySettings:
    parser = Parser(
        prog=program("study"),
        description=__doc__,
    )
    add = parser.add_argument
    add("--output_dir", type=Path, default=Path("runs/study"), help="results (mode 0700)")
    add("--sft_from", type=Path, help="reuse data and SFT models of this study's folder")
    add("--quick", action="store_true", help="two seeds at a smaller scale, within ten minutes")
    add("--seeds", type=POSITIVE, default=5, help="independent repetitions (data, model, order)")
    add("--first_seed", type=SEED, default=42, help="first seed; the others count up from it")
    add("--num_studies", type=POSITIVE, default=3200, help="studies of each phantom")
    add("--sft_epochs", type=Number(above=0), default=3.0, help="epochs of SFT")
    add("--steps", type=POSITIVE, default=60, help="optimiser steps of every arm, of 16 pairs each")
    add(
        "--learning_rate",
        type=Number(above=0),
        default=5e-5,
        help="peak learning rate of every arm",
    )
    add("--beta", type=Number(above=0), default=0.1, help="beta of every arm")
    add("--test_samples", type=POSITIVE, default=200, help="test studies per model")
    add(
        "--reports",
        type=POSITIVE,
        default=60,
        help="test studies whose reports are probed by swaps",
    )
    add("--cpo_plus", action="store_true", help="one more arm, with perception pairs (CPO++)")
    if parser.parse_known_args(argv)[0].quick:
        parser.set_defaults(**QUICK)
    flags = vars(parser.parse_args(argv))
    del flags["quick"]
    return StudySettings(**flags)


def run_study(args: StudySettings) -> Path:
    """Run missing parts, write study.json, study.md and study.html; returns the last."""
    make_train_arguments(args, args.first_seed, args.output_dir, "sft,cpo")  # rejects wrong values
    with lock_folder(args.output_dir):
        make_private(args.output_dir)
        return run_seeds(args)


def run_seeds(args: StudySettings) -> Path:
    """`run_study` in a locked folder."""
    store_settings(args)
    from cpo_fast.experiments.study.figures import build_results, format_markdown
    from cpo_fast.experiments.study.page import write_study_page

    seeds = range(args.first_seed, args.first_seed + args.seeds)
    outcome = build_results({seed: run_seed(args, seed) for seed in seeds}, list_settings(args))
    write_json(args.output_dir / "study.json", outcome)
    write_private(args.output_dir / "study.md", format_markdown(outcome))
    return write_study_page(args.output_dir / "study.html", outcome)


def list_settings(args: StudySettings) -> dict[str, Any]:
    """Settings on which the figures of a seed depend."""
    names = ("num_studies", "sft_epochs", "steps", "learning_rate", "beta", "test_samples",
             "reports")  # fmt: skip
    return {name: getattr(args, name) for name in names}


def store_settings(args: StudySettings) -> None:
    """Store the settings. Raises UsageError if the folder has results of other settings, or the
    folder of --sft_from has models or data of other settings.
    """
    own = list_settings(args)
    shared = {name: own[name] for name in SHARED}
    for folder, wanted in ((args.sft_from, shared), (args.output_dir, own)):
        path = folder / "settings.json" if folder else None
        if path is None or (folder == args.output_dir and not path.is_file()):
            continue
        if not path.is_file():
            raise UsageError(f"--sft_from {folder} holds no study: it has no settings.json")
        earlier = json.loads(path.read_text())
        changed = [name for name, value in wanted.items() if earlier.get(name) != value]
        if changed:
            raise UsageError(
                f"{path} was written with other values of {', '.join(changed)}: use the same flags "
                "or another folder"
            )
    write_json(args.output_dir / "settings.json", own)


def run_seed(args: StudySettings, seed: int) -> dict[str, dict[str, Any]]:
    """{arm: figures} of one seed, "majority" first."""
    from cpo_fast.data import open_studies
    from cpo_fast.experiments.study.arms import (
        ARMS,
        CPO,
        PLUS,
        QUESTIONS,
        SFT,
        SFT_ANSWERS,
        write_plus,
    )
    from cpo_fast.experiments.study.measure import Scale, measure, measure_majority

    folder = args.output_dir / f"seed-{seed}"
    base = (args.sft_from or args.output_dir) / f"seed-{seed}"
    data, files = make_corpus(base, args.num_studies, seed)
    flags = {"image_root": str(data), "eval_fraction": 0}
    models = {SFT: train_stage("sft", args, seed, base / SFT, dataset=str(files.pop(SFT)), **flags)}
    models[SFT_ANSWERS] = models[SFT]
    flags["sft_checkpoint"] = str(models[SFT])
    if args.cpo_plus:
        make_private(folder)
        files[PLUS] = folder / f"{PLUS}.jsonl"
        if not (folder / PLUS / "summary.json").is_file():
            write_plus(files[PLUS], files[CPO], list(open_studies(str(data))), seed=seed)
    for arm, file in files.items():
        models[arm] = train_stage("cpo", args, seed, folder / arm, dataset=str(file), **flags)
    scale = Scale(args.test_samples, args.reports, max_new_tokens=160, max_pixels=12544)
    arms: dict[str, dict[str, Any]] = {"majority": measure_majority(data, args.test_samples)}
    for arm in (*ARMS, *([PLUS] if args.cpo_plus else [])):
        done = (base if arm in (SFT, SFT_ANSWERS) else folder) / arm / "measured.json"
        if not done.is_file():
            print(f"study: seed {seed}, measuring {arm}", flush=True)
            make_private(done.parent)
            write_json(done, measure(models[arm], data, scale, prompt=QUESTIONS[arm]))
        arms[arm] = json.loads(done.read_text(encoding="utf-8"))
    return arms


def make_corpus(folder: Path, num_studies: int, seed: int) -> tuple[Path, dict[str, Path]]:
    """(The phantom of a seed, {arm: its training file}); existing files are reused."""
    from tqdm import tqdm

    from cpo_fast.concepts import load_graph
    from cpo_fast.counterfactual import counterfactuals
    from cpo_fast.data import open_studies
    from cpo_fast.experiments.study.arms import write_arms
    from cpo_fast.phantom import write_phantom

    data, listed = folder / "data", folder / "files.json"  # written last
    if not listed.is_file():
        with lock_folder(folder):  # it can belong to the study of --sft_from
            make_private(folder)
            write_phantom(data, num_studies=num_studies, seed=seed)
            studies = [study for study in open_studies(str(data)) if study.split == "train"]
            made = counterfactuals(studies, load_graph(), num_targets=2, seed=seed)
            bar = tqdm(made, desc="counterfactuals", unit="report", disable=None)
            files = write_arms(folder, studies, [one for one in bar if one.passed], seed=seed)
            write_json(listed, {arm: str(path) for arm, path in files.items()})
    return data, {arm: Path(path) for arm, path in json.loads(listed.read_text()).items()}


def train_stage(stage: str, args: StudySettings, seed: int, folder: Path, **more: Any) -> Path:
    """Train a stage in `folder`, unless an earlier call did; returns its checkpoint."""
    from cpo_fast import train

    path = folder / "summary.json"  # written at the end of a run
    if path.is_file():
        summary = json.loads(path.read_text(encoding="utf-8"))
    else:
        print(f"study: seed {seed}, training {folder.name}", flush=True)
        summary = train.run(make_train_arguments(args, seed, folder, stage, **more))
    return Path(summary["stages"][stage]["checkpoint"])


def make_train_arguments(
    args: StudySettings, seed: int, folder: Path, stages: str, **more: Any
) -> TrainArguments:
    """The settings of one training run: the embedded default at the scale of the study."""
    given = {
        "output_dir": str(folder),
        "stages": stages,
        "seed": seed,
        "sft_num_train_epochs": args.sft_epochs,
        "max_steps": args.steps,
        "learning_rate": args.learning_rate,
        "beta": args.beta,
        "eval_steps": 0,
        "resume_from_checkpoint": "auto",
    }
    return merge_settings(given | more, EMBEDDED).args


if __name__ == "__main__":
    sys.exit(run_command(main))
