"""`python -m cpo_fast.counterfactual`: studies in, counterfactual records out."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from cpo_fast.concepts import load_graph
from cpo_fast.counterfactual.formats import FORMATS, rows
from cpo_fast.counterfactual.generate import GENERATORS, counterfactuals
from cpo_fast.counterfactual.perception import build_pool, perception_counterfactuals
from cpo_fast.data import open_studies
from cpo_fast.errors import CpoFastError, UsageError
from cpo_fast.types import Counterfactual, ImageRef, Study


def main(argv: list[str] | None = None) -> int:
    """Parse `argv`, generate, print a summary; 0 when something passed, 1 for errors or nothing."""
    args = _parser().parse_args(argv)
    try:
        return _run(args)
    except CpoFastError as error:
        print(f"cpo_fast.counterfactual: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cpo_fast.counterfactual", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--dataset", required=True, help='a MIMIC-CXR-JPG folder or "open-i"')
    parser.add_argument("--dataset_format", default="auto")
    parser.add_argument("--sections", default="careful", help="careful or authors")
    parser.add_argument("--image_root", default=None)
    parser.add_argument("--output", required=True, type=Path, help="file of passing records")
    parser.add_argument("--generator", default="graph", choices=GENERATORS)
    parser.add_argument(
        "--kind",
        default="thinking",
        choices=("thinking", "perception"),
        help="another report for the image, or another image for the report",
    )
    parser.add_argument("--graph", default=None, help="concept graph (default: the package's)")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--num_targets", type=int, default=2)
    parser.add_argument("--targets", default=None, help="diseases by comma, instead of a choice")
    parser.add_argument(
        "--shard", default="0/1", help="i/n: every n-th study from the i-th, 0-based"
    )
    parser.add_argument("--format", default="jsonl", choices=FORMATS)
    return parser


def _run(args: argparse.Namespace) -> int:
    index, count = _shard(args.shard)
    graph = load_graph(args.graph)
    targets = [t.strip() for t in args.targets.split(",") if t.strip()] if args.targets else None
    source = open_studies(
        args.dataset,
        dataset_format=args.dataset_format,
        sections=args.sections,
        image_root=args.image_root,
    )
    folder = args.output.parent
    if not folder.is_dir():
        folder.mkdir(parents=True, mode=0o700)
    failed_path = args.output.with_name(args.output.name + ".rejected.jsonl")
    done: set[str] = set()
    if args.format == "jsonl":
        for path in (args.output, failed_path):
            done |= _resume(path, args.seed, args.generator)
    expected = 1 if args.kind == "perception" else args.num_targets
    expected = min(expected, len(targets)) if targets else expected
    finished = {s for s, n in Counter(i.rsplit("/", 1)[0] for i in done).items() if n >= expected}

    def studies() -> Iterator[Study]:
        shard = islice(source, index, None, count)
        for study in tqdm(shard, "counterfactuals", disable=None, unit=" studies"):
            if study.study_id not in finished:
                yield study

    if args.kind == "perception":
        if targets or args.format != "jsonl":
            raise UsageError("--kind perception has no --targets and is written as jsonl only")
        pool = build_pool(tqdm(source, "images", disable=None, unit=" studies"), graph)
        made = perception_counterfactuals(studies(), pool, graph, seed=args.seed)
    else:
        alone = counterfactuals(
            studies(),
            graph,
            num_targets=args.num_targets,
            targets=targets,
            seed=args.seed,
            generator=args.generator,
        )
        made = ((cf, ()) for cf in alone)
    mode = "a" if args.format == "jsonl" else "w"
    passed, failed = 0, Counter[str]()
    with _private(args.output, mode) as good, _private(failed_path, mode) as bad:
        write = _Writer(good, args.format)
        for _, group in groupby(made, key=lambda pair: pair[0].study_id):
            fresh = [(cf, images) for cf, images in group if cf.id not in done]
            for cf, _ in fresh:
                if not cf.passed:
                    reason = ",".join(name for name, ok in cf.checks.items() if not ok)
                    failed[reason] += 1
                    bad.write(_line({**cf.to_json(), "reason": reason}))
            passing = [(cf, images) for cf, images in fresh if cf.passed]
            passed += len(passing)
            write.study(passing)
        write.close()
    _summary(args.output, passed, failed, len(done), source)
    return 0 if passed or done else 1


def _shard(text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    if not (slash and index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise UsageError(f"--shard {text}: give i/n with 0 <= i < n, for example 0/4")
    return int(index), int(count)


def _private(path: Path, mode: str) -> IO[str]:
    """`path` for writing by its owner alone: it holds report text."""
    flags = os.O_WRONLY | os.O_CREAT | (os.O_APPEND if mode == "a" else os.O_TRUNC)
    try:
        handle = os.open(path, flags, 0o600)
    except OSError as error:
        raise UsageError(f"--output {path}: can't be written ({error.strerror})") from error
    return os.fdopen(handle, mode, encoding="utf-8")


def _resume(path: Path, seed: int, generator: str) -> set[str]:
    """The ids in an output of an earlier, perhaps killed, run; a last line cut short is taken
    off."""
    if not path.exists():
        return set()
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    ids: set[str] = set()
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            record = json.loads(line)
            ids.add(record["id"])
            same = record["seed"] == seed and record["generator"] == generator
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{path}, line {number}: not a counterfactual record; give another --output"
            ) from error
        if not same:
            raise UsageError(
                f"{path} holds records of another seed or generator; give another --output or "
                f"remove it"
            )
    return ids


class _Writer:
    """Rows of a format: lines, or one JSON list for ccf."""

    def __init__(self, file: IO[str], form: str) -> None:
        self.file, self.form, self.count = file, form, 0
        if form == "ccf":
            file.write("[\n")

    def study(self, passing: list[tuple[Counterfactual, tuple[ImageRef, ...]]]) -> None:
        for row, (_, images) in zip(
            rows([cf for cf, _ in passing], self.form), passing, strict=self.form != "ccf"
        ):
            if images:
                row["rejected_images"] = [image.path for image in images]
            if self.form == "ccf":
                self.file.write((",\n" if self.count else "") + _line(row).rstrip("\n"))
            else:
                self.file.write(_line(row))
            self.count += 1
        self.file.flush()

    def close(self) -> None:
        if self.form == "ccf":
            self.file.write("\n]\n")


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _summary(path: Path, passed: int, failed: Counter[str], before: int, source: Any) -> None:
    total = passed + sum(failed.values())
    share = f" ({passed / total:.1%})" if total else ""
    print(f"{path}: {passed} of {total} counterfactuals pass all checks{share}")
    if before:
        print(f"  {before} were there from an earlier run")
    for reason, number in failed.most_common():
        print(f"  set aside, {reason}: {number}")
    for reason, number in Counter(r.reason for r in source.rejected).most_common():
        print(f"  studies not used, {reason}: {number}")


if __name__ == "__main__":
    sys.exit(main())
