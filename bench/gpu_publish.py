"""Publishes GPU checks: `python -m bench.gpu_publish RESULTS.json [RESULTS.json ...]`.

The results of one or several runs on one card become bench/results/gpu-CARD-DATE.json, and the
marked blocks of docs/gpu.md and docs/performance.md are made anew of the newest record of every
card. Without results only the blocks are made. What a person has to judge is printed: entries for
MEASURED, and places that still say "untested on a GPU". Exit status: 0 done, 2 refused.
"""

from __future__ import annotations

import argparse
import json
import re
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
    try:
        report.render(data)
        report.machine_line(data["records"])
        assert isinstance(data["started"], str) and isinstance(data["not_run"], list)
    except Exception as error:
        text = (
            f"{path} is no whole results.json of bench.gpu_check ({type(error).__name__}: {error})"
        )
        raise publish.Refused(text) from None
    return data


def pages(root: Path, added: tuple[str, dict[str, Any]] | None = None) -> dict[Path, str]:
    """The pages with blocks of what is published, and of a record to be `added`. Raises Refused
    where one has no block."""
    cards = dict(publish.published(root / "bench" / "results"))
    if added is not None:
        cards = {k: v for k, v in cards.items() if publish.card(v) != publish.card(added[1])}
        cards[added[0]] = added[1]
    listed = sorted(cards.items(), key=lambda item: publish.card(item[1]))
    found = {}
    for name, (block, make) in BLOCKS.items():
        path = root / name
        try:
            found[path] = publish.replaced(path.read_text(), block, make(listed))
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
    parser.add_argument(
        "--commit", help="of the tree that was copied to the machine, if its history was not"
    )
    given = parser.parse_args(arguments)
    if given.commit is not None and not re.fullmatch("[0-9a-f]{7,40}", given.commit):
        parser.error(f"--commit must be 7 to 40 hexadecimal digits, got {given.commit!r}")
    try:
        pages(root)  # before anything is written: are the blocks there?
        data = None
        if given.results:
            runs = [read(path) for path in given.results]
            data = publish.merged(runs, force=given.force, commit=given.commit)
            name, folder = publish.name_of(data), root / "bench" / "results"
            before, lost = publish.missing_figures(data, folder)
            if lost and not given.force:
                raise publish.Refused(
                    f"{before} holds {lost} figures that these runs lack and that would vanish "
                    "from the pages: name its results.json files too, or --force"
                )
            texts = pages(root, (name, json.loads(publish.dumps(data))))
            (folder / name).write_text(publish.dumps(data))
            print(f"wrote bench/results/{name}")
        else:
            texts = pages(root)
        for path, text in texts.items():
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
