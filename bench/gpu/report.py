"""The report of a GPU check: the Markdown page, and the summary printed at the end."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

from bench.gpu import cases, sections
from bench.gpu.cases import LSE_ONLY
from bench.gpu.predictions import Span, predict
from bench.gpu.sections import Record, format_mib, make_table
from bench.gpu.variants import REPORTED as OURS
from cpo_fast.counting import counted
from cpo_fast.testing.error_rule import allowed_error

CHECKS = ("correctness", "suite", "sanitizer")
"""Phases whose failures are faults of this package."""
MEASUREMENTS = ("ceilings", "products", "loss", "tuning", "profile", "steps")
BAD = ("failed", "error", "crashed", "timeout")
ONLINE = ", reference on-line"
COMMON = ("phase", "step", "key", "status", "unit_seconds")
HEADLINE = ("7B", cases.TOKENS), ("tiny", 64)  # model and T; the latter with --quick
SUITES = {
    "test_triton": ("triton lean",),
    "test_cuda": ("cuda rows", "cuda fused"),
}
ROUNDING = 2**-8  # of bfloat16: the band of the error rule
GIB = 2**30
OUT_OF_MEMORY = "OutOfMemoryError"  # not a fault of ours: the card is too small
SHORT_CHARACTERS = 11000  # limit of the summary: often only the end of the output is visible
TARGETS = ["target", "wanted", "measured"]
"""Header of `list_targets` as a table."""


def find_failures(records: list[Record]) -> list[Record]:
    """Failed checks and builds, and our measurements that crashed or violate the error rule.

    A measurement that timed out is not a proven fault; it is listed among the timeouts."""
    phases = (*CHECKS, "build")
    found = [r for r in records if r["phase"] in phases and r["status"] in BAD]
    found += [
        r
        for r in records
        if r["phase"] == "loss" and r["status"] in ("failed", "error", "crashed")
        if r["key"].rpartition(": ")[2] in OURS and OUT_OF_MEMORY not in r["reason"]
    ]
    loss = sections.select_ok(records, "loss")
    for r in loss:
        if r["provider"] in OURS and check_error_rule(r, loss) is False:
            found.append(
                r | {"status": "failed", "reason": f"errors beyond the rule: {r['errors']}"}
            )
    return found


def find_red(records: list[Record]) -> set[str]:
    """Variants that failed a check: no speed is claimed for them."""
    found: set[str] = set()
    for record in find_failures(records):
        head, _, tail = record["key"].partition(": ")
        if record["phase"] == "correctness":
            found.add(head)
        elif record["phase"] in ("sanitizer", "loss"):
            found.add(tail)
        else:
            for prefix, variants in SUITES.items():
                if record["key"].startswith(prefix):
                    found.update(variants)
    return found


def select_timed(records: list[Record]) -> list[Record]:
    """Measurements of the loss op, except of red variants."""
    bad = find_red(records)
    return [r for r in sections.select_ok(records, "loss") if r["provider"] not in bad]


def check_error_rule(record: Record, records: list[Record]) -> bool | None:
    """Whether errors are at most twice eager's plus a rounding; None if eager was not measured."""
    same = ("case", "tokens", "hidden", "vocabulary")
    for other in records:
        if other["provider"] == "eager" and all(other.get(k) == record.get(k) for k in same):
            errors, theirs = record.get("errors", {}), other["errors"]
            return all(errors[k] <= allowed_error(theirs[k], ROUNDING) for k in errors)
    return None


def is_headline(record: Record) -> bool:
    place = record.get("model"), record["tokens"]
    return place in HEADLINE and record["case"] == "frozen head" + ONLINE


def name_case(record: Record) -> str:
    """A measurement's key without the provider."""
    return f"{record.get('model')} T={record['tokens']}, {record['case']}"


def is_headline_name(name: str) -> bool:
    return name in [f"{model} T={T}, frozen head{ONLINE}" for model, T in HEADLINE]


