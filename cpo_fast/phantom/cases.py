"""Sample the phantom's patients, dates, splits, and the signs of each study.

A study is sampled from a *presentation* (heart failure, infection, trauma, ...), a table with the
probability of each finding. This gives the long tail and the co-occurrence of findings. Reports and
images are made elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta

import numpy as np

YEARS = 10
FIRST_DAY = datetime(2110, 1, 1)  # dates are shifted into the future, as in MIMIC-CXR

# name: (share of studies, probability of a support device, probability of each finding)
PRESENTATIONS: dict[str, tuple[float, float, dict[str, float]]] = {
    "normal": (0.345, 0.08, {}),
    "heart failure": (
        0.215,
        0.35,
        {
            "Cardiomegaly": 0.88,
            "Edema": 0.60,
            "Pleural Effusion": 0.62,
            "Atelectasis": 0.22,
            "Enlarged Cardiomediastinum": 0.06,
        },
    ),
    "infection": (
        0.145,
        0.20,
        {
            "Pneumonia": 0.68,
            "Consolidation": 0.48,
            "Pleural Effusion": 0.28,
            "Atelectasis": 0.12,
            "Cardiomegaly": 0.08,
        },
    ),
    "low volumes": (
        0.12,
        0.35,
        {
            "Atelectasis": 0.92,
            "Pleural Effusion": 0.42,
            "Cardiomegaly": 0.20,
            "Pneumothorax": 0.10,
            "Consolidation": 0.06,
        },
    ),
    "opacity": (0.065, 0.15, {"Lung Opacity": 0.95, "Pneumonia": 0.12, "Cardiomegaly": 0.12}),
    "trauma": (
        0.035,
        0.25,
        {"Fracture": 0.80, "Pneumothorax": 0.45, "Pleural Effusion": 0.15, "Lung Opacity": 0.12},
    ),
    "mass": (
        0.04,
        0.15,
        {
            "Lung Lesion": 0.90,
            "Pleural Effusion": 0.22,
            "Enlarged Cardiomediastinum": 0.18,
            "Emphysema": 0.15,
        },
    ),
    "chronic": (
        0.028,
        0.10,
        {"Pleural Other": 0.92, "Emphysema": 0.40, "Pneumothorax": 0.15, "Fracture": 0.08},
    ),
    "mediastinal": (
        0.015,
        0.20,
        {"Enlarged Cardiomediastinum": 0.95, "Cardiomegaly": 0.30, "Pleural Effusion": 0.15},
    ),
}

# Probability of Lung Opacity together with these, as in CheXpert's labels.
_OPACITY_WITH = {"Consolidation": 0.58, "Pneumonia": 0.62, "Edema": 0.52}

# Probability that the report hedges instead of asserting.
_HEDGED = {
    "Pneumonia": 0.22,
    "Edema": 0.14,
    "Consolidation": 0.12,
    "Atelectasis": 0.10,
    "Pleural Effusion": 0.09,
    "Pneumothorax": 0.08,
    "Lung Lesion": 0.08,
    "Enlarged Cardiomediastinum": 0.10,
    "Cardiomegaly": 0.06,
    "Fracture": 0.06,
    "Pleural Other": 0.06,
    "Lung Opacity": 0.05,
}

# Order of the findings in a report; drawing does not depend on it.
ORDER: tuple[str, ...] = (
    "Support Devices",
    "Cardiomegaly",
    "Enlarged Cardiomediastinum",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Lung Opacity",
    "Atelectasis",
    "Lung Lesion",
    "Emphysema",
    "Pleural Effusion",
    "Pneumothorax",
    "Pleural Other",
    "Fracture",
)
_MOST_SIGNS = 5


@dataclass(frozen=True, slots=True)
class Sign:
    """One finding of a study: certainty in the report, strength in the image."""

    finding: str  # a CheXpert name, or "Emphysema"
    certain: bool  # False: hedged in the report, label -1
    strength: float  # 0 not drawn .. 1 most marked; asserted signs are at least 0.65
    side: str = ""  # the patient's "right" | "left" | "bilateral" | "" without a side
    place: str = ""  # "upper lobe", "lower lobe", ...; for Support Devices the kind


@dataclass(frozen=True, slots=True)
class Body:
    """Properties of a patient that are the same in all images."""

    sex: str  # "man" | "woman"
    width: float  # of the thorax, relative
    height: float
    heart: float  # cardiothoracic ratio without disease
    tissue: float  # thickness of soft tissue, relative
    rib_phase: float
    rib_spacing: float


@dataclass(frozen=True, slots=True)
class Exam:
    """One study, before its images and report are made."""

    number: int  # 0 .. num_studies - 1; seeds the random streams of the images and report
    patient_id: str  # 8 digits, first is 1
    study_id: str  # 8 digits, first is 5
    dicom_ids: tuple[str, ...]  # frontal first
    split: str
    when: datetime
    view: str  # "PA" | "AP"
    follow_up: bool
    body: Body
    signs: tuple[Sign, ...]

    @property
    def procedure(self) -> str:
        """Name of the examination in the report and the metadata."""
        if self.view == "AP":
            return "CHEST (PORTABLE AP)"
        return "CHEST (PA AND LAT)" if len(self.dicom_ids) > 1 else "CHEST (PA)"

    @property
    def years(self) -> float:
        """Years since the phantom's first day; determines the drift."""
        return (self.when - FIRST_DAY).total_seconds() / (365.25 * 86400)


