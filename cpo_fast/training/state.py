"""Everything that changes while a stage trains, saved to a checkpoint and restored from it.

State that all ranks share is saved once; state of a single rank (random generators, sums of the
current row, rejected records) is saved per rank. The position in the data needs no file: the plan
is a pure function of data, seed and epoch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from cpo_fast.errors import UsageError
from cpo_fast.training.checkpoint import read_state
from cpo_fast.training.clock import Clock
from cpo_fast.training.distributed import World
from cpo_fast.training.metrics import Sums
from cpo_fast.training.schedule import make_schedule
from cpo_fast.training.sharding import read_tensors
from cpo_fast.training.stage_settings import StageSettings
from cpo_fast.training.watch import Watch

OPTIMIZER = "optimizer"  # folder of AdamW's tensors in a checkpoint


@dataclass
class Progress:
    """Progress of a stage; part of trainer_state.json."""

    step: int = 0
    owes_evaluation: bool = False  # a stop request cut the evaluation of `step` short
    seconds: float = 0.0
    nonfinite_in_a_row: int = 0
    best: dict[str, Any] = field(default_factory=dict)  # metric, value, step
    final: dict[str, float] = field(default_factory=dict)
    throughput: dict[str, Any] = field(default_factory=dict)
    watch: Watch = field(default_factory=Watch)

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> Progress:
        return cls(**{**saved, "watch": Watch(**saved["watch"])})


class StageState:
    """Optimiser, schedule, counts and progress of one stage over `num_steps` steps."""

    def __init__(
        self, settings: StageSettings, model: torch.nn.Module, num_steps: int,
        *, sharded: bool, world: World, clock: Clock,
    ) -> None:  # fmt: skip
        self.world = world
        self.clock = clock
        self.names = {p: name for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            list(self.names),
            lr=settings.learning_rate,
            betas=(settings.adam_beta1, settings.adam_beta2),
            weight_decay=settings.weight_decay,
            foreach=False if sharded else None,  # foreach cannot mix shards and whole tensors
        )
        self.scheduler = make_schedule(self.optimizer, settings, num_steps)
        self.progress = Progress()
        self.sums = Sums()
        self.rejected: list[dict[str, Any]] = []
        self.oom_retries = 0

    def to_json(self) -> dict[str, Any]:
        """The part of trainer_state.json that `restore` reads. Every rank must call it."""
        return {
            "progress": asdict(self.progress),
            "scheduler": _drop_functions(self.scheduler.state_dict()),
            "ranks": self.world.gather(
                {
                    "sums": self.sums.read(),
                    "rejected": self.rejected,
                    "num_tokens": self.clock.num_tokens,
                    "oom_retries": self.oom_retries,
                    "generators": save_generators(),
                }
            ),
        }

    def restore(self, checkpoint: Path) -> None:
        """Restore the state of `checkpoint`. Rank 0 takes over the sums of removed ranks; an added
        rank keeps its own random generator.
        """
        state = read_state(checkpoint)
        self.progress = Progress.from_json(state["progress"])
        self._restore_optimizer(checkpoint / OPTIMIZER)
        self.scheduler.load_state_dict(state["scheduler"])
        self.optimizer.param_groups[0]["lr"] = self.scheduler.get_last_lr()[0]
        ranks, rank, size = state["ranks"], self.world.rank, self.world.size
        for one in ranks[rank : rank + 1] + (ranks[size:] if rank == 0 else []):
            self.sums.add(one["sums"])
            self.rejected += one["rejected"]
            self.clock.num_tokens += one["num_tokens"]
            self.oom_retries += one["oom_retries"]
        if rank < len(ranks):
            restore_generators(ranks[rank]["generators"])

    def optimizer_tensors(self) -> dict[str, torch.Tensor]:
        """AdamW's state by `<kind>/<parameter>`; shards stay shards, scalars become one element."""
        return {
            f"{kind}/{name}": value.detach() if value.ndim else value.detach().reshape(1)
            for parameter, name in self.names.items()
            for kind, value in self.optimizer.state.get(parameter, {}).items()
        }

    def _restore_optimizer(self, folder: Path) -> None:
        parameters = {name: parameter for parameter, name in self.names.items()}

        def place(key: str) -> torch.Tensor:
            kind, name = key.split("/", 1)
            if name not in parameters:
                raise UsageError(
                    f"the checkpoint trains {name}, which this run does not; resume with the "
                    "settings that it was written with"
                )
            return torch.zeros(1) if kind == "step" else torch.zeros_like(parameters[name])

        for key, value in read_tensors(folder, place).items():
            kind, name = key.split("/", 1)
            own = self.optimizer.state[parameters[name]]
            own[kind] = value.reshape(()) if kind == "step" else value


def save_generators() -> dict[str, str]:
    """State of this process's random number generators, as hexadecimal text."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {name: state.numpy().tobytes().hex() for name, state in states.items()}


def restore_generators(states: dict[str, str]) -> None:
    """Inverse of `save_generators`."""
    read = {
        name: torch.frombuffer(bytearray.fromhex(state), dtype=torch.uint8)
        for name, state in states.items()
    }
    torch.set_rng_state(read["cpu"])
    if "cuda" in read and torch.cuda.is_available():
        torch.cuda.set_rng_state(read["cuda"])


def _drop_functions(scheduler_state: dict[str, Any]) -> dict[str, Any]:
    """The schedule's numbers; its functions are not JSON and are rebuilt."""
    return {k: v for k, v in scheduler_state.items() if k != "lr_lambdas"} | {"lr_lambdas": [None]}