def get_head(record: Record) -> tuple[int, int]:
    return record["vocabulary"], record["hidden"]


def find_winners(records: list[Record]) -> list[str]:
    """Entries for cpo_fast/loss/cuda.py: heads whose fastest variant of ours was the same CUDA path
    in every case that was measured with all implementations."""
    times: dict[tuple[int, int], dict[tuple[Any, ...], dict[str, float]]] = {}
    for r in select_timed(records):
        if r["provider"] in OURS and r["case"] != LSE_ONLY:
            case = (r["case"], r["tokens"])
            times.setdefault(get_head(r), {}).setdefault(case, {})[r["provider"]] = r["seconds"]
    found = []
    for (V, D), measured in sorted(times.items()):
        full = [t for t in measured.values() if {"triton lean", "cuda rows"} <= set(t)]
        for path in ("rows", "fused"):
            name = f"cuda {path}"
            if full and all(name in t and min(t, key=t.__getitem__) == name for t in full):
                origin = describe_machine(records)
                found.append(f'({V}, {D}): Measured("{path}", "{origin}"),')
    return found


def find_machine(records: list[Record]) -> Record:
    """The machine's description; {} if unknown."""
    return next(iter(sections.select_ok(records, "environment")), {})


def describe_machine(records: list[Record]) -> str:
    m = find_machine(records)
    if not m:
        return "unknown machine"
    commit = (m["commit"] or "")[:12] or f"unknown, sources {m['source_hash']}"
    changed = f" with {m['changed_files']} changed files" if m["changed_files"] else ""
    torch, triton = (m["versions"].get(name) for name in ("torch", "triton"))
    return f"{m['device']}, torch {torch}, triton {triton}, commit {commit}{changed}"


def summarise(data: Record) -> str:
    """One sentence: failed checks, timeouts, units that were not reached."""
    bad, left = find_failures(data["records"]), Counter(e["phase"] for e in data["not_run"])
    words = []
    if bad:
        words.append(f"RED: {counted(len(bad), 'check')} failed")
        names = sorted(find_red(data["records"]))
        if names:
            words.append(f"no speed is claimed for {', '.join(names)}")
    else:
        passed = sum(r["phase"] in CHECKS and r["status"] == "ok" for r in data["records"])
        words.append(f"{counted(passed, 'check')} passed, none failed")
    if hung := data.get("hung"):
        words.append(f"timed out and skipped afterwards: {', '.join(hung)}")
    if left:
        words.append("not reached: " + ", ".join(f"{n} of {p}" for p, n in left.items()))
    if "finished" not in data:
        words.append("the run is not finished")
    return "; ".join(words) + "."


def list_targets(records: list[Record]) -> list[list[str]]:
    """Rows [target, wanted, measured] of the targets that were measured."""
    rows: list[list[str]] = []
    op = select_timed(records)
    for case, most in (("frozen head", 1.10), ("trained head", 1.12)):
        here = [r for r in op if r["case"] == case + ONLINE and r["tokens"] == 8192]
        here = [r for r in here if r["hidden"] == 3584]
        mine = [r for r in here if r["provider"] in OURS]
        if not mine:
            continue
        best = min(mine, key=lambda r: r["seconds"])
        what = f"7B, T = 8192, {case}, best of ours ({best['provider']})"
        rows.append([f"{what}: x floor", f"<= {most}", f"{best['ratio_to_floor']:.3f}"])
        peers = [r for r in here if r["provider"] not in OURS]
        if peers:
            fastest = min(peers, key=lambda r: r["seconds"])
            gain = fastest["seconds"] / best["seconds"]
            rows.append([f"{what} v {fastest['provider']}", ">= 1.4 x", f"{gain:.2f} x"])
        if case == "frozen head" and best.get("extra_bytes") is not None:
            extra = best["extra_bytes"] / GIB
            rows.append([f"{what}: extra memory", "<= 1.2 GiB", f"{extra:.2f} GiB"])
    every = sections.select_ok(records, "loss")
    judged = [check_error_rule(r, every) for r in every if r["provider"] in OURS and "errors" in r]
    if judged := [rule for rule in judged if rule is not None]:
        rows.append(["errors within the rule", "all", f"{sum(judged)} of {len(judged)}"])
    lse = [r for r in op if r["case"] == LSE_ONLY and r["hidden"] == 3584 and r["tokens"] == 8192]
    if lse:
        best = min(lse, key=lambda r: r["seconds"])
        share = best["flops_per_second"] / best["floor_flops_per_second"]
        what = f"7B, T = 8192, log-probs alone ({best['provider']}): of the bare product's rate"
        rows.append([what, ">= 90 %", f"{share:.0%}"])
    return rows + sections.list_step_targets(records)