def draw_exams(num_studies: int, seed: int) -> list[Exam]:
    """Sample all studies, patient by patient in the order of their first visit.

    The first 80 % of the patients are the training split, the next 10 % validation and the last
    10 % test, so the test split is the latest. Fewer than three patients are all in training.
    """
    rng = np.random.default_rng([seed, 0])
    visits: list[int] = []
    while sum(visits) < num_studies:
        visits.append(int(rng.choice([1, 2, 3], p=[0.6, 0.27, 0.13])))
    visits[-1] -= sum(visits) - num_studies
    entries = np.sort(rng.uniform(0, YEARS - 1, len(visits)))
    patient_ids = 10_000_000 + rng.choice(10_000_000, len(visits), replace=False)
    study_ids = 50_000_000 + rng.choice(10_000_000, num_studies, replace=False)
    splits = _assign_splits(len(visits))

    found: list[Exam] = []
    for index, count in enumerate(visits):
        number = len(found)
        ids = [str(i) for i in sorted(study_ids[number : number + count])]
        found.extend(
            _draw_patient(
                np.random.default_rng([seed, 1, index]),
                number,
                str(patient_ids[index]),
                ids,
                splits[index],
                float(entries[index]),
            )
        )
    return found


def _assign_splits(patients: int) -> list[str]:
    last = max(1, round(patients / 10)) if patients >= 3 else 0
    return ["train"] * (patients - 2 * last) + ["validate"] * last + ["test"] * last


def _draw_patient(
    rng: np.random.Generator,
    number: int,
    patient_id: str,
    study_ids: list[str],
    split: str,
    entry: float,
) -> Iterator[Exam]:
    sex = "woman" if rng.random() < 0.5 else "man"
    body = Body(
        sex=sex,
        width=rng.uniform(0.95, 1.04) - (0.02 if sex == "woman" else 0.0),
        height=rng.uniform(0.95, 1.04),
        heart=rng.uniform(0.41, 0.46),
        tissue=rng.uniform(0.9, 1.1),
        rib_phase=rng.uniform(0, 1),
        rib_spacing=rng.uniform(0.150, 0.175),
    )
    day = FIRST_DAY + timedelta(days=int(entry * 365.25), seconds=int(rng.integers(86400)))
    presentation = _pick_presentation(rng)
    for visit, study_id in enumerate(study_ids):
        if visit:
            day += timedelta(days=int(rng.integers(2, 150)), seconds=int(rng.integers(3600)))
            presentation = presentation if rng.random() < 0.6 else _pick_presentation(rng)
        signs = _draw_signs(rng, presentation)
        bedside = 0.75 if any(s.finding == "Support Devices" for s in signs) else 0.35
        view = "AP" if rng.random() < bedside else "PA"
        images = 2 if view == "PA" and rng.random() < 0.4 else 1
        yield Exam(
            number=number + visit,
            patient_id=patient_id,
            study_id=study_id,
            dicom_ids=tuple(_draw_dicom_id(rng) for _ in range(images)),
            split=split,
            when=day,
            view=view,
            follow_up=visit > 0,
            body=body,
            signs=signs,
        )


def _pick_presentation(rng: np.random.Generator) -> str:
    names = list(PRESENTATIONS)
    shares = np.array([PRESENTATIONS[name][0] for name in names])
    return names[int(rng.choice(len(names), p=shares / shares.sum()))]


