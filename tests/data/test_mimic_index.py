"""The cached index of MIMIC-CXR is private and rebuilt when a table changes."""

from __future__ import annotations

import os
import pickle
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpo_fast.data import mimic_index, open_studies
from cpo_fast.data.mimic_index import cache_file
from cpo_fast.types import Study
from tests.data.samples import dicom, write_csv, write_mimic

SPLIT = "mimic-cxr-2.0.0-split.csv.gz"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(mimic_index, "MIN_CACHED_BYTES", 0)
    studies: list[dict[str, Any]] = [
        {"study": 50000001, "views": ("PA", "", "LATERAL"), "labels": {"Edema": "1.0"}},
        {"study": 50000002, "views": ("",), "labels": None, "date": "21790101", "split": "test"},
        {"study": 50000003, "labels": {"Edema": "x"}},
        {"study": 50000004, "labels": {"Edema": "-1.0"}, "report": None},
    ]
    return write_mimic(tmp_path / "m", studies)


def read(root: Path) -> tuple[list[Study], dict[str, int]]:
    source = open_studies(str(root))
    return list(source), source.reasons()


def fail(*_: object) -> None:
    raise AssertionError("the tables are read again")


def test_cached_index_equals_the_tables(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = read(root)
    assert first[1] == {"bad-label": 2, "report-missing": 1}
    cached = cache_file(str(root / SPLIT))
    assert stat.S_IMODE(cached.stat().st_mode) == 0o600
    assert stat.S_IMODE(cached.parent.stat().st_mode) == 0o700
    assert [path.name for path in cached.parent.iterdir()] == [cached.name]
    monkeypatch.setattr(mimic_index, "build_index", fail)
    assert read(root) == first
    linked = root.parent / "link"
    linked.symlink_to(root)
    assert [study.study_id for study in read(linked)[0]] == [s.study_id for s in first[0]]


@pytest.mark.parametrize("name", ["split", "metadata", "chexpert"])
def test_changed_table_is_read_again(
    root: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    first = read(root)
    table = root / f"mimic-cxr-2.0.0-{name}.csv.gz"
    was = table.stat()
    os.utime(table, ns=(was.st_atime_ns, was.st_mtime_ns + 1))
    with monkeypatch.context() as patch:
        patch.setattr(mimic_index, "build_index", fail)
        with pytest.raises(AssertionError):
            read(root)
    assert read(root) == first
    monkeypatch.setattr(mimic_index, "build_index", fail)
    assert read(root) == first


def test_new_rows_are_read(root: Path) -> None:
    read(root)
    rows = [(dicom(1), 50000001, 10000032, "validate")]
    write_csv(root / SPLIT, ("dicom_id", "study_id", "subject_id", "split"), rows)
    ((study,), _) = read(root)
    assert study.split == "validate"


def test_damaged_or_foreign_cache_is_rebuilt(root: Path) -> None:
    first = read(root)
    cached = cache_file(str(root / SPLIT))
    whole = cached.read_bytes()
    with np.load(cached) as arrays:
        short = {name: arrays[name] for name in arrays.files} | {"view": np.zeros(1, np.uint8)}
    for data in (b"", b"no zip", whole[: len(whole) // 2], pickle.dumps({"key": 1})):
        cached.write_bytes(data)
        assert read(root) == first
        assert cached.stat().st_size == len(whole)
    np.savez(cached, **short)
    assert read(root) == first
    np.savez(cached, **(short | {"key": np.array([{"an": "object"}], dtype=object)}))
    assert read(root) == first


def test_unwritable_cache_is_skipped(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(root / "file"))
    assert len(read(root)[0]) == 2


def test_small_tables_are_not_cached(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mimic_index, "MIN_CACHED_BYTES", 1_000_000)
    read(root)
    assert not cache_file(str(root / SPLIT)).exists()
