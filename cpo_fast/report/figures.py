"""Figures of a report, light and dark: curves, intervals per finding, the concept graph.

Every figure is one small panel, so that a phone shows it at full width with readable letters.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpo_fast.counting import counted
from cpo_fast.report.read import is_number
from cpo_fast.report.tables import bounds, format_number, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

    from cpo_fast.types import ConceptGraph

WIDTH = 4.7  # inches; a phone 360 pixels wide shows 9 point letters at about 10 pixels
DPI = 160
ROW = 0.34  # inches per line of a chart with one line per finding
SMOOTHED = 60  # curves with more points get a running mean
LABEL_CHARACTERS = 44  # of an attribute of the concept graph


@dataclass(frozen=True)
class Theme:
    """Colours of the light or dark theme: `series` for runs, `models` for the stages of one run and
    the arms of the study."""

    paper: str
    ink: str
    faint: str
    grid: str
    series: tuple[str, ...]
    models: Mapping[str, str]


LIGHT = Theme(
    paper="#ffffff",
    ink="#22262b",
    faint="#6b737d",
    grid="#e4e7eb",
    series=("#1f6f78", "#c2571a", "#5b5fc7", "#8a7a12", "#a23b72", "#4d5661"),
    models={
        "majority": "#8b939c",
        "untrained": "#b08d57",
        "sft_answers": "#7fa3cc",
        "sft": "#2f6db5",
        "cpo": "#c2571a",
        "dpo_random": "#1f7a5c",
        "cpo_answers": "#8a5fc7",
    },
)
DARK = Theme(
    paper="#171b20",
    ink="#dfe3e8",
    faint="#98a1ab",
    grid="#2c333b",
    series=("#5fb9c2", "#f0935a", "#9c9ff0", "#d3c04c", "#e07fb0", "#b3bcc6"),
    models={
        "majority": "#9aa3ad",
        "untrained": "#cfae78",
        "sft_answers": "#a9c6e6",
        "sft": "#6ea8ea",
        "cpo": "#f0935a",
        "dpo_random": "#5cc29a",
        "cpo_answers": "#b79bf0",
    },
)

Draw = Callable[["Axes", Theme], None]


@dataclass(frozen=True)
class Panel:
    """One figure: `slug` is its file name, `alt` its description."""

    slug: str
    title: str
    alt: str
    draw: Draw
    height: float = 2.7

    def render(self, *themes: Theme) -> list[bytes]:
        """The figure as PNG bytes in each theme, without metadata such as program or date.

        The layout is computed for the first theme; the others differ in colours only.
        """
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine

        images, place = [], None
        for theme in themes:
            with rc_context(_style(theme)):
                figure = Figure(figsize=(WIDTH, self.height), dpi=DPI)
                FigureCanvasAgg(figure)
                axes = figure.add_subplot()
                axes.set_title(self.title, loc="left", fontweight="bold", fontsize=10, pad=8)
                self.draw(axes, theme)
                if place is None:
                    ConstrainedLayoutEngine().execute(figure)
                    place = axes.get_position()
                axes.set_position(place)
                buffer = io.BytesIO()
                figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
            images.append(buffer.getvalue())
        return images


def _style(theme: Theme) -> Any:  # rc_context expects a dict with literal keys
    return {
        "font.family": "sans-serif",
        "font.size": 9,
        "text.parse_math": False,  # a "$" in a name is plain text
        "text.color": theme.ink,
        "axes.labelcolor": theme.faint,
        "axes.edgecolor": theme.grid,
        "axes.facecolor": theme.paper,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": theme.grid,
        "grid.linewidth": 0.7,
        "xtick.color": theme.faint,
        "ytick.color": theme.faint,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "figure.facecolor": theme.paper,
        "savefig.facecolor": theme.paper,
        "legend.frameon": False,
        "legend.fontsize": 8.5,
        "lines.linewidth": 1.6,
        "lines.solid_capstyle": "round",
    }


@dataclass(frozen=True)
class Line:
    """A curve; `dots` draws held-out points instead of a line; `color` indexes Theme.series."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    color: int = 0
    dots: bool = False


