"""Runs units in worker processes and keeps all results if a worker crashes or hangs.

This process never imports torch, so it cannot hang in a driver and holds no device.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.gpu import environment, report
from bench.gpu.units import ROOT, Setting

START_SECONDS = 45.0  # for a process to import everything and send its plan
PROBE_SECONDS = 20.0
PROBE_LEAST_SECONDS = 10.0
DEATH_SECONDS = 3.0  # wait for a killed process, which can hang in the driver


def get_time() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def replace_file(path: Path, text: str) -> None:
    """Write a file atomically: readers never see a partial file."""
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_text(text)
    fresh.replace(path)


class NotResumable(Exception):
    """The results in a folder cannot be resumed."""


def read_resumable(file: Path) -> dict[str, Any]:
    """The results of a full check of these sources. Raises NotResumable for any others."""
    try:
        data = json.loads(file.read_text())
        sources = report.find_machine(data["records"]).get("source_hash")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise NotResumable(f"{file} cannot be read: {error}") from None
    if "plan" in data:
        raise NotResumable(f"{file} is of --plan {data['plan']}, which cannot be resumed")
    if sources not in (None, environment.hash_sources()):
        raise NotResumable(f"{file} is of other sources; choose another --out")
    return data


def set_aside(folder: Path) -> None:
    """Rename the results of an earlier run, so that they are not overwritten."""
    old = [folder / name for name in ("results.json", "report.md", "verdict.json", "plan.log")]
    if not old[0].exists():
        return
    number = 1
    while any(path.with_stem(f"{path.stem}-{number}").exists() for path in old):
        number += 1
    for path in old:
        if path.exists():
            path.rename(path.with_stem(f"{path.stem}-{number}"))
    print(f"{folder} has results of an earlier run: renamed to results-{number}.json etc.")


class Results:
    """The records so far and the files made from them, written after every change."""

    def __init__(self, folder: Path, resume: bool = False) -> None:
        self.folder = folder
        self.file = folder / "results.json"
        self.data: dict[str, Any] = {"started": get_time(), "records": [], "not_run": []}
        self.data["hung"] = []
        if resume and self.file.exists():
            self.data |= read_resumable(self.file)
            self.data["not_run"] = []
        else:
            set_aside(folder)
        self.files: dict[Path, Callable[[dict[str, Any]], str]] = {
            folder / "report.md": report.render
        }
        self.lock = threading.Lock()
        self.write()

    @property
    def records(self) -> list[dict[str, Any]]:
        return self.data["records"]

    def add(self, record: dict[str, Any]) -> None:
        with self.lock:
            self.records.append(record)
            self.write()
        reason = f": {record['reason']}" if "reason" in record else ""
        text = f"{record['phase']:12} {record['status']:8} {record['key']}{reason}"
        print(f"{record['unit_seconds']:6.1f} s  {text[:190]}", flush=True)

    def write(self) -> None:
        replace_file(self.file, json.dumps(self.data, indent=1))
        for path, make in self.files.items():
            replace_file(path, attempt(make, self.data))


def attempt(make: Callable[[dict[str, Any]], str], data: dict[str, Any]) -> str:
    """`make(data)`, or the traceback as text if it raises: an error in a report must not end the
    run."""
    try:
        return make(data)
    except Exception:
        return f"results.json is complete; making this file failed:\n{traceback.format_exc()}"


def kill(process: subprocess.Popen[Any]) -> None:
    """Kill a process and its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(DEATH_SECONDS)


def probe_device(device: str, limit: float) -> bool:
    """Whether a new process computes a sum on the device within `limit` seconds."""
    code = f"import torch; torch.ones(1, device={device!r}).sum().item()"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        return process.wait(limit) == 0
    except subprocess.TimeoutExpired:
        return False
    finally:
        kill(process)


