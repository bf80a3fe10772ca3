"""The folder of one run: who may read it, what is in it, and what an earlier run left there."""

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

from cpo_fast.errors import UsageError
from cpo_fast.folders import TRAINING, check_free
from cpo_fast.run.arguments import TrainArguments
from cpo_fast.run.same_flags import check_folder_flags
from cpo_fast.training.checkpoint import check_unused
from cpo_fast.training.distributed import World
from cpo_fast.training.metrics import MetricsLog
from cpo_fast.types import RejectedRecord


class RunFolder:
    """`output_dir` of a run. Opening it writes config.json and clears the stages that will run,
    and the evaluation of models that will be trained.

    Only rank 0 of `world` writes; the others read what it left there. In a dry run nobody writes:
    what is read but not there (phantom, tiny model) is made in a temporary folder that goes at the
    end of the process.
    Raises UsageError when a stage that will run has checkpoints there already, unless
    `overwrite_output_dir` allows deleting them.
    """

    def __init__(self, args: TrainArguments, world: World | None = None) -> None:
        self.world = world or World()
        self.dry = args.dry_run
        self.path = Path(args.output_dir)
        self.flags = {"world_size": self.world.size, **asdict(args)}
        self.rejected: list[RejectedRecord] = []
        self.left_out = 0  # records that --max_train_samples and --max_eval_samples leave out
        self.summary: dict[str, Any] = {"stages": {}}
        trained: tuple[str, ...] = ()
        if args.resume_from_checkpoint is None:
            trained = args.trained_stages
        elif self.world.is_main:
            check_folder_flags(self.path, self.flags)
        if not self.writes:
            self.metrics = MetricsLog(self.path / "metrics.jsonl", writes=False)
            return
        check_free(self.path, TRAINING)
        self._make_room(trained, args.overwrite_output_dir)
        self._write_json("config.json", self.flags)
        self.metrics = MetricsLog(self.path / "metrics.jsonl", fresh=trained)
        (self.path / "rejected_records.jsonl").write_text("")
        if trained != ("sft", "cpo") and (self.path / "summary.json").is_file():
            self.summary |= json.loads((self.path / "summary.json").read_text(encoding="utf-8"))
        self.summary["stages"] = {
            name: value for name, value in self.summary["stages"].items() if name not in trained
        }
        if args.trained_stages:  # figures of models that are trained again
            self.summary.pop("evaluation", None)
            self.summary["stages"].pop("evaluate", None)
            (self.path / "evaluation.json").unlink(missing_ok=True)

    @property
    def where_rejected(self) -> str:
        """Where the records that were set aside can be read."""
        if self.dry:
            return "a dry run writes nothing: cpo-fast data check lists them"
        return f"see {self.path / 'rejected_records.jsonl'}"

    @property
    def writes(self) -> bool:
        return self.world.is_main and not self.dry

    @property
    def makes(self) -> bool:
        """Whether this process makes what the run is made of; else it reads rank 0's files."""
        return self.world.is_main or self.dry

    @cached_property
    def made(self) -> Path:
        """The folder for data and models that the run itself makes."""
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
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.path.chmod(0o700)
        except OSError as error:
            raise UsageError(f"--output_dir {self.path} cannot be written: {error}") from error

    def reject(self, records: Iterable[RejectedRecord]) -> None:
        """Append to rejected_records.jsonl; `finish` counts them for summary.json."""
        if not self.writes:
            self.rejected += records if self.dry else []
            return
        with (self.path / "rejected_records.jsonl").open("a", encoding="utf-8") as file:
            for record in records:
                self.rejected.append(record)
                file.write(json.dumps(record.to_json()) + "\n")

    def data(self, **facts: Any) -> None:
        """Facts for the `data` part of summary.json, added to those that are there.

        Of records, `read` = `used` + all of `rejected` + `left_out`; the last two are counted here.
        `samples_set_aside` counts what single stages did without.
        """
        data = self.summary.setdefault("data", {})
        data |= facts
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
        if not self.writes:
            return
        self.data()
        self.summary["versions"] = dict(versions)
        self._write_json("summary.json", self.summary)

    def _write_json(self, name: str, value: Any) -> None:
        partial = self.path / f".{name}.partial"
        partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        partial.rename(self.path / name)


def write_private(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """A JSONL file that holds report text: readable by its owner only."""
    path.unlink(missing_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
