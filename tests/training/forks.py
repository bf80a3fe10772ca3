"""Runs of `cpo-fast train` as forks of one process that has imported everything.

A new interpreter would spend more time on importing torch and transformers than on a small run.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

import peft  # noqa: F401  # imported before the fork
import transformers.optimization  # noqa: F401

from cpo_fast.run import stages  # noqa: F401
from cpo_fast.train import main
from tests.conftest import draw_pixels

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([__name__])


class Run:
    """A process that runs `cpo-fast train` with the flags `argv` and writes into `output`.

    With `killed_at` it kills itself when it renames a path that ends so.
    """

    def __init__(
        self,
        argv: list[str],
        output: Path,
        environment: Mapping[str, str] | None = None,
        killed_at: str = "",
    ) -> None:
        self.output = output
        arguments = (argv, output, environment or {}, killed_at)
        self.process = FORKS.Process(target=train, args=arguments)
        self.process.start()

    def is_running(self) -> bool:
        return self.process.is_alive()

    def send_signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def wait(self, timeout: float = 600) -> int | None:
        """The exit status, negative for a signal; after `timeout` seconds the process is killed."""
        self.process.join(timeout)
        self.process.kill()
        self.process.join()
        return self.process.exitcode

    def read_errors(self) -> str:
        return self.output.with_suffix(".err").read_text()


class Ranks:
    """Two processes of one run, as torchrun starts them."""

    def __init__(self, argv: list[str], output: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        self.runs = [
            Run(
                argv,
                output.with_name(f"{output.name}-{rank}"),
                place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(2)
        ]

    def is_running(self) -> bool:
        return all(run.is_running() for run in self.runs)

    def wait(self) -> list[int | None]:
        return [run.wait() for run in self.runs]

    def read_output(self) -> str:
        return "".join(run.output.with_suffix(".out").read_text() for run in self.runs)

    def read_errors(self) -> str:
        return "".join(run.read_errors() for run in self.runs)


def train(argv: list[str], output: Path, environment: Mapping[str, str], killed_at: str) -> None:
    for number, suffix in ((1, ".out"), (2, ".err")):
        with output.with_suffix(suffix).open("wb") as file:
            os.dup2(file.fileno(), number)
    os.environ |= environment
    draw_pixels()
    if killed_at:
        die_at_rename(killed_at)
    sys.exit(main(argv))


def die_at_rename(place: str) -> None:
    rename = Path.rename

    def rename_or_die(path: Path, target: Path) -> Path:
        if str(path).endswith(place):
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(path, target)

    Path.rename = rename_or_die  # type: ignore[method-assign, assignment]
