"""A run that is killed, stopped or damaged goes on to the same weights as one that was not."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cpo_fast.train import main
from cpo_fast.training.checkpoint import checkpoints, damage_of, latest_checkpoint
from cpo_fast.training.interrupt import EXIT_STATUS
from cpo_fast.training.metrics import TIMING_FIELDS

pytestmark = pytest.mark.slow

FLAGS = [
    "--sft_use_peft", "false", "--sft_per_device_train_batch_size", "4", "--sft_max_steps", "9",
    "--sft_gradient_accumulation_steps", "1", "--per_device_train_batch_size", "2",
    "--gradient_accumulation_steps", "2", "--max_steps", "9", "--learning_rate", "1e-3",
    "--save_steps", "2", "--logging_steps", "3", "--eval_steps", "4", "--packing_length", "300",
    "--lora_dropout", "0.2", "--stages", "sft,cpo", "--dataloader_num_workers", "0",
]  # fmt: skip
KILLS = 20 if os.environ.get("CPO_FAST_LONG_TESTS") else 3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    words = ["clear lungs", "a small effusion", "an enlarged heart", "basal atelectasis"]
    rows = [
        {
            "prompt": f"Report of patient {i}?",
            "chosen": f"There are {words[i % 4]}, {words[(i * 7 + 1) % 4]} and line {i}.",
            "rejected": f"There is {words[(i + 1) % 4]} only, line {i * 3}.",
        }
        for i in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def command(data: Path, folder: Path, *flags: str) -> list[str]:
    return ["--dataset", str(data), "--output_dir", str(folder), *FLAGS, *flags]


@pytest.fixture(scope="module")
def straight(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight") / "run"
    assert main(command(data, folder)) == 0
    return folder


def outcome(folder: Path) -> tuple[bytes, bytes, list[dict[str, Any]]]:
    """Final SFT weights, final adapter, metrics without the timing."""
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    return (
        (folder / "sft" / "checkpoint-9" / "model.safetensors").read_bytes(),
        (folder / "cpo" / "checkpoint-9" / "adapter_model.safetensors").read_bytes(),
        [{k: v for k, v in row.items() if k not in TIMING_FIELDS} for row in rows],
    )


def start(data: Path, folder: Path) -> subprocess.Popen[bytes]:
    arguments = command(data, folder, "--resume_from_checkpoint", "auto")
    return subprocess.Popen(
        [sys.executable, "-m", "cpo_fast.train", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def kill_when(process: subprocess.Popen[bytes], moment: Callable[[], bool], sign: int) -> int:
    """Send `sign` at `moment` (or let the run end first); returns the exit status."""
    while process.poll() is None:
        if moment():
            process.send_signal(sign)
            break
        time.sleep(0.002)
    return process.wait(timeout=120)


def moments(folder: Path) -> list[Callable[[], bool]]:
    """In SFT, inside a checkpoint write, in CPO; then at random times."""
    begun = time.monotonic()
    chance = random.Random(len(list(folder.rglob("*"))))
    after = 4 + 12 * chance.random()
    return [
        lambda: (folder / "sft" / "checkpoint-4").is_dir(),
        lambda: any((folder / "cpo").glob(".partial-*")),
        lambda: (folder / "cpo" / "checkpoint-6").is_dir(),
        lambda: time.monotonic() - begun > after,
    ]


def test_killed_again_and_again_it_ends_with_the_same_weights(
    data: Path, straight: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "killed"
    killed = 0
    for turn in range(KILLS):
        moment = moments(folder)[min(turn, 3)]
        killed += kill_when(start(data, folder), moment, signal.SIGKILL) == -signal.SIGKILL
    assert killed >= 2
    assert main(command(data, folder, "--resume_from_checkpoint", "auto")) == 0
    assert outcome(folder) == outcome(straight)


def test_sigterm_saves_and_exits_with_its_own_status(
    data: Path, straight: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "stopped"
    process = start(data, folder)
    status = kill_when(process, lambda: (folder / "sft" / "checkpoint-2").is_dir(), signal.SIGTERM)
    assert status == EXIT_STATUS
    assert process.stderr is not None
    assert b"--resume_from_checkpoint auto" in process.stderr.read()
    assert main(command(data, folder, "--resume_from_checkpoint", "auto")) == 0
    assert outcome(folder) == outcome(straight)


def test_max_minutes_stops_like_a_signal(data: Path, straight: Path, tmp_path: Path) -> None:
    folder = tmp_path / "timed"
    assert main(command(data, folder, "--max_minutes", "1e-9")) == EXIT_STATUS
    assert [path.name for path in checkpoints(folder / "sft")] == ["checkpoint-1"]
    assert main(command(data, folder, "--resume_from_checkpoint", "auto")) == 0
    assert outcome(folder) == outcome(straight)


def test_a_damaged_checkpoint_is_named_and_passed_over(
    data: Path, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "damaged"
    assert main(command(data, folder)) == 0
    last = folder / "cpo" / "checkpoint-9"
    weights = last / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    (folder / "cpo" / "checkpoint-8" / "manifest.json").unlink()
    assert damage_of(last) == "adapter_model.safetensors has changed"
    assert latest_checkpoint(folder / "cpo") == folder / "cpo" / "checkpoint-6"
    assert "checkpoint-9 is damaged" in capsys.readouterr().err
    assert main(command(data, folder, "--resume_from_checkpoint", "auto")) == 0
    assert outcome(folder) == outcome(straight)


def test_other_flags_are_no_resume(
    data: Path, straight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--resume_from_checkpoint", "auto", "--beta", "0.5"]
    assert main(command(data, straight, *flags)) == 2
    assert "beta" in capsys.readouterr().err


def test_only_the_newest_checkpoints_are_kept(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "limited"
    assert main(command(data, folder, "--save_total_limit", "2", "--stages", "sft")) == 0
    assert [path.name for path in checkpoints(folder / "sft")] == ["checkpoint-8", "checkpoint-9"]


def test_a_step_that_is_not_finite_is_named_and_does_not_reach_the_weights(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "nan"
    status = main(command(data, folder, "--sft_learning_rate", "1e30", "--stages", "sft"))
    assert status == 1
    error = capsys.readouterr().err
    assert "steps in a row" in error and "nonfinite_steps.jsonl" in error
    lines = (folder / "nonfinite_steps.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) >= 3 and json.loads(lines[-1])["ids"]
