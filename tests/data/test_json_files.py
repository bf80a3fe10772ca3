"""Records from JSON and JSON Lines: size limits, reasons of invalid records."""

from __future__ import annotations

import gzip
import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpo_fast.data import json_files
from cpo_fast.data.json_files import MAX_DEPTH, decode_json, records
from cpo_fast.errors import DataError, RecordError
from tests.data.samples import SECRET, read_all

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.lists(st.dictionaries(st.text(), VALUES, max_size=3), min_size=1, max_size=5)


def write_file(tmp_path: Path, data: bytes | str, name: str = "x.json") -> Path:
    path = tmp_path / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def read_in_pieces(text: str, size: int) -> list[Any]:
    """The items of an array whose stream returns `size` bytes per read."""
    stream = io.BytesIO(text.encode())
    return [row for _, row in json_files._array_items(lambda _: stream.read(size), "x")]


@given(OBJECTS, st.integers(1, 40), st.booleans(), st.sampled_from([None, 1]))
def test_array_read_in_pieces_equals_json(
    rows: list, size: int, ascii: bool, indent: int | None
) -> None:
    text = json.dumps(rows, ensure_ascii=ascii, indent=indent)
    assert read_in_pieces("[" + text[1:], size + 1) == json.loads(text)


@given(st.text(alphabet='[]{},:"\\ \n1a', max_size=40), st.integers(1, 9))
def test_any_text_gives_objects_or_reasons(text: str, size: int) -> None:
    for row in read_in_pieces("[" + text, size):
        assert isinstance(row, dict | RecordError)


@given(st.binary(max_size=60))
def test_decode_never_fails(data: bytes) -> None:
    assert isinstance(decode_json(data), dict | RecordError)


def test_lines_array_and_gzip_are_equal(tmp_path: Path) -> None:
    rows = [{"a": 1}, {"a": "ü\n,]}"}, {"a": [{"b": []}]}]
    lines = "\n".join(map(json.dumps, rows)) + "\n\n"
    for data in (lines, json.dumps(rows), json.dumps(rows, indent=2, ensure_ascii=False)):
        assert read_all(write_file(tmp_path, data)) == rows
        assert read_all(write_file(tmp_path, b"\xef\xbb\xbf" + data.encode())) == rows
        assert read_all(write_file(tmp_path, gzip.compress(data.encode()), "x.json.gz")) == rows
    assert read_all(write_file(tmp_path, "[]")) == []


def test_records_have_line_numbers(tmp_path: Path) -> None:
    lines = write_file(tmp_path, '{"a": 1}\n\nnonsense\n{"a": 2}')
    assert [number for number, _ in records(str(lines))] == [1, 3, 4]
    array = write_file(tmp_path, '[\n {"a":\n 1},\n\n {"a": 2}, {"a": 3}]')
    assert [number for number, _ in records(str(array))] == [2, 5, 5]
    for size in range(2, 40):
        stream = io.BytesIO(array.read_bytes())
        pieces = json_files._array_items(lambda _, s=stream, n=size: s.read(n), "x")
        assert [number for number, _ in pieces] == [2, 5, 5]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ('{"a": NaN}', "json-nan"),
        ('{"a": -Infinity}', "json-nan"),
        ('{"a": 1,}', "json-invalid"),
        ("{'a': 1}", "json-invalid"),
        ('{"a": ' + "9" * 5000 + "}", "json-invalid"),
        ("[1]", "not-an-object"),
        ("null", "not-an-object"),
        ('{"a": ' + "[" * 100 + "]" * 100 + "}", "json-too-deep"),
        ('{"a": "\udcff"}', "not-utf8"),
        ('{"a": "\x01"}', "json-invalid"),
    ],
)
def test_invalid_record_leaves_its_neighbours(tmp_path: Path, record: str, reason: str) -> None:
    data = record.encode("utf-8", "surrogateescape")
    good = b'{"a": "' + SECRET.encode() + b'"}'
    expected = [{"a": SECRET}, reason, {"a": SECRET}]
    assert read_all(write_file(tmp_path, good + b"\n" + data + b"\n" + good)) == expected
    assert read_all(write_file(tmp_path, b"[" + b",".join((good, data, good)) + b"]")) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[{"a": 1},]', [{"a": 1}, "json-invalid"]),
        ('[{"a": 1},,{"a": 2}]', [{"a": 1}, "json-invalid", {"a": 2}]),
        ('[{"a": 1}', ["json-truncated"]),
        ('[{"a": 1}, {"b": "unfinished', [{"a": 1}, "json-truncated"]),
        ('[{"a": 1}] {"b": 2}', [{"a": 1}, "json-invalid"]),
        ("[", ["json-truncated"]),
    ],
)
def test_incomplete_arrays(tmp_path: Path, text: str, expected: list) -> None:
    assert read_all(write_file(tmp_path, text)) == expected


