"""A killed, stopped or damaged run continues to the weights of an uninterrupted run."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from cpo_fast.errors import UsageError
from cpo_fast.run.arguments import TrainArguments
from cpo_fast.run.begin import digest_data
from cpo_fast.run.digests import digest_file
from cpo_fast.run.same_flags import check_flags
from cpo_fast.testing.runs import read_rows_without_timing
from cpo_fast.train import main
from cpo_fast.training.checkpoint import (
    find_damage,
    find_latest_checkpoint,
    list_checkpoints,
    read_state,
)
from cpo_fast.training.interrupt import EXIT_STATUS
from cpo_fast.training.loop import Trainer
from cpo_fast.training.objectives import CPOObjective
from cpo_fast.types import ImageRef, PreferenceGroup, Prompt
from tests.samples import write_pairs
from tests.training.forks import Run

pytestmark = pytest.mark.slow


FLAGS = [
    "--sft_use_peft", "false", "--sft_per_device_train_batch_size", "4", "--sft_max_steps", "9",
    "--sft_gradient_accumulation_steps", "1", "--per_device_train_batch_size", "2",
    "--gradient_accumulation_steps", "2", "--max_steps", "9", "--learning_rate", "1e-3",
    "--save_steps", "2", "--logging_steps", "3", "--eval_steps", "4", "--packing_length", "90",
    "--lora_dropout", "0.2", "--stages", "sft,cpo", "--dataloader_num_workers", "0",
    "--save_total_limit", "0",
]  # fmt: skip


KILLS = 20 if os.environ.get("CPO_FAST_LONG_TESTS") else 3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl", 40)


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
        read_rows_without_timing(folder),
    )


def start(data: Path, folder: Path, killed_at: str = "") -> Run:
    arguments = command(data, folder, "--resume_from_checkpoint", "auto")
    return Run(arguments, folder.with_name(f"{folder.name}-output"), killed_at=killed_at)


def kill_when(run: Run, moment: Callable[[], bool], sign: int) -> int | None:
    """Send `sign` at `moment`, unless the run ends first; returns the exit status."""
    while run.is_running():
        if moment():
            run.send_signal(sign)
            break
        time.sleep(0.002)
    return run.wait()


def rows(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def sometime(folder: Path, chance: random.Random) -> Callable[[], bool]:
    """A random moment after the start of the process, or after its first new row."""
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


def test_repeatedly_killed_run_ends_with_the_same_weights(
    data: Path, straight: Path, tmp_path: Path
) -> None:
    """At the end of checkpoint writes; in the long mode at random moments after that."""
    folder = tmp_path / "killed"
    places = ("sft/.partial-6", "cpo/.partial-2", "cpo/.partial-8")
    for place in places:
        assert start(data, folder, killed_at=place).wait() == -signal.SIGKILL
        assert (folder / place).is_dir()
    killed, runs, chance = len(places), 1, random.Random(7)
    while killed < KILLS:
        status = kill_when(start(data, folder), sometime(folder, chance), signal.SIGKILL)
        if status == 0:  # it finished first: check it and start another
            assert outcome(folder) == outcome(straight)
            folder, runs = tmp_path / f"killed-{runs}", runs + 1
        else:
            assert status == -signal.SIGKILL
            killed += 1
    assert main(command(data, folder, "--resume_from_checkpoint", "auto")) == 0
    assert outcome(folder) == outcome(straight)
    print(f"{killed} kills in {runs} runs")


@pytest.mark.complete
def test_sigterm_saves_and_exits_with_status_3(data: Path, straight: Path, tmp_path: Path) -> None:
    folder = tmp_path / "stopped"
    run = start(data, folder)
    status = kill_when(run, lambda: (folder / "sft" / "checkpoint-2").is_dir(), signal.SIGTERM)
    assert status == EXIT_STATUS
    assert "--resume_from_checkpoint auto" in run.read_errors()
    assert main(command(data, folder, "--resume_from_checkpoint", "auto")) == 0
    assert outcome(folder) == outcome(straight)


def interrupting(
    monkeypatch: pytest.MonkeyPatch, kind: type, method: str, moment: Callable[[int], bool]
) -> None:
    """Send SIGTERM to this process before the calls, counted from 1, that `moment` selects."""
    original, calls = getattr(kind, method), itertools.count(1)

    def interrupted(self: Any, *rest: Any, **options: Any) -> Any:
        if moment(next(calls)):
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *rest, **options)

    monkeypatch.setattr(kind, method, interrupted)


def test_stop_between_packs_repeats_the_step_on_resume(
    data: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = tmp_path / "cut"
    with monkeypatch.context() as patch:
        interrupting(patch, CPOObjective, "sum_losses", lambda call: call == 7)
        assert main(command(data, folder)) == EXIT_STATUS
    error = capsys.readouterr().err
    (saved,) = list_checkpoints(folder / "cpo")[-1:]
    step = int(saved.name.rsplit("-", 1)[1])
    assert 0 < step < 9 and f"stopped by SIGTERM after cpo step {step} of 9" in error
    assert main(command(data, folder, "--resume_from_checkpoint", "auto")) == 0
    said = capsys.readouterr().out
    assert "sft: nothing left to train: " in said and "checkpoint-9 is the last of 9" in said
    assert "cpo: nothing left" not in said
    assert outcome(folder) == outcome(straight)


def test_stop_before_an_evaluation_repeats_it_on_resume(
    data: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "owed"
    with monkeypatch.context() as patch:
        interrupting(patch, Trainer, "evaluate", lambda call: call == 1)
        assert main(command(data, folder)) == EXIT_STATUS
    assert [path.name for path in list_checkpoints(folder / "sft")][-1] == "checkpoint-4"
    assert not any("eval_loss" in row for row in read_rows_without_timing(folder))
    assert main(command(data, folder, "--resume_from_checkpoint", "auto")) == 0
    assert outcome(folder) == outcome(straight)


def test_max_minutes_stops_like_a_signal(
    data: Path, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "timed"
    assert main(command(data, folder, "--max_minutes", "1e-9")) == EXIT_STATUS
    assert "stopped by --max_minutes after sft step 0 of 9" in capsys.readouterr().err
    assert list_checkpoints(folder / "sft") == []  # no step was complete
    assert main(command(data, folder, "--resume_from_checkpoint", "auto")) == 0
    assert outcome(folder) == outcome(straight)


def test_damaged_checkpoint_is_named_and_skipped(
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
    assert find_damage(last) == "adapter_model.safetensors has changed"
    assert find_latest_checkpoint(folder / "cpo") == folder / "cpo" / "checkpoint-6"
    assert "checkpoint-9 is damaged" in capsys.readouterr().err
    assert main(command(data, folder, "--resume_from_checkpoint", "auto")) == 0
    assert outcome(folder) == outcome(straight)


def test_resume_rejects_other_flags(
    data: Path, straight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--resume_from_checkpoint", "auto", "--beta", "0.5"]
    assert main(command(data, straight, *flags)) == 2
    assert "beta" in capsys.readouterr().err


SHORT = ["--stages", "sft", "--sft_max_steps", "-1", "--save_steps", "2", "--eval_steps", "0",
         "--eval_fraction", "0"]  # fmt: skip


@pytest.fixture(scope="module")
def stopped_at_two(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over 24 rows and 6 steps, stopped after step 2, beside its data."""
    folder = tmp_path_factory.mktemp("begun")
    rows = data.read_text(encoding="utf-8").splitlines(keepends=True)[:24]
    (folder / "pairs.jsonl").write_text("".join(rows), encoding="utf-8")
    assert main(command(folder / "pairs.jsonl", folder / "run", *SHORT)) == 0
    for step in (4, 6):
        shutil.rmtree(folder / "run" / "sft" / f"checkpoint-{step}")
    return folder