def _draw_dicom_id(rng: np.random.Generator) -> str:
    digits = rng.bytes(20).hex()
    return "-".join(digits[i : i + 8] for i in range(0, 40, 8))


def _draw_signs(rng: np.random.Generator, presentation: str) -> tuple[Sign, ...]:
    _, device, chances = PRESENTATIONS[presentation]
    names: set[str] = set()
    while chances and not names - {"Emphysema"}:
        names = {name for name, chance in chances.items() if rng.random() < chance}
    if "Lung Opacity" not in names:
        companions = [chance for name, chance in _OPACITY_WITH.items() if name in names]
        if companions and rng.random() < max(companions):
            names.add("Lung Opacity")
    if rng.random() < device:
        names.add("Support Devices")
    ordered = [name for name in ORDER if name in names]
    while len(ordered) > _MOST_SIGNS:  # a report has at most six sentences of findings
        ordered.pop(int(rng.integers(1, len(ordered))))
    places = _choose_places(rng, ordered)
    return tuple(_draw_sign(rng, name, *places[name]) for name in ordered)


def _draw_sign(rng: np.random.Generator, name: str, side: str, place: str) -> Sign:
    certain = rng.random() >= _HEDGED.get(name, 0.0)
    if certain:
        strength = rng.uniform(0.65, 1.0)
    else:  # half of the hedged findings are present, as a faint sign
        strength = rng.uniform(0.25, 0.40) if rng.random() < 0.5 else 0.0
    return Sign(name, certain, round(strength, 3), side, place)


def _choose_places(rng: np.random.Generator, names: list[str]) -> dict[str, tuple[str, str]]:
    """Choose side and place of each finding so that no sign covers another."""

    def one() -> str:
        return "right" if rng.random() < 0.55 else "left"

    def other(side: str) -> str:
        return "left" if side == "right" else "right"

    def maybe_both(chance: float) -> str:
        return "bilateral" if rng.random() < chance else one()

    where: dict[str, tuple[str, str]] = {}
    infected = maybe_both(0.25)
    for name in names:
        if name in ("Cardiomegaly", "Enlarged Cardiomediastinum", "Edema", "Emphysema"):
            where[name] = ("", "")
        elif name == "Consolidation":
            upper = rng.random() < 0.5 or ("Pneumonia" in names and infected == "bilateral")
            side = other(infected) if "Pneumonia" in names and not upper else one()
            if side == "left" and "Cardiomegaly" in names:
                upper = True  # an enlarged heart would hide the left lower lobe
            where[name] = (side, "upper lobe" if upper else "lower lobe")
        elif name == "Pneumonia":
            where[name] = (infected, "lower lobe")
        elif name == "Lung Opacity":
            side = one()
            if "Pneumonia" in names:
                side = infected
            elif "Consolidation" in names:  # an upper-lobe consolidation would cover it
                side, place = where["Consolidation"]
                side = other(side) if place == "upper lobe" else side
            elif "Edema" in names:
                side = "bilateral"
            where[name] = (side, "mid lung")
        elif name == "Lung Lesion":
            side, place = where.get("Consolidation", ("", ""))
            where[name] = (other(side) if place == "upper lobe" else one(), "upper lobe")
        elif name == "Pneumothorax":
            where[name] = (one(), "apex")
        elif name == "Pleural Other":
            side = maybe_both(0.3)
            if "Pneumothorax" in names:
                side = other(where["Pneumothorax"][0])
            where[name] = (side, "apex")
        elif name == "Pleural Effusion":
            where[name] = (maybe_both(0.45), "base")
        elif name == "Atelectasis":
            where[name] = (maybe_both(0.4), "base")
        elif name == "Fracture":
            where[name] = (one(), "lateral rib")
        else:
            where[name] = _choose_device(rng, names)
    if where.get("Support Devices", ("", ""))[1] == "chest tube":
        where["Support Devices"] = (where["Pneumothorax"][0], "chest tube")
    return where


def _choose_device(rng: np.random.Generator, names: list[str]) -> tuple[str, str]:
    if "Pneumothorax" in names and rng.random() < 0.7:
        return "", "chest tube"
    kinds = (("left", "pacemaker"), ("", "endotracheal tube"), ("right", "central line"))
    return kinds[int(rng.integers(3))]
