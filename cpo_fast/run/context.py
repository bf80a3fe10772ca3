"""The wiring of one run: what its steps share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from cpo_fast.model.checkpoint import Checkpoint
from cpo_fast.run.arguments import TrainArguments
from cpo_fast.run.run_folder import RunFolder
from cpo_fast.training.distributed import World
from cpo_fast.training.interrupt import StopRequest


@dataclass
class RunContext:
    """Flags, processes, folder, starting checkpoint and stop request of a run."""

    args: TrainArguments
    world: World = field(default_factory=World)
    stop: StopRequest = field(default_factory=StopRequest)
    checkpoint: Checkpoint = field(init=False)  # the start of the first stage, set when it is open
    folder: RunFolder = field(init=False)
    results: dict[Path, Path] = field(default_factory=dict, init=False)  # by folder of the stage

    def __post_init__(self) -> None:
        self.folder = RunFolder(self.args, self.world)

    @property
    def dtype(self) -> torch.dtype:
        """Of the model weights."""
        return torch.bfloat16 if self.args.bf16 else torch.float32
