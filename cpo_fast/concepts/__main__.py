"""Label reports; inspect, export and extend the concept graph."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from cpo_fast.command_line import Parser, program, report_error
from cpo_fast.concepts.graph import graph_from_json, load_graph, read_graph_json
from cpo_fast.concepts.labeller import label_report
from cpo_fast.console import run_command
from cpo_fast.counting import counted
from cpo_fast.errors import CpoFastError, DataError, RecordError, UsageError
from cpo_fast.flags import POSITIVE
from cpo_fast.folders import open_private
from cpo_fast.locks import check_file
from cpo_fast.types import ConceptGraph

_MAX_LINE = 4 << 20
_MAX_EXTRACTION = 1 << 30
"""Maximum bytes of an input line, and of an extraction (200,000 reports take about 60 MB)."""
_SHOWN = 10


def main(argv: list[str] | None = None) -> int:
    """Run a command. Returns 0 for success, 1 for bad data, 2 for wrong usage."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except CpoFastError as error:
        return report_error(program("concepts"), error)
    return 0


def _parser() -> Parser:
    parser = Parser(prog=program("concepts"), description=__doc__)
    commands = parser.add_subparsers(required=True, dest="command")
    label = commands.add_parser(
        "label", help="label reports: {id, report} lines to {id, labels} lines"
    )
    label.add_argument("--input", required=True, type=Path, help="JSON lines with id and report")
    label.add_argument("--output", required=True, type=Path, help="JSON lines with id and labels")
    label.set_defaults(run=_label)
    stats = commands.add_parser("stats", help="print the number of nodes and relations")
    stats.set_defaults(run=_stats)
    export = commands.add_parser("export", help="write the graph as .graphml or .json")
    export.add_argument("--output", required=True, type=Path, help="a .graphml or .json file")
    export.set_defaults(run=_export)
    plot = commands.add_parser("plot", help="draw the graph (.png, .svg, .pdf)")
    plot.add_argument("--output", required=True, type=Path, help="a .png, .svg or .pdf file")
    plot.set_defaults(run=_plot)
    mined = commands.add_parser("mine", help="count findings in a corpus and propose relations")
    mined.add_argument("--dataset", required=True, help='a MIMIC-CXR-JPG folder or "open-i"')
    mined.add_argument("--output", required=True, type=Path, help="a .json file")
    mined.add_argument(
        "--weighted_graph",
        type=Path,
        help="also write the graph with corpus counts: .graphml or .json",
    )
    mined.add_argument(
        "--workers", type=POSITIVE, default=os.cpu_count() or 1, help="number of processes"
    )
    mined.set_defaults(run=_mine)
    merged = commands.add_parser("merge", help="add associations extracted by an LLM to the graph")
    merged.add_argument(
        "--input", required=True, type=Path, help="JSON with data and disease_feature_map"
    )
    merged.add_argument("--output", required=True, type=Path, help="the new graph file")
    merged.set_defaults(run=_merge)
    for command in (stats, export, plot, mined, merged):
        command.add_argument("--graph", default=None, help="graph file (default: built-in)")
    return parser


def _open_output(path: Path) -> IO[str]:
    """Open an output file with mode 0600; its folder is created if missing."""
    try:
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True, mode=0o700)
        handle = open_private(path)
    except OSError as error:
        raise UsageError(f"--output {path}: can't be written ({error.strerror})") from error
    return os.fdopen(handle, "w", encoding="utf-8")


def _label(args: argparse.Namespace) -> None:
    try:
        source = args.input.open("rb")
    except OSError as error:
        raise UsageError(f"--input {args.input}: can't be read ({error.strerror})") from error
    bad: list[str] = []
    labelled = 0
    with source, _open_output(args.output) as out:
        for number, line in enumerate(tqdm(_read_lines(source), "label", disable=None), start=1):
            try:
                key, report = _parse_record(line)
            except RecordError as error:
                bad.append(f"{args.input}, line {number}: {error.detail}")
                continue
            if report is not None:
                out.write(json.dumps({"id": key, "labels": label_report(report)}) + "\n")
                labelled += 1
    print(f"{args.output}: {counted(labelled, 'report')} labelled")
    if bad:
        shown = "\n  ".join(bad[:_SHOWN])
        more = f"\n  and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        raise DataError(f"{counted(len(bad), 'line')} set aside:\n  {shown}{more}")


def _read_lines(source: IO[bytes]) -> Iterator[bytes]:
    """Yield lines, cut after `_MAX_LINE` + 1 bytes; the excess is skipped in pieces."""
    while line := source.readline(_MAX_LINE + 1):
        yield line
        while len(line) > _MAX_LINE and not line.endswith(b"\n"):
            line = source.readline(_MAX_LINE + 1) or b"\n"


