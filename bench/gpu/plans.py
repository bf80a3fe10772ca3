"""Short checks in steps, for a GPU machine that is available for a quarter of an hour.

Each step has a time limit; unused time goes to the next steps, and no step ends later than the
limits up to it add up to. So a plan ends in time even if units hang, and the most important steps
come first. Results are written after every unit. A variant that hangs is skipped in all later
steps. If the device stops answering, the remaining steps are recorded as not reached.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.gpu import report, verdict
from bench.gpu.run import Session, guarded, replace, run_phase, run_side_by_side
from bench.gpu.tuning import BUILDS
from bench.gpu.variants import CHECKED


@dataclass(frozen=True)
class Step:
    """Units of a "module:function" of bench.gpu, for at most `limit` seconds."""

    name: str
    units: str
    limit: float
    phase: str = ""  # of records of units without a phase
    side_by_side: bool = False  # one process per variant, all at the same time
    in_turn: tuple[str, ...] = ()  # one process after another for these `variant`s of its units
    needs: str = ""  # skip the step unless this variant is sound
    judges: bool = False  # variants that do not pass here are not timed


@dataclass(frozen=True)
class Plan:
    name: str
    seconds: float  # upper limit of the whole plan
    first_answer: float  # seconds planned for the first answer of the device
    steps: tuple[Step, ...]
    waits: float = 100.0  # seconds to wait for it, at the cost of the steps: importing torch from a
    # cold disk is slow, and nothing can be checked without an answer
    margin: float = 15.0  # to kill the last process and print the table
    reads_verdict: bool = False
    keeps_verdict: bool = False
    kit: str = "gpu-kit"  # folder of the kit in the tree


SET_UP = (
    Step("kit", "build:kit_units", 20, "build"),
    Step("machine", "environment:units", 10, "environment"),
)
"""First steps of plans after the first one, which may have unpacked the kit."""

FIRST = Plan(
    "first",
    seconds=400,
    first_answer=25,
    steps=(
        Step("kit", "build:kit_units", 70, "build"),
        Step("machine", "ceilings:machine_units", 30, "ceilings"),
        Step("smoke", "smoke:units", 55, "correctness", side_by_side=True, judges=True),
        Step("headline", "loss:headline_units", 70, "loss"),
        Step("heads", "loss:heads_units", 40, "loss"),
        Step("peers", "loss:peers_units", 55, "loss"),
        Step("rules", "correctness:rules_units", 40, "correctness"),
    ),
    keeps_verdict=True,
)
SECOND = Plan(
    "second",
    seconds=330,
    first_answer=15,
    steps=(
        *SET_UP,
        Step("smoke", "smoke:units", 45, "correctness", side_by_side=True, judges=True),
        Step("attention", "attention:plan_units", 35, "correctness"),
        Step("steps", "steps:plan_units", 150, "steps"),
        Step("winner", "correctness:winner_units", 30, "correctness"),
        Step("tuning", "tuning:units", 50, "tuning"),
        Step("sanitizer", "sanitizer:plan_units", 15, "sanitizer"),
        Step("builds", "tuning:build_units", 20, "tuning", in_turn=BUILDS, needs="cuda fused"),
    ),
    reads_verdict=True,
)
"""The limits exceed the total: the last steps use the time that earlier ones leave. A verdict of
the first plan replaces the smoke check; without one the plan ends with the winner's checks."""
TRAINING = Plan(
    "training",
    seconds=280,
    first_answer=15,
    steps=(
        *SET_UP,
        Step("attention", "attention:default_units", 35, "correctness"),
        Step("steps", "steps:plan_units", 185, "steps"),
    ),
)
"""Training steps alone, after changes of the model's side."""
QUACK = Plan(
    "quack",
    seconds=240,
    first_answer=25,
    steps=(
        Step("kit", "build:wheel_units", 80, "build"),
        Step("machine", "environment:units", 10, "environment"),
        Step("smoke", "smoke:units", 50, "correctness", side_by_side=True, judges=True),
        Step("quack", "loss:quack_units", 60, "loss"),
    ),
    kit="gpu-kit-quack",
)
"""The headline with one peer, whose wheels are too large for the common kit."""
PLANS = {plan.name: plan for plan in (FIRST, SECOND, TRAINING, QUACK)}


def run(plan: Plan, session: Session, kept: Path, begun: float) -> None:
    """Run the steps of a plan that began at the monotonic time `begun`.

    The verdict is written beside the results and, after each step of the first plan, to `kept`,
    from which the second plan reads it. A verdict of another device or other sources is ignored.
    """
    results = session.results
    results.data["plan"] = plan.name
    session.log = "plan.log"  # one log, as some transfers limit the number of files
    results.files[results.folder / "verdict.json"] = verdict.dumps
    patience = session.setting.patience
    end = session.end = begun + patience * (plan.seconds - plan.margin)
    # A late first answer shortens the last steps, not the kit's.
    until = max(begun + patience * plan.first_answer, time.monotonic())
    judged = False
    for step in plan.steps:
        until = min(end, until + patience * step.limit)
        if step.judges and plan.reads_verdict:
            known, text = verdict.read(
                kept, report.machine(results.records), results.data.get("quick", False)
            )
            results.data["verdict"] = text
            print(text, flush=True)
            if known is not None:
                results.data["known"] = known
                session.hung.extend(name for name in known["hung"] if name not in session.hung)
                judged = True
                continue
        run_step(step, session, until, judged)
        judged = judged or step.judges
        if plan.keeps_verdict:
            kept.parent.mkdir(parents=True, exist_ok=True)
            replace(kept, guarded(verdict.dumps, results.data))


def run_step(step: Step, session: Session, until: float, judged: bool) -> None:
    """Run one step. With `judged`, variants that did not pass the smoke check are not timed."""
    data = session.results.data
    reason = session.gone
    if step.needs and step.needs not in verdict.sound(data):
        reason = reason or f"{step.needs} has not passed its checks"
    if reason:
        entry = {"phase": step.phase or step.name, "key": f"{step.name}: all units"}
        data["not_run"].append({**entry, "reason": reason})
        session.results.write()
        return
    names = CHECKED[session.setting.device]
    red = set(report.red(data["records"]))
    if judged:
        red |= set(names) - set(verdict.sound(data))
    session.setting = dataclasses.replace(
        session.setting, red=tuple(sorted(red)), best=tuple(verdict.ranking(data))
    )
    named: dict[str, Any] = {"name": step.name, "phase": step.phase}
    if step.side_by_side:
        alive = tuple(name for name in names if name not in session.hung)
        run_side_by_side(step.units, session, until, alive, **named)
    elif step.in_turn:
        for variant in step.in_turn:
            run_phase(step.units, session, until, only=(variant,), **named)
    else:
        run_phase(step.units, session, until, **named)
