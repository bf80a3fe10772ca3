"""Draw the concept graph: diseases inside, attributes around them by category."""

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
    """Draw `graph` to `path` in the format of its suffix. Raises UsageError if this fails."""
    order = sorted(graph.attributes, key=lambda a: (graph.attributes[a].category, a))
    positions = _place_on_ring(order, [1.0])
    positions |= _place_on_ring(_sort_by_angle(graph, positions), [0.5, 0.7])
    figure, axes = plt.subplots(figsize=(16, 16))
    try:
        for relation, (colour, style, width) in _RELATIONS.items():
            edges = [
                (a, b) for a, b, d in graph.network.edges(data=True) if d["relation"] == relation
            ]
            bend = {"connectionstyle": "arc3,rad=0.3"} if relation == "contradiction" else {}
            options = {"ax": axes, "arrows": bool(bend), **bend}
            networkx.draw_networkx_edges(
                graph.network, positions, edges, width, colour, style, **options
            )
            axes.plot([], [], color=colour, linestyle=style, linewidth=width + 0.5, label=relation)
        for category, colour in _COLOURS.items():
            nodes = [a for a in order if graph.attributes[a].category == category]
            if nodes:
                label = category.replace("_", " or ")
                networkx.draw_networkx_nodes(
                    graph.network, positions, nodes, 70, colour, ax=axes, label=label
                )
        names = {d: d for d in graph.diseases}
        box = {"boxstyle": "round", "facecolor": "white", "edgecolor": "#333333"}
        networkx.draw_networkx_labels(
            graph.network, positions, names, font_size=12, bbox=box, ax=axes
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
                fontsize=12,
            )
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=4, fontsize=12)
        axes.set_axis_off()
        axes.set(xlim=(-1.5, 1.5), ylim=(-1.5, 1.5))
        figure.savefig(path, dpi=100, bbox_inches="tight")
    except (OSError, ValueError) as error:
        raise UsageError(f"--output {path}: the picture can't be written ({error})") from error
    finally:
        plt.close(figure)


def _sort_by_angle(graph: ConceptGraph, positions: dict[str, tuple[float, float]]) -> list[str]:
    """Sort the diseases by the mean angle of their attributes, so that fewer lines cross."""

    def middle(name: str) -> float:
        points = [positions[a] for a in graph.diseases[name].associations]
        return math.atan2(sum(y for _, y in points), sum(x for x, _ in points)) % (2 * math.pi)

    return sorted(graph.diseases, key=middle)


def _place_on_ring(names: list[str], radii: list[float]) -> dict[str, tuple[float, float]]:
    """Evenly spaced positions on a circle, with alternating radii."""
    turn = 2 * math.pi / len(names)
    return {
        name: (
            radii[i % len(radii)] * math.cos(i * turn),
            radii[i % len(radii)] * math.sin(i * turn),
        )
        for i, name in enumerate(names)
    }
