"""The parser of all commands: short help in groups, one-line usage errors.

A wrong flag ends the program with status 2 and `PROGRAM: error: --name value: allowed values`;
other errors of a command have the same form (`report_error`).
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from cpo_fast.errors import UsageError
from cpo_fast.flags import Choice, Number, near
from cpo_fast.version import __version__

_NEGATIVE = re.compile(r"-(?:\.?\d.*|inf|nan)", re.I)


def program(command: str) -> str:
    """The command as invoked: `cpo-fast train` or `python -m cpo_fast.train`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    name = (spec.name if spec else "").removesuffix(".__main__")
    return f"python -m {name}" if name == f"cpo_fast.{command}" else f"cpo-fast {command}"


def report_error(prog: str, error: Exception, *, flags: Iterable[str] = ()) -> int:
    """Print `PROGRAM: error: message`; returns the exit status, 2 for usage errors, else 1.

    Library code names settings; those in `flags` are printed as flags.
    """
    print(f"{prog}: error: {show_flags(str(error), flags)}", file=sys.stderr)
    return 2 if isinstance(error, UsageError) else 1


def show_flags(text: str, flags: Iterable[str]) -> str:
    """`text` with `--` before every name of two or more words that is among `flags`."""
    names = "|".join(sorted((name for name in flags if "_" in name), key=len, reverse=True))
    return re.sub(rf"(?<![\w./-])({names})(?![\w/-]|\.\w)", r"--\1", text) if names else text


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """One line per short flag, with defaults shown once."""

    def __init__(self, prog: str) -> None:
        width = min(100, shutil.get_terminal_size((100, 24)).columns)
        super().__init__(prog, max_help_position=34, width=width)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        shown = default is not None and default is not False and default != argparse.SUPPRESS
        if action.help is None or not action.option_strings or not shown:
            return action.help
        return action.help if "default" in action.help else f"{action.help} (default: %(default)s)"

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        if isinstance(action.type, Number):
            return "N" if action.type.whole else "X"
        if action.type is Path:
            return "PATH"
        return super()._get_default_metavar_for_optional(action)


class Parser(argparse.ArgumentParser):
    """argparse's parser with one-line errors, `--some-flag` as `--some_flag`, negative numbers such
    as -1e-5 as values, and only required flags in the usage line."""

    def __init__(self, **settings: Any) -> None:
        settings.setdefault("formatter_class", HelpFormatter)
        super().__init__(**{"allow_abbrev": False, **settings})
        self.add_argument("--version", action="version", version=__version__, help="show version")
        self._actions[0].help = "show this help"

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        words = self._readable(sys.argv[1:] if args is None else args)
        self.exit_on_error = False  # errors are raised and reworded here
        try:
            known, extra = super().parse_known_args(words, namespace)
        except argparse.ArgumentError as error:
            names = (error.argument_name or "").split("/")
            name = next((one for one in names if one in words), names[0])
            self.error(_reworded(name, error.message))
        if extra:
            self.error(f"unexpected argument {extra[0]!r}; settings have the form --flag value")
        return known, extra

    def format_help(self) -> str:
        self.usage = self.usage or self._short_usage()
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        missing = "the following arguments are required: "
        if message.startswith(missing):
            message = f"missing {message.removeprefix(missing)}; see {self.prog} --help"
        self.exit(report_error(self.prog, UsageError(message)))

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and (
            fault := Choice([str(one) for one in action.choices]).fault(value)
        ):
            raise argparse.ArgumentError(action, f"{value}: {fault}")

    def _readable(self, given: Sequence[str]) -> list[str]:
        """`given` with normalised flag names; ends the program at the first unknown flag, which
        argparse would report only after missing ones."""
        words: list[str] = []
        rest = iter(given)
        for word in rest:
            if word == "--" or (self._subparsers is not None and not word.startswith("-")):
                return [*words, word, *rest]  # the rest belongs to the subcommand
            if _NEGATIVE.fullmatch(word) and words and words[-1].startswith("--"):
                words[-1] += f"={word}"
            elif word.startswith("-") and len(word) > 1 and " " not in word.partition("=")[0]:
                words.append(self._flag(word))
            else:
                words.append(word)
        return words

    def _flag(self, word: str) -> str:
        name, equals, value = word.partition("=")
        for spelt in (name, "--" + name[2:].replace("-", "_")):
            if spelt in self._option_string_actions:
                return spelt + equals + value
        meant = near(f"--{name.lstrip('-').replace('-', '_')}", self._flags())
        hint = f"did you mean {meant}?" if meant else f"see {self.prog} --help"
        self.error(f"{name} is not a flag; {hint}")

    def _flags(self) -> list[str]:
        """All flags, the visible ones first."""
        names = self._option_string_actions.items()
        hidden = [name for name, action in names if action.help == argparse.SUPPRESS]
        return [name for name, _ in names if name not in hidden] + hidden

    def _short_usage(self) -> str:
        formatter = self.formatter_class(prog=self.prog)
        words = ["%(prog)s"]
        optional = False
        for action in self._actions:
            if not action.option_strings:
                words.append(formatter._format_args(action, str(action.metavar or action.dest)))
            elif action.required:
                name = formatter._get_default_metavar_for_optional(action)
                value = formatter._format_args(action, name)
                words.append(f"{action.option_strings[0]} {value}")
            else:
                optional |= action.dest not in ("help", "version")
        return " ".join([*words, *(["[--flag value ...]"] if optional else [])])


def _reworded(name: str, message: str) -> str:
    if message.startswith("expected"):
        return f"{name}: needs a value"
    if message.startswith("ignored explicit argument"):
        return f"{name}: takes no value"
    return f"{name} {message}"
