"""The reader of MIMIC-CXR-JPG on small synthetic trees."""

from __future__ import annotations

import csv
import gzip
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpo_fast.data import MimicSource, open_studies
from cpo_fast.data.files import csv_rows
from cpo_fast.data.images import image_size
from cpo_fast.errors import DataError, UsageError
from cpo_fast.types import FINDINGS, Study
from tests.data.samples import SECRET, dicom, write_csv, write_mimic

TABLE = "mimic-cxr-2.0.0-{}.csv.gz"


def read(root: Path, **options: str) -> tuple[list[Study], dict[str, int]]:
    source = open_studies(str(root), **options)
    studies = list(source)
    assert source.read == len(studies) + len(source.rejected)
    return studies, source.reasons()


def test_study_has_all_fields(tmp_path: Path) -> None:
    labels = {"Edema": "1.0", "Fracture": "0.0", "Pneumonia": "-1.0"}
    root = write_mimic(
        tmp_path / "m",
        [{"study": 50414267, "labels": labels, "split": "validate", "date": "21801231"}],
    )
    source = open_studies(str(root))
    (study,) = source
    assert (source.kind, source.path, source.read, source.rejected) == (
        "mimic-cxr", str(root), 1, [],
    )  # fmt: skip
    assert (study.study_id, study.patient_id) == ("s50414267", "p10000032")
    assert study.labels == {"Edema": 1, "Fracture": 0, "Pneumonia": -1}
    assert (study.split, study.date) == ("validate", "21801231")
    assert study.report.text == "FINDINGS: The lungs are clear.\n\nIMPRESSION: No acute process."
    assert study.indication == "___-year-old man with cough."
    (image,) = study.images  # without the lateral view
    assert image.path == f"files/p10/p10000032/s50414267/{dicom(1)}.jpg"
    assert image_size(image) == (8, 6)


def test_order_is_patient_date_time_study(tmp_path: Path) -> None:
    root = write_mimic(
        tmp_path,
        [
            {"patient": 10000033, "study": 50000001, "date": "21000101"},
            {"patient": 10000032, "study": 50000005, "date": "21810101", "time": "93000.0"},
            {"patient": 10000032, "study": 50000004, "date": "21810101", "time": "103000.0"},
            {"patient": 10000032, "study": 50000003, "date": "21810101", "time": "103000.0"},
            {"patient": 10000032, "study": 50000009, "date": "21800101"},
        ],
    )
    studies, _ = read(root)
    assert [study.study_id[-1] for study in studies] == ["9", "5", "3", "4", "1"]
    assert [study.study_id for study in open_studies(str(root))] == [s.study_id for s in studies]


def test_frontal_or_blank_views_are_chosen(tmp_path: Path) -> None:
    root = write_mimic(
        tmp_path,
        [
            {"study": 50000001, "views": ("LATERAL", "PA", "", "AP")},
            {"study": 50000002, "views": ("LL", "", "")},
            {"study": 50000003, "views": ("LATERAL",)},
        ],
    )

    def list_images(source: MimicSource) -> dict[str, list[str]]:
        return {study.study_id: [ref.path[-12:-4] for ref in study.images] for study in source}

    source = MimicSource(str(root))
    assert list_images(source) == {
        "s50000001": ["00000002", "00000004"],
        "s50000002": ["00000006", "00000007"],  # blank views are used without a frontal one
    }
    assert source.reasons() == {"no-frontal-image": 1}


def test_images_in_another_folder(tmp_path: Path) -> None:
    root = write_mimic(tmp_path / "m", [{"study": 50000001}])
    (tmp_path / "small").mkdir()
    shutil.move(root / "files", tmp_path / "small")
    shutil.copytree(
        tmp_path / "small/files", root / "files", ignore=shutil.ignore_patterns("*.jpg")
    )
    (study,) = open_studies(str(root), image_root=str(tmp_path / "small"))
    assert image_size(study.images[0]) == (8, 6)


@pytest.mark.parametrize("suffix", [".png", ".dcm"])
def test_images_in_another_format(tmp_path: Path, suffix: str) -> None:
    root = write_mimic(tmp_path, [{"study": 50000001}])
    for path in root.rglob("*.jpg"):
        path.rename(path.with_suffix(suffix))
    ((study,), _) = read(root)
    assert study.images[0].path.endswith(f"{dicom(1)}{suffix}")


