"""Sections of the report, each from the records of one phase."""

from __future__ import annotations

from typing import Any

from bench.gpu.cases import ATTENTION_CHECK, CLASSES, LOG_2, LOSS_ERROR, STEPS

Record = dict[str, Any]
STEP_COLUMNS = ("pairs_per_second", "seconds", "mfu", "peak_memory_bytes", "loss", "error")
KERNELS = 12  # number listed per profile


def make_table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def format_mib(record: Record) -> str:
    extra = record.get("extra_bytes")
    return "" if extra is None else f"{extra / 2**20:.0f}"


def select_ok(records: list[Record], phase: str) -> list[Record]:
    return [r for r in records if r["phase"] == phase and r["status"] == "ok"]


def format_rate(record: Record) -> str:
    """A ceiling's measured rate."""
    if "bytes_per_second" in record:
        return f"{record['bytes_per_second'] / 1e9:.4g} GB/s"
    return f"{record['flops_per_second'] / 1e12:.4g} TFLOP/s, {record['size']} cubed"


def describe_floors(record: Record) -> str:
    """The floor with both settings of the vendor library, and the clock."""
    found = record.get("floors", {})
    parts = [f"{seconds * 1e3:.3f} ms with {name}" for name, seconds in found.items()]
    text = f" Times: {', '.join(parts)}." if parts else ""
    return f"{text} Timed by {record['timed_by']}." if "timed_by" in record else text


def list_kit_notes(records: list[Record]) -> list[str]:
    """Unusable parts of the kit, with reasons."""
    return [f"Kit: {note}." for r in select_ok(records, "build") for note in r.get("notes", ())]


def make_products_part(records: list[Record]) -> list[str]:
    """Rates of the two products with the head, by rows per chunk and vendor settings."""
    found = select_ok(records, "products")
    if not found:
        return []
    names = list(found[0]["flops_per_second"])
    rows = [
        [str(r["rows"]), *(f"{r['flops_per_second'][name] / 1e12:.4g}" for name in names)]
        for r in found
    ]
    r = found[0]
    title = f"## Products with the head, D = {r['hidden']}, V = {r['vocabulary']}, TFLOP/s"
    return [title, make_table(["rows", *names], rows)]


def make_tuning_part(records: list[Record], red: set[str]) -> list[str]:
    """Times with non-default settings, and their expectations."""
    rows = [
        [
            r["key"],
            f"{r['seconds'] * 1e3:.3f}",
            f"{r['ratio_to_floor']:.3f}",
            format_mib(r),
            r["expected"],
        ]
        for r in select_ok(records, "tuning")
        if r["provider"] not in red
    ]
    if not rows:
        return []
    return ["## Settings", make_table(["setting", "ms", "x floor", "extra MiB", "expected"], rows)]


def make_profiles_part(records: list[Record], red: set[str]) -> list[str]:
    """Device time of a forward and backward by kernel."""
    parts = []
    for r in select_ok(records, "profile"):
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
        parts += [f"### {r['key']}", text, make_table(["kernel", "calls", "ms", "share"], rows)]
    return ["## Profiles", *parts] if parts else []


def select_step_profiles(records: list[Record]) -> list[Record]:
    return [r for r in select_ok(records, "profile") if "wall_seconds" in r]


def make_class_table(found: list[Record]) -> str:
    """Time of steps by kernel class, as shares of an unprofiled step's wall time, on which MFU is
    based; idle is time without a kernel."""
    header = ["step", "wall, s", "in kernels, s", *CLASSES, "idle"]
    rows = []
    for r in found:
        shares = compute_class_shares(r)
        name = f"{r['model']}: {r['provider']}"
        times = [f"{r['wall_seconds']:.3f}", f"{r['seconds']:.3f}"]
        rows.append([name, *times, *(f"{shares[kind]:.1%}" for kind in (*CLASSES, "idle"))])
    return make_table(header, rows)


def compute_class_shares(record: Record) -> dict[str, float]:
    """Shares of a step's wall time, or of its time in kernels if that is longer."""
    whole = max(record["wall_seconds"], record["seconds"])
    shares = {kind: record["classes"][kind] / whole for kind in CLASSES}
    return {**shares, "idle": 1 - record["seconds"] / whole}


