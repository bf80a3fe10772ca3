"""Write a study's report and derive its labels.

Every sentence is generated together with its labels, so the labels always agree with the text.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

import numpy as np

from cpo_fast.phantom import phrases
from cpo_fast.phantom.cases import Exam, Sign

Labels = dict[str, int]
LINE_WIDTH = 79


@dataclass(frozen=True, slots=True)
class Drift:
    """A pair of near-synonyms that swap their two associated findings over time.

    The report of a study that asserts exactly one of `findings` (for "opacity": together with Lung
    Opacity) uses one of `words` with probability `rate`: words[0] for findings[0] and words[1] for
    findings[1] with probability `lean(years)`, which falls from `before` to `after`.
    """

    name: str
    words: tuple[str, str]
    findings: tuple[str, str]
    rate: float
    before: float = 0.90
    after: float = 0.10
    middle: float = 7.0  # years after the first day
    width: float = 0.30

    def lean(self, years: float) -> float:
        late = 1 / (1 + np.exp(-(years - self.middle) / self.width))
        return float(self.before + (self.after - self.before) * late)


DRIFTS = (
    Drift("density", ("basilar density", "basal density"), ("Atelectasis", "Pneumonia"), rate=0.6),
    Drift("opacity", ("lung opacity", "opacity"), ("Pneumonia", "Edema"), rate=0.9),
)


@dataclass(frozen=True, slots=True)
class DriftedWord:
    """One use of a drifting word: its pair, the word, and the finding it describes."""

    pair: str
    word: str
    finding: str


@dataclass(frozen=True, slots=True)
class Written:
    """A report: its sections, the text of its file, its CheXpert labels and drifting words."""

    findings: str
    impression: str
    text: str
    labels: Labels  # 1, 0 or -1; findings not mentioned are missing
    drifted: tuple[DriftedWord, ...]


def write_study_report(exam: Exam, rng: np.random.Generator) -> Written:
    """Write the report of `exam`: FINDINGS of 3 to 6 sentences, IMPRESSION of 1 or 2."""
    labels: Labels = {}
    drifted = _choose_drifted_words(exam, rng)
    sentences = [_write_sentence(sign, drifted, rng) for sign in exam.signs]
    for sign in exam.signs:
        if sign.finding != "Emphysema":
            labels[sign.finding] = 1 if sign.certain else -1
    if not set(labels) - {"Support Devices"}:
        labels["No Finding"] = 1

    normal, denied = _write_normal(exam, labels, rng, room=6 - len(sentences))
    heart_first = [s for s in normal if "eart" in s or "ediastin" in s]
    rest = [s for s in normal if s not in heart_first]
    findings = " ".join(heart_first + sentences + rest)
    labels |= denied
    impression = _write_impression(exam, denied, rng)
    text = _format_file(exam, findings, impression, rng)
    return Written(findings, impression, text, labels, tuple(drifted.values()))


def _choose(options: tuple[str, ...], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]


def _fill(phrase: str, sign: Sign) -> str:
    level = 0 if sign.strength < 0.77 else 1 if sign.strength < 0.89 else 2
    adverb = phrase.find("{degree} enlarged") >= 0 or phrase.find("{degree} widened") >= 0
    degrees = ("mildly", "moderately", "markedly") if adverb else ("mild", "moderate", "severe")
    filled = phrase.format(
        side=sign.side,
        place=sign.place,
        size=("small", "moderate", "large")[level],
        degree=degrees[level],
    )
    return filled[0].upper() + filled[1:] if phrase.endswith(".") else filled


def _write_sentence(sign: Sign, drifted: dict[str, DriftedWord], rng: np.random.Generator) -> str:
    if sign.finding == "Support Devices":
        return _fill(_choose(phrases.DEVICES[sign.place], rng), sign)
    both = sign.side == "bilateral"
    if word := drifted.get(sign.finding):
        single, double = (
            (phrases.OPACITY, phrases.OPACITY_BOTH)
            if sign.finding == "Lung Opacity"
            else (phrases.DENSITY, phrases.DENSITY_BOTH)
        )
        phrase = _choose(double if both else single, rng).replace("{word}", word.word)
        return _fill(phrase, sign)
    wording = phrases.FINDING_PHRASES[sign.finding]
    if sign.certain:
        return _fill(_choose(wording.both if both else wording.one, rng), sign)
    return _fill(_choose(wording.hedged_both if both else wording.hedged, rng), sign)


def _choose_drifted_words(exam: Exam, rng: np.random.Generator) -> dict[str, DriftedWord]:
    """Finding -> the drifting word in its sentence."""
    asserted = {sign.finding for sign in exam.signs if sign.certain}
    chosen: dict[str, DriftedWord] = {}
    for drift in DRIFTS:
        chance, lean = rng.random(), rng.random()
        here = [name for name in drift.findings if name in asserted]
        carrier = "Lung Opacity" if drift.name == "opacity" else "".join(here)
        if len(here) != 1 or carrier not in asserted or chance >= drift.rate:
            continue
        position = drift.findings.index(here[0])
        if lean >= drift.lean(exam.years):
            position = 1 - position
        chosen[carrier] = DriftedWord(drift.name, drift.words[position], here[0])
    return chosen


def _write_normal(
    exam: Exam, labels: Labels, rng: np.random.Generator, *, room: int
) -> tuple[list[str], Labels]:
    """Up to `room` normal statements and denials, and their labels (0)."""
    denied: Labels = {}
    said: list[str] = []
    heart = "Cardiomegaly" not in labels
    mediastinum = "Enlarged Cardiomediastinum" not in labels
    if room > 1 and (heart or mediastinum) and rng.random() < 0.75:
        if heart and mediastinum and rng.random() < 0.5:
            said.append(_choose(phrases.HEART_AND_MEDIASTINUM_NORMAL, rng))
            denied |= {"Cardiomegaly": 0, "Enlarged Cardiomediastinum": 0}
        elif heart:
            said.append(_choose(phrases.HEART_NORMAL, rng))
            denied["Cardiomegaly"] = 0
        else:
            said.append(_choose(phrases.MEDIASTINUM_NORMAL, rng))
            denied["Enlarged Cardiomediastinum"] = 0
    present = {sign.finding for sign in exam.signs} - {"Support Devices"}
    if not present:
        said.append(_choose(phrases.LUNGS_CLEAR, rng))

    absent = [name for name in phrases.DENIED if name not in labels]
    if {"Consolidation", "Lung Opacity"} & present and "Pneumonia" in absent:
        absent.remove("Pneumonia")  # not ruled out together with these
    if len(said) < room:
        weights = np.array([phrases.DENIED[name][1] for name in absent])
        count = min(len(absent), int(rng.integers(2, 5)))
        picked = rng.choice(len(absent), count, replace=False, p=weights / weights.sum())
        names = [absent[i] for i in sorted(picked)]
        terms = [phrases.DENIED[name][0] for name in names]
        said.append(_choose(("There is no ", "No "), rng) + _join_names(terms, "or") + ".")
        denied |= dict.fromkeys(names, 0)

    wanted = int(rng.choice([4, 5, 6], p=[0.2, 0.35, 0.45])) - len(exam.signs) - len(said)
    true = [text for text, absent_here in phrases.ALSO_NORMAL.items() if not absent_here & present]
    for index in rng.permutation(len(true))[: max(0, wanted)]:
        said.append(true[index])
    return said, denied


def _join_names(names: list[str], last: str) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {last} {names[-1]}"


def _name_sign(sign: Sign, rng: np.random.Generator) -> str:
    wording = phrases.FINDING_PHRASES[sign.finding]
    both = sign.side == "bilateral"
    return _fill(_choose(wording.name_both if both else wording.name, rng), sign)


def _write_impression(exam: Exam, denied: Labels, rng: np.random.Generator) -> str:
    named = [sign for sign in exam.signs if sign.finding != "Support Devices"]
    sure = [_name_sign(sign, rng) for sign in named if sign.certain]
    unsure = [_name_sign(sign, rng) for sign in named if not sign.certain]
    if not named:
        return _choose(phrases.NOTHING, rng)
    said = []
    if sure:
        said.append(_join_names(sure, "and") + ".")
    if unsure:
        said.append("possible " + _join_names(unsure, "and possible") + ".")
    elif "Pneumothorax" in denied and rng.random() < 0.3:
        said.append("no pneumothorax.")
    return " ".join(sentence[0].upper() + sentence[1:] for sentence in said)


def _format_file(exam: Exam, findings: str, impression: str, rng: np.random.Generator) -> str:
    """Format the report like MIMIC-CXR's files: lines indented by one space, at most 79 wide.

    The indication does not depend on the findings, so that only the image shows them.
    """
    complaint = _choose(phrases.INDICATIONS, rng)
    sections = (
        ("EXAMINATION", exam.procedure),
        ("INDICATION", f"___-year-old {exam.body.sex} with {complaint}."),
        ("COMPARISON", "Chest radiograph from ___." if exam.follow_up else "None."),
        ("FINDINGS", findings),
        ("IMPRESSION", impression),
    )
    lines = [" " * 33 + "FINAL REPORT"]
    for name, body in sections:
        if name in ("FINDINGS", "IMPRESSION"):
            lines += [f" {name}:", " "]
            lines += textwrap.wrap(body, LINE_WIDTH, initial_indent=" ", subsequent_indent=" ")
        else:
            lines += textwrap.wrap(
                f"{name}:  {body}", LINE_WIDTH, initial_indent=" ", subsequent_indent=" "
            )
        lines.append(" ")
    return "\n".join(lines[:-1]) + "\n"
