"""Content of the phantom: label statistics, wording, drift, signs measured in pixels."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from cpo_fast.phantom.cases import Body, Exam, Sign, draw_exams
from cpo_fast.phantom.radiograph import draw_frontal, draw_lateral
from cpo_fast.phantom.reports import DRIFTS, Drift, Written, write_study_report
from cpo_fast.types import FINDINGS

SIZE = 112
BODY = Body("man", width=1.0, height=1.0, heart=0.43, tissue=1.0, rib_phase=0.3, rib_spacing=0.16)


@pytest.fixture(scope="module")
def corpus() -> list[tuple[Exam, Written]]:
    return [
        (exam, write_study_report(exam, np.random.default_rng([42, 2, exam.number])))
        for exam in draw_exams(2500, 42)
    ]


def count_diseases(report: Written) -> int:
    others = ("No Finding", "Support Devices")
    return sum(value == 1 for name, value in report.labels.items() if name not in others)


def test_label_statistics(corpus: list[tuple[Exam, Written]]) -> None:
    present = Counter(n for _, r in corpus for n, value in r.labels.items() if value == 1)
    share = {name: present[name] / len(corpus) for name in FINDINGS}
    assert 0.29 < share["No Finding"] < 0.38
    assert 0.36 < np.mean([count_diseases(r) >= 2 for _, r in corpus]) < 0.46
    assert 0.14 < np.mean([count_diseases(r) >= 3 for _, r in corpus]) < 0.23
    common = ("Lung Opacity", "Pleural Effusion", "Cardiomegaly", "Atelectasis")
    rare = ("Pneumothorax", "Lung Lesion", "Fracture", "Pleural Other")
    assert min(share[name] for name in common) > 0.12
    assert 0.01 < min(share[name] for name in rare) < max(share[name] for name in rare) < 0.06


def test_edema_occurs_with_cardiomegaly_and_effusion(corpus: list[tuple[Exam, Written]]) -> None:
    def share(name: str, edema: bool) -> float:
        chosen = [r for _, r in corpus if (r.labels.get("Edema") == 1) is edema]
        return float(np.mean([r.labels.get(name) == 1 for r in chosen]))

    for name in ("Cardiomegaly", "Pleural Effusion"):
        assert share(name, True) > 0.5 > 0.25 > share(name, False)


def test_labels_are_uncertain_negative_or_missing(corpus: list[tuple[Exam, Written]]) -> None:
    values = {value for _, r in corpus for value in r.labels.values()}
    assert values == {1, 0, -1}
    hedged = [s for exam, _ in corpus for s in exam.signs if not s.certain]
    drawn = np.mean([s.strength > 0 for s in hedged])
    assert 0.35 < drawn < 0.65
    assert max(s.strength for s in hedged) <= 0.4
    for _, report in corpus:
        if report.labels.get("No Finding") == 1:
            others = set(report.labels) - {"No Finding", "Support Devices"}
            assert all(report.labels[name] == 0 for name in others)


def test_reports_are_short_and_well_formed(corpus: list[tuple[Exam, Written]]) -> None:
    words = [len(f"{r.findings} {r.impression}".split()) for _, r in corpus]
    assert 38 <= np.median(words) <= 65
    for _, report in corpus:
        assert 3 <= len(re.findall(r"\.(?= |$)", report.findings)) <= 6
        assert 1 <= len(re.findall(r"\.(?= |$)", report.impression)) <= 2
        for section in (report.findings, report.impression):
            sentences = re.split(r"(?<=\.) ", section)
            assert all(s[0].isupper() and s.endswith(".") for s in sentences)
            assert "  " not in section


def test_sides_in_the_report_equal_sides_of_the_signs(
    corpus: list[tuple[Exam, Written]],
) -> None:
    for exam, report in corpus:
        if len(exam.signs) == 1 and exam.signs[0].side in ("right", "left"):
            side = exam.signs[0].side
            other = "left" if side == "right" else "right"
            pacemaker = exam.signs[0].place == "pacemaker"  # ends in the right ventricle
            assert pacemaker or not re.search(rf"\b{other}\b", report.findings, re.IGNORECASE)


def test_denied_finding_is_never_drawn(corpus: list[tuple[Exam, Written]]) -> None:
    for exam, report in corpus:
        shown = {sign.finding for sign in exam.signs if sign.strength > 0}
        assert not shown & {name for name, value in report.labels.items() if value == 0}


@pytest.mark.parametrize("drift", DRIFTS, ids=lambda drift: drift.name)
def test_words_drift_to_another_finding(drift: Drift, corpus: list[tuple[Exam, Written]]) -> None:
    """P(first finding | first word) in the reports falls from train to test."""
    first, second = drift.findings
    word = drift.words[0]
    share = {}
    for split in ("train", "test"):
        seen = Counter(
            first if r.labels.get(first) == 1 else second
            for exam, r in corpus
            if exam.split == split
            and re.search(rf"\b{word}\b", r.findings, re.IGNORECASE)
            and (r.labels.get(first) == 1) != (r.labels.get(second) == 1)
        )
        assert seen.total() >= 8
        share[split] = seen[first] / seen.total()
    assert share["train"] > 0.75
    assert share["test"] < 0.45


def test_the_drift_follows_its_documented_curve() -> None:
    for drift in DRIFTS:
        assert drift.lean(2.0) == pytest.approx(0.9, abs=1e-3)
        assert drift.lean(7.0) == pytest.approx(0.5)
        assert drift.lean(9.5) == pytest.approx(0.1, abs=1e-3)


# --- signs, measured at the 112 pixels of the small vision model ---


def draw(*signs: Sign, seed: int = 0) -> np.ndarray:
    picture = draw_frontal(np.random.default_rng(seed), BODY, signs, "PA", SIZE)
    return np.asarray(picture, dtype=np.float32) / 255


def crop(picture: np.ndarray, x: tuple[float, float], y: tuple[float, float]) -> np.ndarray:
    """Crop a window in image coordinates -1..1."""
    columns = slice(*(round((v + 1) / 2 * SIZE) for v in x))
    rows = slice(*(round((v + 1) / 2 * SIZE) for v in y))
    return picture[rows, columns]


def measure_heart(picture: np.ndarray) -> float:
    """Width of the bright region at heart level relative to the width of the chest."""
    profile = crop(picture, (-0.8, 0.8), (0.18, 0.28)).mean(0)
    return float((profile > 0.55).mean())


def test_cardiomegaly_widens_the_heart() -> None:
    well, ill = draw(), draw(Sign("Cardiomegaly", True, 0.7))
    assert 0.3 < measure_heart(well) < 0.5
    assert measure_heart(ill) > measure_heart(well) + 0.1


# finding -> place, window (x, y) on the patient's right side, change of brightness
WINDOWS = {
    "Pleural Effusion": ("base", (-0.78, -0.62), (0.32, 0.48), +0.25),
    "Pneumothorax": ("apex", (-0.60, -0.44), (-0.50, -0.30), -0.08),
    "Consolidation": ("upper lobe", (-0.55, -0.35), (-0.42, -0.22), +0.25),
    "Lung Opacity": ("mid lung", (-0.62, -0.44), (-0.30, -0.10), +0.10),
    "Pneumonia": ("lower lobe", (-0.68, -0.42), (0.02, 0.26), +0.12),
    "Atelectasis": ("base", (-0.65, -0.40), (0.12, 0.32), +0.12),
    "Lung Lesion": ("upper lobe", (-0.40, -0.32), (-0.48, -0.40), +0.35),
    "Pleural Other": ("apex", (-0.45, -0.30), (-0.70, -0.60), +0.12),
    "Fracture": ("lateral rib", (-0.80, -0.42), (-0.14, 0.18), +0.03),
}


@pytest.mark.parametrize("finding", WINDOWS)
def test_one_sided_signs_show_on_their_side_only(finding: str) -> None:
    place, x, y, change = WINDOWS[finding]
    mirrored = (-x[1], -x[0])
    for seed in range(3):
        well = draw(seed=seed)
        right = draw(Sign(finding, True, 0.65, "right", place), seed=seed)
        left = draw(Sign(finding, True, 0.65, "left", place), seed=seed)
        for ill, here, there in ((right, x, mirrored), (left, mirrored, x)):
            sign = crop(ill, here, y).mean() - crop(well, here, y).mean()
            elsewhere = crop(ill, there, y).mean() - crop(well, there, y).mean()
            assert sign * np.sign(change) > abs(change) * 0.6
            assert abs(elsewhere) < 0.01


def test_central_signs_change_their_windows() -> None:
    well = draw()
    wide = draw(Sign("Enlarged Cardiomediastinum", True, 0.7))
    window = (0.16, 0.24), (-0.50, -0.40)
    assert crop(wide, *window).mean() > crop(well, *window).mean() + 0.15
    edema = draw(Sign("Edema", True, 0.7))
    for x in ((-0.42, -0.28), (0.28, 0.42)):
        window = x, (-0.15, 0.05)
        assert crop(edema, *window).mean() > crop(well, *window).mean() + 0.10
    emphysema = draw(Sign("Emphysema", True, 0.8))
    window = (-0.5, -0.35), (0.47, 0.55)  # lung above a flattened diaphragm
    assert crop(emphysema, *window).mean() < crop(well, *window).mean() - 0.2


@pytest.mark.parametrize(
    ("side", "kind"),
    [
        ("left", "pacemaker"),
        ("", "endotracheal tube"),
        ("right", "central line"),
        ("right", "chest tube"),
    ],
)
def test_devices_are_white(side: str, kind: str) -> None:
    well, ill = draw(), draw(Sign("Support Devices", True, 0.9, side, kind))
    assert (ill > 0.9).sum() > (well > 0.9).sum() + 40


def test_brightness_grows_with_the_strength_of_a_sign() -> None:
    window = (-0.78, -0.62), (0.32, 0.55)
    means = [
        crop(draw(Sign("Pleural Effusion", s > 0.5, s, "right", "base")), *window).mean()
        for s in (0.0, 0.33, 0.65, 1.0)
    ]
    assert means == sorted(means)
    assert means[1] > means[0] + 0.02


def test_lateral_view_shows_posterior_fluid() -> None:
    def side_view(*signs: Sign) -> np.ndarray:
        return np.asarray(draw_lateral(np.random.default_rng(0), BODY, signs, SIZE)) / 255

    window = (0.2, 0.36), (0.33, 0.42)
    ill = side_view(Sign("Pleural Effusion", True, 0.8, "right", "base"))
    assert crop(ill, *window).mean() > crop(side_view(), *window).mean() + 0.1
