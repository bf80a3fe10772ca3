"""Open-I: all reports of the installed wheel, and XML written by the tests."""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from itertools import islice
from pathlib import Path
from textwrap import wrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpo_fast.data import open_studies
from cpo_fast.data.openi import installed_file, mesh_labels, parse_xml, split_of
from cpo_fast.data.sections import parse_report
from cpo_fast.errors import DataError, RecordError
from tests.data.samples import SECRET

PART = '<AbstractText Label="{}">{}</AbstractText>'


def citation(
    uid: str = "CXR9", findings: str = "", impression: str = "", terms: tuple[str, ...] = ()
) -> str:
    return (
        f'<eCitation><uId id="{uid}"/><Abstract>{PART.format("FINDINGS", findings)}'
        f"{PART.format('IMPRESSION', impression)}{PART.format('INDICATION', 'Cough.')}</Abstract>"
        f"<MeSH>{''.join(f'<major>{term}</major>' for term in terms)}</MeSH>"
        f'<parentImage id="{uid}_IM-0001-1001"/><parentImage id="{uid}_IM-0001-2001"/></eCitation>'
    )


class Whole:
    """All of Open-I, in a class so that a failing test prints no report."""

    def __init__(self) -> None:
        self.source = open_studies("open-i")
        self.studies = list(self.source)


@pytest.fixture(scope="module")
def whole() -> Whole:
    try:
        return Whole()
    except DataError as error:
        pytest.skip(str(error))


def test_counts_of_the_whole_collection(whole: Whole) -> None:
    source, studies = whole.source, whole.studies
    assert (source.kind, source.read, len(studies)) == ("open-i", 3955, 3927)
    assert source.reasons() == {"no-findings-or-impression": 28}
    assert sum(bool(study.report.findings) for study in studies) == 3425
    assert sum(bool(study.report.impression) for study in studies) == 3921
    assert len({study.study_id for study in studies}) == 3927


def test_labels_of_the_whole_collection(whole: Whole) -> None:
    studies = whole.studies
    present: Counter[str] = Counter()
    for study in studies:
        present.update(name for name, value in study.labels.items() if value)
    assert present == {
        "No Finding": 1363,  # 1391 reports are indexed as normal, 28 of them have no text
        "Lung Opacity": 564,
        "Cardiomegaly": 375,
        "Atelectasis": 332,
        "Pleural Effusion": 161,
        "Emphysema": 102,
        "Edema": 100,
        "Pneumonia": 42,
        "Consolidation": 30,
        "Pneumothorax": 23,
    }
    assert sum(not study.labels for study in studies) == 95


def test_splits_of_the_whole_collection(whole: Whole) -> None:
    studies = whole.studies
    share = {split: n / len(studies) for split, n in Counter(s.split for s in studies).items()}
    assert share == pytest.approx({"train": 0.8, "validate": 0.1, "test": 0.1}, abs=0.02)


def test_frontal_images_are_chosen_where_views_are_known(tmp_path: Path, whole: Whole) -> None:
    source = open_studies("open-i", image_root=str(tmp_path))
    images = {study.study_id: [ref.path for ref in study.images] for study in source}
    assert Counter(map(len, images.values())) == {1: 3773, 0: 101, 2: 49, 3: 4}
    assert images["CXR1"] == ["CXR1_1_IM-0001-4001.png"]  # the first of its two is lateral


def test_rule_of_the_authors_needs_findings(whole: Whole) -> None:
    source = open_studies("open-i", sections="authors")
    assert sum(not study.report.impression for study in source) == 3425
    assert source.reasons() == {"no-findings-or-impression": 530}


def test_reports_in_mimic_layout_are_parsed_back(whole: Whole) -> None:
    def section(name: str, body: str) -> str:
        return "\n".join(
            wrap(f"{name}: {body}", 79, initial_indent=" ", subsequent_indent=" ",
                 break_long_words=False, break_on_hyphens=False)
        )  # fmt: skip

    changed = []
    for study in whole.studies:
        report = study.report
        named = (("FINDINGS", report.findings), ("IMPRESSION", report.impression))
        parts = [section("INDICATION", study.indication or "None.")]
        parts += [section(name, body) for name, body in named if body]
        if parse_report(" " * 33 + "FINAL REPORT\n" + "\n\n".join(parts) + "\n") != report:
            changed.append(study.study_id)
    # One report repeats a header in its impression; wrapping puts it on a new line.
    assert len(changed) <= 1


def test_archive_and_folder_are_equal(whole: Whole, tmp_path: Path) -> None:
    studies = whole.studies
    with tarfile.open(installed_file()) as archive:
        members = list(islice(archive, 1, 41))
        archive.extractall(tmp_path, members, filter="data")
    known = {study.study_id: study for study in studies}
    same = [known[study.study_id] == study for study in open_studies(str(tmp_path))]
    assert len(same) > 30
    assert all(same)


def test_split_depends_only_on_the_id() -> None:
    # With another split, test studies would be in the training data of earlier checkpoints.
    splits = {"CXR1": "train", "CXR7": "test", "CXR14": "validate", "CXR40": "test"}
    assert {name: split_of(name) for name in splits} == splits


