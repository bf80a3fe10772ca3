"""Full disks, vanished files, non-finite numbers: the run reports them and loses nothing."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cpo_fast.model.build import save_model, tiny_text_model
from cpo_fast.model.images import ImageProcessor
from cpo_fast.testing import samples
from cpo_fast.testing.runs import read_rows
from cpo_fast.train import main
from cpo_fast.training import feed, loop
from cpo_fast.training.checkpoint import find_damage, list_checkpoints
from cpo_fast.training.feed import StepFeed
from cpo_fast.training.objectives import SFTObjective
from cpo_fast.types import ImageRef, PackedBatch
from tests.samples import write_pairs

pytestmark = pytest.mark.slow

FLAGS = [
    "--sft_use_peft", "false", "--sft_per_device_train_batch_size", "4", "--sft_max_steps", "6",
    "--sft_gradient_accumulation_steps", "1", "--save_steps", "2", "--stages", "sft",
    "--dataloader_num_workers", "0",
    "--save_total_limit", "0",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl", 20, short=True)


def train(data: Path, folder: Path, *flags: str) -> int:
    return main(["--dataset", str(data), "--output_dir", str(folder), *FLAGS, *flags])


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small separate file system."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(place)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def remount(disk: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", str(disk)], check=True)


def test_full_disk_keeps_the_last_checkpoint_for_a_resume(
    data: Path, disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(data, disk / "run") == 1
    assert "cannot be written" in capsys.readouterr().err
    saved = list_checkpoints(disk / "run" / "sft")
    assert saved and all(find_damage(path) is None for path in saved)
    assert saved[-1].name != "checkpoint-6"
    assert not list((disk / "run" / "sft").glob(".partial-*"))
    remount(disk, "size=200m")
    assert train(data, disk / "run", "--resume_from_checkpoint", "auto") == 0
    assert find_damage(disk / "run" / "sft" / "checkpoint-6") is None


def test_read_only_folder_is_named(
    data: Path, disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    remount(disk, "ro")
    assert train(data, disk / "run") == 2
    assert f"{disk / 'run'} cannot be written" in capsys.readouterr().err


def test_disk_becomes_read_only_while_saving(
    data: Path, disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    remount(disk, "size=200m")
    write = loop.write_checkpoint

    def turning(stage_dir: Path, step: int, *rest: Any, **options: Any) -> Path:
        if step == 4:
            remount(disk, "ro")
        return write(stage_dir, step, *rest, **options)

    monkeypatch.setattr(loop, "write_checkpoint", turning)
    # This file system cannot become read-only while the lock file is open.
    monkeypatch.setattr("cpo_fast.train.lock_folder", nullcontext)
    assert train(data, disk / "run") == 1
    error = capsys.readouterr().err
    assert "checkpoint-4 cannot be written" in error and "--resume_from_checkpoint auto" in error
    assert [path.name for path in list_checkpoints(disk / "run" / "sft")] == ["checkpoint-2"]
    monkeypatch.undo()
    remount(disk, "rw")
    assert train(data, disk / "run", "--resume_from_checkpoint", "auto") == 0
    assert find_damage(disk / "run" / "sft" / "checkpoint-6") is None


def test_dead_worker_is_replaced_without_changes(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(data, tmp_path / "straight") == 0
    item = StepFeed.__getitem__

    def dying(self: StepFeed, index: int) -> Any:
        if index == 3 and not (tmp_path / "died").exists():
            (tmp_path / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return item(self, index)

    monkeypatch.setattr(StepFeed, "__getitem__", dying)
    assert train(data, tmp_path / "run", "--dataloader_num_workers", "1") == 0
    assert "a worker process of the data feed died" in capsys.readouterr().err
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")


def test_repeated_worker_deaths_stop_the_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(feed, "MAX_DEATHS", 0)
    monkeypatch.setattr(StepFeed, "__getitem__", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    assert train(data, tmp_path / "run", "--dataloader_num_workers", "1") == 1
    assert "Lower --dataloader_num_workers" in capsys.readouterr().err


def test_nonfinite_step_is_logged_and_the_run_continues(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summed = SFTObjective.sum_losses
    culprit: list[str] = []

    def poisoned(self: SFTObjective, batch: PackedBatch) -> Any:
        loss, values = summed(self, batch)
        culprit[:] = culprit or [batch.segment_names[0]]
        return (loss * torch.nan if culprit[0] in batch.segment_names else loss), values

    monkeypatch.setattr(SFTObjective, "sum_losses", poisoned)
    assert train(data, tmp_path / "run", "--sft_max_steps", "4") == 0
    (line,) = (tmp_path / "run" / "nonfinite_steps.jsonl").read_text().splitlines()
    bad = json.loads(line)
    assert bad["step"] == 1 and culprit[0].rsplit("/", 1)[0] in bad["ids"] and len(bad["ids"]) == 4
    weights = load_file(tmp_path / "run" / "sft" / "checkpoint-4" / "model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())
    assert losses(tmp_path / "run")[0] is None and all(losses(tmp_path / "run")[1:])


def test_nonfinite_weight_is_named(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_text_model(samples.tokenizer(), hidden_size=64, num_hidden_layers=2)
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = torch.nan
    save_model(model, tmp_path / "model", tokenizer=samples.tokenizer())
    flags = ["--model_name_or_path", str(tmp_path / "model")]
    assert train(data, tmp_path / "run", *flags) == 1
    error = capsys.readouterr().err
    assert "3 steps in a row" in error and "layers.1.mlp.up_proj.weight" in error
    lines = (tmp_path / "run" / "nonfinite_steps.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


def test_image_that_vanishes_mid_run_is_listed_and_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    flags = ["--dataset", "phantom", "--num_studies", "60", "--max_pixels", "12544",
             "--sft_max_steps", "4", "--stages", "graph,counterfactual,sft"]  # fmt: skip
    decode = ImageProcessor.pixels
    calls: list[ImageRef] = []

    def pixels(self: ImageProcessor, ref: ImageRef) -> Any:
        calls.append(ref)
        if len(calls) == 6:
            (Path(ref.root or "") / ref.path).unlink()
        return decode(self, ref)

    monkeypatch.setattr(ImageProcessor, "pixels", pixels)
    assert main([*FLAGS, "--output_dir", str(folder), *flags]) == 0
    lines = (folder / "rejected_records.jsonl").read_text().splitlines()
    reasons = [json.loads(line)["reason"] for line in lines]
    assert reasons.count("image-missing") == 1
    assert find_damage(folder / "sft" / "checkpoint-4") is None


def test_clock_jumps_change_only_timings(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jumps = itertools.cycle((0.0, 4e9, 1e9))
    monkeypatch.setattr("time.time", lambda: next(jumps))
    assert train(data, tmp_path / "run", "--max_minutes", "600") == 0
    assert find_damage(tmp_path / "run" / "sft" / "checkpoint-6") is None


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_rows(folder) if "loss" in row]


def out_of_memory_above(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    summed = SFTObjective.sum_losses

    def full(self: SFTObjective, batch: PackedBatch) -> Any:
        loss, values = summed(self, batch)
        if batch.input_ids.numel() > tokens:
            (loss / 2).backward()  # some gradients exist when memory runs out
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return loss, values

    monkeypatch.setattr(SFTObjective, "sum_losses", full)


def test_out_of_memory_retries_in_halves_with_the_same_result(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(data, tmp_path / "roomy") == 0
    out_of_memory_above(60, monkeypatch)
    assert train(data, tmp_path / "tight") == 0
    assert losses(tmp_path / "tight") == pytest.approx(losses(tmp_path / "roomy"), abs=1e-5)
    last = json.loads((tmp_path / "tight" / "metrics.jsonl").read_text().splitlines()[5])
    assert last["oom_retries"] == 5  # the last step of the epoch is smaller and fits


def test_out_of_memory_twice_stops_with_advice(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out_of_memory_above(0, monkeypatch)
    assert train(data, tmp_path / "run") == 1
    assert "--packing_length" in capsys.readouterr().err