@pytest.fixture
def begun(stopped_at_two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it; the run is resumed inside the folder with relative paths."""
    shutil.copytree(stopped_at_two, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    flags = json.loads(Path("run/config.json").read_text())
    flags["dataset"] = "pairs.jsonl"
    Path("run/config.json").write_text(json.dumps(flags))
    edit_state(lambda state: state["begun_with"]["flags"].update(dataset="pairs.jsonl"))
    return tmp_path / "copy"


def edit_state(edit: Callable[[dict[str, Any]], object]) -> None:
    """Change trainer_state.json of the checkpoint and its checksum."""
    folder = Path("run/sft/checkpoint-2")
    state = json.loads((folder / "trainer_state.json").read_text())
    edit(state)
    (folder / "trainer_state.json").write_text(json.dumps(state))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["trainer_state.json"] = digest_file(folder / "trainer_state.json")
    (folder / "manifest.json").write_text(json.dumps(manifest))


def resume(*flags: str) -> int:
    arguments = [*SHORT, "--resume_from_checkpoint", "auto", *flags]
    return main(command(Path("pairs.jsonl"), Path("run"), *arguments))


def cut_rows() -> None:
    rows = Path("pairs.jsonl").read_text().splitlines(keepends=True)
    Path("pairs.jsonl").write_text("".join(rows[:12]))


def reorder_rows() -> None:
    rows = Path("pairs.jsonl").read_text().splitlines(keepends=True)
    Path("pairs.jsonl").write_text("".join(reversed(rows)))


def change_a_word() -> None:
    text = Path("pairs.jsonl").read_text()
    Path("pairs.jsonl").write_text(text.replace("and line 3.", "and line 4.", 1))


def change_a_weight() -> None:
    path = Path("run/base/model.safetensors")
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def change_the_template() -> None:
    for path in Path("run/base").glob("*"):
        if path.is_file() and path.suffix in (".json", ".jinja"):
            text = path.read_text()
            path.write_text(text.replace("<|im_start|>assistant", "<|im_start|>doctor"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (cut_rows, "training data: 24 samples then, 12 now."),
        (reorder_rows, "training data: the same 24 samples in another order."),
        (change_a_word, "training data: 24 samples then, 24 now, with other content."),
        (change_a_weight, "starting model: other weights or configuration"),
        (change_the_template, "tokenizer: other files"),
    ],
)
def test_resume_rejects_changed_inputs(
    begun: Path, change: Callable[[], None], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change()
    assert resume() == 2
    error = capsys.readouterr().err
    assert said in error and "--allow_changed_data" in error
    assert [path.name for path in list_checkpoints(Path("run/sft"))] == ["checkpoint-2"]


def test_resume_accepts_changed_data_if_allowed(
    begun: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut_rows()
    assert resume("--allow_changed_data") == 0
    said = "training data: 24 samples then, 12 now"
    assert said in capsys.readouterr().out
    stage = json.loads(Path("run/summary.json").read_text())["stages"]["sft"]
    assert stage["resumed_with_changes"] == [said] and stage["steps"] == 3
    state = read_state(Path("run/sft/checkpoint-3"))
    assert state["begun_with"]["training data"]["samples"] == 12
    assert state["begun_with"]["changes"] == [said]


def test_resume_without_digests_prints_a_note(
    begun: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_state(lambda state: state.pop("begun_with"))
    assert resume() == 0
    assert "cannot be compared with its start" in capsys.readouterr().out
    assert read_state(Path("run/sft/checkpoint-6"))["begun_with"]["changes"] == []


def test_resume_rejects_other_flags_without_config_file(
    begun: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("run/config.json").unlink()
    assert resume("--sft_learning_rate", "0.5") == 2
    error = capsys.readouterr().err
    assert "checkpoint-2 was written with other values of --sft_learning_rate" in error


def test_resume_rejects_another_data_set_unless_allowed() -> None:
    begun = asdict(TrainArguments(dataset="a.jsonl"))
    other = asdict(TrainArguments(dataset="b.jsonl"))
    with pytest.raises(
        UsageError, match=r"other values of --dataset: .* --allow_changed_data true"
    ):
        check_flags(Path("config.json"), begun, other)
    check_flags(Path("config.json"), begun, other | {"allow_changed_data": True})
    with pytest.raises(UsageError, match="other values of --beta: resume with the same flags"):
        check_flags(Path("config.json"), begun, begun | {"beta": 0.2, "allow_changed_data": True})
    del begun["allow_changed_data"], begun["loss_impl"]  # as an earlier version wrote it
    check_flags(Path("config.json"), begun, asdict(TrainArguments(dataset="a.jsonl")))


def test_changed_image_file_is_changed_data(tmp_path: Path) -> None:
    groups = []
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(name.encode() * 100)
        prompt = Prompt((1, 2), (ImageRef(name, str(tmp_path)),))
        groups.append(PreferenceGroup(name, prompt, (3,), ((4,),)))
    before = digest_data(groups)
    assert digest_data(groups) == before
    swapped = digest_data(groups[::-1])
    assert swapped["digest"] != before["digest"]
    assert swapped["in_any_order"] == before["in_any_order"]
    (tmp_path / "b.png").write_bytes(b"c.png" * 100)  # the same size
    assert digest_data(groups)["in_any_order"] != before["in_any_order"]
    weighted = [groups[0], replace(groups[1], source="perception")]
    assert digest_data(weighted)["digest"] != digest_data(groups)["digest"]


def test_only_the_newest_checkpoints_are_kept(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "limited"
    assert main(command(data, folder, "--save_total_limit", "2", "--stages", "sft")) == 0
    kept = [path.name for path in list_checkpoints(folder / "sft")]
    assert kept == ["checkpoint-8", "checkpoint-9"]


def test_nonfinite_step_is_named_and_not_applied(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "nan"
    status = main(command(data, folder, "--sft_learning_rate", "1e30", "--stages", "sft"))
    assert status == 1
    error = capsys.readouterr().err
    assert "steps in a row" in error and "nonfinite_steps.jsonl" in error
    lines = (folder / "nonfinite_steps.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) >= 3 and json.loads(lines[-1])["ids"]