def test_labels_of_mesh_terms() -> None:
    labels = mesh_labels(["Opacity/lung/base/left", "Pulmonary Congestion", "Nodule/lung"])
    assert {name for name, value in labels.items() if value} == {"Lung Opacity", "Edema"}
    assert labels["Pneumonia"] == labels["No Finding"] == 0
    assert {name for name, value in mesh_labels(["normal"]).items() if value} == {"No Finding"}
    assert mesh_labels(["No Indexing"]) == mesh_labels([]) == {}
    # Locations are not findings: "Lung/hyperdistention" or "Density/pneumothorax".
    assert not any(mesh_labels(["Lung/hyperdistention", "Catheters/pneumonia"]).values())


def test_synthetic_reports(tmp_path: Path) -> None:
    (tmp_path / "a.xml").write_text(citation("CXR1", "Clear\n  lungs.", "", ("Emphysema/mild",)))
    (tmp_path / "b.xml").write_text(citation("CXR2", "", "Normal &lt; XXXX.", ("normal",)))
    (tmp_path / "c.xml").write_text(citation("CXR3", "", " \n", ("normal",)))
    (tmp_path / "d.xml").write_text(citation("CXR1", SECRET))
    source = open_studies(str(tmp_path))
    one, two = source
    assert (one.report.text, one.labels["Emphysema"]) == ("FINDINGS: Clear lungs.", 1)
    assert (two.report.text, two.indication) == ("IMPRESSION: Normal < XXXX.", "Cough.")
    assert (one.images, one.patient_id) == ((), "CXR1")
    assert [(r.id, r.reason) for r in source.rejected] == [
        ("CXR3", "no-findings-or-impression"),
        ("CXR1", "duplicate-id"),
    ]
    with_images = open_studies(str(tmp_path), image_root=str(tmp_path))
    names = [ref.path for ref in next(iter(with_images)).images]
    assert names == ["CXR1_IM-0001-1001.png", "CXR1_IM-0001-2001.png"]


BOMB = (
    '<!DOCTYPE e [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">]>'
    "<eCitation>&b;</eCitation>"
)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (BOMB, "xml-doctype"),
        ('<!DOCTYPE e SYSTEM "file:///etc/passwd"><e/>', "xml-doctype"),
        ("<a>" * 10_000, "xml-too-deep"),
        ("<a>" + "x" * 1_000_001, "xml-too-large"),
        ("<a><b></a>", "xml-unreadable"),
        ("", "xml-unreadable"),
        (SECRET, "xml-unreadable"),
        ("<a>&unknown;</a>", "xml-unreadable"),
        ('<?xml version="1.0" encoding="klingon"?><a/>', "xml-unreadable"),
    ],
)
def test_hostile_xml_is_set_aside(tmp_path: Path, data: str, reason: str) -> None:
    with pytest.raises(RecordError) as caught:
        parse_xml(data.encode())
    assert caught.value.reason == reason
    (tmp_path / "1.xml").write_text(data)
    (tmp_path / "2.xml").write_text(citation(findings="Clear."))
    (tmp_path / "3.xml").write_text("<other/>")
    source = open_studies(str(tmp_path))
    assert len(list(source)) == 1
    assert source.reasons() == {reason: 1, "not-open-i": 1}
    assert SECRET not in str(source.rejected)


@given(st.binary(max_size=200))
def test_any_bytes_are_parsed_or_have_a_reason(data: bytes) -> None:
    try:
        parse_xml(data)
    except RecordError as error:
        assert error.reason.startswith("xml-")


def write_archive(path: Path, *texts: str) -> str:
    with tarfile.open(path, "w:gz") as tar:
        link = tarfile.TarInfo("ecgen/link.xml")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        for number, text in enumerate(texts):
            member = tarfile.TarInfo(f"ecgen/{number}.xml")
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
    return str(path)


def test_archives_are_read_or_named(tmp_path: Path) -> None:
    good = write_archive(tmp_path / "r.tgz", citation(findings="Clear."), "<bad")
    source = open_studies(good)
    assert [study.study_id for study in source] == ["CXR9"]
    assert (source.read, source.reasons()) == (2, {"xml-unreadable": 1})
    with pytest.raises(DataError, match="has no study"):
        list(open_studies(write_archive(tmp_path / "none.tgz")))
    half = Path(good).read_bytes()
    (tmp_path / "half.tgz").write_bytes(half[: len(half) // 2])
    (tmp_path / "no.tgz").write_text(SECRET)
    for name in ("half.tgz", "no.tgz"):
        with pytest.raises(DataError, match="fetch it again") as caught:
            list(open_studies(str(tmp_path / name)))
        assert SECRET not in str(caught.value)


def test_missing_wheel_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpo_fast.data.openi._WHEEL", "no-such-distribution")
    with pytest.raises(DataError, match="pip install --no-deps torchxrayvision"):
        open_studies("open-i")
