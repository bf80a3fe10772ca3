"""Check a whole data set before training: usable records, records set aside, and reasons."""

from __future__ import annotations

import hashlib
import json
import textwrap
from abc import ABC, abstractmethod
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cpo_fast.counting import counted
from cpo_fast.data.images import add_path, image_size, load_image
from cpo_fast.data.labels import LABEL_NAMES
from cpo_fast.data.lengths import Lengths, quantiles
from cpo_fast.data.preference_values import answer_text
from cpo_fast.data.preferences import PreferenceSource
from cpo_fast.data.source import Source
from cpo_fast.errors import DataError, RecordError
from cpo_fast.folders import write_json, write_private
from cpo_fast.types import Answer, ImageRef, Preference, RejectedRecord, Study

IMAGE_CHECKS = ("decode", "header", "none")
"""Checks of an image: all pixels (finds truncated files), the header only, or none."""


def _digest(*texts: str) -> bytes:
    return hashlib.blake2b("\0".join(texts).encode(), digest_size=12).digest()


def _characters(answer: Answer) -> int:
    """Characters of the text alone, without roles and separators."""
    if isinstance(answer, str):
        return len(answer)
    return sum(len(answer_text((turn,))) for turn in answer)


class Tally(ABC):
    """Statistics of usable records; `add` each one, then `facts` for summary.json."""

    @abstractmethod
    def add(self, record: Any) -> None: ...

    @abstractmethod
    def facts(self) -> dict[str, Any]: ...


@dataclass
class StudyTally(Tally):
    """Labels, images, splits and repeated reports of studies."""

    labels: dict[int, Counter[str]] = field(default_factory=lambda: {1: Counter(), -1: Counter()})
    findings_per_study: Counter[int] = field(default_factory=Counter)
    unlabelled: int = 0
    images: Counter[int] = field(default_factory=Counter)
    studies: Counter[str] = field(default_factory=Counter)
    patients: dict[str, set[str]] = field(default_factory=dict)
    texts: set[bytes] = field(default_factory=set)
    repeated: int = 0

    def add(self, record: Study) -> None:
        self.unlabelled += not record.labels
        for name, value in record.labels.items():
            if value in self.labels:
                self.labels[value][name] += 1
        present = sum(v == 1 for name, v in record.labels.items() if name != "No Finding")
        self.findings_per_study[present] += 1
        self.images[len(record.images)] += 1
        self.studies[record.split] += 1
        self.patients.setdefault(record.split, set()).add(record.patient_id)
        text = _digest(record.report.text)
        self.repeated += text in self.texts
        self.texts.add(text)

    def facts(self) -> dict[str, Any]:
        seen: Counter[str] = Counter()
        for patients in self.patients.values():
            seen.update(patients)
        return {
            "splits": {
                split: {"studies": count, "patients": len(self.patients[split])}
                for split, count in sorted(self.studies.items())
            },
            "patients_in_several_splits": sum(count > 1 for count in seen.values()),
            "labels": {
                name: {"present": self.labels[1][name], "uncertain": self.labels[-1][name]}
                for name in sorted(LABEL_NAMES, key=lambda name: -self.labels[1][name])
                if self.labels[1][name] or self.labels[-1][name]
            },
            "findings_per_study": _sorted(self.findings_per_study),
            "unlabelled": self.unlabelled,
            "images_per_record": _sorted(self.images),
            "repeated_reports": self.repeated,
        }


