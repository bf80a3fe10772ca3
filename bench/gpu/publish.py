"""Converts results of GPU checks to records in bench/results and marked blocks in docs/.

A block lies between `<!-- gpu-report: NAME begin -->` and `<!-- gpu-report: NAME end -->`. It shows
the newest record of every card, so that a card's figures do not replace another card's. Rebuilding
gives the same text.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from bench.gpu import report, sections
from bench.gpu.sections import KERNELS, Record, make_table, name_step, select_ok

NOTHING = "Nothing has been measured on a GPU yet."
LOST = ("executable", "times", "seconds_of_rounds", "unit_seconds", "phases")
"""Fields removed from a record because they describe the host or are long."""
PLACES = re.compile(r"(?<![\w./])(?:/[\w.+@-]+){2,}/?")
"""Absolute paths."""
FIGURES = ("ceilings", "products", "loss", "steps")
"""Phases that record figures."""


class Refused(Exception):
    """The results cannot be published; the message gives the reason and the remedy."""


# --- merging --------------------------------------------------------------------------------------


def merge(runs: list[Record], *, force: bool = False, commit: str | None = None) -> Record:
    """One set of results from several runs on one device, in order of their start.

    The later record of a phase and key wins, but a skipped one replaces none, and a check that
    failed in any run stays failed. `commit` is the commit of the tree that was copied to the
    machine, for runs without git history. Raises Refused if devices differ, if one is not a GPU,
    or, unless forced, if source hashes differ.
    """
    runs = sorted(runs, key=lambda data: data["started"])
    machines = [report.find_machine(data["records"]) for data in runs]
    for data, machine in zip(runs, machines, strict=True):
        if data.get("quick"):
            raise Refused(f"the run of {data['started']} used tiny shapes (--quick)")
        if not machine:
            raise Refused(f"the run of {data['started']} does not name its machine")
        if "capability" not in machine:
            raise Refused(f"the run of {data['started']} was not on a GPU: {machine['device']}")
    if len(names := sorted({m["device"] for m in machines})) > 1:
        raise Refused(f"runs on different cards ({', '.join(names)}): publish each card separately")
    if len(hashes := sorted({m["source_hash"] for m in machines})) > 1 and not force:
        raise Refused(
            f"runs of different sources ({', '.join(hashes)}): publish one of them, or use "
            "--force if the changes do not affect the measurements"
        )
    records: dict[tuple[str, str], Record] = {}
    for number, data in enumerate(runs):
        for record in data["records"]:
            name = record["phase"], record["key"]
            if name not in records or supersedes(record, records[name]):
                records[name] = {**record, "run": number}
                if record["phase"] == "environment" and not record.get("commit"):
                    records[name]["commit"] = commit
    left = {(e["phase"], e["key"]): e for data in runs for e in data["not_run"]}
    return {
        "started": runs[0]["started"],
        "commands": [format_command(data) for data in runs],
        "hung": sorted({name for data in runs for name in data.get("hung", ())}),
        "source_hashes": hashes,
        "records": list(records.values()),
        "not_run": [entry for name, entry in left.items() if name not in records],
        **({"finished": runs[-1]["finished"]} if all("finished" in data for data in runs) else {}),
    }


def find_missing_figures(new: Record, folder: Path) -> tuple[str, int]:
    """(newest record of the same card, number of its figures that publishing `new` would remove
    from the pages)."""
    for name, old in read_published(folder):
        if name_card(old) == name_card(new):
            here, there = (
                {(r["phase"], r["key"]) for r in data["records"] if r["status"] == "ok"}
                for data in (new, old)
            )
            figures = {name for name in there - here if name[0] in FIGURES}
            return name, len(figures)
    return "", 0


def supersedes(later: Record, earlier: Record) -> bool:
    """Whether `later` replaces `earlier`."""
    if later["status"] == "skipped":
        return earlier["status"] == "skipped"
    failed = earlier["phase"] in report.CHECKS and earlier["status"] in report.BAD
    return not failed or later["status"] in report.BAD


def format_command(data: Record) -> str:
    """The command of a run."""
    plan = data.get("plan")
    return f"python -m bench.gpu_check --plan {plan}" if plan else "make gpu-check"


# --- the record -----------------------------------------------------------------------------------


def compact(value: Any) -> Any:
    """Remove host paths and fields that no table shows; round numbers to six digits."""
    if isinstance(value, dict):
        kept = {name: compact(item) for name, item in value.items() if name not in LOST}
        if "kernels" in kept:
            kept["kernels"] = kept["kernels"][:KERNELS]
        return kept
    if isinstance(value, list):
        return [compact(item) for item in value]
    if isinstance(value, str):
        return PLACES.sub(lambda found: found[0].rstrip("/").rpartition("/")[2], value)
    return float(f"{value:.6g}") if isinstance(value, float) else value


def dumps(data: Record) -> str:
    """JSON with one line per record."""
    data = compact(data)
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in data.items()
             if name != "records"]  # fmt: skip
    records = ",\n".join(json.dumps(record) for record in data["records"])
    return "{\n" + ",\n".join(lines) + f',\n"records": [\n{records}\n]\n}}\n'


def name_card(data: Record) -> str:
    """The card's name in file names: h100 for "NVIDIA H100 80GB HBM3"."""
    words = report.find_machine(data["records"])["device"].lower().split()
    words = [word for word in words if word != "nvidia"]
    first = next((word for word in words if re.search(r"\d", word)), "-".join(words))
    return re.sub(r"[^a-z0-9]+", "-", first).strip("-")


