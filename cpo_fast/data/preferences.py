"""Preference files of trl, ms-swift, LLaMA-Factory, ranked lists, CXR-CounterFact and this project.

The format is detected from the first valid record and applies to the whole file. Adjacent rows with
the same images, prompt and chosen answer become one preference with several rejected answers.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

from cpo_fast.counting import counted
from cpo_fast.data.arrow_files import is_datasets_folder
from cpo_fast.data.json_files import records
from cpo_fast.data.preference_rows import PARSERS, detect_format
from cpo_fast.data.preference_values import Message, answer_text
from cpo_fast.data.source import Source
from cpo_fast.data.unread_fields import find_misspelt, unread_fields
from cpo_fast.errors import DataError, RecordError, UsageError
from cpo_fast.types import Origin, Preference

PREFERENCE_FORMATS = ("auto", *PARSERS)

MAX_REJECTED = 64
"""Maximum number of rejected answers that adjacent rows are merged into."""

_PEEK = 1000
_FIELDS = (
    "chosen + rejected or prompt + completion (trl), messages (ms-swift), conversations + chosen + "
    "rejected (LLaMA-Factory), instruction, question or query + chosen + rejected (alpaca), "
    "context + completions or prompt + answers (ranked), report + "
    "counterfact (CXR-CounterFact), chosen + rejected_responses or report + counterfactual (ours)"
)


def is_preference_file(dataset: str, dataset_format: str = "auto") -> bool:
    """Whether `open_preferences` reads `dataset`: by the format, else any file but a .tgz, or a
    folder of datasets.save_to_disk."""
    if dataset_format != "auto":
        return dataset_format in PARSERS
    file = Path(dataset).is_file() and not dataset.endswith((".tgz", ".tar.gz"))
    return file or is_datasets_folder(dataset)


def _adds_nothing(group: Preference, one: Preference) -> bool:
    own = one.rejected_images or one.rejected_prompts
    return not own and all(answer in group.rejected for answer in one.rejected)


def _merge(one: Preference, other: Preference) -> Preference:
    own = one.rejected_prompts or other.rejected_prompts
    return replace(
        one,
        rejected=one.rejected + other.rejected,
        rejected_images=one.rejected_images + other.rejected_images,
        rejected_prompts=_prompts(one) + _prompts(other) if own else (),
        patients=tuple(sorted({*one.patients, *other.patients})),
    )


def _prompts(one: Preference) -> tuple[tuple[Message, ...] | None, ...]:
    return one.rejected_prompts or (None,) * len(one.rejected)


class PreferenceSource(Source[Preference]):
    """The preferences of one file, streamed; `kind` is its format.

    `merged` counts the rows merged into the preceding preference, which `read` does not. `alone`
    counts preferences without a rejected answer, used for supervised fine-tuning only. `ref_logps`
    counts rows with log-probs of a reference, which are not used: the reference is the run's
    initial model. `unread` counts, by field, rows with text that is not read. `repeated_ids` counts
    rows with the id of an earlier, different question or answer.
    """

    noun = "preference"

    def __init__(self, path: str, *, dataset_format: str, image_root: str | None) -> None:
        super().__init__(dataset_format, path)
        place = Path(path).resolve()
        folder = place if place.is_dir() else place.parent
        self.root = str(folder) if image_root is None else image_root
        self.merged = self.alone = self.ref_logps = self.repeated_ids = 0
        self.unread: Counter[str] = Counter()
        if dataset_format == "auto":
            self.kind = self._detect_kind()

    def _detect_kind(self) -> str:
        names: set[str] = set()
        for _, row in islice(records(self.path), _PEEK):
            if not isinstance(row, RecordError):
                if (kind := detect_format(row)) is not None:
                    return kind
                names |= row.keys()
        misspelt = find_misspelt(sorted(names)).items()
        hints = "".join(f"; {name}: did you mean {field}?" for name, field in misspelt)
        raise DataError(
            f"{self.path}: unknown format: no record (of the first {_PEEK}) has the fields "
            f"{_FIELDS}{hints or '; name the format with --dataset_format'}"
        )

    def _same_question(self, one: Preference, other: Preference) -> bool:
        """Whether two rows have the same question and chosen answer. Counterfactuals have the id of
        their study, which must agree; ids of other rows are distinct."""
        return (
            bool(one.rejected and other.rejected)
            and one.chosen == other.chosen
            and one.images == other.images
            and one.prompt == other.prompt
            and (one.plain, one.template) == (other.plain, other.template)
            and one.source == other.source
            and one.weight == other.weight
            and (one.id == other.id or self.kind != "counterfactuals")
        )

    def remarks(self) -> list[str]:
        said = [f"{counted(count, 'row')} with text in the field {name}, which is not read"
                for name, count in self.unread.most_common()]  # fmt: skip
        if self.repeated_ids:
            said.append(
                f"{counted(self.repeated_ids, 'row')} with an id repeated for another question or "
                "answer"
            )
        return said

    def _count_repeated_id(self, one: Preference, met: dict[int, int]) -> None:
        """Count an id of the file that occurred with another question or answer."""
        images = [hash(ref) for ref in one.images]
        seen = hash((json.dumps([one.prompt, answer_text(one.chosen)]), *images))
        self.repeated_ids += met.setdefault(hash(one.id), seen) != seen

    def _records(self) -> Iterator[Preference]:
        parse = PARSERS[self.kind]
        stem = Path(self.path).stem
        self.merged = self.alone = self.ref_logps = self.repeated_ids = 0
        self.unread = Counter()
        met: dict[int, int] = {}
        group: Preference | None = None
        for number, (line, row) in enumerate(records(self.path), 1):
            id = f"{stem}:{number}"
            self.read += 1
            try:
                if isinstance(row, RecordError):
                    raise row
                self.ref_logps += row.get("ref_chosen_logps") is not None
                one = replace(parse(row, self.root, id), origin=Origin(self.path, line))
                self.unread.update(unread_fields(row, one, self.kind))
                if one.id != id:
                    self._count_repeated_id(one, met)
                if group is not None and self._same_question(group, one):
                    if _adds_nothing(group, one):
                        raise RecordError(
                            "duplicate-record", "an adjacent record has the same content"
                        )
                    if len(group.rejected) < MAX_REJECTED:
                        group = _merge(group, one)
                        self.merged += 1
                        self.read -= 1
                        continue
            except RecordError as error:
                self._reject(self.path, line, id, error.reason, error.detail)
                continue
            self.alone += not one.rejected
            if group is not None:
                yield group
            group = one
        if group is not None:
            yield group


def open_preferences(
    path: str, *, dataset_format: str = "auto", image_root: str | None = None
) -> PreferenceSource:
    """The preferences of a .json, .jsonl (also .gz) or Parquet file, or a folder of `datasets`.

    `dataset_format` is one of `PREFERENCE_FORMATS`; image paths are relative to `image_root`, by
    default the file's folder (or the folder itself), and cannot leave it. Returns an iterable of
    Preference with `kind`, `path`, `read`, `merged`, `alone`, `ref_logps` and `rejected`. Raises
    UsageError for an unknown format name, DataError for an unreadable file or an
    unknown format.
    """
    if dataset_format not in PREFERENCE_FORMATS:
        raise UsageError(
            f"--dataset_format must be one of {', '.join(PREFERENCE_FORMATS)}, "
            f"not {dataset_format!r}"
        )
    if image_root is not None and not Path(image_root).is_dir():
        raise DataError(
            f"{image_root}: --image_root is not a folder; give the folder of the images"
        )
    return PreferenceSource(path, dataset_format=dataset_format, image_root=image_root)
