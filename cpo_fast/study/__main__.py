"""`python -m cpo_fast.study`: SFT, DPO with random negatives, CPO without the thought and CPO on
the phantom, several seeds; study.json, study.md and study.html in --output_dir.

What is finished (a model, its figures) is not computed again: a study can be broken off and
continued with the same command.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cpo_fast.errors import CpoFastError, UsageError
from cpo_fast.evaluate import make_private, write_json

QUICK = {"seeds": 2, "num_studies": 1600, "sft_epochs": 4.0, "test_samples": 120, "reports": 32}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, 1 for data that cannot be used, 2 for wrong usage."""
    try:
        print(f"study: {study(parse_arguments(argv))}")
    except CpoFastError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m cpo_fast.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--output_dir", type=Path, default=Path("runs/study"), help="results (mode 0700)")
    add("--quick", action="store_true", help="two seeds at a smaller scale, within ten minutes")
    add("--seeds", type=int, default=5, help="independent repetitions: data, model, order")
    add("--first_seed", type=int, default=42, help="seeds count up from here")
    add("--num_studies", type=int, default=2000, help="size of each phantom")
    add("--sft_epochs", type=float, default=5.0, help="epochs of SFT")
    add("--steps", type=int, default=60, help="optimiser steps of every arm, of 16 pairs each")
    add("--learning_rate", type=float, default=5e-5, help="peak learning rate of every arm")
    add("--beta", type=float, default=0.1, help="beta of every arm")
    add("--test_samples", type=int, default=200, help="test studies that each model answers")
    add("--reports", type=int, default=60, help="of them, whose reports are probed by swaps")
    if parser.parse_known_args(argv)[0].quick:
        parser.set_defaults(**QUICK)
    args = parser.parse_args(argv)
    for name in ("seeds", "num_studies", "steps", "test_samples", "reports"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name} must be at least 1")
    return args


def study(args: argparse.Namespace) -> Path:
    """Run what is missing, then write study.json, study.md and study.html; returns the last."""
    from cpo_fast.study.figures import as_markdown, results
    from cpo_fast.study.page import write_study_page

    make_private(args.output_dir)
    keep_settings(args)
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    outcome = results({seed: one_seed(args, seed) for seed in seeds}, settings(args))
    write_json(args.output_dir / "study.json", outcome)
    (args.output_dir / "study.md").write_text(as_markdown(outcome), encoding="utf-8")
    return write_study_page(args.output_dir / "study.html", outcome)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What decides a seed's figures."""
    names = ("num_studies", "sft_epochs", "steps", "learning_rate", "beta", "test_samples",
             "reports")  # fmt: skip
    return {name: getattr(args, name) for name in names}


def keep_settings(args: argparse.Namespace) -> None:
    """UsageError when the folder holds results of other settings than these."""
    path = args.output_dir / "settings.json"
    if path.is_file() and (earlier := json.loads(path.read_text())) != settings(args):
        changed = [name for name, value in settings(args).items() if earlier.get(name) != value]
        raise UsageError(
            f"{path} was written with other values of {', '.join(changed)}: use the same flags or "
            "another --output_dir"
        )
    write_json(path, settings(args))


def one_seed(args: argparse.Namespace, seed: int) -> dict[str, dict[str, Any]]:
    """{arm: figures} of one seed, "majority" first."""
    from cpo_fast.data import open_studies
    from cpo_fast.study.arms import SFT, write_arms
    from cpo_fast.study.measure import Scale, majority, measure
    from cpo_fast.training.corpus import read_counterfactuals

    folder = args.output_dir / f"seed-{seed}"
    base = folder / SFT
    models = {SFT: trained("sft", args, seed, base, stages="graph,counterfactual,sft",
                           num_studies=args.num_studies)}  # fmt: skip
    data = base / "data"
    cfs = read_counterfactuals(base / "counterfactuals.jsonl")
    files = write_arms(folder, list(open_studies(str(data))), cfs, seed=seed)
    flags = {"image_root": data, "sft_checkpoint": models[SFT], "eval_fraction": 0}
    for arm, file in files.items():
        models[arm] = trained("cpo", args, seed, folder / arm, stages="cpo", dataset=file, **flags)
    scale = Scale(args.test_samples, args.reports, max_new_tokens=160, max_pixels=12544)
    arms: dict[str, dict[str, Any]] = {"majority": majority(data, args.test_samples)}
    for arm, path in models.items():
        done = folder / arm / "measured.json"
        if not done.is_file():
            print(f"study: seed {seed}, measuring {arm}", flush=True)
            write_json(done, measure(path, data, scale))
        arms[arm] = json.loads(done.read_text(encoding="utf-8"))
    return arms


def trained(stage: str, args: argparse.Namespace, seed: int, folder: Path, **more: Any) -> Path:
    """The checkpoint of a stage that is trained in `folder`, unless an earlier call did."""
    from cpo_fast import train

    path = folder / "summary.json"  # written when a run is finished
    if path.is_file():
        summary = json.loads(path.read_text(encoding="utf-8"))
    else:
        summary = train.run(training(args, seed, folder, **more))
    return Path(summary["stages"][stage]["checkpoint"])


def training(args: argparse.Namespace, seed: int, folder: Path, **more: Any) -> Any:
    """The flags of one training run: the embedded default with the study's scale."""
    from cpo_fast.training.arguments import EMBEDDED
    from cpo_fast.training.arguments import parse_arguments as parse_train

    flags = {
        "config": EMBEDDED,
        "output_dir": folder,
        "seed": seed,
        "sft_num_train_epochs": args.sft_epochs,
        "max_steps": args.steps,
        "learning_rate": args.learning_rate,
        "beta": args.beta,
        "eval_steps": 0,
        "resume_from_checkpoint": "auto",
    } | more
    return parse_train(
        [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    )


if __name__ == "__main__":
    sys.exit(main())
