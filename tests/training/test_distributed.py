"""Several processes equal one process; they stop, fail and resume together."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cpo_fast.phantom import write_phantom
from cpo_fast.run.image_check import digest_image
from cpo_fast.testing.runs import read_rows
from cpo_fast.train import main
from cpo_fast.training.checkpoint import find_latest_checkpoint
from cpo_fast.training.interrupt import EXIT_STATUS
from cpo_fast.types import ImageRef
from tests.samples import write_pairs
from tests.training.forks import Ranks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed"),
]

FLAGS = [
    "--sft_use_peft", "false", "--sft_per_device_train_batch_size", "3", "--sft_max_steps", "4",
    "--per_device_train_batch_size", "3", "--max_steps", "4", "--learning_rate", "1e-3",
    "--save_steps", "2", "--logging_steps", "2", "--eval_steps", "2", "--packing_length", "200",
    "--lora_dropout", "0", "--stages", "sft,cpo", "--dataloader_num_workers", "0",
    "--save_total_limit", "0",
]  # fmt: skip
ONE = ["--sft_gradient_accumulation_steps", "2", "--gradient_accumulation_steps", "2"]
TWO = ["--sft_gradient_accumulation_steps", "1", "--gradient_accumulation_steps", "1"]
# AdamW amplifies the rounding of gradients near zero to the scale of the learning rate.
FULL = ["--use_peft", "false", "--learning_rate", "2e-5", "--sft_learning_rate", "5e-5"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
            "-m", "cpo_fast.train"]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl", 40)


def one(data: Path, folder: Path, *flags: str) -> int:
    return main(["--dataset", str(data), "--output_dir", str(folder), *FLAGS, *ONE, *flags])


def start(data: Path, folder: Path, *flags: str) -> Ranks:
    command = ["--dataset", str(data), "--output_dir", str(folder), *FLAGS, *TWO, *flags]
    return Ranks(command, folder.with_name(f"{folder.name}-rank"))


def two(data: Path, folder: Path, *flags: str) -> Ranks:
    ranks = start(data, folder, *flags)
    assert ranks.wait() == [0, 0], ranks.read_errors()
    return ranks


SAME = ("loss", "grad_norm", "learning_rate", "num_tokens", "epoch", "rewards/margins", "nll_loss",
        "rewards/accuracies", "logps/chosen", "eval_loss", "eval_rewards/margins")  # fmt: skip


def assert_same(first: Path, second: Path) -> None:
    """Losses, metrics and weights to 1e-6 (norms and sums relative to their size)."""
    assert [(r["stage"], r["step"]) for r in read_rows(first)] == [
        (r["stage"], r["step"]) for r in read_rows(second)
    ]
    for one_row, other in zip(read_rows(first), read_rows(second), strict=True):
        for name in set(SAME) & (one_row.keys() | other.keys()) - {"num_tokens"}:
            assert one_row[name] == pytest.approx(other[name], rel=2e-6, abs=1e-6), (name, one_row)
    for stage in ("sft", "cpo"):
        paths = [
            next((f / stage / "checkpoint-4").glob("*model.safetensors")) for f in (first, second)
        ]
        left, right = map(load_file, paths)
        assert left.keys() == right.keys()
        for key, value in left.items():
            torch.testing.assert_close(value, right[key], rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def single(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("single") / "run"
    assert one(data, folder) == 0
    return folder


@pytest.fixture(scope="module")
def double(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("double") / "run"
    out = two(data, folder).read_output()
    assert out.count("report: ") == 1 and out.count("data: trl at") == 1  # only rank 0 prints
    return folder


def test_two_processes_equal_one(single: Path, double: Path) -> None:
    assert_same(single, double)


@pytest.fixture(scope="module")
def full(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both stages tune all weights, on one process."""
    folder = tmp_path_factory.mktemp("full") / "run"
    assert one(data, folder, *FULL) == 0
    return folder


