"""Publishes GPU checks: `python -m bench.gpu_publish RESULTS.json [RESULTS.json ...]`.

The results of one or more runs on one card become bench/results/gpu-CARD-DATE.json, and the marked
blocks of docs/gpu.md and docs/performance.md are rebuilt from the newest record of every card.
Without results only the blocks are rebuilt. Prints for review: entries for MEASURED, and lines that
still contain "untested on a GPU". Exit status: 0 done, 2 refused.
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
from cpo_fast.counting import counted

BLOCKS = {
    "docs/gpu.md": ("checks", publish.make_checks_block),
    "docs/performance.md": ("figures", publish.make_figures_block),
}
WORDS = "untested on a GPU|[Nn]othing .*on a GPU( |$)|not been measured on a GPU"


def read_results(path: Path) -> dict[str, Any]:
    """A file's results. Raises Refused if they are incomplete."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise publish.Refused(f"{path}: {error}") from None
    try:
        report.render(data)
        report.describe_machine(data["records"])
        assert isinstance(data["started"], str) and isinstance(data["not_run"], list)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        text = f"{path} is not a complete results.json of bench.gpu_check ({reason})"
        raise publish.Refused(text) from None
    return data


def rebuild_pages(root: Path, added: tuple[str, dict[str, Any]] | None = None) -> dict[Path, str]:
    """The pages with their blocks rebuilt from the published records and the `added` one. Raises
    Refused if a page lacks its block."""
    cards = dict(publish.read_published(root / "bench" / "results"))
    if added is not None:
        cards = {
            k: v for k, v in cards.items() if publish.name_card(v) != publish.name_card(added[1])
        }
        cards[added[0]] = added[1]
    listed = sorted(cards.items(), key=lambda item: publish.name_card(item[1]))
    found = {}
    for name, (block, make) in BLOCKS.items():
        path = root / name
        try:
            found[path] = publish.replace_block(path.read_text(), block, make(listed))
        except publish.Refused as reason:
            raise publish.Refused(f"{name}: {reason}") from None
    return found


def find_untested(root: Path) -> list[str]:
    """Lines of tracked files that call something untested or unmeasured on a GPU."""
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
    parser.add_argument("--force", action="store_true", help="accept runs of different sources")
    parser.add_argument("--commit", help="commit of a tree that was copied without its history")
    given = parser.parse_args(arguments)
    if given.commit is not None and not re.fullmatch("[0-9a-f]{7,40}", given.commit):
        parser.error(f"--commit must be 7 to 40 hexadecimal digits, got {given.commit!r}")
    try:
        rebuild_pages(root)  # raises before anything is written if a block is missing
        data = None
        if given.results:
            runs = [read_results(path) for path in given.results]
            data = publish.merge(runs, force=given.force, commit=given.commit)
            name, folder = publish.name_file(data), root / "bench" / "results"
            before, lost = publish.find_missing_figures(data, folder)
            if lost and not given.force:
                raise publish.Refused(
                    f"{before} has {counted(lost, 'figure')} that these runs lack and publishing "
                    "would remove from the pages: add its results.json files, or use --force"
                )
            texts = rebuild_pages(root, (name, json.loads(publish.dumps(data))))
            (folder / name).write_text(publish.dumps(data))
            print(f"wrote bench/results/{name}")
        else:
            texts = rebuild_pages(root)
        for path, text in texts.items():
            path.write_text(text)
            print(f"wrote {path.relative_to(root)}")
    except publish.Refused as reason:
        print(f"gpu-publish: {reason}", file=sys.stderr)
        return 2
    if data is not None:
        print(report.describe_machine(data["records"]), report.summarise(data), sep="\n")
        entries = report.find_winners(data["records"])
        print("\nEntries for MEASURED in cpo_fast/loss/cuda.py:")
        print("\n".join(f"    {line}" for line in entries) or "    none")
    print("\nLines to review:")
    print("\n".join(f"    {line}" for line in find_untested(root)) or "    none")
    return 0


if __name__ == "__main__":
    sys.exit(main())
