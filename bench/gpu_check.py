"""Checks and measures everything on a GPU: `python -m bench.gpu_check --out DIR`.

In this order: what the machine is; the native parts, built in place; every implementation against
float64 and the rules of the loss op; attention over packs against float32; the tests that need a
GPU; what the device reaches at best; the loss op against its peers; training steps of real shapes;
NVIDIA's sanitizer. Each phase runs in processes of its own, so that a crash costs one unit of it.
After every unit DIR/results.json and DIR/report.md are replaced by complete ones: the run may be
killed at any time, and `--resume` goes on. Nothing is timed of an implementation that broke a rule.

`--plan first` (400 s) and `--plan second` (330 s) do what matters most in the order in which it
matters, for a machine that is to be had for a quarter of an hour; bench/gpu/plans.py lists their
steps. Each is complete in itself. The second knows what the first found where both run in the
same tree on the same device. `--plan training` (280 s) times training steps alone, `--plan quack`
(240 s) compares with that peer at the headline.

Exit status: 0 all checks passed, 1 one failed, 2 wrong options, 3 no GPU, 4 the time was too short
for all checks, 130 interrupted.
Works from a plain copy of the tree: nothing is installed or fetched; what is missing is named.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

from bench.gpu import plans, report
from bench.gpu.run import NotResumable, Results, Session, device_answers, guarded, now, run_phase
from bench.gpu.units import ROOT, Setting

# Name and largest share of the whole time; what a phase leaves over is for those behind it, and the
# last one may take all that is left.
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
CPU_PATIENCE = 5.0  # limits of units and plans are meant for a GPU machine that does nothing else
FIRST_ANSWER_SECONDS = 60.0  # torch is imported from a cold disk


def exit_status(data: dict[str, Any]) -> int:
    """1: a rule was broken, or a check of ours crashed; 4: some check was not reached."""
    if report.broken(data["records"]):
        return 1
    unreached = {entry["phase"] for entry in data["not_run"]}
    return UNFINISHED if unreached & set(report.CHECKS) else 0


def run_all(session: Session, only: list[str], seconds: float) -> None:
    """The phases of the full check named in `only`."""
    end = session.end
    phases = [phase for phase in PHASES if phase in only]
    for phase in phases:
        red = tuple(sorted(report.red(session.results.records)))
        session.setting = dataclasses.replace(session.setting, red=red)
        share = max(60.0, PHASES[phase] * seconds)
        until = end if phase == phases[-1] else min(end, time.monotonic() + share)
        run_phase(phase, session, until)


def arguments_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for the results")
    parser.add_argument(
        "--plan", choices=plans.PLANS, help="a short check in place of the full one"
    )
    parser.add_argument(
        "--minutes", type=float, help=f"the time of the full check (default: {MINUTES:g})"
    )
    parser.add_argument(
        "--seconds", type=float, help="the time of a --plan, which all its limits are scaled to"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=PHASES,
        default=list(PHASES),
        metavar="PHASE",
        help=f"of the full check, some of: {', '.join(PHASES)}",
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu needs --quick"
    )
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to try the check itself")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the full check whose results DIR holds"
    )
    parser.add_argument(
        "--verdict",
        type=Path,
        metavar="FILE",
        default=ROOT / "runs" / "gpu-check" / "verdict.json",
        help="what the first plan leaves for the second (default: runs/gpu-check/verdict.json)",
    )
    parser.add_argument(
        "--kit",
        type=Path,
        metavar="DIR",
        help="what make gpu-kit made (default: gpu-kit; gpu-kit-quack for --plan quack)",
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    begun = time.monotonic()
    parser = arguments_parser()
    given = parser.parse_args(arguments)
    if given.device == "cpu" and not given.quick:
        parser.error("--device cpu is for trying the check itself: add --quick")
    if given.plan and (given.resume or given.only != list(PHASES) or given.minutes is not None):
        parser.error("--resume, --only and --minutes are for the full check, not for a --plan")
    if given.seconds is not None and not (given.plan and given.seconds >= SHORTEST_PLAN):
        parser.error(f"--seconds is for a --plan and at least {SHORTEST_PLAN:g}")
    if given.minutes is not None and not given.minutes > 0:
        parser.error(f"--minutes must be above 0, got {given.minutes:g}")
    try:
        given.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {given.out}: {error.strerror}; name a folder that can be written")
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
    if given.device == "cuda" and not device_answers("cuda", limit):
        print(
            "gpu-check: torch finds no CUDA device here, or it does not answer, so nothing was "
            "checked. Run it on a GPU machine, or try the check itself with --device cpu --quick.",
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
            f"No kit at {kit}: peers that are not installed are left out, and the CUDA kernels are "
            "built here. make gpu-kit makes one; git ignores it, so it must be carried by name.",
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
        print(f"\ngpu-check: interrupted; {results.file} holds what was done", file=sys.stderr)
        return INTERRUPTED
    results.data["finished"] = now()
    results.write()
    print("", guarded(report.short, results.data), f"\n{given.out / 'report.md'}", sep="\n")
    return exit_status(results.data)


if __name__ == "__main__":
    sys.exit(main())
