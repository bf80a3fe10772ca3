"""The best model by a held-out metric is saved, kept and, on request, the result of a stage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cpo_fast.testing.runs import read_rows
from cpo_fast.train import main
from cpo_fast.training.checkpoint import list_checkpoints
from cpo_fast.training.loop import Trainer
from tests.samples import write_pairs

pytestmark = pytest.mark.slow

FLAGS = [
    "--eval_fraction", "0.3", "--sft_per_device_train_batch_size", "4", "--sft_max_steps", "6",
    "--sft_gradient_accumulation_steps", "1", "--gradient_accumulation_steps", "1",
    "--max_steps", "6", "--eval_steps", "1", "--dataloader_num_workers", "0",
    "--save_total_limit", "1", "--stages", "sft,cpo", "--lora_dropout", "0",
    "--sft_freeze_vit",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl", 30, short=True)


def train(data: Path, folder: Path, *flags: str) -> int:
    return main(["--dataset", str(data), "--output_dir", str(folder), *FLAGS, *flags])


def evaluated(folder: Path, stage: str, name: str) -> dict[int, float]:
    rows = read_rows(folder)
    return {row["step"]: row[name] for row in rows if row["stage"] == stage and name in row}


def test_best_checkpoint_is_kept_and_loaded_at_the_end(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    losses = iter([3.0, 2.0, 1.0, 2.0, 1.5, 4.0] * 2)
    monkeypatch.setattr(Trainer, "evaluate", lambda self: {"eval_loss": next(losses)})
    flags = ["--load_best_model_at_end", "--sft_learning_rate", "1e-2"]
    assert train(data, folder, *flags) == 0
    by_step = evaluated(folder, "sft", "eval_loss")
    best = min(by_step, key=lambda step: by_step[step])
    assert best == 3
    steps = [int(path.name.rsplit("-", 1)[1]) for path in list_checkpoints(folder / "sft")]
    assert steps == [best, 6]
    state = json.loads((folder / "sft" / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["best_metric"] == by_step[best] and state["best_global_step"] == best
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["stages"]["sft"]["checkpoint"].endswith(f"checkpoint-{best}")
    adapter = load_file(folder / "sft" / f"checkpoint-{best}" / "adapter_model.safetensors")
    name = next(key for key in adapter if key.endswith("q_proj.lora_A.weight"))
    key = name.removeprefix("base_model.model.").replace(".lora_A", "")
    before, after = (
        load_file(folder / place / "model.safetensors")[key] for place in ("base", "sft/merged")
    )
    added = adapter[name.replace("lora_A", "lora_B")] @ adapter[name] * (32 / 8)
    torch.testing.assert_close(after - before, added, rtol=0, atol=1e-5)


def test_greater_reward_metric_is_better(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert train(data, folder, "--metric_for_best_model", "rewards/margins") == 0
    by_step = evaluated(folder, "cpo", "eval_rewards/margins")
    state = json.loads((folder / "cpo" / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["best_metric"] == max(by_step.values())


def test_unknown_metric_error_lists_the_metrics(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(data, tmp_path / "run", "--sft_metric_for_best_model", "bleu") == 2
    error = capsys.readouterr().err
    assert "--sft_metric_for_best_model bleu: choose from loss, eval_loss" in error