def test_files_can_be_a_link_to_another_disk(tmp_path: Path) -> None:
    root = write_mimic(tmp_path / "m", [{"study": 50000001}])
    (root / "files").rename(tmp_path / "disk")
    (root / "files").symlink_to(tmp_path / "disk")
    ((study,), _) = read(root)
    assert image_size(study.images[0]) == (8, 6)


def test_negbio_labels_and_unpacked_tables(tmp_path: Path) -> None:
    root = write_mimic(tmp_path, [{"study": 50000001}], labeller="negbio")
    packed = root / TABLE.format("split")
    packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
    packed.unlink()
    studies, _ = read(root)
    assert studies[0].labels == {"No Finding": 1}


def test_study_without_labels_is_read(tmp_path: Path) -> None:
    root = write_mimic(
        tmp_path, [{"study": 50000001, "labels": None}, {"study": 50000002, "labels": {}}]
    )
    studies, reasons = read(root)
    assert [study.labels for study in studies] == [{}, {}]
    assert reasons == {}


def test_unusable_studies_are_set_aside(tmp_path: Path) -> None:
    root = write_mimic(
        tmp_path,
        [
            {"study": 50000001, "report": None},
            {"study": 50000002, "report": " \n"},
            {"study": 50000003, "report": f" INDICATION: {SECRET}\n"},
            {"study": 50000004, "report": b" FINDINGS: \0\1\2 " + SECRET.encode()},
            {"study": 50000005, "report": "FINDINGS: " + SECRET * 30_000},
            {"study": 50000006, "labels": {"Edema": SECRET}},
            {"study": 50000007, "report": "\ufeff FINDINGS: marked."},
            {"study": 50000008, "report": " FINDINGS: 37\xb0".encode("latin-1")},
        ],
    )
    source = open_studies(str(root))
    kept = {study.study_id: study.report.findings for study in source}
    assert kept == {"s50000007": "marked.", "s50000008": "37°"}
    assert [(r.id, r.reason) for r in source.rejected] == [
        ("50000006", "bad-label"),
        ("s50000001", "report-missing"),
        ("s50000002", "report-empty"),
        ("s50000003", "no-findings-or-impression"),
        ("s50000004", "report-unreadable"),
        ("s50000005", "report-too-long"),
        ("s50000006", "bad-label"),
    ]
    assert SECRET not in str(source.rejected)


def test_repeated_and_conflicting_rows_are_set_aside(tmp_path: Path) -> None:
    root = write_mimic(tmp_path, [{"study": 50000001}, {"study": 50000002}])
    rows = [
        (dicom(1), 50000001, 10000032, "train"),
        (dicom(1), 50000001, 10000032, "train"),
        (dicom(2), 50000001, 10000032, "test"),
        (dicom(3), 50000002, 10000033, "holiday"),
        (dicom(4), "../../etc", 10000032, "train"),
        ("../x", 50000002, 10000032, "train"),
    ]
    header = ("dicom_id", "study_id", "subject_id", "split")
    write_csv(root / TABLE.format("split"), header, rows)
    studies, reasons = read(root)
    assert [study.study_id for study in studies] == ["s50000001"]
    assert reasons == {"bad-id": 2, "duplicate-id": 1, "conflicting-row": 1, "bad-split": 1}


def rewrite_table(root: Path, name: str, change: Callable[[list[str]], list[str]]) -> Path:
    """Apply `change` to every row of a table, except its header."""
    path = root / TABLE.format(name)
    with gzip.open(path, "rt", newline="") as file:
        header, *rows = csv.reader(file)
    write_csv(path, header, map(change, rows))
    return root