def test_deep_nesting_is_set_aside(tmp_path: Path) -> None:
    deep = '{"a": ' + "[" * 1_000_000 + "]" * 1_000_000 + "}"
    assert read_all(write_file(tmp_path, deep)) == ["json-too-deep"]
    assert read_all(write_file(tmp_path, f"[{deep}]")) == ["json-too-deep"]
    brackets_in_text = json.dumps({"a": "[" * 1000})
    assert read_all(write_file(tmp_path, brackets_in_text)) == [{"a": "[" * 1000}]
    full = '{"a": ' + "[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1) + "}"
    assert isinstance(read_all(write_file(tmp_path, full))[0], dict)


def test_records_beyond_the_limit_are_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_files, "MAX_RECORD_BYTES", 1000)
    monkeypatch.setattr(json_files, "_CHUNK", 300)
    long, good = json.dumps({"a": "x" * 5000}), '{"a": 1}'
    path = write_file(tmp_path, f"{good}\n{long}\n{good}\n")
    assert read_all(path) == [{"a": 1}, "record-too-long", {"a": 1}]
    awkward = {"a": ['x"]},\\' * 150, [{"b": "y" * 700}], "\\" * 801], "c": "{" * 999}
    for item in (long, json.dumps(awkward), json.dumps(awkward, indent=1), "[" * 900 + "]" * 900):
        array = f"[{good},\n{item},\n{good}]"
        assert read_all(write_file(tmp_path, array)) == [{"a": 1}, "record-too-long", {"a": 1}]
        assert read_all(write_file(tmp_path, f"[{item}]")) == ["record-too-long"]
        lines = [line for line, _ in json_files.records(str(write_file(tmp_path, array)))]
        assert lines == [1, 2, array.count("\n") + 1]
    truncated = read_all(write_file(tmp_path, f"[{good},{long[:-4]}"))
    assert truncated == [{"a": 1}, "record-too-long", "json-truncated"]


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    for path, match in (
        (tmp_path / "nowhere.json", "cannot be read"),
        (tmp_path, "not a file"),
        (tmp_path / "pipe.json", "not a file"),
        (write_file(tmp_path, " \n\n", "empty.json"), "the file is empty"),
        (write_file(tmp_path, f"id,text\n1,{SECRET}", "x.csv"), "neither JSON"),
        (write_file(tmp_path, "[{}]".encode("utf-16"), "wide.json"), "neither JSON"),
        (write_file(tmp_path, gzip.compress(b'{"a": 1}\n' * 999)[:40], "cut.jsonl.gz"), "damaged"),
        (write_file(tmp_path, b"PAR1" + SECRET.encode(), "x.parquet"), "not a readable Parquet"),
    ):
        with pytest.raises(DataError, match=match) as caught:
            read_all(path)
        assert str(path) in str(caught.value)
        assert SECRET not in str(caught.value)


@given(
    st.lists(
        st.recursive(
            st.text('"\\\\,[]{} \nx', max_size=40),
            lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
            max_leaves=6,
        ).map(lambda value: {"a": value}),
        max_size=5,
    ),
    st.integers(1, 9),
    st.integers(5, 60),
)
def test_items_around_a_skipped_one_are_unchanged(items: list, chunk: int, bound: int) -> None:
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(json_files, "MAX_RECORD_BYTES", bound)
        patch.setattr(json_files, "_CHUNK", chunk)
        path = Path(folder) / "x.json"
        path.write_text(json.dumps(items, indent=1))
        found = [value for _, value in json_files.records(str(path))]
    assert len(found) == len(items)
    for value, item in zip(found, items, strict=True):
        if isinstance(value, RecordError):
            assert value.reason == "record-too-long"
            assert len(json.dumps(item, indent=1)) > bound // 2
        else:
            assert value == item
