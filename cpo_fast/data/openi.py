"""Open-I (Indiana University chest X-rays): 3,955 reports as XML, labelled by MeSH indexers.

The reports are read from the installed wheel of torchxrayvision, which is not imported, or from a
.tgz or folder. Their licence (CC BY-NC-ND 4.0) forbids redistribution of derived works. Images are
a separate download: with `image_root` a study has its frontal PNG files, without it only text.
Open-I has one report per patient and no splits: ids are split 80/10/10 by their hash.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import tarfile
import zlib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path, PurePosixPath
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from cpo_fast.data.files import open_regular
from cpo_fast.data.source import StudySource
from cpo_fast.errors import DataError, RecordError
from cpo_fast.types import ImageRef, Origin, Report, Study

MAX_XML_BYTES = 1_000_000
MAX_XML_DEPTH = 64

MESH_TERMS: dict[str, tuple[str, ...]] = {
    "Atelectasis": ("pulmonary atelectasis",),
    "Cardiomegaly": ("cardiomegaly",),
    "Consolidation": ("consolidation",),
    "Edema": ("pulmonary edema", "pulmonary congestion"),
    "Lung Opacity": ("opacity", "airspace disease", "infiltrate"),
    "Pleural Effusion": ("pleural effusion",),
    "Pneumonia": ("pneumonia",),
    "Pneumothorax": ("pneumothorax",),
    "Emphysema": ("emphysema", "pulmonary emphysema", "bullous emphysema"),
}
"""The nine findings common to Open-I and the concept graph -> first parts of major terms."""

_WHEEL = "torchxrayvision"
_REPORTS = "torchxrayvision/data/NLMCXR_reports.tgz"
_VIEWS = "torchxrayvision/data/nlmcxr_tsne_pa.csv.gz"


def installed_file(file: str = _REPORTS) -> str:
    """The path of `file` in the installed wheel. Raises DataError with the remedy if it is
    missing."""
    try:
        path = Path(str(metadata.distribution(_WHEEL).locate_file(file)))
    except metadata.PackageNotFoundError:
        path = Path(file)
    if not path.is_file():
        raise DataError(
            f"Open-I: {path.name} is not installed; run `make real-data`, "
            "or `pip install --no-deps torchxrayvision==1.5.7`, or give the .tgz or the XML folder"
        )
    return str(path)


def parse_xml(data: bytes) -> Element:
    """The root element of a small XML document.

    A document type, and with it entities, is refused. Raises RecordError "xml-doctype",
    "xml-too-deep", "xml-too-large" or "xml-unreadable".
    """
    if len(data) > MAX_XML_BYTES:
        raise RecordError("xml-too-large", f"{len(data)} bytes, at most {MAX_XML_BYTES}")
    builder = TreeBuilder()
    depth = 0

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > MAX_XML_DEPTH:
            raise RecordError("xml-too-deep", f"more than {MAX_XML_DEPTH} levels")
        builder.start(tag, attributes)

    def end(tag: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(tag)

    def doctype(*_: object) -> None:
        raise RecordError("xml-doctype", "a document type can define entities; remove it")

    parser = expat.ParserCreate()
    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = builder.data
    parser.StartDoctypeDeclHandler = doctype
    try:
        parser.Parse(data, True)
    except (expat.ExpatError, ValueError, LookupError) as error:
        line = getattr(error, "lineno", None)
        raise RecordError(
            "xml-unreadable", "not XML" if line is None else f"not XML at line {line}"
        ) from None
    return builder.close()


def mesh_labels(terms: list[str]) -> dict[str, int | None]:
    """Labels from major terms: the nine findings and "No Finding", each 1 or 0; {} if not
    indexed."""
    heads = {term.split("/")[0].strip().lower() for term in terms}
    if not heads or "no indexing" in heads:
        return {}
    labels: dict[str, int | None] = {
        name: int(not heads.isdisjoint(known)) for name, known in MESH_TERMS.items()
    }
    labels["No Finding"] = int("normal" in heads)
    return labels


def split_of(study_id: str) -> str:
    """train, validate or test, 80/10/10, by the SHA-256 of the id."""
    tenth = int.from_bytes(hashlib.sha256(study_id.encode()).digest()[:8], "big") % 10
    return "test" if tenth == 9 else "validate" if tenth == 8 else "train"


def _read_views() -> dict[str, str]:
    """Image id -> "PA" or "L" from the wheel's table, which was derived from pixels and covers one
    or two images of most studies; {} if it is not installed.
    """
    try:
        path = installed_file(_VIEWS)
    except DataError:
        return {}
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        return {row["imageid"]: row["tsne-view"] for row in csv.DictReader(file)}


def _read_members(path: str) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of the XML files of a .tgz in archive order, or of a folder sorted by name."""
    if Path(path).is_dir():
        for found in sorted(Path(path).rglob("*.xml")):
            try:
                with open_regular(str(found)) as file:
                    data = file.read(MAX_XML_BYTES + 1)
            except OSError:
                data = b""
            yield str(found.relative_to(path)), data
        return
    try:
        with open_regular(path) as raw, tarfile.open(fileobj=raw, mode="r|gz") as archive:
            for member in archive:
                if member.isreg() and member.name.endswith(".xml"):
                    packed = archive.extractfile(member)
                    assert packed is not None  # a regular member
                    yield member.name, packed.read(MAX_XML_BYTES + 1)
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path}: not a readable .tgz ({type(error).__name__}); fetch it again"
        ) from None


