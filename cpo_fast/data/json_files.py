"""Records from JSON Lines or a JSON array (`records`: from any file), one at a time, bounded.

No file content can cause unbounded recursion or memory, or end the reading: a line or item has at
most `MAX_RECORD_BYTES` and `MAX_DEPTH` levels, and an invalid one yields a RecordError in its
place. The array scanner is written by hand because json.load and ijson stop at the first invalid
item.
"""

from __future__ import annotations

import codecs
import json
import re
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any, NoReturn

from cpo_fast.data.arrow_files import (
    MAX_RECORD_BYTES,
    Record,
    datasets_rows,
    is_datasets_folder,
    parquet_rows,
)
from cpo_fast.data.files import lines, open_data
from cpo_fast.errors import DataError, RecordError

MAX_DEPTH = 64
_CHUNK = 1 << 20

# A complete string (possessive: no backtracking), a bracket, a comma, or the opening quote of a
# string that continues beyond the buffer.
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{},]|"', re.DOTALL)

_STRING_END = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)


def _no_constant(_: str) -> NoReturn:
    raise RecordError("json-nan", "NaN and Infinity are not JSON; write null")


def _depth(data: bytes) -> int:
    """Deepest nesting of brackets outside strings; counting stops beyond MAX_DEPTH."""
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


def decode_json(data: bytes) -> dict[str, Any] | RecordError:
    """The JSON object in `data`, or a RecordError, which never quotes the data."""
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
        return RecordError("not-an-object", f"a {type(value).__name__} instead of an object")
    return value


def _reader(file: IO[bytes], path: str) -> Callable[[int], bytes]:
    """`file.read` that raises DataError for a damaged compressed file."""

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
            yield number, decode_json(line)


def _array_items(read: Callable[[int], bytes], path: str) -> Iterator[Record]:
    """The items of a JSON array; `read(n)` returns the next n bytes, fewer at the end."""
    buffer = read(_CHUNK).removeprefix(codecs.BOM_UTF8)
    start = at = buffer.index(b"[") + 1  # start of the item; start of the unscanned part
    line, counted = 1, 0  # line number at buffer[counted]
    depth = 0
    more = True
    skipped = False
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
                    yield line, decode_json(item)
                elif not skipped and (mark == b"," or items):
                    yield line, RecordError("json-invalid", "a comma without a record")
                items, start, skipped = items + 1, at, False
                if mark != b",":
                    if buffer[at:].strip() or read(_CHUNK).strip():
                        yield line, RecordError("json-invalid", "text after the end of the array")
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
            begin = line + buffer.count(b"\n", 0, len(buffer) - len(buffer.lstrip()))
            yield begin, RecordError("record-too-long", f"over {MAX_RECORD_BYTES} bytes")
            line += buffer.count(b"\n", 0, at)
            buffer, newlines, more = _skip_item(buffer[at:], depth, read)
            # The rest starts with the mark after the item, which is not an error.
            line, depth, at, skipped = line + newlines, 0, 0, True
            continue
        # Double the buffer, so that a long string is not scanned repeatedly.
        piece = read(max(_CHUNK, len(buffer)))
        more = bool(piece)
        buffer += piece


def _skip_item(buffer: bytes, depth: int, read: Callable[[int], bytes]) -> tuple[bytes, int, bool]:
    """Skip the rest of an array item, `depth` levels deep, in constant memory.

    Returns the data from the mark after the item on, the number of lines skipped, and whether the
    file may continue; b"" if it ends inside the item.
    """
    newlines = 0
    inside = False  # within a string
    while True:
        at = 0
        if inside:
            if (end := _STRING_END.match(buffer)) is None:
                # A backslash at the end escapes a byte that is not read yet.
                half = (len(buffer) - len(buffer.rstrip(b"\\"))) % 2
                at = len(buffer) - half
            else:
                at, inside = end.end(), False
        if not inside:
            for token in _TOKEN.finditer(buffer, at):
                mark = token[0]
                if not depth and mark in (b",", b"]", b"}"):
                    return (
                        buffer[token.start() :],
                        newlines + buffer.count(b"\n", 0, token.start()),
                        True,
                    )
                at = token.end()
                if mark == b'"':
                    inside = True
                    break
                depth += (mark in (b"[", b"{")) - (mark in (b"]", b"}"))
            else:
                at = len(buffer)
        newlines += buffer.count(b"\n", 0, at)
        buffer = buffer[at:]
        if inside and len(buffer) > 1:
            continue
        piece = read(_CHUNK)
        if not piece:
            return b"", newlines, False
        buffer += piece


def records(path: str) -> Iterator[Record]:
    """The records of a .json, .jsonl (also .gz) or Parquet file, detected by its first bytes, or of
    a folder of `datasets.save_to_disk`.

    Raises DataError for any other file, an empty one, or one that is damaged as a whole.
    """
    if is_datasets_folder(path):
        yield from datasets_rows(path)
        return
    with open_data(path) as file:
        head = _reader(file, path)(1 << 16).removeprefix(codecs.BOM_UTF8).lstrip()
    if head.startswith(b"PAR1"):
        yield from parquet_rows(path)
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
