"""Folders of results: detecting their kind, and writing private files."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from cpo_fast.errors import UsageError

TRAINING = "a training run"
EVALUATION = "results of cpo-fast evaluate"
CHECK = "results of cpo-fast data check"


def contents_of(folder: str | Path) -> str:
    """A description of the results in `folder`; "" if there are none of this package.

    A training run has metrics.jsonl or `stages` in its config.json, an evaluation has `suite`; any
    other config.json belongs to a model. A stage of a run has checkpoints; `data check` writes
    summary.json without config.json.
    """
    folder = Path(folder)
    if (folder / "metrics.jsonl").is_file():
        return TRAINING
    file = folder / "config.json"
    if file.is_file():
        config = read_object(file)
        if is_of_run(config):
            return TRAINING
        return EVALUATION if "model_type" not in config and "suite" in config else "a model"
    if (folder / "adapter_config.json").is_file():
        return "a model"
    if any(folder.glob("checkpoint-*/")) or (folder / "merged").is_dir():
        return "the checkpoints of a training stage"
    file = folder / "summary.json"
    if not file.is_file():
        return ""
    return CHECK if set(read_object(file)) == {"data"} else TRAINING


def is_of_run(config: Mapping[str, Any]) -> bool:
    """Whether a config.json has the flags of a training run, not a model's configuration."""
    return "stages" in config and "model_type" not in config


def check_free(folder: str | Path, own: str) -> None:
    """UsageError if `folder` has results other than `own`: their files, such as config.json and
    summary.json, would be replaced."""
    if (held := contents_of(folder)) not in ("", own):
        raise UsageError(
            f"--output_dir {folder} holds {held}, whose files would be replaced: name another "
            "folder"
        )


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in `file`; {} if there is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def make_private(folder: Path) -> None:
    """Create `folder` with mode 0700, or set this mode."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
    except OSError as error:
        raise UsageError(f"--output_dir {folder} cannot be written: {error}") from error


def open_private(path: Path, flags: int = os.O_WRONLY | os.O_TRUNC) -> int:
    """Open `path` for writing in place; a new file gets mode 0600. Returns the descriptor."""
    return os.open(path, flags | os.O_CREAT, 0o600)


@contextmanager
def replace_private(path: Path, *, binary: bool = False) -> Iterator[IO[Any]]:
    """A new file (mode 0600) that replaces `path` at the end of the block, unless the block raises.

    Several processes can write the same path: each has its own partial file until then.
    """
    descriptor, name = tempfile.mkstemp(".partial", f".{path.name}.", path.parent)  # mode 0600
    partial = Path(name)
    try:
        encoding = None if binary else "utf-8"
        with os.fdopen(descriptor, "wb" if binary else "w", encoding=encoding) as file:
            yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_private(path: Path, data: bytes | str) -> None:
    """Replace `path` by a new file with mode 0600, since it can hold patient text."""
    with replace_private(path, binary=isinstance(data, bytes)) as file:
        file.write(data)


def write_json(path: Path, value: Any) -> None:
    """`write_private` of `value` as indented JSON."""
    write_private(path, json.dumps(value, indent=2) + "\n")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """`write_private` of `rows`, one JSON object per line."""
    with replace_private(path) as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
