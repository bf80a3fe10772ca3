"""The settings of a run from their sources: base, preset, `--config` file, command line."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from cpo_fast.command_line import Parser, program
from cpo_fast.errors import UsageError
from cpo_fast.flags import Allowed, Choice, Number, Switch
from cpo_fast.run.arguments import (
    EMBEDDED,
    SECTIONS,
    TrainArguments,
    find_fault,
    find_range,
    read_flags_file,
)

CHOOSES_BASE = ("dataset", "model_name_or_path")
PRESET_FOLDER = EMBEDDED.with_name("presets")
DESCRIPTION = """\
Trains, evaluates and reports: data -> counterfactuals -> SFT -> CPO -> evaluation -> report.

Flags override the --config file, and the file overrides the --preset. Flags that begin with sft_
belong to SFT, the others to CPO or both; --lora-r is --lora_r. The defaults below are the paper's;
without --dataset and --model_name_or_path, phantom.yaml (tiny model, phantom data) applies.
"""
FLAGS = {f.name: f for f in fields(TrainArguments)}
SHARED = ("max_length", "lr_scheduler_type", "lr_scheduler_kwargs")
"""Flags that also apply to SFT if its own flag is not set."""


@dataclass(frozen=True)
class Layer:
    """The values of one source by flag; a later layer overrides an earlier one."""

    name: str
    values: dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """The settings of a run; `base`: which defaults apply and why; `layers`: values by source."""

    args: TrainArguments
    base: str
    layers: tuple[Layer, ...]

    def describe(self) -> list[str]:
        """Lines for the screen: the base, then the effective non-default values of each layer."""
        origin = {name: layer for layer in self.layers for name in layer.values}
        texts = [f"base settings: {self.base}"]
        for layer in self.layers:
            shown = [
                _format_setting(name, getattr(self.args, name), brief=layer.name == EMBEDDED.name)
                for name in layer.values
                if name != "preset"
                and origin[name] is layer
                and getattr(self.args, name) != FLAGS[name].default
            ]
            texts += [f"  {layer.name}: {', '.join(shown)}"] if shown else []
        if unused := self._find_unused():
            texts.append(f"  not used by --stages {self.args.stages}: {', '.join(unused)}")
        return [line for text in texts for line in _wrap(text)]

    def _find_unused(self) -> list[str]:
        """Flags of the command line that apply only to stages that do not run."""
        running = self.args.stage_names
        found = []
        for name in self.layers[-1].values:
            twin = f"sft_{name}"
            if name.startswith("sft_") and "sft" not in running and name != "sft_checkpoint":
                found.append(f"--{name}")
            elif twin in FLAGS and name not in SHARED and "cpo" not in running and "sft" in running:
                found.append(f"--{name} (SFT has --{twin})")
        return found


def read_settings(argv: Sequence[str] | None = None) -> Settings:
    """Read `[--config run.yaml] [--preset name] [--flag value ...]`.

    An unknown flag ends the program with a one-line error and status 2; other faults raise
    UsageError.
    """
    given = vars(make_parser().parse_args(argv))
    config = given.pop("config", None)
    for name, value in given.items():
        if fault := find_fault(name, value):
            raise UsageError(f"--{name} {value}: {fault}")
    return merge_settings(given, None if config is None else Path(config))


def merge_settings(given: Mapping[str, Any], config: Path | None = None) -> Settings:
    """Combine `given`, the file `config`, the preset and the base, highest priority first.

    The base is phantom.yaml unless `given` or the file sets `dataset` or `model_name_or_path`.
    Raises UsageError for a wrong value or file.
    """
    given = dict(given)
    in_file = read_flags_file(config) if config is not None else {}
    if config is not None and not in_file:
        raise UsageError(f"--config {config}: sets no flag; expected lines like `beta: 0.1`")
    preset = (in_file | given).get("preset", "default")
    named = " and ".join(f"--{name}" for name in CHOOSES_BASE if name in in_file | given)
    of_base: dict[str, Any] = {}
    if named:
        are = "are" if " and " in named else "is"
        base = f"the paper's (defaults of --help), because {named} {are} set"
    else:
        of_base = read_flags_file(EMBEDDED)
        base = (
            f"{EMBEDDED.name}, not the paper's (defaults of --help), because neither "
            f"--{' nor --'.join(CHOOSES_BASE)} is set"
        )
        if "output_dir" in in_file | given:
            del of_base["overwrite_output_dir"]  # only for the embedded default's folder
    layers = (
        Layer(EMBEDDED.name, of_base),
        Layer(f"--preset {preset}", read_flags_file(PRESET_FOLDER / f"{preset}.yaml")),
        Layer(f"--config {config}", in_file),
        Layer("command line", given),
    )
    values = {name: value for layer in layers for name, value in layer.values.items()}
    try:
        return Settings(TrainArguments(**values), base, layers)
    except UsageError as error:
        if config is None:
            raise
        raise UsageError(f"{error} (with the flags of --config {config})") from None


def make_parser() -> Parser:
    """The parser of all flags; its result holds only the flags that are set."""
    parser = Parser(
        prog=program("train"),
        usage="%(prog)s [--config FILE] [--preset NAME] [--flag value ...]",
        description=DESCRIPTION,
        argument_default=argparse.SUPPRESS,
    )
    titles = {first: title for title, first in SECTIONS.items()}
    group = parser.add_argument_group("")
    for name, flag in FLAGS.items():
        if name in titles:
            group = parser.add_argument_group(titles[name])
        if name == "preset":
            group.add_argument("--config", metavar="FILE", help="YAML file of `flag: value` lines")
        allowed, metavar = find_range(name), flag.metadata["metavar"]
        text = _format_help(flag.metadata["help"], allowed, flag.default, listed=metavar == "NAME")
        if isinstance(allowed, Switch):
            group.add_argument(
                f"--{name}", type=allowed.read, nargs="?", const=True, metavar="true|false",
                help=text,
            )  # fmt: skip
            group.add_argument(
                f"--no_{name}", action="store_false", dest=name, help=argparse.SUPPRESS,
                default=argparse.SUPPRESS,
            )  # fmt: skip
            continue
        if isinstance(allowed, Number):
            metavar = "N" if allowed.whole else "X"
        elif isinstance(allowed, Choice) and metavar is None:
            metavar = "|".join(allowed.listed())
        group.add_argument(f"--{name}", type=allowed.read, metavar=metavar, help=text)
    return parser


def _format_help(text: str, allowed: Allowed, default: Any, *, listed: bool) -> str:
    if listed and isinstance(allowed, Choice):
        text += f": {', '.join(allowed.listed())}"
    if default is not None and default is not False:
        text += f" (default: {_format_value(default)})"
    return text.replace("%", "%%")


def _format_setting(name: str, value: Any, *, brief: bool) -> str:
    default = FLAGS[name].default
    shown = not brief and default is not None and not isinstance(default, bool | str)
    return f"{name}={_format_value(value)}" + (
        f" (default {_format_value(default)})" if shown else ""
    )


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(
        text, 100, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )


def _format_value(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)
