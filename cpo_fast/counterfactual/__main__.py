"""Generate and check counterfactual reports of the studies in a data set."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from cpo_fast.command_line import Parser, program, report_error
from cpo_fast.concepts import load_graph
from cpo_fast.console import run_command
from cpo_fast.counterfactual.formats import FORMATS, format_rows
from cpo_fast.counterfactual.generate import balance, generate_decided, place_images
from cpo_fast.counterfactual.local import load_local
from cpo_fast.counterfactual.perception import build_pool, perception_counterfactuals
from cpo_fast.counterfactual.progress import DraftBar
from cpo_fast.counterfactual.server import ServerWriter
from cpo_fast.counterfactual.writers import GraphWriter, Writer
from cpo_fast.data import STUDY_FORMATS, open_studies
from cpo_fast.data.export import RowWriter
from cpo_fast.data.sections import RULES
from cpo_fast.errors import CpoFastError, RecordError, UsageError
from cpo_fast.flags import COUNT, POSITIVE, SEED, Number
from cpo_fast.folders import open_private
from cpo_fast.locks import check_file, lock_file
from cpo_fast.types import Counterfactual, Study

AT_LEAST_0 = Number(low=0)
GENERATORS = ("graph", "local", "server")


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns 0 if a record passed, 1 for bad data or if none passed, 2 for wrong
    usage."""
    args = _parser().parse_args(argv)
    try:
        return _run(args)
    except CpoFastError as error:
        return report_error(program("counterfactual"), error)


def _parser() -> Parser:
    parser = Parser(prog=program("counterfactual"), description=__doc__)
    parser.add_argument("--dataset", required=True, help='a MIMIC-CXR-JPG folder or "open-i"')
    parser.add_argument(
        "--dataset_format", default="auto", choices=STUDY_FORMATS, help="format of the data set"
    )
    parser.add_argument(
        "--sections", default="careful", choices=RULES, help="rules to find report sections"
    )
    parser.add_argument("--image_root", metavar="PATH", help="image folder (default: the data set)")
    parser.add_argument(
        "--output", required=True, type=Path, help="file for the records that pass all checks"
    )
    parser.add_argument(
        "--generator", default="graph", choices=GENERATORS,
        help="rules on the concept graph, a local model, or a model on a server",
    )  # fmt: skip
    parser.add_argument(
        "--kind",
        default="thinking",
        choices=("thinking", "perception"),
        help="change the report (thinking) or the image (perception)",
    )
    parser.add_argument("--graph", default=None, help="concept graph file (default: built-in)")
    parser.add_argument("--seed", type=SEED, default=42, help="random seed")
    parser.add_argument("--num_targets", type=POSITIVE, default=2, help="target diseases per study")
    parser.add_argument(
        "--targets", metavar="NAMES", help="comma-separated diseases to use as targets"
    )
    parser.add_argument(
        "--shard", default="0/1", help="i/n: every n-th study, starting with study i (from 0)"
    )
    parser.add_argument("--format", default="jsonl", choices=FORMATS, help="format of --output")
    parser.add_argument(
        "--balance_targets",
        action="store_true",
        help="use all diseases about equally often; reads the data set twice",
    )
    models = parser.add_argument_group("for --generator local or server")
    models.add_argument("--model", help="model folder (local) or model name (server)")
    models.add_argument(
        "--temperature",
        type=AT_LEAST_0,
        default=0.0,
        help="sampling temperature; 0: greedy, except retries",
    )
    models.add_argument(
        "--max_new_tokens", type=POSITIVE, default=1024, help="maximum tokens of an answer"
    )
    local = parser.add_argument_group("for --generator local")
    local.add_argument("--batch_size", type=POSITIVE, default=8, help="prompts per batch")
    server = parser.add_argument_group("for --generator server")
    server.add_argument(
        "--server_url", metavar="URL", default="http://127.0.0.1:8000/v1",
        help="OpenAI-compatible server",
    )  # fmt: skip
    server.add_argument("--concurrency", type=POSITIVE, default=8, help="concurrent requests")
    server.add_argument(
        "--requests_per_second", type=AT_LEAST_0, default=0.0, help="rate limit; 0: none"
    )
    server.add_argument(
        "--timeout_s",
        type=Number(low=0.001),
        default=120.0,
        help="time limit of a request in seconds",
    )
    server.add_argument("--max_retries", type=COUNT, default=5, help="retries of a failed request")
    server.add_argument(
        "--api_key_env", metavar="NAME", help="environment variable that holds the API key"
    )
    server.add_argument(
        "--allow_remote_host",
        action="store_true",
        help="allow sending reports to a remote (not loopback or private) host",
    )
    return parser