@pytest.mark.parametrize(
    "written", ["{}.0", " {} ", "{}.00", "s{}", "S{}", '"{}"', ' "{}.0" ', "'{}", '="{}"']
)
@pytest.mark.parametrize("name", ["split", "metadata", "chexpert"])
def test_ids_in_spreadsheet_spelling(tmp_path: Path, name: str, written: str) -> None:
    studies = [{"study": 51234567, "labels": {"Edema": "1.0"}, "split": "test", "views": ("AP",)},
               {"study": 50000002, "labels": {"Fracture": "-1.0"}, "date": "21790101"}]  # fmt: skip
    plain, _ = read(write_mimic(tmp_path / "a", studies))

    def change(row: list[str]) -> list[str]:
        return [written.format(cell) if cell.isdigit() and len(cell) == 8 and cell[0] in "15"
                else f' "{cell}" ' if "-" in cell and len(cell) == 44 else cell
                for cell in row]  # fmt: skip

    changed, reasons = read(rewrite_table(write_mimic(tmp_path / "b", studies), name, change))
    assert [(s.study_id, s.patient_id, s.labels, s.split, s.date) for s in changed] == [
        (s.study_id, s.patient_id, s.labels, s.split, s.date) for s in plain
    ]
    assert [len(s.images) for s in changed] == [1, 1] and reasons == {}
    assert all(study.labels for study in changed)


def test_invalid_id_is_set_aside_with_its_line(tmp_path: Path) -> None:
    root = write_mimic(tmp_path, [{"study": 50000001}, {"study": 50000002}])

    def change(row: list[str]) -> list[str]:
        return [SECRET if cell == "50000002" else cell for cell in row]

    rewrite_table(root, "chexpert", change)
    source = open_studies(str(root))
    assert [study.labels for study in source] == [{"No Finding": 1}, {}]
    ((file, line, id, reason),) = [(r.file, r.line, r.id, r.reason) for r in source.rejected]
    assert (file, line, id, reason) == (str(root / TABLE.format("chexpert")), 3, "", "bad-id")
    assert SECRET not in str(source.rejected)


@pytest.mark.parametrize("name", ["metadata", "chexpert"])
@pytest.mark.parametrize(
    ("other", "why"), [("5.12E+07", "from line 2 on"), (None, "its ids differ")]
)
def test_table_that_matches_no_study_is_named(
    tmp_path: Path, name: str, other: str | None, why: str
) -> None:
    root = write_mimic(tmp_path, [{"study": 50000001}, {"study": 50000002}])

    def change(row: list[str]) -> list[str]:
        return [other or cell.replace("000000", "999999") for cell in row]

    with pytest.raises(DataError, match=rf"{name}\.csv\.gz: no row matches a study.*{why}"):
        open_studies(str(rewrite_table(root, name, change)))


def test_radiologist_test_set_is_not_a_label_table(tmp_path: Path) -> None:
    root = write_mimic(tmp_path, [{"study": 50000001}])
    (root / "mimic-cxr-2.1.0-test-set-labeled.csv").write_text("study_id,Airspace Opacity\n5,1\n")
    assert [study.labels for study in read(root)[0]] == [{"No Finding": 1}]
    (root / TABLE.format("chexpert")).rename(root / "mimic-cxr-2.1.0-test-set-chexpert.csv.gz")
    with pytest.raises(DataError, match=r"no mimic-cxr-2\.0\.0-chexpert\.csv\.gz"):
        open_studies(str(root))


@pytest.mark.parametrize("name", ["split", "metadata", "chexpert"])
def test_missing_table_is_named(tmp_path: Path, name: str) -> None:
    root = write_mimic(tmp_path, [{"study": 50000001}])
    (root / TABLE.format(name)).unlink()
    with pytest.raises(DataError, match=rf"no mimic-cxr-2\.0\.0-{name}\.csv\.gz.*beside"):
        open_studies(str(root))


@pytest.mark.parametrize(
    ("name", "column"),
    [("split", "subject_id"), ("metadata", "ViewPosition"), ("chexpert", "Pleural Other")],
)
def test_missing_column_is_named(tmp_path: Path, name: str, column: str) -> None:
    root = write_mimic(tmp_path, [{"study": 50000001}])
    path = root / TABLE.format(name)
    text = gzip.decompress(path.read_bytes()).decode().replace(column, "other", 1)
    path.write_bytes(gzip.compress(text.encode()))
    with pytest.raises(DataError, match=f"{name}.csv.gz: no column {column}; download"):
        open_studies(str(root))