def name_file(data: Record) -> str:
    return f"gpu-{name_card(data)}-{data['started'][:10]}.json"


def read_published(folder: Path) -> list[tuple[str, Record]]:
    """(name, data) of every card's newest record in `folder`, sorted by card."""
    newest: dict[str, tuple[str, Record]] = {}
    for path in sorted(folder.glob("gpu-*.json")):  # a card's files sort by date
        data = json.loads(path.read_text())
        newest[name_card(data)] = path.name, data
    return [newest[name] for name in sorted(newest)]


# --- blocks ---------------------------------------------------------------------------------------


def replace_block(page: str, name: str, text: str) -> str:
    """The page with a block's text replaced. Raises Refused if the page lacks the block."""
    begin, end = (f"<!-- gpu-report: {name} {which} -->" for which in ("begin", "end"))
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
        raise Refused(f"the page must contain the lines {begin} and {end} once each, in this order")
    head, tail = page.split(begin)[0], page.split(end)[1]
    return f"{head}{begin}\n\n{text.strip()}\n\n{end}{tail}"


def make_checks_block(cards: list[tuple[str, Record]]) -> str:
    """Block of docs/gpu.md: machine, ceilings, checks, targets, measured against predicted."""
    parts = []
    for name, data in cards:
        records = data["records"]
        parts += [f"### {report.find_machine(records)['device']}", describe_origin(name, data)]
        parts.append(report.summarise(data))
        if rows := [[r["key"], sections.format_rate(r)] for r in select_ok(records, "ceilings")]:
            parts.append(make_table(["ceiling", "measured"], rows))
        parts += make_check_tables(records)
        if rows := report.list_targets(records):
            parts.append(make_table(report.TARGETS, rows))
        if rows := list_predicted_rows(data):
            header = ["head, T, case", "provider", "predicted, ms", "measured, ms", ""]
            parts.append(make_table(header, rows))
    return "\n\n".join(parts) or NOTHING


def describe_origin(name: str, data: Record) -> str:
    """Date, machine, versions, commands and file of a record."""
    commands = " and ".join(f"`{text}`" for text in dict.fromkeys(data["commands"]))
    line = report.describe_machine(data["records"])
    hashes = data["source_hashes"]
    sources = f"source hash {hashes[0]}"
    if len(hashes) > 1:
        sources = f"runs of different sources: {', '.join(hashes)}"
    record = f"Record: `bench/results/{name}`."
    return f"{data['started'][:10]}, {line}, {sources}, by {commands}. {record}"