def curves(
    slug: str,
    title: str,
    lines: Sequence[Line],
    *,
    log_scale: bool = False,
    share: bool = False,
    zero_line: bool = False,
    smooth: bool = True,
) -> Panel:
    """Curves over steps; with many points, if `smooth`, a thin line and a thick running mean."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    def is_smoothed(line: Line) -> bool:
        return smooth and not line.dots and len(line.values) > SMOOTHED

    def draw(axes: Axes, theme: Theme) -> None:
        for line in lines:
            color = theme.series[line.color % len(theme.series)]
            if line.dots:
                axes.plot(line.steps, line.values, color=color, linewidth=0.8, linestyle=":")
                axes.scatter(line.steps, line.values, s=22, color=color, edgecolors=theme.paper,
                             linewidths=0.8, label=line.label, zorder=3)  # fmt: skip
            elif is_smoothed(line):
                axes.plot(line.steps, line.values, color=color, linewidth=0.7, alpha=0.35)
                mean, label = running_mean(line.values), f"{line.label}, running mean"
                axes.plot(line.steps, mean, color=color, label=label)
            else:
                marker = "o" if len(line.values) == 1 else None
                axes.plot(line.steps, line.values, color=color, label=line.label, marker=marker)
        if zero_line:
            axes.axhline(0, color=theme.faint, linewidth=0.8)
        axes.yaxis.set_major_formatter("{x:g}")
        if log_scale:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter("{x:g}")
        if share:
            axes.set_ylim(-0.03, 1.03)
            show_percent(axes.yaxis)
        axes.set_xlabel("optimiser step")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        if len(lines) > 1 or any(map(is_smoothed, lines)):
            axes.legend(loc="best", labelcolor=theme.ink)

    last = ", ".join(f"{line.label}: last {format_number(line.values[-1])}" for line in lines)
    return Panel(slug, title, f"Curve over optimiser steps, {title}. {last}.", draw)


def show_percent(axis: Axis) -> None:
    """Label an axis of shares in whole per cent."""
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))


def running_mean(values: Sequence[float]) -> list[float]:
    """Centred mean over a twentieth of the points (at least 5), shorter at both ends."""
    half = max(2, len(values) // 40)
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    windows = ((max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values)))
    return [(sums[high] - sums[low]) / (high - low) for low, high in windows]


def intervals(
    slug: str,
    title: str,
    rows: Sequence[str],
    models: Mapping[str, Sequence[Mapping[str, Any]]],
    labels: Mapping[str, str],
) -> Panel:
    """A dot with its 95 % interval per row and model; `models[m][i]` is the figure of row i."""

    def draw(axes: Axes, theme: Theme) -> None:
        for place, (model, values) in enumerate(models.items()):
            color = theme.models.get(model, theme.series[place % len(theme.series)])
            offset = (place - (len(models) - 1) / 2) * 0.66 / len(models)
            known = [i for i, figure in enumerate(values) if is_number(figure.get("value"))]
            at = [i + offset for i in known]
            for i, y in zip(known, at, strict=True):
                if interval := bounds(values[i]):
                    axes.hlines(y, *interval, color=color, linewidth=1.6, alpha=0.55)
            axes.scatter([values[i]["value"] for i in known], at, s=20, color=color,
                         label=labels.get(model, model), zorder=3)  # fmt: skip
        for i in range(1, len(rows)):
            axes.axhline(i - 0.5, color=theme.grid, linewidth=0.7)
        axes.set_yticks(range(len(rows)), rows, color=theme.ink)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(-0.03, 1.03)
        axes.grid(visible=False, axis="y")
        show_percent(axes.xaxis)
        axes.legend(loc="upper center", bbox_to_anchor=(0.3, -0.06 - 0.25 / len(rows)),
                    ncols=2 if len(models) > 3 else len(models), labelcolor=theme.ink,
                    handletextpad=0.1, columnspacing=1.2)  # fmt: skip

    names = ", ".join(labels.get(model, model) for model in models)
    alt = f"{title} with 95 % intervals for {names}; the table has the figures."
    return Panel(slug, title, alt, draw, height=1.35 + ROW * len(rows) * max(1, len(models) / 3))


def blend(color: str, paper: str, share: float) -> str:
    """`color` on `paper` with opacity `share`; all colours "#rrggbb"."""
    parts = [(int(color[i : i + 2], 16), int(paper[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(share * c + (1 - share) * p):02x}" for c, p in parts)


def concept_graph(graph: ConceptGraph) -> Panel:
    """The concept graph as a matrix: attributes are rows, diseases columns, relations colours."""
    from matplotlib.patches import Patch, Rectangle

    attributes = list(graph.attributes.values())
    categories = list(dict.fromkeys(attribute.category for attribute in attributes))
    attributes.sort(key=lambda attribute: categories.index(attribute.category))
    row = {attribute.id: i for i, attribute in enumerate(attributes)}
    diseases = list(graph.diseases.values())

    def draw(axes: Axes, theme: Theme) -> None:
        colors = {
            "hallmark": theme.series[0],
            "association": blend(theme.series[0], theme.paper, 0.35),
            "exclusion": theme.series[1],
        }
        for x, disease in enumerate(diseases):
            cells = dict.fromkeys(disease.associations, "association")
            cells |= dict.fromkeys(disease.exclusions, "exclusion")
            cells |= dict.fromkeys(disease.hallmarks, "hallmark")
            for attribute, relation in cells.items():
                if attribute in row:
                    y = row[attribute]
                    color = colors[relation]
                    axes.add_patch(Rectangle((x - 0.42, y - 0.42), 0.84, 0.84, color=color, lw=0))
        for i in range(1, len(attributes)):
            if attributes[i].category != attributes[i - 1].category:
                axes.axhline(i - 0.5, color=theme.faint, linewidth=0.8)
        for category in categories:
            ys = [i for i, a in enumerate(attributes) if a.category == category]
            label = category.replace("_", " / ")
            axes.text(len(diseases) - 0.3, sum(ys) / len(ys), label, rotation=-90, ha="left",
                      va="center", fontsize=8, color=theme.faint)  # fmt: skip
        names = [shorten(attribute.name, LABEL_CHARACTERS) for attribute in attributes]
        axes.set_yticks(range(len(attributes)), names, fontsize=7.5, color=theme.ink)
        axes.set_xticks(range(len(diseases)), [d.name for d in diseases], rotation=60, ha="left",
                        rotation_mode="anchor", fontsize=8, color=theme.ink)  # fmt: skip
        axes.xaxis.tick_top()
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.set_xlim(-0.5, len(diseases) - 0.5)
        axes.set_ylim(len(attributes) - 0.5, -0.5)
        handles = [Patch(color=color, label=relation) for relation, color in colors.items()]
        axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.3, -0.005), ncols=3,
                    labelcolor=theme.ink)  # fmt: skip

    title = f"{counted(len(diseases), 'disease')}, {counted(len(attributes), 'attribute')}"
    alt = f"Concept graph as a matrix: {title}. Colours: hallmark, association, exclusion."
    return Panel("concept_graph", title, alt, draw, height=2.2 + 0.155 * len(attributes))
