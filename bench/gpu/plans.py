"""Short checks in steps, for a GPU machine that is available for 15 minutes.

The most important steps come first. Each step ends at the latest at the sum of the limits up to and
including its own; later steps use unused time. So a plan ends in time even if units hang. Results
are written after every unit. A variant that hangs is skipped in all later steps. If the device
stops answering, the remaining steps are recorded as not reached.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.gpu import report, verdict
from bench.gpu.run import Session, attempt, replace_file, run_phase, run_side_by_side
from bench.gpu.tuning import BUILDS
from bench.gpu.variants import CHECKED


@dataclass(frozen=True)
class Step:
    """The units that `units`, a "module:function" of bench.gpu, lists; at most `limit` seconds."""

    name: str
    units: str
    limit: float
    phase: str = ""  # phase of units that have none
    side_by_side: bool = False  # one process per variant, all at the same time
    in_turn: tuple[str, ...] = ()  # one process per variant listed, one after another
    needs: str = ""  # skip the step unless this variant is sound
    judges: bool = False  # variants that do not pass here are not timed


@dataclass(frozen=True)
class Plan:
    name: str
    seconds: float  # upper limit of the whole plan
    first_answer: float  # seconds planned for the device's first answer
    steps: tuple[Step, ...]
    waits: float = 100.0  # seconds to wait for it, taken from the steps: importing torch from a
    # cold disk is slow, and no check can run without an answer
    margin: float = 15.0  # to kill the last process and print the table
    reads_verdict: bool = False
    keeps_verdict: bool = False
    kit: str = "gpu-kit"  # the kit's folder in the tree


SET_UP = (
    Step("kit", "build:list_kit_units", 20, "build"),
    Step("machine", "environment:list_units", 10, "environment"),
)
"""First steps of later plans: the first one has usually unpacked the kit."""

FIRST = Plan(
    "first",
    seconds=400,
    first_answer=25,
    steps=(
        Step("kit", "build:list_kit_units", 70, "build"),
        Step("machine", "ceilings:list_machine_units", 30, "ceilings"),
        Step("smoke", "smoke:list_units", 55, "correctness", side_by_side=True, judges=True),
        Step("headline", "loss:list_headline_units", 70, "loss"),
        Step("heads", "loss:list_head_units", 40, "loss"),
        Step("peers", "loss:list_peer_units", 55, "loss"),
        Step("rules", "correctness:list_rule_units", 40, "correctness"),
    ),
    keeps_verdict=True,
)
SECOND = Plan(
    "second",
    seconds=330,
    first_answer=15,
    steps=(
        *SET_UP,
        Step("smoke", "smoke:list_units", 45, "correctness", side_by_side=True, judges=True),
        Step("attention", "attention:list_plan_units", 35, "correctness"),
        Step("steps", "steps:list_plan_units", 150, "steps"),
        Step("winner", "correctness:list_winner_units", 30, "correctness"),
        Step("tuning", "tuning:list_units", 50, "tuning"),
        Step("sanitizer", "sanitizer:list_plan_units", 15, "sanitizer"),
        Step("builds", "tuning:list_build_units", 20, "tuning", in_turn=BUILDS, needs="cuda fused"),
    ),
    reads_verdict=True,
)
"""The limits exceed the total: the last steps use the time that earlier ones leave. The first
plan's verdict replaces the smoke check; without one the plan ends with the winner's checks."""
TRAINING = Plan(
    "training",
    seconds=280,
    first_answer=15,
    steps=(
        *SET_UP,
        Step("attention", "attention:list_default_units", 35, "correctness"),
        Step("steps", "steps:list_plan_units", 185, "steps"),
    ),
)
"""Training steps alone, after changes to the model code."""
QUACK = Plan(
    "quack",
    seconds=240,
    first_answer=25,
    steps=(
        Step("kit", "build:list_wheel_units", 80, "build"),
        Step("machine", "environment:list_units", 10, "environment"),
        Step("smoke", "smoke:list_units", 50, "correctness", side_by_side=True, judges=True),
        Step("quack", "loss:list_quack_units", 60, "loss"),
    ),
    kit="gpu-kit-quack",
)
"""The headline with quack, whose wheels are too large for the common kit."""
PLANS = {plan.name: plan for plan in (FIRST, SECOND, TRAINING, QUACK)}


def run(plan: Plan, session: Session, kept: Path, begun: float) -> None:
    """Run the steps of a plan that began at the monotonic time `begun`.

    The verdict is written next to the results and, after each step of the first plan, to `kept`,
    which the second plan reads. A verdict for another device or other sources is ignored.
    """
    results = session.results
    results.data["plan"] = plan.name
    session.log = "plan.log"  # one log, as some transfers limit the number of files
    results.files[results.folder / "verdict.json"] = verdict.dumps
    patience = session.setting.patience
    end = session.end = begun + patience * (plan.seconds - plan.margin)
    # A late first answer shortens the last steps, not the kit step.
    until = max(begun + patience * plan.first_answer, time.monotonic())
    judged = False
    for step in plan.steps:
        until = min(end, until + patience * step.limit)
        if step.judges and plan.reads_verdict:
            known, text = verdict.read(
                kept, report.find_machine(results.records), results.data.get("quick", False)
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
            replace_file(kept, attempt(verdict.dumps, results.data))


def run_step(step: Step, session: Session, until: float, judged: bool) -> None:
    """Run one step. With `judged`, only variants that passed the smoke check are timed."""
    data = session.results.data
    reason = session.gone
    if step.needs and step.needs not in verdict.list_sound(data):
        reason = reason or f"{step.needs} has not passed its checks"
    if reason:
        entry = {"phase": step.phase or step.name, "key": f"{step.name}: all units"}
        data["not_run"].append({**entry, "reason": reason})
        session.results.write()
        return
    names = CHECKED[session.setting.device]
    red = set(report.find_red(data["records"]))
    if judged:
        red |= set(names) - set(verdict.list_sound(data))
    session.setting = dataclasses.replace(
        session.setting, red=tuple(sorted(red)), best=tuple(verdict.rank_sound(data))
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