@pytest.fixture(scope="module")
def sharded(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded") / "run"
    two(data, folder, *FULL, "--fsdp", "true")
    return folder


def test_sharded_full_tuning_equals_one_process(full: Path, sharded: Path) -> None:
    assert_same(full, sharded)


@pytest.mark.complete
def test_sharded_run_resumes_with_one_process_and_vice_versa(
    data: Path, full: Path, sharded: Path, tmp_path: Path
) -> None:
    resume = [*FULL, "--resume_from_checkpoint", "auto"]
    assert one(data, half(sharded, tmp_path / "one"), *resume) == 0
    assert_same(full, tmp_path / "one")
    two(data, half(full, tmp_path / "two"), *resume, "--fsdp", "true")
    assert_same(full, tmp_path / "two")


def half(run: Path, folder: Path) -> Path:
    """The run as it was in the middle of CPO."""
    shutil.copytree(run, folder)
    shutil.rmtree(folder / "cpo" / "checkpoint-4")
    return folder


@pytest.mark.complete
def test_run_of_two_processes_resumes_with_one_and_vice_versa(
    data: Path, single: Path, double: Path, tmp_path: Path
) -> None:
    resume = ["--resume_from_checkpoint", "auto"]
    assert one(data, half(double, tmp_path / "one"), *resume) == 0
    assert_same(single, tmp_path / "one")
    two(data, half(single, tmp_path / "two"), *resume)
    assert_same(single, tmp_path / "two")


def test_resume_rejects_another_batch_size(
    data: Path, double: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--resume_from_checkpoint", "auto", "--gradient_accumulation_steps", "4"]
    assert one(data, double, *flags) == 2
    assert "x processes (6, now 12)" in capsys.readouterr().err


def wait_for(path: Path, ranks: Ranks) -> None:
    while ranks.is_running() and not (path.exists() and path.stat().st_size):
        time.sleep(0.01)
    assert path.exists(), ranks.read_errors()


def test_signal_to_one_rank_stops_all_at_the_same_step(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    long = ["--sft_max_steps", "2000", "--save_steps", "0", "--eval_steps", "0"]
    ranks = start(data, folder, *long)
    wait_for(folder / "metrics.jsonl", ranks)
    ranks.runs[-1].send_signal(signal.SIGTERM)
    assert ranks.wait() == [EXIT_STATUS, EXIT_STATUS]
    err = ranks.read_errors()
    assert "stopped by SIGTERM after sft step" in err and "rank 1: stopped by SIGTERM" in err
    (saved,) = (folder / "sft").glob("checkpoint-*")
    state = json.loads((saved / "trainer_state.json").read_text())
    assert f"after sft step {state['global_step']} of" in err
    assert len(state["ranks"]) == 2


def test_death_of_a_rank_ends_the_others_with_a_message(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    long = ["--sft_max_steps", "2000", "--save_steps", "10", "--save_total_limit", "2"]
    ranks = start(data, folder, *long)
    wait_for(folder / "sft" / "checkpoint-10", ranks)
    ranks.runs[-1].send_signal(signal.SIGKILL)
    assert ranks.wait() == [1, -signal.SIGKILL]
    assert "lost contact with the other processes" in ranks.read_errors()
    assert find_latest_checkpoint(folder / "sft") is not None


def test_wrong_flag_ends_all_ranks_of_torchrun(data: Path, tmp_path: Path) -> None:
    command = [*TORCHRUN, "--dataset", str(data), "--output_dir", str(tmp_path / "run"), *FLAGS]
    done = subprocess.run(
        [*command, "--model_name_or_path", "/nowhere"], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "/nowhere: no such model folder" in done.stderr


@pytest.mark.complete
def test_sharded_sft_and_adapters_with_images_equal_one_process(tmp_path: Path) -> None:
    """Images stop decoding after the check, more of them on one rank than on the other."""
    phantom = write_phantom(tmp_path / "data", num_studies=60)
    broken = sorted(phantom.rglob("*.jpg"))[::12]
    for path in broken:
        path.write_bytes(path.read_bytes()[:-900])
    flags = ["--max_pixels", "12544", "--packing_length", "600",
             "--stages", "graph,counterfactual,sft,cpo", "--max_eval_samples", "6",
             "--learning_rate", "2e-5", "--sft_learning_rate", "5e-5"]  # fmt: skip
    for name in ("one", "two"):
        (tmp_path / name).mkdir(mode=0o700)
        known = [digest_image(ImageRef(str(path), str(phantom))) for path in broken]
        (tmp_path / name / "checked_images.txt").write_text("".join(f"{k}\n" for k in known))
    assert one(phantom, tmp_path / "one", *flags) == 0
    two(phantom, tmp_path / "two", *flags, "--fsdp", "true")
    assert_same(tmp_path / "one", tmp_path / "two")
    first, second = (
        sorted((tmp_path / name / "rejected_records.jsonl").read_text().splitlines())
        for name in ("one", "two")
    )
    assert first == second and sum("image" in line for line in first) > 0
