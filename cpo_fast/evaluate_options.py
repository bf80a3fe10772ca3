"""The flags of `cpo-fast evaluate`, and which of them apply to which kind of data."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cpo_fast.command_line import Parser, program
from cpo_fast.data import DATASET_FORMATS, is_preference_file
from cpo_fast.data.labels import UNCERTAIN_POLICIES
from cpo_fast.errors import UsageError
from cpo_fast.evaluation.settings import IMAGES, OF_SUITES, PAIRS, STUDIES, UNUSED
from cpo_fast.flags import COUNT, POSITIVE, SEED, Choices, Number, split
from cpo_fast.folders import TRAINING, contents_of, read_object
from cpo_fast.types import SPLITS

SUITES = ("classification", "report", "zero_shot", "drift")
DEFAULT_SUITE = "classification,report"
DEFAULT_BETA = 0.1

DESCRIPTION = """Evaluate a model on a data set; writes figures and a page.

Suites: "classification" (accuracy of the diagnosis per finding) and "report" (the thought against
the radiologist's report) from generated answers, "zero_shot" (AUC from the likelihood of each
finding's sentence) and "drift" (how the diagnosis moves along the thought) by scoring. A preference
file gives how often the chosen answer is preferred."""


@dataclass(frozen=True)
class EvaluateArguments:
    """The flags of `cpo-fast evaluate`; `kind`: PAIRS, IMAGES or STUDIES; `beta` None: unset."""

    kind: str
    model: str
    base_model: str | None
    dataset: str
    output_dir: Path
    suite: tuple[str, ...] | None
    split: str
    dataset_format: str
    image_root: str | None
    uncertain_labels: str
    max_samples: int | None
    max_length: int
    max_pixels: int | None
    beta: float | None
    max_new_tokens: int
    batch_size: int
    packing_length: int
    drift_samples: int
    num_examples: int
    bf16: bool
    seed: int


def parse_arguments(argv: Sequence[str] | None = None) -> EvaluateArguments:
    """Read the flags. Raises UsageError for a flag without effect on this data set."""
    values = vars(_parser().parse_args(argv))
    given = vars(_parser(argument_default=argparse.SUPPRESS).parse_args(argv))
    dataset, kind = values["dataset"], find_kind(values["dataset"], values["dataset_format"])
    for name in UNUSED[kind]:
        if name in given:
            raise UsageError(
                f"--{name} {given[name]} has no effect: {dataset} is {kind}; leave --{name} out"
            )
    if kind is IMAGES and "uncertain_labels" in given and _is_temporal(dataset):
        raise UsageError(
            f"--uncertain_labels {given['uncertain_labels']} has no effect: {dataset} is MS-CXR-T, "
            "which has no uncertain labels; leave it out"
        )
    if kind is STUDIES:
        values["suite"] = _read_suites(values["suite"], given)
    return EvaluateArguments(kind=kind, **values)


def _read_suites(named: str | None, given: Mapping[str, Any]) -> tuple[str, ...]:
    text = DEFAULT_SUITE if named is None else named
    if fault := Choices(SUITES).fault(text):
        raise UsageError(f"--suite {text}: {fault}")
    suites = split(text)
    for name, users in OF_SUITES.items():
        if name in given and not set(users) & set(suites):
            raise UsageError(
                f"--{name} {given[name]} is for --suite {' or '.join(users)}, and --suite is "
                f"{','.join(suites)}"
            )
    return suites


def _parser(**settings: Any) -> Parser:
    """With `argument_default` the result holds only the flags that are set."""
    parser = Parser(prog=program("evaluate"), description=DESCRIPTION, **settings)
    suppressed = "argument_default" in settings

    def add(flag: str, **options: Any) -> None:
        if suppressed:
            options.pop("default", None)
        parser.add_argument(flag, **options)

    add("--model", required=True, help="folder of a model, an adapter or a training stage")
    add("--base_model", help="folder of an adapter's base (default: named by the adapter)")
    add("--dataset", required=True, help="MIMIC-CXR folder, open-i, a CSV, or a preference file")
    add("--output_dir", required=True, type=Path, help="folder of the results (mode 0700)")
    add("--suite", help=f"for studies: of {','.join(SUITES)} (default: {DEFAULT_SUITE})")
    add("--split", default="test", choices=SPLITS,
        help="for studies: which ones")  # fmt: skip
    add("--dataset_format", default="auto", choices=DATASET_FORMATS, metavar="NAME",
        help=f"format (auto: detected automatically): {', '.join(DATASET_FORMATS)}")  # fmt: skip
    add("--image_root", help="folder of the images if not in the data set")
    add("--uncertain_labels", default="negative", choices=tuple(UNCERTAIN_POLICIES),
        help="how uncertain labels count")  # fmt: skip
    add("--max_samples", type=POSITIVE, help="limit of studies, images or records")
    add("--max_length", type=POSITIVE, default=4096, help="longest prompt + report in tokens")
    add("--max_pixels", type=POSITIVE, help="largest image area (default: the model's own)")
    add("--beta", type=Number(above=0),
        help="for an adapter and pairs: scale of the rewards (default: from the run that "
        f"trained it, else {DEFAULT_BETA:g})")  # fmt: skip
    add("--max_new_tokens", type=POSITIVE, default=256, help="longest generated answer")
    add("--batch_size", type=POSITIVE, default=32, help="studies per generation batch")
    add("--packing_length", type=POSITIVE, default=4096, help="tokens per pack when scoring")
    add("--drift_samples", type=POSITIVE, default=32, help="studies of the drift suite")
    add("--num_examples", type=COUNT, default=4, help="example studies on the page")
    add("--bf16", action="store_true", help="bfloat16 weights")
    add("--seed", type=SEED, default=42, help="seed of the bootstrap")
    return parser


def find_kind(dataset: str, dataset_format: str) -> str:
    """PAIRS, IMAGES or STUDIES."""
    if is_csv(dataset):
        return IMAGES
    return PAIRS if is_preference_file(dataset, dataset_format) else STUDIES


def is_csv(dataset: str) -> bool:
    """Whether the data set is a CSV of images and labels."""
    return dataset.endswith((".csv", ".csv.gz"))


def _is_temporal(dataset: str) -> bool:
    from cpo_fast.evaluation.csv_sets import read_csv
    from cpo_fast.evaluation.ms_cxr_t import is_ms_cxr_t

    return Path(dataset).is_file() and is_ms_cxr_t(read_csv(Path(dataset))[0])


def resolve_model(args: EvaluateArguments) -> EvaluateArguments:
    """Resolve `--model` to a folder and, for an adapter on pairs, an unset `--beta` to the beta of
    the run that trained the adapter.

    Raises UsageError for adapter flags with a whole model.
    """
    from cpo_fast.model.lineage import is_adapter
    from cpo_fast.run.find_checkpoint import find_checkpoint

    path = find_checkpoint(args.model, "--model")
    beta = args.beta
    if not is_adapter(path):
        idle = {"base_model": "names an adapter's base", "beta": "scales rewards, which compare an "
                "adapter with the model below it"}  # fmt: skip
        for name, purpose in idle.items():
            if (value := getattr(args, name)) is not None:
                raise UsageError(
                    f"--{name} {value} has no effect: it {purpose}, and --model {args.model} is a "
                    f"whole model; leave --{name} out"
                )
    elif beta is None and args.kind is PAIRS:
        beta = _read_beta_of_run(path)
    return replace(args, model=str(path), beta=beta)


def _read_beta_of_run(checkpoint: Path) -> float:
    """The beta of the checkpoint's run; the default without a run."""
    run = checkpoint.resolve().parents[1]
    found = read_object(run / "config.json") if contents_of(run) == TRAINING else {}
    known = Number(above=0).fault(found.get("beta")) is None
    beta = float(found["beta"]) if known else DEFAULT_BETA
    of = f"of the run {run}" if known else "(the default: the adapter is in no run's folder)"
    print(f"beta {beta:g} {of}")
    return beta
