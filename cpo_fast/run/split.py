"""Which preferences of a file are held out: by what is asked and about whom, never by row.

Rows that ask the same, that are about the same patient, or that show the same image lie on one
side (connected components). The choice depends on the rows and the seed only, not on their order.
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
    ("patient question answer", "the rows are all joined by shared images: an image may be on both "
     "sides"),
    ("question answer", "the rows are all joined by shared patients or images: a patient may be on "
     "both sides"),
    ("patient answer", "all rows ask the same question: what is held out are answers to it"),
)  # fmt: skip
"""What keeps rows together, and what is said where this is not the first choice. The next one is
taken only where the one before joins all rows."""


@dataclass(frozen=True, slots=True)
class Split:
    """The two sides, each in file order; `note` says in words what could not be kept apart."""

    train: list[Preference]
    held_out: list[Preference]
    note: str = ""


def _digest(kind: str, value: Any) -> bytes:
    return hashlib.blake2b(json.dumps([kind, value]).encode(), digest_size=16).digest()


def _image(ref: ImageRef) -> str:
    """What tells one image from another: its path, or its bytes."""
    if ref.data is not None:
        return hashlib.sha256(ref.data).hexdigest()
    return posixpath.normpath(ref.path)


def _said(message: Mapping[str, Any]) -> list[str]:
    texts = (part["text"] if part["type"] == "text" else "\0" for part in parts_of(message))
    return [str(message["role"]), " ".join("".join(texts).split())]


def question_key(one: Preference) -> bytes:
    """Equal for preferences that ask the same: prompt (white space aside) and images."""
    return _digest("question", [list(map(_said, one.prompt)), list(map(_image, one.images))])


def _keys(one: Preference) -> dict[str, list[bytes]]:
    """What may join a preference with others, by name.

    "answer" is prompt and chosen answer as one text: where the prompt is what the answers share, it
    varies from row to row, and this does not.
    """
    images = list(map(_image, one.images))
    messages = list(map(_said, one.prompt))
    text = "".join(text for _, text in messages) + answer_text(one.chosen)
    return {
        "patient": [_digest("patient", id) for id in one.patients],
        "image": [_digest("image", image) for image in images],
        "question": [question_key(one)],
        "answer": [_digest("answer", ["".join(text.split()), images])],
    }


def _components(rows: Iterable[Sequence[bytes]]) -> list[list[int]]:
    """Row numbers, together where rows share a key, directly or through others."""
    joined, first = UnionFind(), []
    for keys in rows:
        joined.union(*keys)
        first.append(keys[0])
    found: dict[bytes, list[int]] = {}
    for number, key in enumerate(first):
        found.setdefault(joined[key], []).append(number)
    return list(found.values())


def _chosen(parts: list[list[int]], rank: Mapping[int, bytes], share: float) -> Iterator[int]:
    """The rows of as many whole parts as make up `share` of all rows: of two parts or more at least
    one, and, below a share of 1, not all."""
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


def _told_apart(keys: Sequence[Mapping[str, list[bytes]]]) -> tuple[list[list[int]], str]:
    """The rows in parts that may lie on different sides, and what to say of it."""
    for names, note in _LEVELS:
        parts = _components([key for name in names.split() for key in row[name]] for row in keys)
        if len(parts) > 1:
            return parts, note
    return parts, "all rows ask the same and have the same answer: nothing is held out"


def split_by_question(preferences: Sequence[Preference], share: float, seed: int) -> Split:
    """Hold out about `share` of the preferences, of pairs and of answers alone each.

    Nothing is held out where the rows do not differ in question, patient, image or answer.
    """
    if share <= 0 or not preferences:
        return Split(list(preferences), [])
    keys = [_keys(one) for one in preferences]
    parts, note = _told_apart(keys)
    if len(parts) == 1:
        return Split(list(preferences), [], note)
    rank = {
        number: hashlib.sha256(f"{seed}/".encode() + min(row["question"] + row["answer"])).digest()
        for number, row in enumerate(keys)
    }
    held: set[int] = set()
    for paired in (True, False):
        stratum = [p for p in parts if any(preferences[n].rejected for n in p) is paired]
        held.update(_chosen(stratum, rank, share))
    return Split(
        [one for number, one in enumerate(preferences) if number not in held],
        [one for number, one in enumerate(preferences) if number in held],
        note,
    )


def first_questions(preferences: Sequence[Preference], most: int) -> list[Preference]:
    """At most `most` preferences: whole questions, in the order in which they first appear, those
    with more preferences than are left passed over. Raises UsageError where none fits."""
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


def sizes(preferences: Sequence[Preference]) -> str:
    """`12 questions of 3 patients in 14 records`."""
    questions = len({question_key(one) for one in preferences})
    patients = len({id for one in preferences for id in one.patients})
    of = f" of {counted(patients, 'patient')}" if patients else ""
    return f"{counted(questions, 'question')}{of} in {counted(len(preferences), 'record')}"
