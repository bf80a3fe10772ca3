"""Runs units in worker processes and keeps their results whatever happens to the workers.

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
DEATH_SECONDS = 3.0  # a killed process can hang in the driver: it is not awaited longer


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def replace(path: Path, text: str) -> None:
    """Write a file atomically: readers never see a partial one."""
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_text(text)
    fresh.replace(path)


class NotResumable(Exception):
    """The results in a folder cannot be continued."""


def resumable(file: Path) -> dict[str, Any]:
    """The results of a full check of these sources. Raises NotResumable for other results."""
    try:
        data = json.loads(file.read_text())
        sources = report.machine(data["records"]).get("source_hash")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise NotResumable(f"{file} cannot be read: {error}") from None
    if "plan" in data:
        raise NotResumable(f"{file} is of --plan {data['plan']}, which cannot be continued")
    if sources not in (None, environment.source_hash()):
        raise NotResumable(f"{file} is of other sources; choose another --out")
    return data


def set_aside(folder: Path) -> None:
    """Rename the results of an earlier run, so that a new run does not overwrite them."""
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
    """The records so far and files made from them, written after every change."""

    def __init__(self, folder: Path, resume: bool = False) -> None:
        self.folder = folder
        self.file = folder / "results.json"
        self.data: dict[str, Any] = {"started": now(), "records": [], "not_run": [], "hung": []}
        if resume and self.file.exists():
            self.data |= resumable(self.file)
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
        replace(self.file, json.dumps(self.data, indent=1))
        for path, make in self.files.items():
            replace(path, guarded(make, self.data))


def guarded(make: Callable[[dict[str, Any]], str], data: dict[str, Any]) -> str:
    """`make(data)`, or the traceback as text if it fails: an error in a report must not end the
    run."""
    try:
        return make(data)
    except Exception:
        return f"results.json is complete; making this file failed:\n{traceback.format_exc()}"


def kill(process: subprocess.Popen[Any]) -> None:
    """Kill a process and all processes of its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(DEATH_SECONDS)


def device_answers(device: str, limit: float) -> bool:
    """Whether a fresh process computes a sum on the device within `limit` seconds."""
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
    """A process that runs the units of a phase, and the JSON lines that it sends."""

    def __init__(
        self,
        source: str,
        setting: Setting,
        behind: set[str],
        log: Path,
        environment: dict[str, str],
    ) -> None:
        reading, writing = os.pipe()
        command = [sys.executable, "-m", "bench.gpu.worker", source, setting.dumps()]
        with log.open("a") as output:
            self.process = subprocess.Popen(
                [*command, json.dumps(sorted(behind)), str(writing)],
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

    def lines(self, until: list[float]) -> Iterator[dict[str, Any]]:
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
    """State across phases: variants that hung, and whether the device still answers."""

    setting: Setting
    results: Results
    environment: dict[str, str] = field(default_factory=dict)  # of all later processes
    end: float = float("inf")  # monotonic time that no probe of the device exceeds
    gone: str = ""  # why nothing more can run
    log: str = ""  # a common log of all phases; default: one per phase
    probe: Callable[[str, float], bool] = device_answers

    @property
    def hung(self) -> list[str]:
        return self.results.data["hung"]

    def current(self, only: tuple[str, ...] = ()) -> Setting:
        return dataclasses.replace(self.setting, hung=tuple(self.hung), only=only)

    def check_device(self) -> None:
        """Probe the device after a unit that was killed or broke its process."""
        limit = min(PROBE_SECONDS, self.end - time.monotonic())
        if limit < PROBE_LEAST_SECONDS:  # too short for a conclusion
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

    `name` is the name of the log (unless the session has one) and the `step` of records; `phase` is
    the phase of records and of unreached units; both default to `source`. After a timeout of a
    unit, all later units of its variant are skipped. If a process ends early, the device is probed,
    here or, without `probing`, by the caller: returns whether a process ended early.
    """
    name = name or source
    phase = phase or name
    results = session.results
    behind = {r["key"] for r in results.records if r.get("step", r["phase"]) == name}
    log = results.folder / (session.log or f"{name}.log")
    plan: dict[str, tuple[str, str]] = {}  # key: variant, phase
    listed, troubled, cut_off = False, False, ""
    barren = 0  # consecutive processes without a result

    def record(key: str, **figures: Any) -> None:
        own = plan.get(key, ("", ""))[1] or phase
        step = {} if own == name else {"step": name}
        behind.add(key)
        results.add({"phase": own, **step, "key": key, **figures})

    while time.monotonic() < deadline and barren < 2 and not session.gone:
        worker = Worker(source, session.current(only), behind, log, session.environment)
        begun, running, told = time.monotonic(), "", False
        until = [min(deadline, begun + session.setting.patience * START_SECONDS)]
        spoilt = planned = False
        try:
            for line in worker.lines(until):
                if "plan" in line:
                    plan.update({key: (variant, own) for key, variant, own in line["plan"]})
                    listed, planned, told = True, True, not line["plan"]
                    until[0] = deadline
                elif "begin" in line:
                    running, begun = line["begin"], time.monotonic()
                    until[0] = min(deadline, begun + line["limit"])
                else:
                    running, until[0], told = "", deadline, True
                    ends, spoilt = line.pop("ends"), line.pop("spoilt")
                    session.environment.update(line.pop("environment", {}))
                    record(line.pop("key"), **line)
                    # A process can hang in the driver at exit: it is not awaited.
                    if ends or not waiting(plan, behind, session):
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
            told = True
            if late and (variant := plan[running][0]) and variant not in session.hung:
                session.hung.append(variant)
        trouble = bool(running) or spoilt or (late and not planned)
        if trouble and probing:
            session.check_device()
        troubled = troubled or trouble
        barren = 0 if told else barren + 1
        if planned and not waiting(plan, behind, session):
            break
    left = [key for key in plan if key not in behind]
    entries = [{"phase": plan[key][1] or phase, "key": key} for key in left]
    for entry in entries:
        if entry["key"] == cut_off:
            entry["reason"] = "interrupted at the end of the time"
    if not listed:
        reason = f"its process fails; see {log.name}" if barren else "no time was left"
        entries = [{"phase": phase, "key": f"all units: {session.gone or reason}"}]
    with results.lock:
        results.data["not_run"] += entries
        results.write()
    return troubled


def waiting(plan: dict[str, tuple[str, str]], behind: set[str], session: Session) -> bool:
    """Whether a unit of the plan can still run."""
    return any(key not in behind and plan[key][0] not in session.hung for key in plan)


def run_side_by_side(
    source: str,
    session: Session,
    deadline: float,
    variants: tuple[str, ...],
    *,
    name: str,
    phase: str,
) -> None:
    """`run_phase` for all variants at the same time, then one probe of the device."""

    def one(variant: str) -> bool:
        return run_phase(
            source, session, deadline, name=name, phase=phase, only=(variant,), probing=False
        )

    with ThreadPoolExecutor(max(1, len(variants))) as pool:
        if any(list(pool.map(one, variants))):
            session.check_device()
