"""Report text of damaged data appears in no output, log, message or rejected record, only in the
requested files."""

from __future__ import annotations

import gzip
import json
import logging
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import cpo_fast.data
from cpo_fast.data.__main__ import main
from tests.data.preference_samples import turn
from tests.data.samples import SECRET, dicom, image_bytes, write_csv, write_mimic

WORDS = SECRET.split()[0]  # one word is already a leak


GOOD = [
    {"prompt": [turn(SECRET, "user")], "chosen": [turn(SECRET)], "rejected": [turn(SECRET + "!")]},
    {"prompt": SECRET, "chosen": SECRET, "rejected_responses": [SECRET + "."]},
    {"messages": [turn(SECRET, "user"), turn(SECRET)], "rejected_response": "x"},
    {"prompt": [turn(SECRET, "user")], "chosen": [turn(SECRET), turn("x", "user"), turn(SECRET)],
     "rejected": [turn("x")], "tools": SECRET, "chat_template_kwargs": {SECRET: SECRET}},
    {"prompt": [turn(SECRET, "user")], "completion": [turn(SECRET)]},
    {"conversations": [{"from": "human", "value": SECRET}],
     "chosen": {"from": "gpt", "value": SECRET}, "rejected": {"from": "gpt", "value": "x"}},
    {"prompt": SECRET, "answers": [{"answer": SECRET, "rank": 1}, {"answer": "x", "rank": 2}]},
    {"dicom_id": dicom(1), "sid": "50000001", "pid": "10000001", "report": SECRET,
     "diagnose": SECRET, "counterfact": {"Edema": SECRET}},
    {"id": "s1/Edema", "study_id": "s1", "images": [], "labels": ["Edema"], "report": SECRET,
     "target": "Fracture", "counterfactual": SECRET},
]  # fmt: skip


def damage(row: dict[str, Any]) -> list[bytes]:
    """The row, truncated and invalid copies, and copies with each field of another type."""
    whole = json.dumps(row).encode()
    rows = [whole, whole[:-9], whole.replace(b'"', b"'"), whole.replace(b"Zebra", b"Zebra\xff")]
    for name in row:
        for value in (None, 7, [], [SECRET], {SECRET: SECRET}, SECRET, [{"role": SECRET}], " "):
            rows.append(json.dumps({**row, name: value}).encode())
    rows.append(json.dumps({**row, "images": [SECRET], "weight": SECRET}).encode())
    return rows


def write_tree(root: Path) -> Path:
    reports = [
        f" FINDINGS: {SECRET}",
        f" INDICATION: {SECRET}",
        (f" FINDINGS: {SECRET}\0").encode(),
        f" FINDINGS: {SECRET * 30_000}",
    ]
    studies = [{"study": 50000001 + i, "report": text} for i, text in enumerate(reports)]
    studies.append({"study": 50000009, "labels": {"Edema": SECRET}})
    write_mimic(root, studies)
    next((root / "files").rglob("*.jpg")).write_text(SECRET)
    return root


def write_wrong_table(root: Path) -> Path:
    """A split table with report text in the wrong cells."""
    write_tree(root)
    rows = [(SECRET, SECRET, SECRET, SECRET), (dicom(1), 50000001, 10000032, SECRET)]
    header = ("dicom_id", "study_id", "subject_id", "split")
    write_csv(root / "mimic-cxr-2.0.0-split.csv.gz", header, rows)
    return root


def write_unreadable_table(root: Path) -> Path:
    write_tree(root)
    damaged = f'dicom_id,study_id,subject_id,split\n"{SECRET}'.encode() + b"\xff"
    (root / "mimic-cxr-2.0.0-split.csv.gz").write_bytes(gzip.compress(damaged))
    return root


def write_open_i(root: Path) -> Path:
    root.mkdir()
    (root / "1.xml").write_text(f"<eCitation>{SECRET}</wrong>")
    (root / "2.xml").write_text(
        f"<eCitation><uId id='CXR2'/><Abstract>{SECRET}</Abstract></eCitation>"
    )
    text = f"<AbstractText Label='FINDINGS'>{SECRET}</AbstractText>"
    (root / "3.xml").write_text(f"<eCitation><uId id='CXR3'/>{text}</eCitation>")
    return root


def write_arrow(root: Path) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    root.mkdir()
    built = pyarrow.Table.from_pylist([{"prompt": SECRET, "chosen": SECRET, "rejected": SECRET}])
    with pyarrow.ipc.new_stream(str(root / "a.arrow"), built.schema) as stream:
        stream.write_table(built)
    (root / "state.json").write_text('{"_data_files": [{"filename": "a.arrow"}]}')
    return root


DATA: dict[str, Callable[[Path], Path]] = {
    "mimic": write_tree, "table": write_wrong_table, "unreadable-table": write_unreadable_table,
    "open-i": write_open_i, "arrow": write_arrow,
}  # fmt: skip


def run_commands(dataset: Path, out: Path, *forced: str) -> str:
    """Run both commands; the text of their output files, except the exported file."""
    data = ["--dataset", str(dataset), *forced]
    main(["check", *data, "--output_dir", str(out)])
    for form in ("jsonl", "ccf", "trl", "swift"):
        main(["export", *data, "--output", str(out / "rows"), "--format", form])
    (out / "rows").unlink(missing_ok=True)
    return "".join(path.read_text() for path in sorted(out.iterdir()))


@pytest.fixture
def assert_silent(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture
) -> Callable[[str], None]:
    caplog.set_level(logging.DEBUG)

    def check(left: str) -> None:
        printed = capsys.readouterr()
        seen = printed.out + printed.err + caplog.text + left
        assert "set aside" in seen or "error: " in seen  # the command ran
        assert WORDS not in seen

    return check


@pytest.mark.parametrize("kind", DATA)
def test_folders_leak_no_text(
    kind: str, tmp_path: Path, assert_silent: Callable[[str], None]
) -> None:
    (tmp_path / "out").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_silent(run_commands(DATA[kind](tmp_path / "data"), tmp_path / "out"))


@pytest.mark.parametrize("place", range(len(GOOD)))
@pytest.mark.parametrize("array", [False, True])
def test_preference_files_leak_no_text(
    place: int, array: bool, tmp_path: Path, assert_silent: Callable[[str], None]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "a.jpg").write_bytes(image_bytes())
    rows = damage({key: value for key, value in GOOD[place].items() if key != "id"})
    path = tmp_path / "rows.json"
    path.write_bytes(b"[" + b",\n".join(rows) + b"]" if array else b"\n".join(rows))
    left = run_commands(path, tmp_path / "out")
    if not array:  # a truncated row ends an array
        assert '"reason"' in left
    # An image path is an identifier, the only field value that a detail may contain.
    assert_silent(re.sub(r'"detail": "' + re.escape(SECRET) + '[^"]*', "", left))


def test_only_the_commands_print_or_log() -> None:
    folder = Path(cpo_fast.data.__file__).parent
    for path in folder.glob("*.py"):
        if path.name != "__main__.py":
            text = path.read_text()
            assert not re.search(r"\bprint\(|\blogging\b|\bwarnings\b|sys\.std", text), path.name