def make_summary(data: Record) -> str:
    """The text printed at the end of a run."""
    records = data["records"]
    lines = [describe_machine(records), summarise(data)]
    lines += [data["verdict"]] if "verdict" in data else []
    lines += sections.list_kit_notes(records)
    for r in find_failures(records)[:8]:
        lines.append(f"  {r['status']}: {r['key']}: {r['reason']}"[:160])
    for r in sections.select_ok(records, "ceilings"):
        lines.append(f"{r['key']:60} {sections.format_rate(r)}")
    for what, wanted, measured in list_targets(records):
        lines.append(f"{what[:100]:100} {measured}  (wanted {wanted})")
    guess = make_predictor(records)
    for r in select_timed(records):
        name = f"T={r['tokens']} D={r['hidden']} {r['case']}: {r['provider']}"
        text = f"{r['seconds'] * 1e3:9.2f} ms {r['ratio_to_floor']:6.2f} x floor"
        want = guess(r)
        lines.append(
            f"{name[:72]:72} {text}" + (f"  predicted {format_span(want)} ms" if want else "")
        )
    lines += sections.make_summary_lines(records, find_red(records))
    text = ""
    for line in lines:
        if len(text) + len(line) > SHORT_CHARACTERS:
            return text + "... the rest is in report.md"
        text += line + "\n"
    return text.rstrip()


def list_reasons(entry: Record) -> list[str]:
    return [entry["reason"]] if "reason" in entry else []


def make_predictor(records: list[Record]) -> Callable[[Record], Span | None]:
    """A function that returns the prediction for a measurement of the loss op on this device."""
    device = str(find_machine(records).get("device"))

    def guess(record: Record) -> Span | None:
        if record["tokens"] != cases.TOKENS:
            return None
        return predict(device, record["provider"], record["case"], str(record.get("model")))

    return guess


def format_span(found: Span | None) -> str:
    return "" if found is None else f"{found.low:.4g} to {found.high:.4g}"


def group_by_case(records: list[Record]) -> dict[tuple[Any, ...], list[Record]]:
    """Measurements of the loss op by (T, D, V, case), fastest first; cases in order of time."""
    groups: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    for r in select_timed(records):
        groups[r["tokens"], r["hidden"], r["vocabulary"], r["case"]].append(r)
    return {key: sorted(found, key=lambda r: r["seconds"]) for key, found in groups.items()}


def select_checks(records: list[Record]) -> list[Record]:
    return [r for phase in ("build", *CHECKS) for r in records if r["phase"] == phase]


