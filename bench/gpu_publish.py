"""Publishes GPU checks: `python -m bench.gpu_publish RESULTS.json [RESULTS.json ...]`.

The results of one or several runs on one card become bench/results/gpu-CARD-DATE.json, and the
marked blocks of docs/gpu.md and docs/performance.md are made anew of the newest record of every
card. Without results only the blocks are made. What a person has to judge is printed: entries for
MEASURED, and places that still say "untested on a GPU". Exit status: 0 done, 2 refused.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.gpu import publish, report
from bench.gpu.units import ROOT

BLOCKS = {
    "docs/gpu.md": ("checks", publish.checks_block),
    "docs/performance.md": ("figures", publish.figures_block),
}
WORDS = "untested on a GPU|[Nn]othing .*on a GPU( |$)|not been measured on a GPU"


def read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise publish.Refused(f"{path}: {error}") from None
    if not isinstance(data, dict) or not {"started", "records", "not_run"} <= set(data):
        raise publish.Refused(f"{path} is no results.json of bench.gpu_check")
    return data


def pages(root: Path) -> dict[Path, str]:
    """The pages with blocks of what is published now. Raises Refused where one has no block."""
    cards = publish.published(root / "bench" / "results")
    found = {}
    for name, (block, make) in BLOCKS.items():
        path = root / name
        try:
            found[path] = publish.replaced(path.read_text(), block, make(cards))
        except publish.Refused as reason:
            raise publish.Refused(f"{name}: {reason}") from None
    return found


def places(root: Path) -> list[str]:
    """Lines of tracked files that say that something was not run or measured on a GPU."""
    command = ["git", "grep", "-nIE", WORDS, "--", ".", ":!bench/gpu*", ":!tests"]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    except OSError:
        return []
    return [line[:160] for line in done.stdout.splitlines()]


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_publish",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", nargs="*", type=Path, metavar="RESULTS.json")
    parser.add_argument("--force", action="store_true", help="also runs of different sources")
    parser.add_argument("--commit", help="of the tree that was copied to the machine")
    given = parser.parse_args(arguments)
    try:
        pages(root)  # before anything is written: are the blocks there?
        data = None
        if given.results:
            runs = [read(path) for path in given.results]
            data = publish.merged(runs, force=given.force, commit=given.commit)
            path = root / "bench" / "results" / publish.name_of(data)
            path.write_text(publish.dumps(data))
            print(f"wrote {path.relative_to(root)}")
        for path, text in pages(root).items():
            path.write_text(text)
            print(f"wrote {path.relative_to(root)}")
    except publish.Refused as reason:
        print(f"gpu-publish: {reason}", file=sys.stderr)
        return 2
    if data is not None:
        print(report.machine_line(data["records"]), report.verdict(data), sep="\n")
        entries = report.winners(data["records"])
        print("\nEntries for MEASURED in cpo_fast/loss/cuda.py:")
        print("\n".join(f"    {line}" for line in entries) or "    none")
    print("\nTo be judged, whether it is still true:")
    print("\n".join(f"    {line}" for line in places(root)) or "    nothing found")
    return 0


if __name__ == "__main__":
    sys.exit(main())
