"""The folder of one run: its files, its summary, and results of earlier runs in it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from cpo_fast.counting import counted
from cpo_fast.errors import DataError
from cpo_fast.folders import TRAINING, check_free, make_private, write_json, write_jsonl
from cpo_fast.run.arguments import TrainArguments
from cpo_fast.run.find_checkpoint import check_unused
from cpo_fast.run.same_flags import check_folder_flags
from cpo_fast.training.distributed import World
from cpo_fast.training.metrics import MetricsLog
from cpo_fast.training.stage_settings import TRAINING_STAGES
from cpo_fast.types import RejectedRecord


class RunFolder:
    """`output_dir` of a run. Opening it writes config.json and removes the results of the stages
    that will be trained, and the evaluation.

    Only rank 0 of `world` writes; the other ranks read its files. A dry run writes nothing: it
    creates phantom and tiny model in a temporary folder that is deleted when the process ends.
    Raises UsageError when a stage to be trained has checkpoints, unless `overwrite_output_dir`
    allows deleting them.
    """

    def __init__(self, args: TrainArguments, world: World | None = None) -> None:
        self.world = world or World()
        self.dry = args.dry_run
        self.path = Path(args.output_dir)
        self.flags = {"world_size": self.world.size, **asdict(args)}
        self.rejected: list[RejectedRecord] = []
        self.left_out = 0  # usable records beyond a limit or without pairs of the chosen sources
        self.summary: dict[str, Any] = {"stages": {}}
        trained: tuple[str, ...] = ()
        if args.resume_from_checkpoint is None:
            trained = args.trained_stages
        elif self.world.is_main:
            check_folder_flags(self.path, self.flags)
        if not self.is_writer:
            self.metrics = MetricsLog(self.path / "metrics.jsonl", writes=False)
            return
        check_free(self.path, TRAINING)
        self._make_room(trained, args.overwrite_output_dir)
        write_json(self.path / "config.json", self.flags)
        self.metrics = MetricsLog(self.path / "metrics.jsonl", fresh=trained)
        write_jsonl(self.path / "rejected_records.jsonl", [])
        if trained != TRAINING_STAGES and (self.path / "summary.json").is_file():
            self.summary |= json.loads((self.path / "summary.json").read_text(encoding="utf-8"))
            self.summary.pop("data", None)  # the data are read again
        self.summary["stages"] = {
            name: value for name, value in self.summary["stages"].items() if name not in trained
        }
        if args.trained_stages:  # figures of models that are retrained
            self.summary.pop("evaluation", None)
            self.summary["stages"].pop("evaluate", None)
            (self.path / "evaluation.json").unlink(missing_ok=True)

    @property
    def where_rejected(self) -> str:
        """Where rejected records are listed."""
        if self.dry:
            return "a dry run writes nothing; cpo-fast data check lists them"
        return f"see {self.path / 'rejected_records.jsonl'}"

    @property
    def is_writer(self) -> bool:
        return self.world.is_main and not self.dry

    @property
    def prepares_inputs(self) -> bool:
        """Whether this process creates phantom, tiny model and counterfactuals or reads them."""
        return self.world.is_main or self.dry

    @cached_property
    def scratch_dir(self) -> Path:
        """Folder for data and models that the run creates."""
        if not self.dry:
            return self.path
        memory = Path("/dev/shm")
        place = str(memory) if os.access(memory, os.W_OK) else None
        self._temporary = tempfile.TemporaryDirectory(prefix="cpo_fast-", dir=place)
        return Path(self._temporary.name)

    def _make_room(self, trained: Sequence[str], overwrite: bool) -> None:
        if not overwrite:
            check_unused(self.path, trained)
        for stage in trained:
            folder = self.path / stage
            if folder.exists():
                shutil.rmtree(folder)
        make_private(self.path)

    def reject(self, records: Iterable[RejectedRecord]) -> None:
        """Append to rejected_records.jsonl; `finish` counts the records for summary.json."""
        if not self.is_writer:
            self.rejected += records if self.dry else []
            return
        with (self.path / "rejected_records.jsonl").open("a", encoding="utf-8") as file:
            for record in records:
                self.rejected.append(record)
                file.write(json.dumps(record.to_json()) + "\n")

    def reject_unreadable(self, what: str, records: Sequence[RejectedRecord]) -> None:
        """Reject samples whose image fails during `what`, and print how many."""
        self.reject(records)
        if records:
            samples = counted(len(records), "sample")
            print(f"{what}: {samples} left out, an image could not be read; the first: "
                  f"{records[0].id} ({records[0].reason}: {records[0].detail})")  # fmt: skip

    def stop_if_too_bad(self, bad: int, read: int, limit: float) -> None:
        """Raise DataError if more than the share `limit` of the records read is rejected."""
        if read and bad / read > limit:
            raise DataError(
                f"{bad} of {counted(read, 'record')} set aside, more than --max_bad_fraction "
                f"{limit}; {self.where_rejected}"
            )

    def add_data(self, **facts: Any) -> None:
        """Add facts to the `data` part of summary.json; a mapping extends an earlier one.

        For records, `read` = `used` + `rejected` + `left_out`; the last two are counted here.
        `samples_set_aside` counts the samples that a single stage left out.
        """
        data = self.summary.setdefault("data", {})
        for name, value in facts.items():
            data[name] = data.get(name, {}) | value if isinstance(value, dict) else value
        whole: Counter[str] = Counter()
        samples: dict[str, Counter[str]] = {}
        for record in self.rejected:
            if record.stage != "counterfactual":
                (samples.setdefault(record.stage, Counter()) if record.stage else whole)[
                    record.reason
                ] += 1
        data["rejected"] = dict(whole)
        data["left_out"] = self.left_out
        data["samples_set_aside"] = {stage: dict(found) for stage, found in samples.items()}

    def finish(self, versions: Mapping[str, str]) -> None:
        """Write summary.json."""
        if not self.is_writer:
            return
        self.add_data()
        self.summary["versions"] = dict(versions)
        write_json(self.path / "summary.json", self.summary)