class OpenISource(StudySource):
    """Studies of Open-I; `path` is a .tgz, a folder of XML files, or "" for the installed wheel.

    Text is unchanged ("XXXX" is the de-identification). Section rule "authors" reads findings only.
    A report that was not indexed has empty labels.
    """

    def __init__(
        self, path: str = "", *, sections: str = "careful", image_root: str | None = None
    ) -> None:
        super().__init__("open-i", path or installed_file())
        self.sections = sections
        self.image_root = image_root
        self._view = _read_views() if image_root is not None else {}

    def _frontal(self, names: list[str]) -> list[str]:
        """Images known to be frontal, else images not known to be lateral, else all."""
        frontal = [name for name in names if self._view.get(name) == "PA"]
        return frontal or [name for name in names if self._view.get(name) != "L"] or names

    def _study(self, root: Element, study_id: str, file: str) -> Study:
        text = {"FINDINGS": "", "IMPRESSION": "", "INDICATION": ""}
        for part in root.iter("AbstractText"):
            if (name := part.get("Label", "")) in text:
                text[name] = " ".join("".join(part.itertext()).split())
        report = Report(text["FINDINGS"], text["IMPRESSION"] if self.sections == "careful" else "")
        if not (report.findings or report.impression):
            raise RecordError("no-findings-or-impression", f"by the {self.sections} rule")
        images: list[str] = []
        if self.image_root is not None:
            images = self._frontal([image.get("id", "") for image in root.iter("parentImage")])
        return Study(
            study_id=study_id,
            patient_id=study_id,
            report=report,
            images=tuple(ImageRef(f"{name}.png", self.image_root or "") for name in images),
            labels=mesh_labels([major.text or "" for major in root.iter("major")]),
            split=split_of(study_id),
            indication=text["INDICATION"],
            origin=Origin(file),
        )

    def _records(self) -> Iterator[Study]:
        seen: set[str] = set()
        for name, data in _read_members(self.path):
            self.read += 1
            study_id, file = PurePosixPath(name).stem, f"{self.path}:{name}"
            try:
                root = parse_xml(data)
                uid = root.find("uId")
                if root.tag != "eCitation" or uid is None or not uid.get("id"):
                    raise RecordError("not-open-i", "no eCitation with a uId")
                study_id = uid.get("id", "")
                if study_id in seen:
                    raise RecordError("duplicate-id", "another file has the same uId")
                seen.add(study_id)
                study = self._study(root, study_id, file)
            except RecordError as error:
                self._reject(file, None, study_id, error.reason, error.detail)
                continue
            yield study
