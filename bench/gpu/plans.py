"""Checks for a GPU machine that is to be had for a quarter of an hour, step by step.

A step has a time of its own; what it leaves over is for those behind it, and none can take more
than the steps up to it have together. So a plan ends in time whatever hangs, and what matters most
comes first. Results are on disk after every unit. A variant that hangs is left out of all later
steps; when the device no longer answers, the rest is named as not reached and the plan ends.
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
    phase: str = ""  # under which units without a phase of their own are recorded
    side_by_side: bool = False  # each variant in a process of its own, all at the same time
    in_turn: tuple[str, ...] = ()  # a process for each of these `variant`s of its units
    needs: str = ""  # the sound variant without which there is nothing to do
    judges: bool = False  # variants that do not pass here are not timed


@dataclass(frozen=True)
class Plan:
    name: str
    seconds: float  # in which it has ended
    first_answer: float  # seconds of the plan for the device to answer once
    steps: tuple[Step, ...]
    waits: float = 100.0  # seconds that it may take in fact, at the cost of the steps: torch comes
    # from a cold disk, and nothing can be checked without an answer
    margin: float = 15.0  # for a last process to be killed, and the table to be printed
    reads_verdict: bool = False
    keeps_verdict: bool = False
    kit: str = "gpu-kit"  # the folder of the tree that is unpacked


SET_UP = (
    Step("kit", "build:kit_units", 20, "build"),
    Step("machine", "environment:units", 10, "environment"),
)
"""Of plans that follow the first: what it has unpacked may be there."""

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
"""Its last steps have what is left: all have their time only where those before end early. With a
verdict of the first plan there is no smoke check, without one no time for more than the winner."""
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
"""Training steps alone, for when what they are made of has changed."""
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
"""One peer whose wheels are too large to travel with the others: the headline only."""
PLANS = {plan.name: plan for plan in (FIRST, SECOND, TRAINING, QUACK)}


def run(plan: Plan, session: Session, kept: Path, begun: float) -> None:
    """Runs the steps of a plan that began at the monotonic time `begun`.

    The verdict stands beside the results, and after each step of the first plan in `kept`, where
    the second looks for it. A verdict on another device or other sources is not used.
    """
    results = session.results
    results.data["plan"] = plan.name
    session.log = "plan.log"  # few files: not every way back from a machine takes many
    results.files[results.folder / "verdict.json"] = verdict.dumps
    patience = session.setting.patience
    end = session.end = begun + patience * (plan.seconds - plan.margin)
    # A late first answer costs the last steps, not the kit.
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
    """One step; with `judged`, nothing is timed of a variant that did not pass the smoke check."""
    data = session.results.data
    reason = session.gone
    if step.needs and step.needs not in verdict.sound(data):
        reason = reason or f"{step.needs} is not sound here"
    if reason:
        entry = {"phase": step.phase or step.name, "key": f"{step.name}: all of it"}
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
