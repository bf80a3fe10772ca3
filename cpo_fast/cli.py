"""`cpo-fast COMMAND ...`: every command of the package under one name.

`cpo-fast train --max_steps 5` is `python -m cpo_fast.train --max_steps 5`. Only the given command
is imported.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from cpo_fast.command_line import report_error
from cpo_fast.console import run_command
from cpo_fast.errors import UsageError
from cpo_fast.flags import near
from cpo_fast.version import __version__

COMMANDS = {
    "train": "the full pipeline: data, counterfactuals, SFT, CPO, evaluation, report",
    "data": "check a data set before training on it; export it for other tools",
    "concepts": "label reports; show, mine and export the concept graph",
    "counterfactual": "write counterfactual reports",
    "phantom": "write the phantom, a synthetic data set",
    "evaluate": "evaluate a model on a data set",
    "study": "the paper's comparison on the phantom, several seeds",
    "export": "merge an adapter into its base",
    "report": "write the page of one run, or compare several runs",
    "doctor": "check this installation",
}
"""Command -> help. A command is the module `cpo_fast.NAME` with a `main(argv)` that returns the
exit status."""

ELSEWHERE = {"study": "cpo_fast.experiments.study"}
"""Commands with another module."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status; 2 for an unknown command."""
    given = list(sys.argv[1:] if argv is None else argv)
    if not given or given[0] in ("-h", "--help"):
        print(usage())
        return 0 if given else 2
    if given[0] == "--version":
        print(__version__)
        return 0
    if given[0] not in COMMANDS:
        meant = near(given[0], COMMANDS)
        hint = f"did you mean {meant}?" if meant else "see cpo-fast --help"
        return report_error("cpo-fast", UsageError(f"{given[0]} is not a command; {hint}"))
    name = ELSEWHERE.get(given[0], f"cpo_fast.{given[0]}")
    try:  # a package has its command in __main__
        module = importlib.import_module(f"{name}.__main__")
    except ModuleNotFoundError as error:
        if error.name != f"{name}.__main__":
            raise
        module = importlib.import_module(name)
    return run_command(lambda: module.main(given[1:]))


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = (f"  {name:{width}}  {text}" for name, text in COMMANDS.items())
    return "\n".join(
        ["usage: cpo-fast COMMAND [--flag value ...]", "", *lines, "",
         "`cpo-fast COMMAND --help` lists the flags. --version prints the version."]
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
