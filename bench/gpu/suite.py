"""Runs the tests in tests/ that need a GPU, one process per file."""

from __future__ import annotations

import functools
import importlib.util
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from bench.gpu.units import ROOT, NotHere, Setting, Unit

TRITON = ("kernels/test_triton_kernels.py", "kernels/test_triton_loss.py")
"""Tests that run on a GPU if available, else in Triton's interpreter."""


def run(path: Path, only_marked: bool, out: str) -> dict[str, Any]:
    if importlib.util.find_spec("pytest") is None:
        raise NotHere("pytest is not installed")
    results = Path(out) / f"{path.stem}.xml"
    # The project's addopts need plug-ins that may not be installed.
    command = [sys.executable, "-m", "pytest", str(path), "-q", "-o", "addopts=--strict-markers"]
    command += ["-p", "no:cacheprovider", f"--junitxml={results}", "--maxfail=20"]
    command += ["-m", "gpu"] if only_marked else []
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    if not results.exists():
        raise AssertionError(f"pytest exited with {done.returncode}: {done.stderr[-300:]}")
    counts = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    for suite in ElementTree.parse(results).getroot().iter("testsuite"):
        for name in counts:
            counts[name] += int(suite.get(name, 0))
    broken = counts["failures"] + counts["errors"]
    names = re.findall(r"^(?:FAILED|ERROR) \S+::(\S+)", done.stdout, re.M)
    assert broken == 0, f"{broken} of {counts['tests']} failed: {', '.join(names)[:300]}"
    assert done.returncode in (0, 5), f"pytest exited with {done.returncode}"
    if counts["tests"] == counts["skipped"]:
        raise NotHere(f"all {counts['tests']} tests were skipped")
    return counts


def list_units(setting: Setting) -> list[Unit]:
    marked = [
        path
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if re.search(r"pytest\.mark\.gpu\b|marks=.*\bgpu\b", path.read_text())
    ]
    files = [(path, True) for path in marked]
    files += [(ROOT / "tests" / name, False) for name in TRITON]
    return [
        Unit(path.name, functools.partial(run, path, only_marked, setting.out), limit=150)
        for path, only_marked in (files[:1] if setting.quick else files)
    ]
