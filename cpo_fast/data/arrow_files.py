"""Records from Parquet files and folders of `datasets.save_to_disk`, a few rows at a time.

Both need pyarrow. Row groups and record batches can have any size: Parquet is read through a small
buffer, Arrow files are memory-mapped, and only a few rows at a time become Python objects.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cpo_fast.data.files import open_regular
from cpo_fast.errors import DataError, RecordError

MAX_RECORD_BYTES = 64_000_000
"""Enough for a row with a few images."""

Record = tuple[int, dict[str, Any] | RecordError]
"""Row number from 1, and the record or the error in its place."""

_ROWS = 16
_BUFFER = 1 << 20
_MAX_STATE_BYTES = 16_000_000


def _pyarrow(path: str, what: str) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise DataError(f"{path}: {what} needs pyarrow; `pip install pyarrow`") from None
    return pyarrow


def _rows_of(batch: Any) -> Iterator[dict[str, Any] | RecordError]:
    """The rows of a record batch, with a RecordError for one that is too large or not UTF-8."""
    for start in range(0, batch.num_rows, _ROWS):
        several = batch.slice(start, _ROWS)
        try:
            if several.nbytes <= MAX_RECORD_BYTES:
                yield from several.to_pylist()
                continue
        except UnicodeDecodeError:
            pass
        for row in range(several.num_rows):
            one = several.slice(row, 1)
            try:
                if one.nbytes > MAX_RECORD_BYTES:
                    yield RecordError("record-too-long", f"over {MAX_RECORD_BYTES} bytes")
                else:
                    yield one.to_pylist()[0]
            except UnicodeDecodeError:
                yield RecordError("not-utf8", "a text of the row")


def parquet_rows(path: str) -> Iterator[Record]:
    """The rows of a Parquet file. Raises DataError if it is unreadable or pyarrow is missing."""
    pyarrow = _pyarrow(path, "Parquet")
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False) as table:
            number = 0
            for batch in table.iter_batches(batch_size=_ROWS, use_threads=False):
                for row in _rows_of(batch):
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError, RecursionError) as error:
        raise DataError(
            f"{path}: not a readable Parquet file ({type(error).__name__}); write it again"
        ) from None


# --- folders of datasets -------------------------------------------------------------------------


def is_datasets_folder(path: str) -> bool:
    """Whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote `path`."""
    return any((Path(path) / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _state(path: Path) -> dict[str, Any]:
    try:
        with open_regular(str(path)) as file:
            state = json.loads(file.read(_MAX_STATE_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: cannot be read ({type(error).__name__}); save the data set again"
        ) from None
    return state if isinstance(state, dict) else {}


def _arrow_files(folder: str) -> list[Path]:
    """The Arrow files of a data set in order; of several splits, the files of "train"."""
    place = Path(folder)
    if not (place / "state.json").is_file():
        splits = _state(place / "dataset_dict.json").get("splits")
        place /= "train"
        if not (place / "state.json").is_file():
            known = [name for name in splits or () if isinstance(name, str) and len(name) < 40]
            raise DataError(
                f"{folder}: has no split named train; give the folder of one split "
                f"({', '.join(known[:8]) or 'it names none'})"
            )
    entries = _state(place / "state.json").get("_data_files")
    names = [
        entry.get("filename") if isinstance(entry, dict) else None
        for entry in (entries if isinstance(entries, list) else ())
    ]
    for name in names:
        if not isinstance(name, str) or not name or Path(name).name != name:
            raise DataError(f"{place}/state.json: names a file outside the folder; save it again")
    if not names:
        raise DataError(f"{place}/state.json: names no Arrow file; save the data set again")
    return [place / str(name) for name in names]


def datasets_rows(folder: str) -> Iterator[Record]:
    """The rows of a folder of `datasets.save_to_disk`, file after file.

    Raises DataError if a file is missing or damaged, or pyarrow is not installed.
    """
    pyarrow = _pyarrow(folder, "a folder of datasets.save_to_disk")
    number = 0
    for path in _arrow_files(folder):
        try:
            with (
                open_regular(str(path)),  # does not block on a pipe
                pyarrow.memory_map(str(path)) as file,
                pyarrow.ipc.open_stream(file) as stream,
            ):
                for batch in stream:
                    batch.validate(full=False)
                    for row in _rows_of(batch):
                        number += 1
                        yield number, row
        except (pyarrow.ArrowException, OSError, RecursionError) as error:
            raise DataError(
                f"{path}: not a readable Arrow file ({type(error).__name__}); "
                "save the data set again"
            ) from None
