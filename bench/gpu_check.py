"""Checks and measures everything on a GPU: `python -m bench.gpu_check --out DIR`.

In this order: what the machine is; the native parts, built in place; every implementation against
float64 and the rules of the loss op; the tests that need a GPU; what the device reaches at best;
the loss op against its peers; training steps of real shapes; NVIDIA's sanitizer. Each phase runs in
processes of its own, so that a crash costs one unit of it. After every unit DIR/results.json and
DIR/report.md are replaced by complete ones: the run may be killed at any time, and `--resume` goes
on. Nothing is timed of an implementation that broke a rule.

Exit status: 0 all checks passed, 1 one failed, 3 no GPU, 4 the time was too short for all checks.
Works from a plain copy of the tree: nothing is installed or fetched; what is missing is named.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.gpu import report
from bench.gpu.units import ROOT, Setting

# Name and largest share of the whole time; what a phase leaves over is for those behind it, and the
# last one may take all that is left.
PHASES = {
    "environment": 0.10,
    "build": 0.30,
    "correctness": 0.22,
    "suite": 0.18,
    "ceilings": 0.06,
    "loss": 0.25,
    "steps": 0.30,
    "sanitizer": 1.0,
}
NO_GPU, UNFINISHED = 3, 4


class Results:
    """The records so far, on disk after every change."""

    def __init__(self, folder: Path, resume: bool) -> None:
        self.folder = folder
        self.file = folder / "results.json"
        self.data: dict[str, Any] = {"started": now(), "records": [], "not_run": []}
        if resume and self.file.exists():
            self.data = json.loads(self.file.read_text())
            self.data["not_run"] = []
        self.write()

    @property
    def records(self) -> list[dict[str, Any]]:
        return self.data["records"]

    def add(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        self.write()
        reason = f": {record['reason']}" if "reason" in record else ""
        text = f"{record['phase']:12} {record['status']:8} {record['key']}{reason}"
        print(f"{record['unit_seconds']:6.1f} s  {text[:190]}", flush=True)

    def write(self) -> None:
        replace(self.file, json.dumps(self.data, indent=1))
        replace(self.folder / "report.md", report.render(self.data))


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def replace(path: Path, text: str) -> None:
    """Whoever reads `path`, at any time, finds a whole file."""
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_text(text)
    fresh.replace(path)


class Worker:
    """A process with the units of a phase, and the lines that it tells."""

    def __init__(self, phase: str, setting: Setting, behind: set[str], log: Path) -> None:
        reading, writing = os.pipe()
        command = [sys.executable, "-m", "bench.gpu.worker", phase, setting.dumps()]
        with log.open("a") as output:
            self.process = subprocess.Popen(
                [*command, json.dumps(sorted(behind)), str(writing)],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(writing,),
                start_new_session=True,
                env=os.environ | {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"},
            )
        os.close(writing)
        self.reading = reading
        self.rest = b""

    def lines(self, until: list[float]) -> Iterator[dict[str, Any]]:
        """What it tells, until it ends or the time `until[0]` of the monotonic clock is over."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.reading, selectors.EVENT_READ)
            while True:
                if not selector.select(max(0.0, until[0] - time.monotonic())):
                    return
                data = os.read(self.reading, 1 << 16)
                if not data:
                    return
                *whole, self.rest = (self.rest + data).split(b"\n")
                for line in whole:
                    yield json.loads(line)

    def end(self) -> int:
        """Ends it and what it started; its exit status, negative for a signal of its own."""
        try:
            status = self.process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            status = 0
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.reading)
        return status


def run_phase(phase: str, setting: Setting, deadline: float, results: Results) -> None:
    """Runs the units of a phase that have no record yet, in as many processes as it takes.

    Once a unit took too long, those of its group are left out: a kernel that waits for ever would
    do so in each of them, and take the time of all others.
    """
    behind = {record["key"] for record in results.records if record["phase"] == phase}
    log = results.folder / f"{phase}.log"
    plan: list[str] = []
    left_out: list[str] = []
    barren = 0  # processes in a row that ended without a unit's result
    while time.monotonic() < deadline and barren < 2:
        worker = Worker(phase, setting, behind, log)
        until, running, begun, told = [deadline], None, time.monotonic(), False
        group = ""
        try:
            for line in worker.lines(until):
                if "plan" in line:
                    plan, told = line["plan"], not line["plan"]
                elif "begin" in line:
                    running, group, begun = line["begin"], line["group"], time.monotonic()
                    until[0] = min(deadline, begun + line["limit"])
                else:
                    running, until[0], told = None, deadline, True
                    behind.add(line["key"])
                    results.add({"phase": phase, **line})
        finally:
            late = time.monotonic() >= until[0]
            status = worker.end()
        if running is not None and not (late and until[0] == deadline):
            ended = "took too long" if late else f"the process ended with {status}"
            behind.add(running)
            record: dict[str, Any] = {"phase": phase, "key": running}
            record["status"] = "timeout" if late else "crashed"
            record["unit_seconds"] = time.monotonic() - begun
            results.add({**record, "reason": f"{ended}; see {log.name}"})
            told = True
            if late and group:
                left_out += [key for key in plan if key.startswith(group) and key not in behind]
                behind.update(left_out)
        barren = 0 if told else barren + 1
        if told and running is None and not [key for key in plan if key not in behind]:
            break
    left = left_out + [key for key in plan if key not in behind]
    if not plan and not behind:
        reason = "no time was left" if barren == 0 else f"its process fails; see {log.name}"
        left = [f"all of it: {reason}"]
    results.data["not_run"] += [{"phase": phase, "key": key} for key in left]
    results.write()


def has_gpu() -> bool:
    """Asked in another process, so that this one never holds a device."""
    code = "import torch, sys; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def exit_status(data: dict[str, Any]) -> int:
    """1: a rule was broken, or a check of ours crashed; 4: some check was not reached."""
    if report.broken(data["records"]):
        return 1
    unreached = {entry["phase"] for entry in data["not_run"]}
    return UNFINISHED if unreached & set(report.CHECKS) else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for the results")
    parser.add_argument("--minutes", type=float, default=9.0, help="the time for all of it")
    parser.add_argument("--only", nargs="+", choices=PHASES, default=list(PHASES), metavar="PHASE")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to try the check itself")
    parser.add_argument("--resume", action="store_true", help="keep the results that DIR holds")
    given = parser.parse_args(arguments)
    end = time.monotonic() + 60 * given.minutes - 5
    given.out.mkdir(parents=True, exist_ok=True)
    if given.device == "cuda" and not has_gpu():
        print(
            "gpu-check: torch finds no CUDA device here, so nothing was checked. Run it on a GPU "
            "machine, or try the check itself with --device cpu --quick.",
            file=sys.stderr,
        )
        return NO_GPU
    if given.device == "cpu" and not given.quick:
        parser.error("--device cpu is for trying the check itself: add --quick")
    results = Results(given.out, given.resume)
    phases = [phase for phase in PHASES if phase in given.only]
    for phase in phases:
        red = tuple(sorted(report.red(results.records)))
        setting = Setting(given.device, given.quick, str(given.out.resolve()), red)
        share = max(60.0, PHASES[phase] * 60 * given.minutes)
        until = end if phase == phases[-1] else min(end, time.monotonic() + share)
        run_phase(phase, setting, until, results)
    results.data["finished"] = now()
    results.write()
    print("", report.short(results.data), f"\n{given.out / 'report.md'}", sep="\n")
    return exit_status(results.data)


if __name__ == "__main__":
    sys.exit(main())
