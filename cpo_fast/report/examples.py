"""One example study of a report: image, original report, counterfactual, answers of the models."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpo_fast.data.images import load_image
from cpo_fast.data.labels import parse_answer
from cpo_fast.errors import RecordError
from cpo_fast.evaluation.text import thought_of
from cpo_fast.report.diff import Piece, word_diff
from cpo_fast.report.read import strings
from cpo_fast.report.tables import in_order, name_of, shorten
from cpo_fast.types import ImageRef

IMAGE_PIXELS = 448  # longest side of an image, twice its size on the page
SHOWN_CHARACTERS = 700  # of a model's thought
SHOWN_UNPARSED = 160  # of a thought without a diagnosis
LONGEST_REPORT = 12_000  # characters; the time of word_diff grows with the square


@dataclass(frozen=True)
class Answer:
    name: str
    verdict: str  # "right" | "partly" | "wrong": also the CSS class
    word: str
    diagnosis: str
    thought: str


@dataclass(frozen=True)
class Example:
    study_id: str
    labels: tuple[str, ...]
    target: str
    image: str
    image_note: str
    before: list[Piece]
    after: list[Piece]
    answers: list[Answer] = field(default_factory=list)


def prepare_example(example: Mapping[str, Any], folder: Path) -> Example:
    """An entry of evaluation.json for the page; relative image paths start at `folder`."""
    report = shorten(str(example.get("report") or ""), LONGEST_REPORT)
    edited = shorten(str(example.get("counterfactual") or ""), LONGEST_REPORT)
    before, after = word_diff(report, edited) if edited else ([(False, report)], [])
    image, image_note = _image(example.get("image"), folder)
    labels = tuple(strings(example.get("labels")))
    found = example.get("answers")
    answers: dict[str, Any] = found if isinstance(found, dict) else {}
    return Example(
        study_id=str(example.get("study_id") or "without id"),
        labels=labels,
        target=str(example.get("target") or ""),
        image=image,
        image_note=image_note,
        before=before,
        after=after,
        answers=[_answer(name, str(answers[name]), labels) for name in in_order(answers)],
    )


def _answer(name: str, text: str, labels: Sequence[str]) -> Answer:
    names = parse_answer(text)
    if not names:
        verdict, word = "wrong", "cannot be parsed"
    elif set(names) == set(labels):
        verdict = word = "right"
    else:
        verdict = word = "partly" if set(names) & set(labels) else "wrong"
        word = "partly right" if verdict == "partly" else word
    thought = shorten(thought_of(text), SHOWN_CHARACTERS if names else SHOWN_UNPARSED)
    return Answer(name_of(name), verdict, word, ", ".join(names), thought)


def _image(path: Any, folder: Path) -> tuple[str, str]:
    """(data URI, note): a small grey JPEG of the example's image, or why it is missing."""
    if not path:
        return "", "This study has no image."
    from PIL import Image

    try:
        image = load_image(ImageRef(str(folder / str(path)))).convert("L")
    except RecordError as error:
        return "", f"The image is not shown ({error.reason})."
    image.thumbnail((IMAGE_PIXELS, IMAGE_PIXELS), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=85)
    return data_uri(buffer.getvalue(), "image/jpeg"), ""


def data_uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
