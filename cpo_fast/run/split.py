"""Split the preferences of a file into training and held-out sides by question and patient.

Rows with the same question, patient or image are kept on one side (connected components). The
choice depends on the rows and the seed, not on the order of the rows.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from networkx.utils import UnionFind

from cpo_fast.counting import counted
from cpo_fast.data.preference_values import answer_text, parts_of
from cpo_fast.errors import UsageError
from cpo_fast.types import ImageRef, Preference

_LEVELS = (
    ("patient image question answer", ""),
    ("patient question answer", "shared images join all rows: an image can be on both sides"),
    ("question answer", "shared patients or images join all rows: a patient can be on both sides"),
    ("patient answer", "all rows ask the same question: answers to it are held out"),
)  # fmt: skip
"""(Keys that join rows, note to print). A level is used only if the one before joins all rows."""


@dataclass(frozen=True, slots=True)
class Split:
    """The two sides, each in file order; `note`: what could not be separated, as text."""

    train: list[Preference]
    held_out: list[Preference]
    note: str = ""


def _digest(kind: str, value: Any) -> bytes:
    return hashlib.blake2b(json.dumps([kind, value]).encode(), digest_size=16).digest()


def _identify_image(ref: ImageRef) -> str:
    """Identity of an image: its path, or a digest of its bytes."""
    if ref.data is not None:
        return hashlib.sha256(ref.data).hexdigest()
    return posixpath.normpath(ref.path)


def _normalise(message: Mapping[str, Any]) -> list[str]:
    texts = (part["text"] if part["type"] == "text" else "\0" for part in parts_of(message))
    return [str(message["role"]), " ".join("".join(texts).split())]


def question_key(one: Preference) -> bytes:
    """Equal for preferences with the same prompt (ignoring white space) and images."""
    return _digest(
        "question", [list(map(_normalise, one.prompt)), list(map(_identify_image, one.images))]
    )


def _find_keys(one: Preference) -> dict[str, list[bytes]]:
    """The keys by which a preference can be joined with others, by kind.

    "answer" is prompt and chosen answer as one text. It does not vary between rows whose prompt is
    the shared beginning of their answers, while the prompt does.
    """
    images = list(map(_identify_image, one.images))
    messages = list(map(_normalise, one.prompt))
    text = "".join(text for _, text in messages) + answer_text(one.chosen)
    return {
        "patient": [_digest("patient", id) for id in one.patients],
        "image": [_digest("image", image) for image in images],
        "question": [question_key(one)],
        "answer": [_digest("answer", ["".join(text.split()), images])],
    }


def _find_components(rows: Iterable[Sequence[bytes]]) -> list[list[int]]:
    """Lists of row numbers whose rows share a key, directly or through other rows."""
    joined, first = UnionFind(), []
    for keys in rows:
        joined.union(*keys)
        first.append(keys[0])
    found: dict[bytes, list[int]] = {}
    for number, key in enumerate(first):
        found.setdefault(joined[key], []).append(number)
    return list(found.values())


def _choose_rows(parts: list[list[int]], rank: Mapping[int, bytes], share: float) -> Iterator[int]:
    """The rows of whole parts that make up at most `share` of all rows. With two or more parts at
    least one is chosen and, for a share below 1, not all."""
    target = round(share * sum(map(len, parts)))
    ranked = sorted(parts, key=lambda part: min(rank[number] for number in part))
    taken: list[list[int]] = []
    left = target
    for part in ranked if share >= 1 else ranked[:-1]:
        if len(part) <= left:
            taken.append(part)
            left -= len(part)
    if not taken and len(parts) > 1 and share > 0:
        taken = [min(ranked, key=len)]
    for part in taken:
        yield from part


def _separate(keys: Sequence[Mapping[str, list[bytes]]]) -> tuple[list[list[int]], str]:
    """Parts of the rows that can be put on different sides, and the note of their level."""
    for names, note in _LEVELS:
        parts = _find_components(
            [key for name in names.split() for key in row[name]] for row in keys
        )
        if len(parts) > 1:
            return parts, note
    return parts, "all rows ask the same and have the same answer: nothing is held out"


def split_by_question(preferences: Sequence[Preference], share: float, seed: int) -> Split:
    """Hold out about `share` of the preferences, separately of pairs and of answers without pairs.

    Nothing is held out if the rows do not differ in question, patient, image or answer.
    """
    if share <= 0 or not preferences:
        return Split(list(preferences), [])
    keys = [_find_keys(one) for one in preferences]
    parts, note = _separate(keys)
    if len(parts) == 1:
        return Split(list(preferences), [], note)
    rank = {
        number: hashlib.sha256(f"{seed}/".encode() + min(row["question"] + row["answer"])).digest()
        for number, row in enumerate(keys)
    }
    held: set[int] = set()
    for paired in (True, False):
        stratum = [p for p in parts if any(preferences[n].rejected for n in p) is paired]
        held.update(_choose_rows(stratum, rank, share))
    return Split(
        [one for number, one in enumerate(preferences) if number not in held],
        [one for number, one in enumerate(preferences) if number in held],
        note,
    )


def take_questions(preferences: Sequence[Preference], most: int) -> list[Preference]:
    """At most `most` preferences: whole questions in the order of their first row, skipping those
    that do not fit any more. Raises UsageError if none fits."""
    keys = [question_key(one) for one in preferences]
    sizes = Counter(keys)
    kept: set[bytes] = set()
    left = most
    for key, size in sizes.items():
        if size <= left:
            kept.add(key)
            left -= size
    if preferences and not kept:
        raise UsageError(
            f"--max_train_samples {most}: every question has more rows than that (the smallest "
            f"{min(sizes.values())}), and a question is not split; raise it"
        )
    return [one for one, key in zip(preferences, keys, strict=True) if key in kept]


def describe_sizes(preferences: Sequence[Preference]) -> str:
    """`12 questions of 3 patients in 14 records`."""
    questions = len({question_key(one) for one in preferences})
    patients = len({id for one in preferences for id in one.patients})
    of = f" of {counted(patients, 'patient')}" if patients else ""
    return f"{counted(questions, 'question')}{of} in {counted(len(preferences), 'record')}"