def make_check_tables(records: list[Record]) -> list[str]:
    bad = report.find_failures(records)
    failures = "\n".join(f"- {r['status']}: {r['key']}: {r['reason']}" for r in bad)
    return [part for part in (report.make_check_counts(records), failures) if part]


def list_predicted_rows(data: Record) -> list[list[str]]:
    """Rows of the loss op's measurements that have a prediction."""
    records: list[Record] = data["records"]
    guess, rows = report.make_predictor(records), []
    for r in report.select_timed(records):
        if (want := guess(r)) is None:
            continue
        ms = r["seconds"] * 1e3
        result = "faster" if ms < want.low else "slower" if ms > want.high else "as predicted"
        place = f"{r['model']}, {r['tokens']}, {r['case']}"
        rows.append([place, r["provider"], report.format_span(want), f"{ms:.2f}", result])
    return rows


def make_figures_block(cards: list[tuple[str, Record]]) -> str:
    """Block of docs/performance.md: the loss op and training steps, with card and command."""
    parts = []
    for name, data in cards:
        device = report.find_machine(data["records"])["device"]
        tables = make_loss_tables(device, data) + make_step_tables(device, data)
        if not tables:
            tables = ["Nothing that passed its checks was timed."]
        parts += [f"### {device}", describe_origin(name, data), *tables]
    return "\n\n".join(parts) or NOTHING


def cite(data: Record, record: Record) -> str:
    return f"`{data['commands'][record['run']]}`"


def make_loss_tables(device: str, data: Record) -> list[str]:
    parts = []
    for (T, D, V, case), found in report.group_by_case(data["records"]).items():
        rows = []
        for r in found:
            errors = [f"{r['errors'][k]:.1e}" if k in r.get("errors", {}) else ""
                      for k in ("loss", "gradient")]  # fmt: skip
            # The floor of the same measurement: their rounds alternated.
            time = [f"{r[name] * 1e3:.2f}" for name in ("seconds", "floor_seconds")]
            time.append(f"{r['ratio_to_floor']:.3f}")
            rows.append([r["provider"], *time, sections.format_mib(r), *errors, cite(data, r)])
        title = f"**{case}**, T = {T}, D = {D}, V = {V}, {device}:"
        header = ["provider", "ms", "floor, ms", "x floor", "extra MiB", "loss error"]
        header += ["gradient error", "by"]
        parts += [title, make_table(header, rows)]
    return parts


def make_step_tables(device: str, data: Record) -> list[str]:
    found = select_ok(data["records"], "steps")
    rows = []
    wrong = sections.find_wrong_attention(data["records"])
    for r in found:
        for kind, s in r["steps"].items():
            if "pairs_per_second" not in s or kind in wrong:
                continue
            memory = s.get("peak_memory_bytes")
            rows.append(
                [
                    r["size"],
                    name_step(r),
                    r["attention"],
                    f"{s['pairs_per_second']:.3g}",
                    f"{s['seconds']:.3f}",
                    f"{s['mfu']:.1%}" if "mfu" in s else "",
                    "" if memory is None else f"{memory / report.GIB:.1f}",
                    cite(data, r),
                ]
            )
    if not rows:
        return []
    header = ["model", "step", "attention", "pairs per second", "s", "MFU"]
    header += ["peak memory, GiB", "by"]
    title = f"**Training steps**, {found[0]['pairs']} pairs, {found[0]['dtype']}, {device}:"
    parts = [title, make_table(header, rows)]
    profiled = sections.select_step_profiles(data["records"])
    if profiled := [r for r in profiled if r["provider"] not in wrong]:
        title = f"**Where the time of a step goes**, shares of its wall time, {device}:"
        parts += [title, sections.make_class_table(profiled)]
    return parts
