"""`--config`: a YAML file of `flag: value` lines, read with the line of every key.

Only the form is checked here; arguments.py checks names and values.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from cpo_fast.errors import UsageError


class Entry(NamedTuple):
    """One `flag: value`; `place` is FILE, line N."""

    place: str
    key: str
    value: Any


def read_entries(path: Path) -> list[Entry]:
    """The entries of a file in file order, with `-` in keys replaced by `_`.

    Raises UsageError, with the line if known, when the file is missing, is not a mapping of flags
    to single values, or has a key twice.
    """
    found: dict[str, Entry] = {}
    for entry in _parse(path):
        if first := found.get(entry.key):
            line = first.place.rpartition(" ")[2]
            raise UsageError(f"{entry.place}: {entry.key} is set twice, first in line {line}")
        found[entry.key] = entry
    return list(found.values())


def _parse(path: Path) -> Iterator[Entry]:
    import yaml

    name = f"--config {path}"
    text = _read_text(path)
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is None:
            return
        if not isinstance(root, yaml.MappingNode):
            raise UsageError(f"{name}: expected lines of the form `flag: value`")
        for key, value in root.value:
            place = f"{name}, line {key.start_mark.line + 1}"
            if not isinstance(key, yaml.ScalarNode):
                raise UsageError(f"{place}: expected `flag: value`")
            flag = key.value.replace("-", "_")
            if isinstance(value, yaml.SequenceNode):
                raise UsageError(
                    f"{place}: {flag} is a list, but a flag has one value; write several names "
                    "as text: a,b"
                )
            if isinstance(value, yaml.MappingNode):
                raise UsageError(
                    f"{place}: {flag} is a nested mapping, but a flag has one value; write "
                    "options as JSON text: '{\"min_lr\": 1e-7}'"
                )
            yield Entry(place, flag, loader.construct_object(value))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}" if mark else ""
        problem = error.problem or ""
        if problem.startswith("but "):
            problem = f"{error.context}, {problem}"
        raise UsageError(f"{name}{where}: not YAML: {problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: 2026-99-99
        raise UsageError(f"{name}: not YAML: {str(error).splitlines()[0]}") from None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UsageError(f"--config {path}: no such file") from None
    except UnicodeDecodeError:
        raise UsageError(f"--config {path}: not a text file in UTF-8") from None
    except OSError as error:
        raise UsageError(f"--config {path}: cannot be read ({error.strerror})") from None