@dataclass
class PreferenceTally(Tally):
    """Answers, images, lengths and repeated rows of preferences."""

    rejected: Counter[int] = field(default_factory=Counter)
    images: Counter[int] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    lengths: dict[str, array[int]] = field(
        default_factory=lambda: {name: array("L") for name in ("prompt", "chosen", "rejected")}
    )
    rows: set[bytes] = field(default_factory=set)
    repeated: int = 0

    def add(self, record: Preference) -> None:
        self.rejected[len(record.rejected)] += 1
        self.images[len(record.images)] += 1
        self.sources[record.source] += 1
        prompt = json.dumps(record.prompt)
        self.lengths["prompt"].append(_characters(record.prompt))
        self.lengths["chosen"].append(_characters(record.chosen))
        self.lengths["rejected"].extend(map(_characters, record.rejected))
        rejected = [answer_text(answer) for answer in record.rejected]
        names = [ref.path or hashlib.sha256(ref.data or b"").hexdigest() for ref in record.images]
        prompt += json.dumps(record.rejected_prompts)
        row = _digest(prompt, answer_text(record.chosen), *rejected, *names)
        self.repeated += row in self.rows
        self.rows.add(row)

    def facts(self) -> dict[str, Any]:
        return {
            "rejected_per_preference": _sorted(self.rejected),
            "images_per_record": _sorted(self.images),
            "sources": dict(self.sources),
            "characters": {name: quantiles(values) for name, values in self.lengths.items()},
            "repeated_preferences": self.repeated,
        }


def _sorted(counts: Counter[int]) -> dict[str, int]:
    return {str(key): counts[key] for key in sorted(counts)}


@dataclass(frozen=True)
class Checked:
    """Result of a check. `facts` is the `data` part of summary.json."""

    facts: dict[str, Any]
    rejected: list[RejectedRecord]

    @property
    def bad_fraction(self) -> float:
        return len(self.rejected) / self.facts["read"]


def _images_of(record: Study | Preference, max_images: int) -> Iterator[ImageRef]:
    """The images used by a run: the first `max_images` of a study, all of a preference."""
    if isinstance(record, Study):
        yield from record.images[:max_images]
        return
    yield from record.all_images


def _check_image(ref: ImageRef, read: Callable[[ImageRef], object]) -> None:
    try:
        read(ref)
    except RecordError as error:
        raise add_path(ref, error) from None


def _is_sampled(id: str, sample: float) -> bool:
    """Whether a record is in the sample; independent of machine and order."""
    digest = hashlib.sha256(id.encode()).digest()
    return int.from_bytes(digest[:8], "big") < sample * 2**64


def check(
    source: Source[Any],
    images: str = "decode",
    *,
    lengths: Lengths | None = None,
    sample: float = 1.0,
    max_images: int = 1,
) -> Checked:
    """Read all of `source` and check its images by `images`, one of `IMAGE_CHECKS`.

    `lengths` counts tokens. Images and tokens are checked in a share `sample` of the records,
    selected by id; of a study the first `max_images` images. A record whose image fails or whose
    messages the chat template refuses is set aside. `read` counts all records, `used` the remaining
    ones. Raises DataError if the data set cannot be read.
    """
    if images not in IMAGE_CHECKS:
        raise ValueError(f"images must be one of {IMAGE_CHECKS}, not {images!r}")
    read: Callable[[ImageRef], object] = image_size if images == "header" else load_image
    tally: Tally = StudyTally() if source.noun == "study" else PreferenceTally()
    bad: list[RejectedRecord] = []
    for record in tqdm(source, "check", unit=source.noun, disable=None):
        id = record.study_id if isinstance(record, Study) else record.id
        sampled = sample >= 1 or _is_sampled(id, sample)
        try:
            for ref in _images_of(record, max_images) if sampled and images != "none" else ():
                _check_image(ref, read)
            if lengths is not None and sampled:
                lengths.add(record)
        except RecordError as error:
            bad.append(RejectedRecord.of(id, record.origin, error, file=source.path))
            continue
        tally.add(record)
    rejected = [*source.rejected, *bad]
    reasons = Counter(record.reason for record in rejected)
    facts = {
        "dataset": source.path,
        "kind": source.kind,
        "read": source.read,
        "used": source.read - len(rejected),
        "rejected": dict(reasons.most_common()),
        "images_checked": images,
        "sample": sample,
        **tally.facts(),
    }
    if isinstance(source, PreferenceSource):
        facts["merged_rows"] = source.merged
        facts["answers_alone"] = source.alone
        facts["unused_reference_logps"] = source.ref_logps
        facts["repeated_ids"] = source.repeated_ids
        facts["unread_fields"] = dict(source.unread.most_common())
    if lengths is not None:
        facts |= lengths.facts()
    return Checked(facts, rejected)


