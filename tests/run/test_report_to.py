"""Only the numbers of metrics.jsonl are sent to the named trackers."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from cpo_fast.errors import UsageError
from cpo_fast.run.report_to import open_trackers, parse_trackers
from cpo_fast.testing.runs import read_rows
from cpo_fast.train import main

ROWS: list[dict[str, Any]] = [
    {"stage": "sft", "step": 1, "epoch": 0.5, "loss": 2.0, "note": "a patient's report"},
    {"stage": "cpo", "step": 1, "loss": 0.69, "rewards/margins": 0.1, "grad_norm": None},
]
WANTED = {
    ("sft", 1): {"epoch": 0.5, "loss": 2.0},
    ("cpo", 1): {"loss": 0.69, "rewards/margins": 0.1},
}


def send(name: str, folder: Path) -> None:
    with open_trackers(parse_trackers(name), folder) as to_all:
        for row in ROWS:
            to_all(row)


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> None:
    """A module that replaces a package, which need not be installed."""
    module = ModuleType(name)
    module.__spec__ = importlib.util.spec_from_loader(name, None)
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, name, module)


def test_tensorboard_gets_a_series_per_metric(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    send("tensorboard", tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for (stage, step), values in WANTED.items():
        for metric, value in values.items():
            (event,) = events.Scalars(f"{stage}/{metric}")
            assert (event.step, event.value) == (step, pytest.approx(value))
    assert len(events.Tags()["scalars"]) == 4


def named(sent: list[dict[str, float]]) -> dict[tuple[str, int], dict[str, float]]:
    """The values sent under `<stage>/<metric>` and `<stage>/step`, in the form of WANTED."""
    found = {}
    for values in sent:
        (stage,) = {name.split("/", 1)[0] for name in values}
        plain = {name.split("/", 1)[1]: value for name, value in values.items()}
        found[stage, int(plain.pop("step"))] = plain
    return found


def test_wandb_gets_numbers_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[dict[str, float]] = []
    made: dict[str, Any] = {}
    ended: list[bool] = []

    def init(**options: Any) -> SimpleNamespace:
        made.update(options)
        return SimpleNamespace(
            log=sent.append,
            finish=lambda: ended.append(True),
            define_metric=lambda *names, **options: None,
        )

    stand_in(monkeypatch, "wandb", init=init, Settings=lambda **options: options)
    send("wandb", tmp_path)
    assert named(sent) == WANTED and ended == [True]
    assert made["settings"]["console"] == "off" and made["settings"]["x_disable_meta"]
    assert "config" not in made and made["dir"] == str(tmp_path)


def test_trackio_gets_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[dict[str, float]] = []
    calls: list[str] = []
    stand_in(
        monkeypatch,
        "trackio",
        init=lambda **options: calls.append("init"),
        log=sent.append,
        finish=lambda: calls.append("finish"),
    )
    send("trackio", tmp_path)
    assert named(sent) == WANTED and calls == ["init", "finish"]


def test_mlflow_gets_numbers_with_their_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[str, float, int]] = []

    class Client:
        def __init__(self, uri: str) -> None:
            assert uri == f"sqlite:///{tmp_path / 'mlflow.db'}"

        def get_experiment_by_name(self, name: str) -> None:
            return None

        def create_experiment(self, name: str) -> str:
            return "7"

        def create_run(self, experiment: str) -> SimpleNamespace:
            assert experiment == "7"
            return SimpleNamespace(info=SimpleNamespace(run_id="run"))

        def log_batch(self, run: str, metrics: list[tuple[str, float, int]]) -> None:
            sent.extend(metrics)

        def set_terminated(self, run: str) -> None:
            sent.append(("end", 0.0, 0))

    def metric(key: str, value: float, timestamp: int, step: int) -> tuple[str, float, int]:
        return key, value, step

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    stand_in(monkeypatch, "mlflow", MlflowClient=Client)
    stand_in(monkeypatch, "mlflow.entities", Metric=metric)
    send("mlflow", tmp_path)
    assert sent == [
        ("sft/epoch", 0.5, 1),
        ("sft/loss", 2.0, 1),
        ("cpo/loss", 0.69, 1),
        ("cpo/rewards/margins", 0.1, 1),
        ("end", 0.0, 0),
    ]


def test_failing_tracker_is_named_and_the_run_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[int] = []

    def log(values: dict[str, float]) -> None:
        calls.append(1)
        raise ConnectionError("no server, and a secret")

    stand_in(monkeypatch, "trackio", init=lambda **options: None, log=log, finish=lambda: None)
    send("trackio", tmp_path)
    error = capsys.readouterr().err
    assert len(calls) == 1
    assert "trackio failed (ConnectionError)" in error and "secret" not in error


def test_unknown_or_uninstalled_trackers_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_trackers("none") == parse_trackers("") == []
    with pytest.raises(UsageError, match="choose from none, tensorboard"):
        parse_trackers("visdom")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install wandb"):
        parse_trackers("wandb")


def test_missing_tracker_stops_the_run_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    assert main(["--report_to", "visdom", "--output_dir", str(folder)]) == 2
    assert "--report_to visdom" in capsys.readouterr().err and not folder.exists()


def test_run_reports_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"Patient {i}?", "chosen": "Clear.", "rejected": "Wet."} for i in range(8)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    sent: list[dict[str, float]] = []
    stand_in(monkeypatch, "trackio", init=lambda **options: None, log=sent.append,
             finish=lambda: None)  # fmt: skip
    command = ["--dataset", str(data), "--output_dir", str(tmp_path / "run"), "--stages", "sft",
               "--sft_max_steps", "3", "--dataloader_num_workers", "0"]  # fmt: skip
    assert main([*command, "--report_to", "trackio"]) == 0
    losses = [row["loss"] for row in read_rows(tmp_path / "run") if "loss" in row]
    assert [values["sft/loss"] for values in sent if "sft/loss" in values] == losses
    assert all(isinstance(value, int | float) for values in sent for value in values.values())
