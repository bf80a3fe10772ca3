"""One example study of a report: image, original and counterfactual, what the models answered."""

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
from cpo_fast.report.tables import name_of
from cpo_fast.types import ImageRef

IMAGE_PIXELS = 448  # longest side of an image: twice what a page shows of it
SHOWN_CHARACTERS = 700


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


def example_of(example: Mapping[str, Any], folder: Path) -> Example:
    """An entry of evaluation.json made ready for the page; relative image paths are in `folder`."""
    report, edited = str(example.get("report") or ""), str(example.get("counterfactual") or "")
    before, after = word_diff(report, edited) if edited else ([(False, report)], [])
    image, image_note = _image(example.get("image"), folder)
    labels = tuple(map(str, example.get("labels") or ()))
    answers = example.get("answers") or {}
    return Example(
        study_id=str(example.get("study_id") or "without id"),
        labels=labels,
        target=str(example.get("target") or ""),
        image=image,
        image_note=image_note,
        before=before,
        after=after,
        answers=[_answer(str(name), str(text), labels) for name, text in answers.items()],
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
    thought = thought_of(text)
    if len(thought) > SHOWN_CHARACTERS:
        thought = thought[:SHOWN_CHARACTERS].rstrip() + " …"
    return Answer(name_of(name), verdict, word, ", ".join(names), thought)


def _image(path: Any, folder: Path) -> tuple[str, str]:
    """(data URI, note): a small grey JPEG of the example's image, or why there is none."""
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