def make_check_counts(records: list[Record]) -> str:
    """A table of check counts by phase, variant and status; "" without checks."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for r in select_checks(records):
        name = r["key"].partition(": ")[0] if r["phase"] == "correctness" else ""
        counts[f"{r['phase']} {name}".strip()][r["status"]] += 1
    if not counts:
        return ""
    statuses = [s for s in ("ok", "skipped", *BAD) if any(c[s] for c in counts.values())]
    rows = [[name, *(str(c[s] or "") for s in statuses)] for name, c in counts.items()]
    return make_table(["checks", *statuses], rows)


def render(data: Record) -> str:
    """The complete report, from the records so far."""
    records: list[Record] = data["records"]
    parts = [
        "# GPU check",
        f"{describe_machine(records)}. Started {data['started']}.",
        summarise(data),
    ]
    parts += [data["verdict"]] if "verdict" in data else []
    parts += sections.list_kit_notes(records)
    if m := find_machine(records):
        shown = {k: v for k, v in m.items() if k not in COMMON}
        versions = shown.pop("versions")
        rows = [[k, str(v)] for k, v in shown.items()]
        rows += [[name, version or "not installed"] for name, version in versions.items()]
        parts += ["## Machine", make_table(["property", "value"], rows)]
    if rows := list_targets(records):
        parts += ["## Targets", make_table(TARGETS, rows)]
    if counts := make_check_counts(records):
        parts += ["## Checks", counts]
        for title, wanted in (("Failures", BAD), ("Skipped", ("skipped",))):
            found = [r for r in select_checks(records) if r["status"] in wanted]
            if found:
                lines = [f"- {r['phase']}, {r['key']}: {r['reason']}" for r in found]
                parts += [f"### {title}", "\n".join(lines)]
    if ceilings := sections.select_ok(records, "ceilings"):
        rows = [[r["key"], sections.format_rate(r)] for r in ceilings]
        parts += ["## Ceilings", make_table(["ceiling", "measured"], rows)]
    parts += sections.make_products_part(records) + make_loss_part(records)
    bad = find_red(records)
    parts += sections.make_tuning_part(records, bad) + sections.make_profiles_part(records, bad)
    parts += sections.make_steps_part(records)
    quiet = [r for r in records if r["phase"] in MEASUREMENTS]
    if lines := [
        f"- {r['phase']}, {r['key']}: {r['status']}, {r['reason']}" for r in quiet if "reason" in r
    ]:
        parts += ["## Not measured", "\n".join(lines)]
    if data["not_run"]:
        lines = [
            f"- {': '.join([entry['phase'] + ', ' + entry['key'], *list_reasons(entry)])}"
            for entry in data["not_run"]
        ]
        parts += ["## Not reached in the time", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def make_loss_part(records: list[Record]) -> list[str]:
    op, guess, groups = select_timed(records), make_predictor(records), group_by_case(records)
    parts = ["## Loss op"] if groups else []
    for (T, D, V, case), found in groups.items():
        rows = []
        for r in found:
            errors = r.get("errors", {})
            rule = check_error_rule(r, op) if r["provider"] in OURS and errors else None
            spread = r["times"]["op"]
            rows.append(
                [
                    r["provider"],
                    f"{r['seconds'] * 1e3:.3f}",
                    f"{spread['least'] * 1e3:.3f} to {spread['most'] * 1e3:.3f}",
                    f"{r['floor_seconds'] * 1e3:.3f}",
                    f"{r['ratio_to_floor']:.3f}",
                    format_mib(r),
                    *(f"{errors[k]:.1e}" if k in errors else "" for k in ("loss", "gradient")),
                    {True: "yes", False: "NO", None: ""}[rule],
                    format_span(guess(r)),
                ]
            )
        rate = found[0]["floor_flops_per_second"] / 1e12
        floor = "Each row's floor was timed in rounds that alternated with it. "
        floor += f"Floor of {found[0]['provider']}: {rate:.4g} TFLOP/s."
        floor += sections.describe_floors(found[0])
        header = ["provider", "ms", "rounds", "floor ms", "x floor", "extra MiB", "loss error"]
        header += ["gradient error", "within the rule", "predicted ms"]
        parts += [f"### T = {T}, D = {D}, V = {V}: {case}", floor, make_table(header, rows)]
    if lines := find_winners(records):
        text = "Heads with one fastest path in every case, for MEASURED in cpo_fast/loss/cuda.py:"
        parts += ["### Default choice", text, "\n".join(f"    {line}" for line in lines)]
    return parts
