"""Every code block of README.md and docs/ is run, or gives the reason why it is only parsed."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import cpo_fast
from tests.docs_blocks import CODE, NO_CODE, ROOT, blocks, check_data, find_pages, parse_block
from tests.test_layout import STAGES

PARSED_ONLY = {
    "README.md": 4,
    "CONTRIBUTING.md": 2,
    "docs/counterfactuals.md": 2,
    "docs/distributed.md": 3,
    "docs/evidence.md": 1,
    "docs/gpu.md": 2,
    "docs/migrating-ms-swift.md": 1,
    "docs/migrating-trl.md": 1,
    "docs/packing.md": 2,
    "docs/performance.md": 3,
    "docs/tutorial-mimic.md": 2,
}
"""Blocks per page that are parsed and not run. A new block of this kind needs an entry."""
TRAINING = (
    "README.md",
    "docs/counterfactuals.md",
    "docs/tutorial-mimic.md",
    "docs/tutorial-phantom.md",
    "docs/tutorial-preferences.md",
)


def run_bash(script: str, folder: Path, commands: Path) -> None:
    environment = {
        **os.environ,
        "PATH": f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "XDG_CACHE_HOME": str(folder / "cache"),
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{script}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def parametrize_pages() -> list[Any]:
    """Every page; pages that train take minutes and are marked `complete`."""
    return [
        pytest.param(page, id=name, marks=[pytest.mark.complete] if name in TRAINING else [])
        for page in find_pages()
        for name in [str(page.relative_to(ROOT))]
    ]


@pytest.mark.parametrize("name", TRAINING)
def test_commands_of_training_pages_are_accepted(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parser of each command checks its flags; `make test` runs the page."""
    monkeypatch.chdir(tmp_path)
    commands = 0
    for block in blocks(ROOT / name):
        for file in block.mark("file"):
            Path(file).write_text(block.replaced())
        if block.language == "bash":
            commands += parse_block(block, monkeypatch)
    assert commands


@pytest.mark.slow
@pytest.mark.parametrize("page", parametrize_pages())
def test_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, commands = tmp_path / "page", tmp_path / "bin"
    folder.mkdir()
    commands.mkdir()
    # The command from this checkout; test_packaging.py runs the installed command.
    script = f'#!/bin/sh\nexec "{sys.executable}" -m cpo_fast.cli "$@"\n'
    (commands / "cpo-fast").write_text(script)
    (commands / "cpo-fast").chmod(0o755)
    monkeypatch.chdir(folder)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page):
        for name in block.mark("file"):
            (folder / name).write_text(block.replaced())
        if block.mark("parse"):
            assert parse_block(block, monkeypatch) > 0, f"{block.place}: nothing to parse"
        elif block.language == "python":
            code = compile(block.replaced(), block.place, "exec")
            with contextlib.redirect_stdout(io.StringIO()):
                exec(code, namespace)
        elif block.language == "bash":
            run_bash(block.replaced(), folder, commands)
        else:
            check_data(block, tmp_path)


def test_every_block_is_tested() -> None:
    """Every block has a known language; blocks that are only parsed have a reason."""
    counts: Counter[str] = Counter()
    parsed: Counter[str] = Counter()
    for page in find_pages():
        for block in blocks(page):
            if block.language.startswith("{"):  # a directive of the generator
                continue
            assert block.language in (*CODE, *NO_CODE), f"{block.place}: {block.language!r}"
            for mark in block.marks:
                kind = mark.split()[0].strip(",")
                assert kind in ("replace", "parse", "file"), f"{block.place}: {mark}"
                counts[kind] += 1
            for why in block.mark("parse"):
                assert len(why) > 10, f"{block.place}: `parse` needs a reason"
                print(f"parsed only: {block.place}: {why}")
                parsed[block.page] += 1
            counts[block.language] += 1
    print(f"blocks and marks: {dict(counts)}")
    assert dict(parsed) == PARSED_ONLY


def test_readme_map_equals_the_tree() -> None:
    """Every package and top-level module of cpo_fast is in the map or in the line of helpers."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## The map")[1]
    _, listing, rest = section.split("```")[:3]
    mapped: set[str] = set()
    stages: dict[str, None] = {}
    for line in listing.splitlines()[1:]:
        stages |= {name: None for name in line.split(" ")[0].split("/")[1:2] if name in STAGES}
        first, *others = re.split(r" {2,}", line)[0].split(" ")
        mapped |= {str(Path(first)), *(str(Path(first).parent / name) for name in others)}
    assert tuple(stages) == STAGES
    assert f"pipeline: {', '.join(STAGES)};" in " ".join(str(cpo_fast.__doc__).split())
    for path in mapped:
        assert (ROOT / path).exists(), f"README.md, the map: {path} does not exist"
    helpers = rest.split("## ")[0]
    mapped |= {f"cpo_fast/{name}.py" for name in re.findall(r"`(\w+)`", helpers)}
    package = ROOT / "cpo_fast"
    modules = {path for path in package.glob("*.py") if path.name != "__init__.py"}
    modules |= {path.parent for path in package.glob("*/**/__init__.py")}
    tree = {str(path.relative_to(ROOT)) for path in modules} - {"cpo_fast/experiments"}
    assert tree - {"cpo_fast/kernels"} <= mapped
    assert {path for path in mapped if path.startswith("cpo_fast/")} <= tree


def test_ledger_names_commits_commands_and_records() -> None:
    """One row for each speed-up: newest first, with its commit and a command that exists."""
    page = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    section = page.split("## Ledger of speed-ups")[1].split("\n## ")[0]
    rows = [line.split(" | ") for line in section.splitlines() if line.startswith("| 20")]
    assert len(rows) > 10
    dates = [row[0].removeprefix("| ") for row in rows]
    assert dates == sorted(dates, reverse=True)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for date, commits, *_, command in rows:
        assert re.fullmatch(r"\| \d{4}-\d\d-\d\d", date)
        assert all(re.fullmatch(r"[0-9a-f]{7}", commit) for commit in commits.split(", ")), commits
        files = re.findall(r"(?:bench|tests)/[\w./-]+\.(?:py|json)", command)
        files += [f"{name.replace('.', '/')}.py" for name in re.findall(r"bench\.\w+", command)]
        targets = re.findall(r"\bmake ([\w-]+)", command)
        assert files or targets, command
        assert all((ROOT / name).is_file() for name in files), command
        assert all(f"\n{target}:" in makefile for target in targets), command


@pytest.mark.complete
@pytest.mark.slow
def test_pages_build_without_warnings(tmp_path: Path) -> None:
    """Broken links, pages outside the index and bad docstrings are warnings, here errors."""
    pytest.importorskip("sphinx", reason="the docs extra is not installed")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html"]
    done = subprocess.run(
        [*command, "docs", str(tmp_path / "html")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "html" / "api.html").read_text(encoding="utf-8")
    assert "segment_ids" in page
    assert "<math" in (tmp_path / "html" / "op.html").read_text(encoding="utf-8")
