"""Base of all readers: an iterable that counts the records read and lists those set aside."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from typing import Generic, TypeVar

from cpo_fast.errors import DataError
from cpo_fast.types import RejectedRecord, Study

Record = TypeVar("Record")


class Source(ABC, Generic[Record]):
    """An iterable of records in file order, repeatable with the same result.

    `kind` is the format and `path` the location. While iterating, `read` counts the records so far
    and `rejected` lists those set aside: at the end `read == yielded + len(rejected)`. Raises
    DataError at the end if there was no record.
    """

    noun = "record"

    def __init__(self, kind: str, path: str) -> None:
        self.kind = kind
        self.path = path
        self.read = 0
        self.rejected: list[RejectedRecord] = []

    def __iter__(self) -> Iterator[Record]:
        self.read = 0
        self.rejected = []
        yield from self._records()
        if self.read == 0:
            raise DataError(
                f"{self.path}: has no {self.noun}; point --dataset at data of kind {self.kind}"
            )

    @abstractmethod
    def _records(self) -> Iterator[Record]:
        """Yield records, count each in `read`, and call `_reject` for those set aside."""

    def _reject(self, file: str, line: int | None, id: str, reason: str, detail: str = "") -> None:
        self.rejected.append(RejectedRecord(file, line, id, reason, detail))

    def remarks(self) -> list[str]:
        """Notes for the user about the records in use, as sentences."""
        return []

    def reasons(self) -> dict[str, int]:
        """{reason: number of records set aside}, most frequent first."""
        return dict(Counter(record.reason for record in self.rejected).most_common())


class StudySource(Source[Study]):
    """Studies of MIMIC-CXR or Open-I."""

    noun = "study"
