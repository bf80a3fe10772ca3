"""`--report_to`: sends the numbers of metrics.jsonl to TensorBoard, Weights & Biases, trackio or
MLflow.

Only numbers are sent, under `<stage>/<metric>`: no configuration, path, id, console output or other
text, because reports are patient data. TensorBoard and MLflow write into the output folder, MLflow
unless its environment variables name a server. trackio and wandb follow their environment
variables; wandb sends to its server by default.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpo_fast.errors import UsageError, first_line
from cpo_fast.training.stage_settings import TRAINING_STAGES

PROJECT = "cpo_fast"
Log = Callable[[str, int, dict[str, float]], None]  # stage, step, values
Close = Callable[[], None]


def _tensorboard(folder: Path) -> tuple[Log, Close]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))

    def log(stage: str, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(f"{stage}/{name}", value, step)
        writer.flush()

    return log, writer.close


def _wandb(folder: Path) -> tuple[Log, Close]:
    import wandb

    quiet: Any = {  # send nothing about command line, code or machine
        "console": "off",
        "disable_git": True,
        "disable_code": True,
        "x_disable_meta": True,
        "x_disable_stats": True,
        "x_save_requirements": False,
    }
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        dir=str(folder),
        settings=wandb.Settings(**quiet),
    )
    for stage in TRAINING_STAGES:  # both stages count from 1
        run.define_metric(f"{stage}/step")
        run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")

    def log(stage: str, step: int, values: dict[str, float]) -> None:
        run.log({f"{stage}/{name}": value for name, value in {**values, "step": step}.items()})

    return log, run.finish


def _trackio(folder: Path) -> tuple[Log, Close]:
    import trackio

    trackio.init(project=os.environ.get("TRACKIO_PROJECT", PROJECT), embed=False)

    def log(stage: str, step: int, values: dict[str, float]) -> None:
        trackio.log({f"{stage}/{name}": value for name, value in {**values, "step": step}.items()})

    return log, trackio.finish


def _mlflow(folder: Path) -> tuple[Log, Close]:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    uri = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{folder.resolve() / 'mlflow.db'}")
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
    client = MlflowClient(uri)  # not mlflow.start_run, which adds user and script as tags
    experiment = client.get_experiment_by_name(name)
    identity = experiment.experiment_id if experiment else client.create_experiment(name)
    run = client.create_run(identity).info.run_id

    def log(stage: str, step: int, values: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [Metric(f"{stage}/{key}", value, now, step) for key, value in values.items()]
        client.log_batch(run, metrics=metrics)

    return log, lambda: client.set_terminated(run)


TRACKERS: Mapping[str, Callable[[Path], tuple[Log, Close]]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
    "mlflow": _mlflow,
}


def parse_trackers(report_to: str) -> list[str]:
    """The names in `--report_to`. Raises UsageError for an unknown or uninstalled one."""
    names = [name.strip() for name in report_to.split(",") if name.strip() not in ("", "none")]
    for name in names:
        if name not in TRACKERS:
            raise UsageError(f"--report_to {name}: choose from none, {', '.join(TRACKERS)}")
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"--report_to {name}: not installed (pip install {name})")
    return names


@dataclass
class _Tracker:
    name: str
    log: Log
    close: Close


@contextmanager
def open_trackers(
    names: Sequence[str], folder: Path
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Open trackers; yields a function that sends a row of metrics.jsonl to all of them.

    A tracker that fails during the run is reported on stderr once and then left out; metrics.jsonl
    is complete.
    """
    opened: list[_Tracker] = []

    def call_safely(one: _Tracker, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # trackers raise various exceptions
            opened.remove(one)
            kind = type(error).__name__
            print(f"warning: {one.name} failed ({kind}) and is left out", file=sys.stderr)

    def send(row: Mapping[str, Any]) -> None:
        values = {
            name: float(value)
            for name, value in row.items()
            if isinstance(value, int | float) and name != "step"
        }
        for one in tuple(opened):
            call_safely(one, lambda one=one: one.log(row["stage"], row["step"], values))  # type: ignore[misc]

    try:
        for name in names:
            try:
                opened.append(_Tracker(name, *TRACKERS[name](folder)))
            except Exception as error:
                kind = type(error).__name__
                raise UsageError(
                    f"--report_to {name} cannot be started: {kind}: {first_line(error)}"
                ) from error
        yield send
    finally:
        for one in tuple(opened):
            call_safely(one, one.close)
