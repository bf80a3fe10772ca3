"""Parts of the report that need nothing but records of one phase each."""

from __future__ import annotations

from typing import Any

Record = dict[str, Any]
STEP_COLUMNS = ("pairs_per_second", "seconds", "mfu", "peak_memory_bytes", "loss", "error")
KERNELS = 12  # of a profile that are listed


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def mib(record: Record) -> str:
    extra = record.get("extra_bytes")
    return "" if extra is None else f"{extra / 2**20:.0f}"


def measured(records: list[Record], phase: str) -> list[Record]:
    return [r for r in records if r["phase"] == phase and r["status"] == "ok"]


def rate(record: Record) -> str:
    """Of a ceiling."""
    if "bytes_per_second" in record:
        return f"{record['bytes_per_second'] / 1e9:.4g} GB/s"
    return f"{record['flops_per_second'] / 1e12:.4g} TFLOP/s, {record['size']} cubed"


def floors(record: Record) -> str:
    """The floor under both settings of the vendor library, and what clock was used."""
    found = record.get("floors", {})
    parts = [f"{seconds * 1e3:.3f} ms with {name}" for name, seconds in found.items()]
    text = f" It takes {', '.join(parts)}." if parts else ""
    return f"{text} Timed by {record['timed_by']}." if "timed_by" in record else text


def kit_notes(records: list[Record]) -> list[str]:
    """What of the kit could not be used, and why."""
    return [f"Kit: {note}." for r in measured(records, "build") for note in r.get("notes", ())]


def products(records: list[Record]) -> list[str]:
    """Rates of the two products with the head, by rows of a chunk and vendor settings."""
    found = measured(records, "products")
    if not found:
        return []
    names = list(found[0]["flops_per_second"])
    rows = [
        [str(r["rows"]), *(f"{r['flops_per_second'][name] / 1e12:.4g}" for name in names)]
        for r in found
    ]
    r = found[0]
    title = f"## Products with the head, D = {r['hidden']}, V = {r['vocabulary']}, TFLOP/s"
    return [title, table(["rows", *names], rows)]


def tuning(records: list[Record], red: set[str]) -> list[str]:
    """Settings tried beside the default one, and what was expected of them."""
    rows = [
        [
            r["key"],
            f"{r['seconds'] * 1e3:.3f}",
            f"{r['ratio_to_floor']:.3f}",
            mib(r),
            r["expected"],
        ]
        for r in measured(records, "tuning")
        if r["provider"] not in red
    ]
    if not rows:
        return []
    return ["## Settings", table(["what", "ms", "x floor", "extra MiB", "expected"], rows)]


def profiles(records: list[Record], red: set[str]) -> list[str]:
    """Device time by kernel of one forward and backward."""
    parts = []
    for r in measured(records, "profile"):
        if r["provider"] in red:
            continue
        total = r["seconds"]
        rows = [
            [
                f"`{k['name'][:90]}`".replace("|", "\\|"),
                f"{k['calls']:.3g}",
                f"{k['seconds'] * 1e3:.3f}",
                f"{k['seconds'] / total:.1%}",
            ]
            for k in r["kernels"][:KERNELS]
        ]
        text = f"{total * 1e3:.3f} ms in kernels per call."
        parts += [f"### {r['key']}", text, table(["kernel", "calls", "ms", "share"], rows)]
    return ["## Profiles", *parts] if parts else []


def steps(records: list[Record]) -> list[str]:
    parts = []
    for r in measured(records, "steps"):
        rows = [
            [name, *(step_cell(s, key) for key in STEP_COLUMNS)] for name, s in r["steps"].items()
        ]
        text = f"{r['pairs']} pairs, {r['dtype']}, attention {r['attention']}, on {r['device']}."
        parts += [f"## Step of {r['key']}", text, table(["", *STEP_COLUMNS], rows)]
    return parts


def step_cell(step: Record, key: str) -> str:
    value = step.get(key)
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def step_requirements(records: list[Record]) -> list[list[str]]:
    """[what, wanted, measured]: the 7B step's MFU, and its rate beside the best of trl's."""
    rates: dict[str, float] = {}
    rows = []
    for r in measured(records, "steps"):
        for name, step in r["steps"].items():
            if r["size"] == "7B" and "pairs_per_second" in step:
                rates[name] = max(rates.get(name, 0.0), step["pairs_per_second"])
                if name == "ours" and "mfu" in step:
                    rows.append(["step of 7B: MFU", ">= 45 %", f"{step['mfu']:.0%}"])
    if {"ours", "trl"} <= set(rates):
        rows.append(["step of 7B v trl", ">= 3 x", f"{rates['ours'] / rates['trl']:.2f} x"])
    return rows


def short_lines(records: list[Record], red: set[str]) -> list[str]:
    """What the table that ends a run says of tuning, steps, products and profiles."""
    lines = []
    for r in measured(records, "tuning"):
        if r["provider"] not in red:
            text = f"{r['seconds'] * 1e3:9.2f} ms {r['ratio_to_floor']:6.3f} x floor"
            lines.append(f"{r['key'][:60]:60} {text}")
    for r in measured(records, "steps"):
        for name, step in r["steps"].items():
            if "pairs_per_second" in step:
                text = f"{step['pairs_per_second']:.3g} pairs/s"
                text += f", MFU {step['mfu']:.0%}" if "mfu" in step else ""
                lines.append(f"{'step of ' + r['size'] + ': ' + name:60} {text}")
    for r in measured(records, "products"):
        values = (f"{name} {x / 1e12:.0f}" for name, x in r["flops_per_second"].items())
        lines.append(f"rows {r['rows']:5}, TFLOP/s: {', '.join(values)}")
    for r in measured(records, "profile"):
        if r["provider"] not in red:
            worst = (f"{k['name'][:64]} {k['seconds'] * 1e3:.2f}" for k in r["kernels"][:5])
            lines.append(f"{r['key']}, ms: {'; '.join(worst)}")
    return lines
