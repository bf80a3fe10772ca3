"""Read text from files that can be large, compressed, damaged or misnamed."""

from __future__ import annotations

import codecs
import csv
import errno
import gzip
import os
import stat
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO, cast

from cpo_fast.errors import DataError, RecordError

MAX_CSV_LINE_BYTES = 1_000_000
MAX_REPORT_BYTES = 1_000_000


class NotAFile(OSError):
    """A folder, device or pipe instead of a file."""


def open_regular(path: str) -> BinaryIO:
    """Open a regular file for bytes, without blocking on a pipe. Raises OSError (NotAFile for
    anything else)."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise NotAFile(errno.EINVAL, "is a folder, device or pipe, not a file")
    return os.fdopen(descriptor, "rb")


@contextmanager
def open_data(path: str) -> Iterator[IO[bytes]]:
    """Open `path` for bytes, decompressed if it ends in .gz. Raises DataError."""
    try:
        file = open_regular(path)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); check the path and permissions"
        ) from None
    with file:
        if path.endswith(".gz"):
            yield cast("IO[bytes]", gzip.GzipFile(fileobj=file, mode="rb"))
        else:
            yield file


def lines(file: IO[bytes], path: str, limit: int) -> Iterator[bytes | None]:
    """Lines with their line ends, without a byte-order mark; None for a line over `limit` bytes.

    An over-long line is skipped in pieces, so memory stays bounded. Raises DataError if a
    compressed file is damaged.
    """
    try:
        first = True
        while line := file.readline(limit + 1):
            if len(line) > limit and not line.endswith(b"\n"):
                while (piece := file.readline(limit)) and not piece.endswith(b"\n"):
                    pass
                yield None
            else:
                yield line.removeprefix(codecs.BOM_UTF8) if first else line
            first = False
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path}: damaged ({type(error).__name__}); fetch the file again") from None


def csv_rows(path: str, columns: Sequence[str], remedy: str) -> Iterator[tuple[int, list[str]]]:
    """(line number, values of `columns` in that order) of a CSV file, with columns found by name.

    Missing cells of a short row are "". Raises DataError with file, column and `remedy` for a
    missing column, and with the line number for text that is not UTF-8 CSV.
    """
    with open_data(path) as file:
        number = 0

        def text() -> Iterator[str]:
            for line in lines(file, path, MAX_CSV_LINE_BYTES):
                if line is None:
                    raise DataError(
                        f"{path}: line {number + 1} has over {MAX_CSV_LINE_BYTES} bytes; {remedy}"
                    )
                yield line.decode("utf-8")

        reader = csv.reader(text(), strict=True)
        try:
            header = [name.strip() for name in next(reader, [])]
            missing = [name for name in columns if name not in header]
            if missing:
                raise DataError(f"{path}: no column {', '.join(missing)}; {remedy}")
            places = [header.index(name) for name in columns]
            for row in reader:
                number = reader.line_num
                if row:
                    yield number, [row[i].strip() if i < len(row) else "" for i in places]
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(
                f"{path}: line {number + 1} is not UTF-8 CSV ({type(error).__name__}); {remedy}"
            ) from None


def read_report(path: str) -> str:
    """The text of a report file: UTF-8, with or without a byte-order mark, else Latin-1.

    Raises RecordError "report-missing", "report-empty", "report-too-long" or "report-unreadable".
    """
    name = Path(path).name
    try:
        with open_regular(path) as file:
            data = file.read(MAX_REPORT_BYTES + 1)
    except FileNotFoundError:
        raise RecordError("report-missing", f"{name} is not beside its study's folder") from None
    except OSError as error:
        raise RecordError("report-unreadable", f"{name}: {error.strerror}") from None
    if len(data) > MAX_REPORT_BYTES:
        raise RecordError("report-too-long", f"more than {MAX_REPORT_BYTES} bytes")
    if b"\0" in data:
        raise RecordError("report-unreadable", "holds binary data")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    if not text.strip():
        raise RecordError("report-empty", name)
    return text
