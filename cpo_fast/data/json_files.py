"""Records out of JSON Lines, a JSON array or Parquet, one at a time and within bounds.

Nothing that a file holds may make the reader recurse, grow or stop: a line or item is at most
`MAX_RECORD_BYTES` long and `MAX_DEPTH` deep, and one that is not good JSON is a RecordError in its
place, after which the next is read.
"""

from __future__ import annotations

import codecs
import json
import re
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any, NoReturn

from cpo_fast.data.files import lines, open_data
from cpo_fast.errors import DataError, RecordError

MAX_RECORD_BYTES = 64_000_000
"""Room for a few images in base64."""

MAX_DEPTH = 64
_CHUNK = 1 << 20

# A whole string (possessive: no backtracking), a bracket, a comma, or the quote of a string whose
# end has not been read yet.
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{},]|"', re.DOTALL)

Record = tuple[int, dict[str, Any] | RecordError]
"""Line (of a Parquet file: row) counted from 1, and the record or why it is none."""


def _no_constant(_: str) -> NoReturn:
    raise RecordError("json-nan", "NaN and Infinity are no JSON; write null")


def _depth(data: bytes) -> int:
    """Deepest nesting of brackets outside strings, counted no further than beyond the bound."""
    depth = deepest = 0
    for token in _TOKEN.finditer(data):
        first = token[0][:1]
        if first in b"[{":
            depth += 1
            deepest = max(deepest, depth)
            if deepest > MAX_DEPTH:
                break
        elif first in b"]}":
            depth -= 1
    return deepest


def decode(data: bytes) -> dict[str, Any] | RecordError:
    """The JSON object of `data`, or the RecordError that says why it is none; never quotes it."""
    if data.count(b"[") + data.count(b"{") > MAX_DEPTH and _depth(data) > MAX_DEPTH:
        return RecordError("json-too-deep", f"more than {MAX_DEPTH} levels")
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_no_constant)
    except RecordError as error:
        return error
    except UnicodeDecodeError as error:
        return RecordError("not-utf8", f"at byte {error.start} of the record")
    except json.JSONDecodeError as error:
        return RecordError("json-invalid", f"{error.msg} at character {error.pos} of the record")
    except (ValueError, RecursionError) as error:
        return RecordError("json-invalid", type(error).__name__)
    if not isinstance(value, dict):
        return RecordError("not-an-object", f"a {type(value).__name__} instead of named fields")
    return value


def _reader(file: IO[bytes], path: str) -> Callable[[int], bytes]:
    """`file.read`, with damage of a compressed file as a DataError."""

    def read(size: int) -> bytes:
        try:
            return file.read(size)
        except (EOFError, OSError, zlib.error) as error:
            raise DataError(
                f"{path}: damaged ({type(error).__name__}); fetch the file again"
            ) from None

    return read


def _json_lines(file: IO[bytes], path: str) -> Iterator[Record]:
    for number, line in enumerate(lines(file, path, MAX_RECORD_BYTES), 1):
        if line is None:
            yield number, RecordError("record-too-long", f"over {MAX_RECORD_BYTES} bytes")
        elif line.strip():
            yield number, decode(line)


def _array_items(read: Callable[[int], bytes], path: str) -> Iterator[Record]:
    """The items of one JSON array; `read(n)` gives the next n bytes or fewer at the end."""
    buffer = read(_CHUNK).removeprefix(codecs.BOM_UTF8)
    start = at = buffer.index(b"[") + 1  # of the item, of what is not scanned yet
    line, counted = 1, 0  # the line of buffer[counted]
    depth = 0
    more = True
    items = 0
    while True:
        for token in _TOKEN.finditer(buffer, at):
            mark = token[0]
            if mark == b'"' and more:
                at = token.start()
                break
            at = token.end()
            if mark in (b"[", b"{"):
                depth += 1
            elif depth and mark in (b"]", b"}"):
                depth -= 1
            elif not depth and mark in (b",", b"]", b"}"):
                item = buffer[start : token.start()]
                begin = start + len(item) - len(item.lstrip())
                line, counted = line + buffer.count(b"\n", counted, begin), begin
                if item.strip():
                    yield line, decode(item)
                elif mark == b"," or items:
                    yield line, RecordError("json-invalid", "a comma without a record")
                items += 1
                start = at
                if mark != b",":
                    if buffer[at:].strip() or read(_CHUNK).strip():
                        yield line, RecordError("json-invalid", "text behind the array's end")
                    return
        else:
            at = len(buffer)
        if not more:
            yield (
                line + buffer.count(b"\n", counted),
                RecordError("json-truncated", "the file ends inside the array"),
            )
            return
        line, counted = line + buffer.count(b"\n", counted, start), 0
        buffer, at, start = buffer[start:], at - start, 0
        if len(buffer) > MAX_RECORD_BYTES:
            raise DataError(
                f"{path}: the record at line {line} has over {MAX_RECORD_BYTES} bytes; "
                "write large records as JSON Lines"
            )
        # At least as much again, so that a long string is not scanned over and over.
        piece = read(max(_CHUNK, len(buffer)))
        more = bool(piece)
        buffer += piece


def _parquet_rows(path: str) -> Iterator[Record]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}: Parquet needs pyarrow; `pip install pyarrow`") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            number = 0
            for batch in table.iter_batches(batch_size=16):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{path}: not Parquet that can be read ({type(error).__name__}); write it again"
        ) from None


def records(path: str) -> Iterator[Record]:
    """The records of a .json, .jsonl (also .gz) or Parquet file, told apart by how it begins.

    Raises DataError when the file is none of these, is empty, or is damaged as a whole.
    """
    with open_data(path) as file:
        head = _reader(file, path)(1 << 16).removeprefix(codecs.BOM_UTF8).lstrip()
    if head.startswith(b"PAR1"):
        yield from _parquet_rows(path)
    elif head.startswith(b"{"):
        with open_data(path) as file:
            yield from _json_lines(file, path)
    elif head.startswith(b"["):
        with open_data(path) as file:
            yield from _array_items(_reader(file, path), path)
    elif head:
        raise DataError(f"{path}: neither JSON, JSON Lines nor Parquet; give one of these")
    else:
        raise DataError(f"{path}: the file is empty; give one with records")
