"""Decodes every image of a run once, before anything is computed on it.

A record whose image does not decode is rejected for all stages: SFT, CPO, held-out loss, evaluation
and reference. Images are decoded as in training (`load_shades`), but not resized.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cpo_fast.counting import counted
from cpo_fast.data.images import add_path, load_shades
from cpo_fast.data.pixels import resized_size
from cpo_fast.errors import DataError, RecordError
from cpo_fast.run.arguments import TrainArguments
from cpo_fast.run.context import RunContext
from cpo_fast.run.corpus import Corpus, Texts, keep_answers
from cpo_fast.run.run_folder import RunFolder
from cpo_fast.training.feed import load_steps
from cpo_fast.types import ImageRef, Origin, Preference, RejectedRecord

FEW = 64
"""Images that a dry run decodes."""

PER_PROCESS = 32
"""Images per worker process that are worth its start."""

REMEDIES = ("no-decoder", "image-needs-pydicom")
"""Reasons that concern the installation, not the image."""

SPLIT_NAMES = {"train": "training", "validate": "held-out", "test": "test"}


class _Decodings:
    """Item i is None where image i decodes, else (reason, detail)."""

    def __init__(self, refs: Sequence[ImageRef], max_pixels: int, min_pixels: int) -> None:
        self.refs = refs
        self.bounds = {"min_pixels": min_pixels, "max_pixels": max_pixels}

    def __len__(self) -> int:
        return len(self.refs)

    def __getitem__(self, index: int) -> tuple[str, str] | None:
        ref = self.refs[index]
        try:
            resized_size(*load_shades(ref).size, **self.bounds)
        except RecordError as error:
            return error.reason, error.detail
        return None


@dataclass
class ImageCheck:
    """Finds the images of a run that fail. Rank 0 decodes; all ranks use its result.

    Decoded images are listed in `checked_images.txt` of the run's folder, as digests of path, size
    and modification time: a resumed run decodes only new ones.
    """

    run: RunContext
    failed: dict[ImageRef, RecordError] = field(default_factory=dict)
    looked: set[ImageRef] = field(default_factory=set)
    decoded: int = 0
    known: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.args, self.folder = self.run.args, self.run.folder

    def summary(self) -> dict[str, Any]:
        """The stage "images" of summary.json."""
        seconds = round(self.seconds, 2)
        return {"seconds": seconds, "decoded": self.decoded, "known": self.known}

    def decode(self, refs: Iterable[ImageRef]) -> None:
        """Decode the new ones of `refs`; those that do not decode are added to `failed`."""
        new = [ref for ref in dict.fromkeys(refs) if ref not in self.looked]
        if self.folder.dry:
            room = FEW - len(self.looked)
            new = new[:: max(1, -(-len(new) // room))] if room > 0 else []
        if not new:
            return
        self.looked.update(new)
        found = self.folder.world.on_main(lambda: self._find_failures(new))
        names = {name: RecordError(reason, detail) for name, reason, detail in found}
        self.failed |= {
            ref: names[key] for ref in new if names and (key := _make_image_key(ref)) in names
        }

    def find_error(self, refs: Iterable[ImageRef]) -> RecordError | None:
        """The error of the first of `refs` that fails; it names the image."""
        return next((add_path(ref, self.failed[ref]) for ref in refs if ref in self.failed), None)

    def _find_failures(self, refs: Sequence[ImageRef]) -> list[tuple[str, str, str]]:
        """(image key, reason, detail) of the images that fail, as JSON values."""
        kept = self.folder.path / "checked_images.txt"
        known = set(kept.read_text(encoding="utf-8").splitlines()) if kept.is_file() else set()
        keys = {ref: key for ref in refs if (key := digest_image(ref)) not in known}
        begun = time.perf_counter()
        found = []
        nowhere = contextlib.nullcontext(io.StringIO())
        with kept.open("a", encoding="utf-8") if self.folder.is_writer else nowhere as file:
            for ref, outcome in zip(keys, self._decode_all(list(keys)), strict=True):
                if outcome is not None:
                    found.append((_make_image_key(ref), *outcome))
                elif keys[ref] is not None:
                    file.write(f"{keys[ref]}\n")
        seconds = time.perf_counter() - begun
        self.decoded += len(keys)
        self.known += len(refs) - len(keys)
        self.seconds += seconds
        print(
            f"images: {len(keys)} decoded in {seconds:.1f} s, {len(found)} of them fail; "
            f"{len(refs) - len(keys)} are known from an earlier run"
        )
        return found

    def _decode_all(self, refs: Sequence[ImageRef]) -> Iterator[tuple[str, str] | None]:
        # Nothing else runs meanwhile: use every core, unless no worker processes are wanted.
        cores = (os.cpu_count() or 1) if self.args.dataloader_num_workers else 0
        workers = min(cores, len(refs) // PER_PROCESS)
        decodings = _Decodings(refs, self.args.max_pixels, self.args.min_pixels)
        outcomes = load_steps(decodings, num_workers=workers)
        return iter(tqdm(outcomes, desc="images", unit="image", total=len(refs), disable=None))


def _make_image_key(ref: ImageRef) -> str:
    """A key of the image, unique in the run and equal on every rank."""
    if ref.data is not None:
        return hashlib.sha256(ref.data).hexdigest()
    return f"{ref.root}\0{ref.path}"


def digest_image(ref: ImageRef) -> str | None:
    """A digest that changes with the image; None if the file is missing."""
    if ref.data is not None:
        return _make_image_key(ref)[:32]
    path = Path(ref.root, ref.path).absolute()
    try:
        stat = path.stat()
    except (OSError, ValueError):
        return None
    return hashlib.sha256(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}".encode()).hexdigest()[:32]


# --- records whose image fails -------------------------------------------------------------------


def find_used_splits(args: TrainArguments) -> list[str]:
    """The splits whose images the stages of this run use."""
    trains = bool(args.trained_stages)
    evaluates = "evaluate" in args.stage_names
    uses = {"train": trains, "validate": trains or evaluates, "test": evaluates}
    return [split for split, used in uses.items() if used]


def reject_studies(run: RunContext, corpus: Corpus, check: ImageCheck) -> None:
    """Reject the studies whose images fail, in all splits that the run uses.

    Raises DataError when more than `max_bad_fraction` of the records is rejected by now, or a split
    is left empty.
    """
    args = run.args
    splits = find_used_splits(args)
    limits = dict.fromkeys(splits, args.max_eval_samples) | {"train": None}
    images = {
        split: [study.images for study in corpus.studies[split][: limits[split]]]
        for split in splits
    }
    check.decode(image for shown in images.values() for one in shown for image in one)
    bad: dict[str, list[RejectedRecord]] = {}
    for split in splits:
        kept, bad[split] = [], []
        for study in corpus.studies[split]:
            if (error := check.find_error(study.images)) is None:
                kept.append(study)
            else:
                bad[split].append(RejectedRecord.of(study.study_id, study.origin, error))
        corpus.studies[split] = kept
    _reject_records(run, corpus, check, bad, images)


def reject_samples(run: RunContext, corpus: Corpus, texts: Texts, check: ImageCheck) -> None:
    """Reject records for the images that `reject_studies` does not check: of preference files and
    counterfactuals.

    A row is rejected if any of its images fails. A perception counterfactual whose image fails is
    left out and the study stays. `max_eval_samples` held-out samples are kept. Raises DataError as
    `reject_studies`.
    """
    args, folder = run.args, run.folder
    for split in ("validate", "test"):
        _keep_first(folder, texts, split, args.max_eval_samples)
    splits = find_used_splits(args)
    samples = {split: [*texts.sft[split], *texts.cpo[split]] for split in splits}
    check.decode(image for split in splits for one in samples[split] for image in one.all_images)
    images: dict[str, list[tuple[ImageRef, ...]]] = {}
    bad: dict[str, list[RejectedRecord]] = {}
    for split in splits:
        shown: dict[Key, set[ImageRef]] = {}
        for one in samples[split]:
            own = one.all_images if corpus.preferences else one.images
            shown.setdefault(record_key(one), set()).update(own)
        images[split] = [tuple(refs) for refs in shown.values()]
        failed = {at: error for at, refs in shown.items() if (error := check.find_error(refs))}
        bad[split] = [
            RejectedRecord.of(id, origin, error, file=str(args.dataset))
            for (id, origin), error in failed.items()
        ]
        for stage in (texts.sft, texts.cpo):
            stage[split] = [one for one in stage[split] if record_key(one) not in failed]
    _reject_records(run, corpus, check, bad, images)
    _leave_out_answers(folder, texts, splits, check)


Key = tuple[str, Origin | None]


def record_key(one: Preference) -> Key:
    """Equal for all samples of one record."""
    return one.id, one.origin


def _keep_first(folder: RunFolder, texts: Texts, split: str, limit: int | None) -> None:
    """Keep the first `limit` samples of each stage; count records without samples as left out."""
    before = {record_key(one) for one in texts.sft[split]}
    for stage in (texts.sft, texts.cpo):
        stage[split] = stage[split][:limit]
    kept = {record_key(one) for stage in (texts.sft, texts.cpo) for one in stage[split]}
    if left_out := len(before - kept):
        folder.left_out += left_out
        records = counted(left_out, "record")
        print(f"data: {records} of split {split} left out by --max_eval_samples")


def _leave_out_answers(
    folder: RunFolder, texts: Texts, splits: Sequence[str], check: ImageCheck
) -> None:
    """Leave out the rejected answers (perception counterfactuals) whose own image fails."""
    unreadable = []
    for split in splits:
        kept = []
        for one in texts.cpo[split]:
            shown = one.rejected_images or (None,) * len(one.rejected)
            errors = [check.find_error(images or ()) for images in shown]
            unreadable += [
                RejectedRecord.of(f"{one.id}/perception", one.origin, error, stage="counterfactual")
                for error in errors
                if error is not None
            ]
            left = keep_answers(one, [k for k, error in enumerate(errors) if error is None])
            if left.rejected:
                kept.append(left)
        texts.cpo[split] = kept
    folder.reject(unreadable)
    if unreadable:
        print(f"counterfactuals: {len(unreadable)} left out: an image does not decode")
        folder.add_data(counterfactuals={"unreadable": len(unreadable)})


def _reject_records(
    run: RunContext,
    corpus: Corpus,
    check: ImageCheck,
    bad: dict[str, list[RejectedRecord]],
    images: dict[str, list[tuple[ImageRef, ...]]],
) -> None:
    """Reject the `bad` records of every split; `images`: of all records of the split."""
    args, folder = run.args, run.folder
    found = [record for records in bad.values() for record in records]

    def decide() -> None:
        looked = sum(
            check.looked.issuperset(shown) for records in images.values() for shown in records
        )
        before = corpus.rejected / max(corpus.read, 1)
        # Records that a flag leaves out are assumed to fail at the same rate.
        share = before + (1 - before) * len(found) / max(looked, 1)
        too_bad = bool(found) and share > args.max_bad_fraction
        remedy = _find_remedy(check) if {r.reason for r in found} <= set(REMEDIES) else None
        if too_bad and remedy:
            raise DataError(remedy)
        folder.reject(found)
        if too_bad:
            earlier = f" and {corpus.rejected} of {corpus.read} were set aside before"
            raise DataError(
                f"an image cannot be read in {len(found)} of {counted(looked, 'record')}"
                f"{earlier if corpus.rejected else ''}: more than --max_bad_fraction "
                f"{args.max_bad_fraction}; {folder.where_rejected}"
            )
        for split, records in bad.items():
            if records and len(records) == len(images[split]):
                raise DataError(
                    f"no {SPLIT_NAMES[split]} sample could be read: an image fails in each of "
                    f"{counted(len(records), 'sample')}, the first: {records[0].reason}, "
                    f"{records[0].detail}"
                )
        if found:
            print(f"data: {counted(len(found), 'record')} set aside: an image cannot be read")
        if found and remedy:
            print(f"warning: {remedy}", file=sys.stderr)

    run.world.on_main(decide)


def _find_remedy(check: ImageCheck) -> str:
    """The decoder's advice on what to install, each once."""
    advice = {
        error.detail if error.reason == "no-decoder" else error.reason: error.detail
        for error in check.failed.values()
    }
    return f"{'; '.join(advice.values())} ({counted(len(check.failed), 'image')})"
