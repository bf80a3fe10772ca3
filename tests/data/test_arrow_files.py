"""Parquet files and folders of datasets.save_to_disk: rows, bounds, and invalid files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cpo_fast.data import arrow_files, open_preferences
from cpo_fast.data.arrow_files import is_datasets_folder
from cpo_fast.data.images import load_image
from cpo_fast.data.json_files import records
from cpo_fast.errors import DataError
from tests.data.samples import SECRET, image_bytes, read_all

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def write_folder(folder: Path, rows: list[dict[str, Any]], **state: Any) -> Path:
    """Write a folder in the layout of `datasets` without that package."""
    folder.mkdir(parents=True)
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.ipc.new_stream(str(folder / "data-0.arrow"), table.schema) as stream:
        stream.write_table(table, max_chunksize=7)
    state = {"_data_files": [{"filename": "data-0.arrow"}], **state}
    (folder / "state.json").write_text(json.dumps(state))
    return folder


ROWS = [{"a": i, "images": [{"bytes": b"x", "path": None}]} for i in range(40)]


def test_rows_are_read_in_order(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "x.parquet", row_group_size=9)
    assert read_all(tmp_path / "x.parquet") == ROWS
    assert read_all(write_folder(tmp_path / "folder", ROWS)) == ROWS
    assert [number for number, _ in records(str(tmp_path / "folder"))] == list(range(1, 41))


def test_folders_that_datasets_itself_writes(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    chosen = [{"role": "assistant", "content": "x"}]
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Q{i}"}],
            "chosen": chosen,
            "rejected": [{"role": "assistant", "content": "y"}],
            "images": [{"bytes": image_bytes(), "path": None}],
        }
        for i in range(5)
    ]
    features = {"images": datasets.List(datasets.Image())}
    made = datasets.Dataset.from_list(rows)
    made = made.cast(datasets.Features({**made.features, **features}))
    made.save_to_disk(str(tmp_path / "one"), num_shards=2)
    datasets.DatasetDict(test=made.select([0]), train=made).save_to_disk(str(tmp_path / "all"))
    for folder in ("one", "all", "all/train"):
        source = open_preferences(str(tmp_path / folder))
        found = list(source)
        assert (source.kind, len(found), source.rejected) == ("trl", 5, [])
        assert load_image(found[0].images[0]).size == (8, 6)
    assert len(list(open_preferences(str(tmp_path / "all/test")))) == 1


def test_image_paths_are_relative_to_the_folder(tmp_path: Path) -> None:
    rows = [{"prompt": "Q", "chosen": "x", "rejected": "y", "images": ["a.jpg"]}]
    folder = write_folder(tmp_path / "set", rows)
    (folder / "a.jpg").write_bytes(image_bytes())
    (found,) = open_preferences(str(folder))
    assert load_image(found.images[0]).size == (8, 6)


def test_rows_beyond_the_limit_are_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrow_files, "MAX_RECORD_BYTES", 1000)
    rows = [{"a": "x" * (5000 if i == 3 else 300)} for i in range(9)]
    expected = [*rows[:3], "record-too-long", *rows[4:]]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    assert read_all(tmp_path / "x.parquet") == expected
    assert read_all(write_folder(tmp_path / "folder", rows)) == expected


def test_invalid_utf8_is_set_aside(tmp_path: Path) -> None:
    raw = pyarrow.array([b"good", b"\xff" + SECRET.encode()])
    text = pyarrow.StringArray.from_buffers(2, raw.buffers()[1], raw.buffers()[2])
    parquet.write_table(pyarrow.table({"a": text}), tmp_path / "x.parquet")
    assert read_all(tmp_path / "x.parquet") == [{"a": "good"}, "not-utf8"]


def test_large_row_group_is_read_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    data = [bytes([i % 251]) * 100_000 for i in range(400)]
    parquet.write_table(
        pyarrow.table({"a": data}),
        path,
        write_batch_size=8,
        compression="none",
        use_dictionary=False,
    )
    del data
    pool = pyarrow.default_memory_pool()
    before, most = pool.bytes_allocated(), 0
    for _ in records(str(path)):
        most = max(most, pool.bytes_allocated() - before)
    assert 0 < most < 20_000_000  # of 40 million


@pytest.mark.parametrize(
    ("state", "match"),
    [
        ({"_data_files": [{"filename": "../x.arrow"}]}, "outside the folder"),
        ({"_data_files": [{"filename": 7}]}, "outside the folder"),
        ({"_data_files": []}, "no Arrow file"),
        ({"_data_files": None}, "no Arrow file"),
        ({"_data_files": [{"filename": "data-1.arrow"}]}, "cannot be read|not a readable"),
    ],
)
def test_invalid_states_are_named(tmp_path: Path, state: dict, match: str) -> None:
    with pytest.raises(DataError, match=match):
        read_all(write_folder(tmp_path / "set", ROWS, **state))


def test_damaged_folders_are_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", [{"a": SECRET * 1000}] * 50)
    whole = (folder / "data-0.arrow").read_bytes()
    for data in (b"", SECRET.encode(), whole[: len(whole) // 2]):
        (folder / "data-0.arrow").write_bytes(data)
        with pytest.raises(DataError, match="not a readable") as caught:
            read_all(folder)
        assert SECRET not in str(caught.value)
    (folder / "state.json").write_text("{" + SECRET)
    with pytest.raises(DataError, match=r"state\.json: cannot be read"):
        read_all(folder)
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits/dataset_dict.json").write_text('{"splits": ["test"]}')
    assert is_datasets_folder(str(tmp_path / "splits"))
    with pytest.raises(DataError, match=r"no split named train.*\(test\)"):
        read_all(tmp_path / "splits")


def test_missing_pyarrow_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "set", ROWS)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    for path in (folder, tmp_path / "x.parquet"):
        with pytest.raises(DataError, match="pip install pyarrow"):
            read_all(path)
