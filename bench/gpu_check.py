"""Runs all checks and measurements on a GPU: `python -m bench.gpu_check --out DIR`.

Phases in order: environment; native extensions, built in place; every implementation against
float64 and the rules of the loss op; attention over packs against float32; the tests that need a
GPU; ceilings of the device; the loss op against its peers; training steps at real shapes; NVIDIA's
sanitizer. Each phase runs in worker processes, so that a crash loses one unit. DIR/results.json and
DIR/report.md are rewritten after every unit: the run can be killed at any time and continued with
`--resume`. Implementations that failed a check are not timed.

`--plan first` (400 s) and `--plan second` (330 s) run the most important units first, for a machine
that is available for 15 minutes; bench/gpu/plans.py lists their steps. Each plan can run alone. The
second uses the first one's verdict if both run in the same tree on the same device. `--plan
training` (280 s) times training steps only; `--plan quack` (240 s) compares with quack at the
headline.

Exit status: 0 all checks passed, 1 a check failed, 2 wrong options, 3 no GPU, 4 the time ended
before all checks ran, 130 interrupted.
Works in a plain copy of the tree: nothing is downloaded; missing packages are reported.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

from bench.gpu import plans, report
from bench.gpu.run import NotResumable, Results, Session, attempt, get_time, probe_device, run_phase
from bench.gpu.units import ROOT, Setting

# Largest share of the total time per phase. Later phases use unused time; the last one can use all
# that is left.
PHASES = {
    "environment": 0.10,
    "build": 0.30,
    "correctness": 0.22,
    "attention": 0.10,
    "suite": 0.18,
    "ceilings": 0.06,
    "loss": 0.25,
    "steps": 0.30,
    "sanitizer": 1.0,
}
NO_GPU, UNFINISHED, INTERRUPTED = 3, 4, 130
MINUTES = 9.0
SHORTEST_PLAN = 60.0  # seconds
CPU_PATIENCE = 5.0  # factor of the time limits, which suit an idle GPU machine
FIRST_ANSWER_SECONDS = 60.0  # includes importing torch from a cold disk


def get_exit_status(data: dict[str, Any]) -> int:
    """1 after a failed check, UNFINISHED if a check was not reached, else 0."""
    if report.find_failures(data["records"]):
        return 1
    unreached = {entry["phase"] for entry in data["not_run"]}
    return UNFINISHED if unreached & set(report.CHECKS) else 0


def run_all(session: Session, only: list[str], seconds: float) -> None:
    """Run the phases of the full check that `only` names."""
    end = session.end
    phases = [phase for phase in PHASES if phase in only]
    for phase in phases:
        red = tuple(sorted(report.find_red(session.results.records)))
        session.setting = dataclasses.replace(session.setting, red=red)
        share = max(60.0, PHASES[phase] * seconds)
        until = end if phase == phases[-1] else min(end, time.monotonic() + share)
        run_phase(phase, session, until)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="results folder")
    parser.add_argument("--plan", choices=plans.PLANS, help="a short check instead of the full one")
    parser.add_argument(
        "--minutes", type=float, help=f"time of the full check (default: {MINUTES:g})"
    )
    parser.add_argument(
        "--seconds", type=float, help="time of a --plan; scales all of its time limits"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=PHASES,
        default=list(PHASES),
        metavar="PHASE",
        help=f"phases of the full check to run: {', '.join(PHASES)}",
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu needs --quick"
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny shapes, to test the check itself"
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue the full check whose results are in DIR"
    )
    parser.add_argument(
        "--verdict",
        type=Path,
        metavar="FILE",
        default=ROOT / "runs" / "gpu-check" / "verdict.json",
        help="verdict of the first plan for the second (default: runs/gpu-check/verdict.json)",
    )
    parser.add_argument(
        "--kit",
        type=Path,
        metavar="DIR",
        help="output of make gpu-kit (default: gpu-kit; gpu-kit-quack for --plan quack)",
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    begun = time.monotonic()
    parser = build_parser()
    given = parser.parse_args(arguments)
    if given.device == "cpu" and not given.quick:
        parser.error("--device cpu only tests the check itself: add --quick")
    if given.plan and (given.resume or given.only != list(PHASES) or given.minutes is not None):
        parser.error("--resume, --only and --minutes cannot be used with --plan")
    if given.seconds is not None and not (given.plan and given.seconds >= SHORTEST_PLAN):
        parser.error(f"--seconds needs a --plan and must be at least {SHORTEST_PLAN:g}")
    if given.minutes is not None and not given.minutes > 0:
        parser.error(f"--minutes must be above 0, got {given.minutes:g}")
    try:
        given.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {given.out}: {error.strerror}; name a writable folder")
    plan = plans.PLANS.get(given.plan)
    patience = CPU_PATIENCE if given.device == "cpu" else 1.0
    if plan and given.seconds:
        patience = given.seconds / plan.seconds
    kit = given.kit or ROOT / (plan or plans.FIRST).kit
    setting = Setting(
        given.device,
        given.quick,
        str(given.out.resolve()),
        patience=patience,
        kit=str(kit.resolve()),
        scratch=str(given.verdict.resolve().parent / "kit"),
    )
    limit = plan.waits if plan else FIRST_ANSWER_SECONDS
    if given.device == "cuda" and not probe_device("cuda", limit):
        print(
            "gpu-check: torch finds no CUDA device, or the device does not answer. Nothing was "
            "checked. Run this on a GPU machine, or test the check with --device cpu --quick.",
            file=sys.stderr,
        )
        return NO_GPU
    try:
        results = Results(given.out, given.resume and plan is None)
    except NotResumable as reason:
        parser.error(f"--resume: {reason}")
    results.data["quick"] = given.quick
    session = Session(setting, results)
    if plan and not kit.is_dir():
        print(
            f"No kit at {kit}: peers that are not installed are skipped, and the CUDA kernels are "
            "built on this machine. make gpu-kit builds one; git ignores it: copy it explicitly.",
            flush=True,
        )
    try:
        if plan:
            plans.run(plan, session, given.verdict, begun)
        else:
            seconds = 60 * (given.minutes or MINUTES)
            session.end = begun + seconds - 5
            run_all(session, given.only, seconds)
    except KeyboardInterrupt:
        print(f"\ngpu-check: interrupted; {results.file} has the results so far", file=sys.stderr)
        return INTERRUPTED
    results.data["finished"] = get_time()
    results.write()
    print("", attempt(report.make_summary, results.data), "", given.out / "report.md", sep="\n")
    return get_exit_status(results.data)


if __name__ == "__main__":
    sys.exit(main())