# --- out -----------------------------------------------------------------------------------------


def write(checked: Checked, output_dir: str) -> None:
    """Write summary.json (its `data` part) and rejected_records.jsonl to `output_dir`."""
    folder = Path(output_dir)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_json(folder / "summary.json", {"data": checked.facts})
        lines = "".join(json.dumps(record.to_json()) + "\n" for record in checked.rejected)
        write_private(folder / "rejected_records.jsonl", lines)
    except OSError as error:
        raise DataError(
            f"{output_dir}: cannot be written ({error.strerror}); choose another --output_dir"
        ) from None


WIDTH = 80
_BAR = 18


def _lines(name: str, value: str, column: int) -> Iterator[str]:
    """A row of the table, wrapped at spaces (a long path anywhere)."""
    room = WIDTH - column - 2
    parts = [value]
    if len(value) > room:
        parts = textwrap.wrap(value, room, break_on_hyphens=False)
    for place, part in enumerate(parts):
        yield f"{'' if place else name:<{column}}  {part}".rstrip()


def _join_counts(counts: Mapping[str, object], sign: str = " ") -> str:
    return ", ".join(f"{key}{sign}{value}" for key, value in counts.items())


def table(checked: Checked, examples: int = 3) -> str:
    """The facts in lines of at most 80 columns, with the ids of `examples` records per reason."""
    facts = checked.facts
    rows: list[tuple[str, str]] = [
        ("data set", f"{facts['dataset']} ({facts['kind']})"),
        ("records", str(facts["read"])),
        ("usable", f"{facts['used']} ({100 * (1 - checked.bad_fraction):.1f} %)"),
        ("set aside", str(len(checked.rejected))),
    ]
    for reason, count in facts["rejected"].items():
        ids = [record.id for record in checked.rejected if record.reason == reason][:examples]
        named = ", ".join(_short(id) for id in ids if id)
        rows.append((f"  {reason}", f"{count}  e.g. {named}" if named else str(count)))
    for split, sizes in facts.get("splits", {}).items():
        studies = counted(sizes["studies"], "study", "studies")
        rows.append((split, f"{studies} of {counted(sizes['patients'], 'patient')}"))
    single = (
        "patients_in_several_splits unlabelled repeated_reports merged_rows repeated_preferences "
        "answers_alone unused_reference_logps repeated_ids"
    )
    rows += [(name.replace("_", " "), str(facts[name])) for name in single.split() if name in facts]
    for name in ("images_per_record", "findings_per_study", "rejected_per_preference", "sources",
                 "unread_fields"):  # fmt: skip
        if counts := facts.get(name):
            rows.append((name.replace("_", " "), _join_counts(counts, ": ")))
    for unit in ("characters", "tokens"):
        for name, values in facts.get(unit, {}).items():
            if values:
                rows.append((f"{unit}, {name}", _join_counts(values)))
    if over := facts.get("over_max_length"):
        share = f"{over['records']} ({100 * over['share']:.2f} %)"
        rows.append((f"longer than {over['max_length']}", share))
    most = max((counts["present"] for counts in facts.get("labels", {}).values()), default=0)
    for name, counts in facts.get("labels", {}).items():
        bar = "#" * -(-counts["present"] * _BAR // max(most, 1))
        rows.append((f"  {name}", f"{counts['present']:>7}  {bar}  +{counts['uncertain']} unsure"))
    column = max(len(name) for name, _ in rows)
    return "\n".join(line for name, value in rows for line in _lines(name, value, column))


def _short(id: str) -> str:
    return id if len(id) <= 40 else f"{id[:37]}..."