def make_steps_part(records: list[Record]) -> list[str]:
    """A table per size with a row per step, then their time by kernel class."""
    parts = []
    found = select_ok(records, "steps")
    for size in dict.fromkeys(r["size"] for r in found):
        here = [r for r in found if r["size"] == size]
        rows = [
            [name_step(r), r["attention"], *(format_step_cell(s, key) for key in STEP_COLUMNS)]
            for r in here
            for s in r["steps"].values()
        ]
        text = f"{here[0]['pairs']} pairs, {here[0]['dtype']}, on {here[0]['device']}."
        header = ["step", "attention", *STEP_COLUMNS]
        parts += [f"## Steps of {size}", text, make_table(header, rows)]
    if profiled := select_step_profiles(records):
        parts += ["## Time of a step by class of kernel", make_class_table(profiled)]
    return parts


def name_step(record: Record) -> str:
    """The last part of a record's key: "ours, compiled", "trl in batches of 8"."""
    return record["key"].partition(": ")[2]


def format_step_cell(step: Record, key: str) -> str:
    value = step.get(key)
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def find_wrong_attention(records: list[Record]) -> set[str]:
    """Our steps whose attention failed its check; a timeout is not a failure."""
    failed = {
        r["key"]
        for r in records
        if r["phase"] == "correctness" and r["status"] in ("failed", "error", "crashed")
    }
    return {name for name, (check, _) in STEPS.items() if ATTENTION_CHECK.format(check) in failed}


def list_step_targets(records: list[Record]) -> list[list[str]]:
    """Rows [target, wanted, measured] of our fastest 7B step with correct loss and attention: MFU,
    and its rate relative to trl's best."""
    wrong = find_wrong_attention(records)
    mine: list[tuple[float, str, Record]] = []
    trl = 0.0
    for r in select_ok(records, "steps"):
        for name, step in r["steps"].items():
            if r["size"] != "7B" or "pairs_per_second" not in step:
                continue
            rate = step["pairs_per_second"]
            if name == "trl":
                trl = max(trl, rate)
            elif name in STEPS and name not in wrong and abs(step["loss"] - LOG_2) < LOSS_ERROR:
                mine.append((rate, name, step))
    if not mine:
        return []
    rate, name, step = max(mine, key=lambda found: found[0])
    what, rows = f"step of 7B, best of ours ({name})", []
    if "mfu" in step:
        rows.append([f"{what}: MFU", ">= 45 %", f"{step['mfu']:.0%}"])
    if trl:
        rows.append([f"{what} v trl", ">= 3 x", f"{rate / trl:.2f} x"])
    return rows


def make_summary_lines(records: list[Record], red: set[str]) -> list[str]:
    """Lines of tuning, steps, products and profiles in the summary of a run."""
    lines = []
    for r in select_ok(records, "tuning"):
        if r["provider"] not in red:
            text = f"{r['seconds'] * 1e3:9.2f} ms {r['ratio_to_floor']:6.3f} x floor"
            lines.append(f"{r['key'][:60]:60} {text}")
    for r in select_ok(records, "steps"):
        for name, step in r["steps"].items():
            if "pairs_per_second" in step:
                text = f"{step['pairs_per_second']:.3g} pairs/s"
                text += f", MFU {step['mfu']:.0%}" if "mfu" in step else ""
                lines.append(f"{'step of ' + r['size'] + ': ' + name:60} {text}")
    for r in select_ok(records, "products"):
        values = (f"{name} {x / 1e12:.0f}" for name, x in r["flops_per_second"].items())
        lines.append(f"rows {r['rows']:5}, TFLOP/s: {', '.join(values)}")
    for r in select_step_profiles(records):
        shares = (f"{kind} {share:.1%}" for kind, share in compute_class_shares(r).items())
        lines.append(f"step of {r['model']}, {r['provider']}, time: {', '.join(shares)}")
    for r in select_ok(records, "profile"):
        if r["provider"] not in red:
            longest = (f"{k['name'][:64]} {k['seconds'] * 1e3:.2f}" for k in r["kernels"][:5])
            lines.append(f"{r['key']}, ms: {'; '.join(longest)}")
    return lines