def _build_writer(args: argparse.Namespace, bar: DraftBar) -> Writer:
    """The generator selected by the flags."""
    if args.generator == "graph":
        return GraphWriter()
    if not args.model:
        raise UsageError(f"--generator {args.generator} needs --model")
    if args.generator == "local":
        return load_local(
            args.model,
            batch_size=args.batch_size,
            temperature=args.temperature,
            max_new_tokens=args.max_new_tokens,
            on_token=bar.show_tokens,
        )
    if args.api_key_env and not os.environ.get(args.api_key_env):
        raise UsageError(f"--api_key_env {args.api_key_env}: this environment variable is not set")
    return ServerWriter(
        args.server_url,
        args.model,
        api_key=os.environ[args.api_key_env] if args.api_key_env else "",
        allow_remote_host=args.allow_remote_host,
        concurrency=args.concurrency,
        requests_per_second=args.requests_per_second,
        timeout=args.timeout_s,
        max_retries=args.max_retries,
        temperature=args.temperature,
        max_new_tokens=args.max_new_tokens,
    )


def _run(args: argparse.Namespace) -> int:
    index, count = _parse_shard(args.shard)
    if args.graph is not None and not Path(args.graph).is_file():
        raise UsageError(f"--graph {args.graph}: no such file")
    check_file(args.output)
    graph = load_graph(args.graph)
    targets = [t.strip() for t in args.targets.split(",") if t.strip()] if args.targets else None
    if args.kind == "perception" and (
        targets or args.balance_targets or args.format != "jsonl" or args.generator != "graph"
    ):
        raise UsageError(
            "--kind perception takes no --targets, --balance_targets or --generator, and only "
            "--format jsonl"
        )
    if targets and args.balance_targets:
        raise UsageError("--targets and --balance_targets exclude each other; give one")
    source = open_studies(
        args.dataset,
        dataset_format=args.dataset_format,
        sections=args.sections,
        image_root=args.image_root,
    )
    bar = DraftBar()
    writer = _build_writer(args, bar)
    folder = args.output.parent
    failed_path = args.output.with_name(args.output.name + ".rejected.jsonl")
    lines = args.format == "jsonl"
    with (
        lock_file(args.output),
        _open_records(args.output, lines) as good,
        _open_records(failed_path, lines) as bad,
    ):
        done: set[str] = set()
        for path, file in ((args.output, good), (failed_path, bad)) if lines else ():
            done |= _read_finished(path, file, args.seed, args.generator)
        expected = 1 if args.kind == "perception" else args.num_targets
        expected = min(expected, len(targets)) if targets else expected
        finished = {
            s for s, n in Counter(i.rsplit("/", 1)[0] for i in done).items() if n >= expected
        }

        def studies() -> Iterator[Study]:
            for study in islice(source, index, None, count):
                bar.studies += 1
                if study.study_id not in finished:
                    yield place_images(study, folder)

        made: Iterable[list[Counterfactual]]
        if args.kind == "perception":
            everyone = tqdm(source, "images", disable=None, unit=" studies")
            pool = build_pool((place_images(study, folder) for study in everyone), graph)
            left = tqdm(studies(), "counterfactuals", disable=None, unit=" studies")
            found = perception_counterfactuals(left, pool, graph, seed=args.seed)
            made = ([one] for one in found)
        else:
            prices = {}
            if args.balance_targets:
                everyone = tqdm(source, "targets", disable=None, unit=" studies")
                prices = balance(everyone, graph, num_targets=args.num_targets, seed=args.seed)
            made = generate_decided(
                studies(),
                graph,
                num_targets=args.num_targets,
                targets=targets,
                seed=args.seed,
                generator=writer,
                prices=prices,
                skip=done,
                by_study=not lines,
                on_draft=bar.show_tally,
            )
        passed, failed = 0, Counter[str]()
        rows, rejected = RowWriter(good, args.format), RowWriter(bad, "jsonl")
        for group in made:
            passing = [cf for cf in group if cf.passed]
            reasons = {
                cf.id: ",".join(name for name, ok in cf.checks.items() if not ok) for cf in group
            }
            try:
                for row in format_rows(passing, args.format):
                    rows.write(row)
                passed += len(passing)
            except RecordError as error:  # the format cannot represent the text
                reasons |= dict.fromkeys((cf.id for cf in passing), error.reason)
            for cf in group:
                if reason := reasons[cf.id]:
                    failed[reason] += 1
                    rejected.write({**cf.to_json(), "reason": reason})
            good.flush()
            bad.flush()
        rows.close()
        bar.close()
    _print_summary(args.output, passed, failed, len(done), source)
    for reason, number in writer.faults.most_common():
        print(f"  failed while generating, {reason}: {number}")
    return 0 if passed or done else 1


