"""Runs with presets: their settings take effect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cpo_fast.loss import processor
from cpo_fast.testing.runs import read_rows
from cpo_fast.train import main

pytestmark = pytest.mark.slow


def train(folder: Path, *flags: str) -> list[dict[str, Any]]:
    data = folder / "pairs.jsonl"
    rows = [
        {
            "prompt": f"Report of patient {i}?",
            "chosen": f"A small effusion in line {i}.",
            "rejected": f"The heart is enlarged, {i}.",
        }
        for i in range(12)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    command = ["--dataset", str(data), "--output_dir", str(folder / "out"), "--stages", "sft,cpo",
               "--sft_use_peft", "false", "--sft_per_device_train_batch_size", "2",
               "--sft_gradient_accumulation_steps", "1", "--gradient_accumulation_steps", "1",
               "--dataloader_num_workers", "0", "--eval_fraction", "0"]  # fmt: skip
    assert main([*command, *flags]) == 0
    return read_rows(folder / "out")


def test_paper(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(processor, "fast_bfloat16", lambda: False)
    rows = train(tmp_path, "--preset", "paper", "--bf16", "false", "--sft_learning_rate", "1e-4")
    rates = {stage: [row["learning_rate"] for row in rows if row["stage"] == stage]
             for stage in ("sft", "cpo")}  # fmt: skip
    assert len(rates["sft"]) == 6 and len(rates["cpo"]) == 3  # 12 samples / 2, 12 pairs / 4
    assert rates["sft"][0] < max(rates["sft"]) <= 1e-4  # one step warms up
    assert 1e-7 < rates["sft"][-1] < rates["sft"][-2] and rates["cpo"][0] == 2e-5
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["preset"], config["bf16"], config["expand_pairs"]) == ("paper", False, True)
    assert "warning: bf16" not in capsys.readouterr().err


def test_lowmem(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(processor, "fast_bfloat16", lambda: False)
    rows = train(tmp_path, "--preset", "lowmem", "--max_steps", "1", "--sft_max_steps", "1")
    cpo = [row for row in rows if row["stage"] == "cpo"]
    assert cpo[0]["loss"] == pytest.approx(0.693147, abs=5e-3)  # bf16 with cached reference
    assert list((tmp_path / "out").glob("reference*"))
    warning = "warning: bf16 on a processor without AVX512"
    assert warning in capsys.readouterr().err
    monkeypatch.setattr(processor, "fast_bfloat16", lambda: True)
    processor.warn_of_slow_bfloat16()
    assert warning not in capsys.readouterr().err
