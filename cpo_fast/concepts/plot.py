"""A picture of the concept graph: diseases in a ring, attributes around them by category."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import networkx

from cpo_fast.errors import UsageError
from cpo_fast.types import ConceptGraph

_COLOURS = {
    "morphological": "#4477aa",
    "density": "#ccbb44",
    "anatomical": "#228833",
    "functional_dynamic": "#aa3377",
}
_RELATIONS = {
    "association": ("#999999", "solid", 0.6),
    "exclusion": ("#cc3311", "dashed", 1.2),
    "contradiction": ("#ee7733", "dotted", 1.4),
}


def draw(graph: ConceptGraph, path: Path) -> None:
    """Draw `graph` to `path`; its suffix names the format. Raises UsageError when it can't be
    written."""
    positions = _ring(list(graph.diseases), 0.55)
    order = sorted(graph.attributes, key=lambda a: (graph.attributes[a].category, a))
    positions |= _ring(order, 1.0)
    figure, axes = plt.subplots(figsize=(15, 15))
    try:
        for relation, (colour, style, width) in _RELATIONS.items():
            edges = [
                (a, b) for a, b, d in graph.network.edges(data=True) if d["relation"] == relation
            ]
            drawn = networkx.draw_networkx_edges(
                graph.network, positions, edges, width, colour, style, ax=axes
            )
            if edges:
                drawn.set_label(relation)
        for category, colour in _COLOURS.items():
            nodes = [a for a in order if graph.attributes[a].category == category]
            if nodes:
                networkx.draw_networkx_nodes(
                    graph.network, positions, nodes, 60, colour, ax=axes, label=category
                )
        names = {d: d for d in graph.diseases}
        box = {"boxstyle": "round", "facecolor": "white", "edgecolor": "#333333"}
        networkx.draw_networkx_labels(
            graph.network, positions, names, font_size=9, bbox=box, ax=axes
        )
        for key in order:
            x, y = positions[key]
            angle = math.degrees(math.atan2(y, x))
            left = x < 0
            axes.text(
                1.03 * x,
                1.03 * y,
                graph.attributes[key].name,
                rotation=angle - 180 if left else angle,
                ha="right" if left else "left",
                va="center",
                rotation_mode="anchor",
                fontsize=7,
            )
        axes.legend(loc="lower left", fontsize=8)
        axes.set_axis_off()
        axes.set(xlim=(-1.55, 1.55), ylim=(-1.55, 1.55))
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise UsageError(f"--output {path}: the picture can't be written ({error})") from error
    finally:
        plt.close(figure)


def _ring(names: list[str], radius: float) -> dict[str, tuple[float, float]]:
    turn = 2 * math.pi / len(names)
    return {
        name: (radius * math.cos(i * turn), radius * math.sin(i * turn))
        for i, name in enumerate(names)
    }