@pytest.mark.parametrize(
    "data",
    [
        b"not gzip",
        gzip.compress(b"dicom_id,study_id,subject_id,split\n" + b"x,y,z,train\n" * 9999)[:60],
        gzip.compress(b"dicom_id,study_id,subject_id,split\n\xff\xfe,1,2,3\n"),
        gzip.compress(b"dicom_id,study_id,subject_id,split\n" + b"x" * 2_000_000),
        gzip.compress(b'dicom_id,study_id,subject_id,split\n"unclosed,1,2,3\n'),
        gzip.compress(b""),
    ],
    ids=["not gzip", "cut off", "not UTF-8", "a line of 2 MB", "an open quote", "empty"],
)
def test_damaged_table_is_named(tmp_path: Path, data: bytes) -> None:
    root = write_mimic(tmp_path, [{"study": 50000001}])
    (root / TABLE.format("split")).write_bytes(data)
    with pytest.raises(DataError, match=r"split\.csv\.gz: "):
        list(open_studies(str(root)))


def test_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    root = write_mimic(tmp_path, [{"study": 50000001}])
    path = root / TABLE.format("split")
    path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + gzip.decompress(path.read_bytes())))
    assert len(read(root)[0]) == 1


def test_empty_tables_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no study"):
        list(open_studies(str(write_mimic(tmp_path, []))))


def test_unknown_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file or folder"):
        open_studies(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="empty"):
        open_studies(str(tmp_path))
    (tmp_path / "notes.txt").write_text(SECRET)
    with pytest.raises(DataError, match="unknown format") as caught:
        open_studies(str(tmp_path))
    assert SECRET not in str(caught.value)
    with pytest.raises(DataError, match="not a data set of studies"):
        open_studies(str(tmp_path / "notes.txt"))
    with pytest.raises(DataError, match=r"no mimic-cxr-2\.0\.0-"):
        open_studies(str(tmp_path), dataset_format="mimic-cxr")
    with pytest.raises(UsageError, match="dataset_format"):
        open_studies(str(tmp_path), dataset_format="dicom")
    with pytest.raises(UsageError, match="sections"):
        open_studies(str(tmp_path), sections="all")
    with pytest.raises(DataError, match="image_root"):
        open_studies("open-i", image_root=str(tmp_path / "nowhere"))


def test_second_reading_is_equal(tmp_path: Path) -> None:
    root = write_mimic(tmp_path, [{"study": 50000001}, {"study": 50000002, "report": None}])
    source = open_studies(str(root))
    first, rejected = list(source), list(source.rejected)
    assert (list(source), source.rejected, source.read) == (first, rejected, 2)


def test_rule_of_the_authors_is_passed_on(tmp_path: Path) -> None:
    studies = [{"study": 50000001}, {"study": 50000002, "report": " IMPRESSION: Normal."}]
    kept, reasons = read(write_mimic(tmp_path, studies), sections="authors")
    assert [study.report.impression for study in kept] == [""]
    assert reasons == {"no-findings-or-impression": 1}


def test_phantom_without_its_files_has_missing_reports(tmp_path: Path) -> None:
    from cpo_fast.phantom import write_phantom

    root = write_phantom(tmp_path / "phantom", num_studies=12, seed=3)
    studies, reasons = read(Path(root))
    assert (len(studies), reasons) == (12, {})
    assert all(study.images and study.labels for study in studies)
    shutil.rmtree(Path(root) / "files")
    assert read(Path(root)) == ([], {"report-missing": 12})


def test_every_label_column_is_read(tmp_path: Path) -> None:
    labels = dict.fromkeys(FINDINGS, "-1.0")
    root = write_mimic(tmp_path, [{"study": 50000001, "labels": labels}], columns=FINDINGS[::-1])
    assert read(root)[0][0].labels == dict.fromkeys(FINDINGS, -1)


@settings(max_examples=100)
@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_give_rows_or_an_error(data: bytes, header: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.csv"
        path.write_bytes((b"a,b\n" if header else b"") + data)
        try:
            rows = list(csv_rows(str(path), ("b", "a"), "fetch it again"))
        except DataError as error:
            assert str(error).endswith("fetch it again")
        else:
            assert all(len(values) == 2 for _, values in rows)