def _parse_record(line: bytes) -> tuple[Any, str | None]:
    """(id, report) of a line; (None, None) for an empty line. Raises RecordError."""
    if len(line) > _MAX_LINE:
        raise RecordError("record-too-long", "more than 4 MiB; one report per line is expected")
    if not line.strip():
        return None, None
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise RecordError("not-utf8", "is not UTF-8 text") from None
    except (ValueError, RecursionError):
        raise RecordError("json-invalid", "is not JSON") from None
    if not isinstance(row, dict) or "id" not in row or not isinstance(row.get("report"), str):
        raise RecordError("missing-field", 'needs "id" and "report" (a string)')
    return row["id"], row["report"]


def count_graph(graph: ConceptGraph) -> dict[str, Any]:
    """Number of nodes, attributes per category, edges per relation and hallmarks."""
    edges = graph.network.edges(data=True)
    return {
        "diseases": len(graph.diseases),
        "attributes": len(graph.attributes),
        "categories": dict(Counter(a.category for a in graph.attributes.values())),
        "phrases": sum(len(a.phrases) for a in graph.attributes.values()),
        "relations": dict(Counter(data["relation"] for _, _, data in edges)),
        "hallmarks": sum(len(d.hallmarks) for d in graph.diseases.values()),
        "irrelevant pairs": sum(
            not graph.network.has_edge(d, a) for d in graph.diseases for a in graph.attributes
        ),
    }


def _stats(args: argparse.Namespace) -> None:
    print(json.dumps(count_graph(load_graph(args.graph)), indent=1))


def _export(args: argparse.Namespace) -> None:
    _write_network(load_graph(args.graph), args.output, "--output")
    print(args.output)


def _write_network(graph: ConceptGraph, path: Path, flag: str) -> None:
    """Write the graph as GraphML or node-link JSON, depending on the suffix."""
    import networkx

    network = graph.network.copy()
    if path.suffix == ".json":
        with _open_output(path) as out:
            json.dump(networkx.node_link_data(network, edges="edges"), out, indent=1)
    elif path.suffix == ".graphml":
        for _, data in network.nodes(data=True):  # GraphML has no lists
            data.update({k: ", ".join(v) for k, v in data.items() if isinstance(v, tuple)})
        for *_, data in network.edges(
            data=True
        ):  # and no null: the PMI of pairs that never co-occur
            for key in [k for k, v in data.items() if v is None]:
                del data[key]
        with _open_output(path) as out:
            out.writelines(line + "\n" for line in networkx.generate_graphml(network))
    else:
        raise UsageError(f"{flag} {path}: the name must end in .json or .graphml")


def _mine(args: argparse.Namespace) -> None:
    from cpo_fast.concepts.mine import add_weights, collect_evidence, mine, propose_changes
    from cpo_fast.data import open_studies

    if args.weighted_graph and args.weighted_graph.suffix not in (".graphml", ".json"):
        raise UsageError(
            f"--weighted_graph {args.weighted_graph}: the name must end in .json or .graphml"
        )
    check_file(args.output)
    if args.weighted_graph:
        check_file(args.weighted_graph, "--weighted_graph")
    graph_json = read_graph_json(args.graph)
    graph = graph_from_json(graph_json)
    studies = open_studies(args.dataset)
    texts = (s.report.text for s in tqdm(studies, "mine", disable=None, unit=" reports"))
    counts = mine(graph_json, texts, args.workers)
    edges = collect_evidence(graph, counts)
    proposed = propose_changes(edges)
    with _open_output(args.output) as out:
        json.dump(
            {
                "reports": counts.reports,
                "asserted": dict(sorted(counts.nodes.items())),
                "uncertain": dict(sorted(counts.uncertain.items())),
                "denied": dict(sorted(counts.denied.items())),
                "edges": [edge.to_json() for edge in edges],
                "proposals": proposed,
            },
            out,
            indent=1,
        )
    if args.weighted_graph:
        _write_network(add_weights(graph, edges), args.weighted_graph, "--weighted_graph")
    print(f"{args.output}: {counted(counts.reports, 'report')}, {counted(len(edges), 'pair')}")
    for change, number in Counter(row["change"] for row in proposed).most_common():
        print(f"  {change}: {number} proposed")


def _merge(args: argparse.Namespace) -> None:
    from cpo_fast.concepts.extraction import merge_extraction

    merged, done = merge_extraction(
        read_graph_json(args.graph),
        read_graph_json(args.input, "extraction", _MAX_EXTRACTION),
        str(args.input),
    )
    with _open_output(args.output) as out:
        json.dump(merged, out, indent=1)
    print(f"{args.output}: {len(done['added'])} associations added, {done['known']} already known")
    for name in ("excluded", "too_rare"):
        print(f"  not added, {name}: {len(done[name])}")
    print(f"  names that match no node: {len(done['unknown'])}")


def _plot(args: argparse.Namespace) -> None:
    from cpo_fast.concepts.plot import draw

    draw(load_graph(args.graph), args.output)
    print(args.output)


if __name__ == "__main__":
    sys.exit(run_command(main))
