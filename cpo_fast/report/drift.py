"""The drift probe of one study on the page: thought as a heat map, curve, swaps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpo_fast.counting import counted
from cpo_fast.report.figures import Panel, show_percent
from cpo_fast.report.read import is_number, strings
from cpo_fast.report.tables import Cell, Row, Table, format_number, format_percent, name_of, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from cpo_fast.report.figures import Theme

SHOWN_SWAPS = 12
NAMED_TOKENS = 4  # tokens with the largest variation, labelled in the curve
APART = 0.2  # smallest distance of two labels, as a share of the curve's length
SHOWN_FINDINGS = 8  # bars; the axis label gives the total of the others
TITLE_CHARACTERS = 52
KINDS = {
    "synonym": "near-synonym",
    "side": "other side",
    "negation": "negation",
    "hallmark": "hallmark replaced",
}
SIDES = {"keeps": ("synonym", "side"), "changes": ("negation", "hallmark")}
"""Kinds of swaps that should keep, and should change, the diagnosis."""


@dataclass(frozen=True)
class Token:
    text: str
    heat: str  # 0 .. 1: its variation as a share of the study's largest
    title: str


@dataclass(frozen=True)
class DriftStudy:
    """One probed study; `panels` are the curve per token and the bars of up to two swaps."""

    study_id: str
    model: str
    tokens: list[Token]
    panels: list[Panel]
    swaps: Table | None


def prepare_drift(entry: Mapping[str, Any], place: int) -> DriftStudy | None:
    """An entry of `drift` in evaluation.json for the page; None if it is damaged."""
    tokens, findings = strings(entry.get("tokens")), strings(entry.get("findings"))
    variation, divergence = (numbers(entry.get(key)) for key in ("variation", "divergence"))
    before = numbers(entry.get("end"))
    if not tokens or not len(tokens) == len(variation) == len(divergence):
        return None
    if not findings or len(before) != len(findings):
        return None
    model = name_of(str(entry.get("model") or ""))
    largest = max(variation) or 1.0
    panels = [curve(f"drift_{place}_curve", tokens, variation, divergence)]
    swaps = [swap for swap in _swaps(entry) if len(numbers(swap["distribution"])) == len(findings)]
    for name, kinds in SIDES.items():
        own = [swap for swap in swaps if swap.get("kind") in kinds]
        if own:
            worst = max(own, key=lambda swap: float(swap["variation"]))
            after = numbers(worst["distribution"])
            panels.append(bars(f"drift_{place}_{name}", _title(worst), findings, before, after))
    rows = tuple(
        Row(
            f"{swap.get('before')} → {swap.get('after')}",
            (
                Cell(format_number(swap["variation"])),
                Cell(format_number(swap.get("divergence"))),
                Cell(_likeliest(findings, numbers(swap["distribution"]))),
            ),
            KINDS.get(str(swap.get("kind")), str(swap.get("kind"))),
        )
        for swap in sorted(swaps, key=lambda swap: -float(swap["variation"]))[:SHOWN_SWAPS]
    )
    columns = ("Swap", "Variation", "Divergence, bits", "Likeliest finding after it")
    note = f"Likeliest finding without a swap: {_likeliest(findings, before)}."
    return DriftStudy(
        study_id=str(entry.get("study_id") or "without id"),
        model=model,
        tokens=[
            Token(text, f"{value / largest:.3f}", f"variation {format_number(value)}")
            for text, value in zip(tokens, variation, strict=True)
        ],
        panels=panels,
        swaps=Table("Swaps, largest first", columns, rows, note, words=True) if rows else None,
    )


def numbers(value: Any) -> list[float]:
    """A JSON list of numbers; [] for anything else."""
    known = isinstance(value, list) and all(map(is_number, value))
    return [float(x) for x in value] if known else []


def _swaps(entry: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    found = entry.get("swaps")
    return [
        swap
        for swap in (found if isinstance(found, list) else ())
        if isinstance(swap, dict) and is_number(swap.get("variation")) and "distribution" in swap
    ]


def _title(swap: Mapping[str, Any]) -> str:
    title = f"{str(swap.get('before')).strip()} → {str(swap.get('after')).strip()}"
    return shorten(title, TITLE_CHARACTERS)


def _likeliest(findings: Sequence[str], z: Sequence[float]) -> str:
    return findings[max(range(len(z)), key=lambda i: z[i])]


def curve(
    slug: str, tokens: Sequence[str], variation: Sequence[float], divergence: Sequence[float]
) -> Panel:
    """Total variation and Jensen-Shannon divergence per token; the largest are labelled."""
    ranked = sorted(range(len(tokens)), key=lambda j: -variation[j])
    named: list[int] = []
    for j in ranked[: 3 * NAMED_TOKENS]:
        if tokens[j].strip() and all(abs(j - other) > APART * len(tokens) for other in named):
            named.append(j)

    def draw(axes: Axes, theme: Theme) -> None:
        at = range(1, len(tokens) + 1)
        axes.fill_between(at, variation, color=theme.series[0], alpha=0.18, linewidth=0)
        axes.plot(at, variation, color=theme.series[0], label="total variation", linewidth=1.2)
        axes.plot(at, divergence, color=theme.series[1], label="Jensen-Shannon, bits", linewidth=1)
        for j in named[:NAMED_TOKENS]:
            axes.annotate(tokens[j].strip()[:14], (j + 1, variation[j]), xytext=(0, 3),
                          textcoords="offset points", ha="center", fontsize=8,
                          color=theme.ink)  # fmt: skip
        axes.set_ylim(0, max(0.05, 1.2 * max(variation)))
        axes.set_xlabel("token of the thought")
        axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.2), ncols=2,
                    labelcolor=theme.ink)  # fmt: skip

    j = ranked[0]
    alt = (
        f"Change of the diagnosis per token over {counted(len(tokens), 'token')}. The largest "
        f"total variation, {format_number(variation[j])}, is at token {j + 1}."
    )
    return Panel(slug, "Change of the diagnosis per token", alt, draw)


def bars(
    slug: str,
    title: str,
    findings: Sequence[str],
    before: Sequence[float],
    after: Sequence[float],
) -> Panel:
    """Probability of the likeliest findings before and after a swap, findings down."""
    larger = [max(pair) for pair in zip(before, after, strict=True)]
    shown = sorted(sorted(range(len(findings)), key=lambda i: -larger[i])[:SHOWN_FINDINGS])
    rest = [sum(z) - sum(z[i] for i in shown) for z in (before, after)]

    def draw(axes: Axes, theme: Theme) -> None:
        rows = range(len(shown))
        for shift, name, z, color in ((-0.19, "before", before, theme.models["sft"]),
                                      (0.19, "after", after, theme.models["cpo"])):  # fmt: skip
            axes.barh([i + shift for i in rows], [z[i] for i in shown], 0.36, color=color,
                      label=name)  # fmt: skip
        axes.set_yticks(rows, [findings[i] for i in shown], color=theme.ink, fontsize=8.5)
        axes.set_ylim(len(shown) - 0.5, -0.5)
        if len(shown) < len(findings):
            others = " before, ".join(map(format_percent, rest))
            axes.set_xlabel(f"all others together: {others} after", fontsize=8)
        axes.grid(visible=False, axis="y")
        show_percent(axes.xaxis)
        axes.legend(loc="upper center", bbox_to_anchor=(0.3, -0.2), ncols=2, labelcolor=theme.ink)

    alt = f"Probability of the likeliest findings before and after the swap {title}."
    return Panel(slug, title, alt, draw, height=1.2 + 0.24 * len(shown))