class Worker:
    """A process that runs a phase's units and sends JSON lines."""

    def __init__(
        self,
        source: str,
        setting: Setting,
        done: set[str],
        log: Path,
        environment: dict[str, str],
    ) -> None:
        reading, writing = os.pipe()
        command = [sys.executable, "-m", "bench.gpu.worker", source, setting.dumps()]
        with log.open("a") as output:
            self.process = subprocess.Popen(
                [*command, json.dumps(sorted(done)), str(writing)],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(writing,),
                start_new_session=True,
                env=os.environ | {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"} | environment,
            )
        os.close(writing)
        self.reading = reading
        self.rest = b""

    def read_lines(self, until: list[float]) -> Iterator[dict[str, Any]]:
        """Received lines, until the process ends or the monotonic time `until[0]` is reached."""
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

    def end(self, late: bool) -> int:
        """End the process and its children; returns the exit status, negative for a signal."""
        status = 0
        if not late:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = self.process.wait(timeout=1)
        kill(self.process)
        os.close(self.reading)
        return status


@dataclass
class Session:
    """State across phases: variants that hung, whether the device still answers."""

    setting: Setting
    results: Results
    environment: dict[str, str] = field(default_factory=dict)  # for all later processes
    end: float = float("inf")  # monotonic time at which a device probe must end
    gone: str = ""  # why no further unit can run
    log: str = ""  # common log of all phases; default: one log per phase
    probe: Callable[[str, float], bool] = probe_device

    @property
    def hung(self) -> list[str]:
        return self.results.data["hung"]

    def make_setting(self, only: tuple[str, ...] = ()) -> Setting:
        return dataclasses.replace(self.setting, hung=tuple(self.hung), only=only)

    def check_device(self) -> None:
        """Probe the device after a unit that was killed or broke its process."""
        limit = min(PROBE_SECONDS, self.end - time.monotonic())
        if limit < PROBE_LEAST_SECONDS:  # too short to be conclusive
            return
        if not self.gone and not self.probe(self.setting.device, limit):
            self.gone = "the device no longer answers"


def run_phase(
    source: str,
    session: Session,
    deadline: float,
    *,
    name: str = "",
    phase: str = "",
    only: tuple[str, ...] = (),
    probing: bool = True,
) -> bool:
    """Run the units of `source` ("module:function" of bench.gpu) that have no record yet, in as
    many processes as needed, until `deadline`.

    `name` is the log's name (unless the session has one) and the records' `step`; `phase` is the
    phase of records and of unreached units; both default to `source`. After a unit's timeout, all
    later units of its variant are skipped. If a process ends early, the device is probed, unless
    `probing` is false: the caller must probe it if this returns True.
    """
    name = name or source
    phase = phase or name
    results = session.results
    done = {r["key"] for r in results.records if r.get("step", r["phase"]) == name}
    log = results.folder / (session.log or f"{name}.log")
    plan: dict[str, tuple[str, str]] = {}  # key: variant, phase
    listed, troubled, cut_off = False, False, ""
    fruitless = 0  # consecutive processes without a result

    def record(key: str, **figures: Any) -> None:
        own = plan.get(key, ("", ""))[1] or phase
        step = {} if own == name else {"step": name}
        done.add(key)
        results.add({"phase": own, **step, "key": key, **figures})

    while time.monotonic() < deadline and fruitless < 2 and not session.gone:
        worker = Worker(source, session.make_setting(only), done, log, session.environment)
        begun, running, progress = time.monotonic(), "", False
        until = [min(deadline, begun + session.setting.patience * START_SECONDS)]
        broken = planned = False
        try:
            for line in worker.read_lines(until):
                if "plan" in line:
                    plan.update({key: (variant, own) for key, variant, own in line["plan"]})
                    listed, planned, progress = True, True, not line["plan"]
                    until[0] = deadline
                elif "begin" in line:
                    running, begun = line["begin"], time.monotonic()
                    until[0] = min(deadline, begun + line["limit"])
                else:
                    running, until[0], progress = "", deadline, True
                    ends, broken = line.pop("ends"), line.pop("broken")
                    session.environment.update(line.pop("environment", {}))
                    record(line.pop("key"), **line)
                    # Do not wait for the exit: a process can hang in the driver.
                    if ends or not has_waiting(plan, done, session):
                        break
        finally:
            late = time.monotonic() >= until[0]
            status = worker.end(late)
        if running and late and until[0] == deadline:
            cut_off = running
        elif running:
            ended = "timed out" if late else f"the process ended with status {status}"
            seconds = time.monotonic() - begun
            text = f"{ended}; see {log.name}"
            kind = "timeout" if late else "crashed"
            record(running, status=kind, unit_seconds=seconds, reason=text)
            progress = True
            if late and (variant := plan[running][0]) and variant not in session.hung:
                session.hung.append(variant)
        trouble = bool(running) or broken or (late and not planned)
        if trouble and probing:
            session.check_device()
        troubled = troubled or trouble
        fruitless = 0 if progress else fruitless + 1
        if planned and not has_waiting(plan, done, session):
            break
    left = [key for key in plan if key not in done]
    entries = [{"phase": plan[key][1] or phase, "key": key} for key in left]
    for entry in entries:
        if entry["key"] == cut_off:
            entry["reason"] = "interrupted at the end of the time"
    if not listed:
        reason = f"its process fails; see {log.name}" if fruitless else "no time was left"
        entries = [{"phase": phase, "key": f"all units: {session.gone or reason}"}]
    with results.lock:
        results.data["not_run"] += entries
        results.write()
    return troubled


def has_waiting(plan: dict[str, tuple[str, str]], done: set[str], session: Session) -> bool:
    """Whether a unit of the plan can still run."""
    return any(key not in done and plan[key][0] not in session.hung for key in plan)


def run_side_by_side(
    source: str,
    session: Session,
    deadline: float,
    variants: tuple[str, ...],
    *,
    name: str,
    phase: str,
) -> None:
    """`run_phase` for all variants concurrently, then one probe of the device."""

    def run_one(variant: str) -> bool:
        return run_phase(
            source, session, deadline, name=name, phase=phase, only=(variant,), probing=False
        )

    with ThreadPoolExecutor(max(1, len(variants))) as pool:
        if any(list(pool.map(run_one, variants))):
            session.check_device()
