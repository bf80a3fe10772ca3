"""A run that is killed, stopped or damaged goes on to the same weights as one that was not."""

from __future__ import annotations

import itertools
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
from cpo_fast.training.loop import Trainer
from cpo_fast.training.metrics import TIMING_FIELDS
from cpo_fast.training.objectives import CPOObjective

pytestmark = pytest.mark.slow

FLAGS = [
    "--sft_use_peft", "false", "--sft_per_device_train_batch_size", "4", "--sft_max_steps", "9",
    "--sft_gradient_accumulation_steps", "1", "--per_device_train_batch_size", "2",
    "--gradient_accumulation_steps", "2", "--max_steps", "9", "--learning_rate", "1e-3",
    "--save_steps", "2", "--logging_steps", "3", "--eval_steps", "4", "--packing_length", "90",
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
    return (
        (folder / "sft" / "checkpoint-9" / "model.safetensors").read_bytes(),
        (folder / "cpo" / "checkpoint-9" / "adapter_model.safetensors").read_bytes(),
        outcome_rows(folder),
    )


def outcome_rows(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMING_FIELDS} for row in rows]


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


def rows(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def sometime(folder: Path, chance: random.Random) -> Callable[[], bool]:
    """At a random moment: from the start of the process on, or of its first new row on."""
    limit = 8 * chance.random()
    if chance.random() < 0.25:
        begun = time.monotonic()
        return lambda: time.monotonic() - begun > limit
    first: list[float] = []
    before = rows(folder)

    def moment() -> bool:
        if not first and rows(folder) not in (0, before):
            first.append(time.monotonic())
        return bool(first) and time.monotonic() - first[0] > limit / 4

    return moment


def test_killed_again_and_again_it_ends_with_the_same_weights(
    data: Path, straight: Path, tmp_path: Path
) -> None:
    """In SFT, inside a checkpoint write, in CPO; in the long mode at random moments after that."""
    folder = tmp_path / "killed"
    chosen: list[Callable[[], bool]] = [
        lambda: (folder / "sft" / "checkpoint-4").is_dir(),
        lambda: any((folder / "cpo").glob(".partial-*")),
        lambda: (folder / "cpo" / "checkpoint-6").is_dir(),
    ]
    for moment in chosen:
        assert kill_when(start(data, folder), moment, signal.SIGKILL) == -signal.SIGKILL
    killed, runs, chance = len(chosen), 1, random.Random(7)
    while killed < KILLS:
        status = kill_when(start(data, folder), sometime(folder, chance), signal.SIGKILL)
        if status == 0:  # it was faster: that run is judged, and another one begins
            assert outcome(folder) == outcome(straight)
            folder, runs = tmp_path / f"killed-{runs}", runs + 1
        else:
            assert status == -signal.SIGKILL
            killed += 1
    assert main(command(data, folder, "--resume_from_checkpoint", "auto")) == 0
    assert outcome(folder) == outcome(straight)
    print(f"{killed} kills in {runs} runs")


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


def interrupting(
    monkeypatch: pytest.MonkeyPatch, kind: type, method: str, moment: Callable[[int], bool]
) -> None:
    """SIGTERM to this process before the calls of a method, counted from 1, that `moment` names."""
    original, calls = getattr(kind, method), itertools.count(1)

    def interrupted(self: Any, *rest: Any, **options: Any) -> Any:
        if moment(next(calls)):
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *rest, **options)

    monkeypatch.setattr(kind, method, interrupted)


def test_a_stop_between_two_packs_leaves_the_step_to_the_resumed_run(
    data: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = tmp_path / "cut"
    with monkeypatch.context() as patch:
        interrupting(patch, CPOObjective, "summed", lambda call: call == 7)
        assert main(command(data, folder)) == EXIT_STATUS
    error = capsys.readouterr().err
    (saved,) = checkpoints(folder / "cpo")[-1:]
    step = int(saved.name.rsplit("-", 1)[1])
    assert 0 < step < 9 and f"stopped by SIGTERM after cpo step {step} of 9" in error
    assert main(command(data, folder, "--resume_from_checkpoint", "auto")) == 0
    assert outcome(folder) == outcome(straight)


def test_a_stop_before_an_evaluation_leaves_it_to_the_resumed_run(
    data: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "owed"
    with monkeypatch.context() as patch:
        interrupting(patch, Trainer, "evaluate", lambda call: call == 1)
        assert main(command(data, folder)) == EXIT_STATUS
    assert [path.name for path in checkpoints(folder / "sft")][-1] == "checkpoint-4"
    assert not any("eval_loss" in row for row in outcome_rows(folder))
    assert main(command(data, folder, "--resume_from_checkpoint", "auto")) == 0
    assert outcome(folder) == outcome(straight)


def test_max_minutes_stops_like_a_signal(
    data: Path, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "timed"
    assert main(command(data, folder, "--max_minutes", "1e-9")) == EXIT_STATUS
    assert "stopped by --max_minutes after sft step 0 of 9" in capsys.readouterr().err
    assert checkpoints(folder / "sft") == []  # not one step was whole: it begins again
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