def _parse_shard(text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    if not (slash and index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise UsageError(f"--shard {text}: give i/n with 0 <= i < n, for example 0/4")
    return int(index), int(count)


def _open_records(path: Path, keep: bool) -> IO[str]:
    """Open `path` to read and write (mode 0600: it holds report text); empty it unless `keep`."""
    try:
        handle = open_private(path, os.O_RDWR)
    except OSError as error:
        raise UsageError(f"--output {path}: can't be written ({error.strerror})") from error
    file = os.fdopen(handle, "r+", encoding="utf-8", newline="\n")
    try:
        if not keep:
            file.truncate(0)
    except OSError as error:
        raise UsageError(f"--output {path}: not a regular file ({error.strerror})") from error
    return file


def _read_finished(path: Path, file: IO[str], seed: int, generator: str) -> set[str]:
    """The ids in the output of an earlier, possibly interrupted run.

    Removes an incomplete last line, and records that failed because of the server, which are
    retried.
    """
    ids: set[str] = set()
    kept, cut, again = 0, False, False  # cut: the last line is incomplete
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            cut = not line.endswith(b"\n")
            if cut:
                break
            kept += len(line)
            try:
                record = json.loads(line)
                same = record["seed"] == seed and record["generator"] == generator
                if _failed_by_server(record):
                    again = True
                else:
                    ids.add(record["id"])
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UsageError(
                    f"{path}, line {number}: not a counterfactual record; give another --output"
                ) from error
            if not same:
                raise UsageError(
                    f"{path} holds records of another seed or generator; remove it or give another "
                    f"--output"
                )
    if cut:
        file.truncate(kept)
    if again:
        whole = path.read_bytes().splitlines(keepends=True)
        rest = [line for line in whole if not _failed_by_server(json.loads(line))]
        file.truncate(0)
        file.write(b"".join(rest).decode())
    file.seek(0, os.SEEK_END)
    return ids


def _failed_by_server(record: dict[str, Any]) -> bool:
    return str(record.get("reason", "")).startswith("server-")


def _print_summary(path: Path, passed: int, failed: Counter[str], before: int, source: Any) -> None:
    total = passed + sum(failed.values())
    share = f" ({passed / total:.1%})" if total else ""
    print(f"{path}: {passed} of {total} counterfactuals pass all checks{share}")
    if before:
        print(f"  {before} records from an earlier run")
    for reason, number in failed.most_common():
        print(f"  set aside, {reason}: {number}")
    for reason, number in Counter(r.reason for r in source.rejected).most_common():
        print(f"  studies not used, {reason}: {number}")


if __name__ == "__main__":
    sys.exit(run_command(main))
