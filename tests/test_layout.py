"""Light imports, commands and layout of the package."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from cpo_fast.counting import counted

ROOT = Path(__file__).parents[1]
STAGES = ("data", "concepts", "counterfactual", "packing", "model", "loss", "training",
          "evaluation", "report", "run")  # fmt: skip


def list_loaded_modules(statement: str) -> set[str]:
    """Top-level modules in a new interpreter after `statement`."""
    code = f"{statement}\nimport sys, json\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in json.loads(done.stdout)}


def test_importing_the_package_does_not_load_torch() -> None:
    assert not list_loaded_modules("import cpo_fast") & {"torch", "transformers", "triton", "peft"}
    flags = "import cpo_fast.run.settings, cpo_fast.evaluate_options"
    assert not list_loaded_modules(flags) & {"torch", "transformers", "numpy", "tqdm"}


def test_loss_op_loads_neither_transformers_nor_peft() -> None:
    modules = list_loaded_modules("from cpo_fast import cpo_loss, linear_logprobs")
    assert "torch" in modules
    assert not modules & {"transformers", "peft", "triton", "networkx", "matplotlib", "sklearn"}


@pytest.mark.parametrize("stage", STAGES)
def test_stages_import_only_earlier_stages(stage: str) -> None:
    shared = {"types", "errors", "flags", "version", "console", "locks", "command_line"}
    shared |= {"folders", "counting"}
    allowed = {*shared, *STAGES[: STAGES.index(stage) + 1]}
    for path in (ROOT / "cpo_fast" / stage).rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        imported = re.findall(r"^\s*(?:from|import) cpo_fast\.(\w+)", text, flags=re.M)
        imported += [
            name.strip().split(" ")[0]
            for names in re.findall(r"^\s*from cpo_fast import ([\w, ]+)", text, flags=re.M)
            for name in names.split(",")
            if name.strip() in STAGES
        ]
        native = {"kernels", "_cpu", "_cuda"} if stage == "loss" else set()
        if path.name == "fused.py" and stage == "model":
            native = {"kernels"}
        outside = set(imported) - allowed - native
        assert not outside, f"{path.relative_to(ROOT)} imports {sorted(outside)}"


def test_training_does_not_import_run() -> None:
    for path in (ROOT / "cpo_fast" / "training").rglob("*.py"):
        assert "cpo_fast.run" not in path.read_text(encoding="utf-8"), path.name


@pytest.mark.parametrize("folder", ["evaluation", "loss", "model", "packing", "training"])
def test_lower_layers_name_no_command_line_flag(folder: str) -> None:
    for path in (ROOT / "cpo_fast" / folder).rglob("*.py"):
        named = re.findall(r"(?<![\w-])--[a-z]\w+", path.read_text(encoding="utf-8"))
        assert not named, f"{path.relative_to(ROOT)} names {named}"


OPTIONAL = {"wandb", "trackio", "mlflow", "pycocoevalcap"}
"""Packages used only if the user has installed them."""


def find_imports(path: Path) -> set[str]:
    """Top-level modules that a file imports at run time."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for body in node.body
        for inner in ast.walk(body)
    }
    names: list[str] = []
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module or "")
    return {name.split(".")[0] for name in names}


def test_every_third_party_import_is_declared() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needs = [*declared["dependencies"], *chain(*declared["optional-dependencies"].values())]
    known = {canonicalize_name(Requirement(need).name) for need in needs}
    modules = packages_distributions()
    for path in (ROOT / "cpo_fast").rglob("*.py"):
        for name in find_imports(path) - set(sys.stdlib_module_names) - OPTIONAL - {"cpo_fast"}:
            owners = {canonicalize_name(owner) for owner in modules.get(name, [name])}
            assert owners & known, f"{path.relative_to(ROOT)} imports {name}: declare it"


def test_files_stay_short_and_bench_imports_no_tests() -> None:
    listed = subprocess.run(["git", "ls-files", "*.py", "*.cu", "*.cpp", "*.h"], cwd=ROOT,
                            capture_output=True, text=True, check=False)  # fmt: skip
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.split():
        text = (ROOT / name).read_text(encoding="utf-8")
        assert text.count("\n") <= 450, name
        if name.startswith(("bench/", "cpo_fast/")):
            assert not re.search(r"^\s*(from|import) tests\b", text, flags=re.M), name


def test_tests_that_import_bench_are_listed() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    sentence = re.search(r"Only\s([^.]*) import `bench`\.", page)
    assert sentence
    listed = re.findall(r"`(tests/\w+/)`", sentence[1])
    importers = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("*.py")
        if "bench" in find_imports(path)
    }
    covered = {name: {one for one in importers if one.startswith(name)} for name in listed}
    assert importers == set().union(*covered.values()) and all(covered.values())


def test_number_and_noun_agree() -> None:
    assert counted(1, "step") == "1 step" and counted(0, "step") == "0 steps"
    assert counted(1, "study", "studies") == "1 study"
    assert counted(2000, "study", "studies", show=lambda n: f"{n:,}") == "2,000 studies"


def test_make_help_lists_documented_targets() -> None:
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    for target in (
        *("setup", "train", "test", "quick", "lowest", "real", "bench", "lint"),
        *("docs", "doctor", "dist", "clean", "help"),
    ):
        assert f"make {target} " in done.stdout


def test_benchmarks_are_listed_with_earlier_times(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text((ROOT / "conftest.py").read_text())
    (tmp_path / "test_slow.py").write_text("def test_a(): pass\ndef test_b(): pass\n")

    def count_benchmarks(*flags: str) -> str:
        command = [sys.executable, "-m", "pytest", "--benchmark", *flags, "."]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        return next(line for line in done.stdout.splitlines() if " benchmarks" in line)

    unknown = "no time is known for {}, and some take minutes (-k selects)"
    assert count_benchmarks("-k", "test_a") == "1 benchmarks; " + unknown.format("them")
    before = "of them ran here before, in 0.0 minutes"
    assert count_benchmarks() == f"2 benchmarks; 1 {before}; " + unknown.format("the others")
    assert count_benchmarks() == f"2 benchmarks; 2 {before}"


def test_plain_pytest_collects_tests_and_benchmark_collects_bench(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "conftest.py"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    for name in ("bench/bench_a.py", "tests/folder/test_b.py"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("def test_it(): pass\n")

    def collect_tests(*flags: str) -> list[str]:
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "--no-header", *flags]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        return [line for line in done.stdout.splitlines() if "::" in line]

    assert collect_tests("--benchmark") == ["bench/bench_a.py::test_it"]
    assert collect_tests() == ["tests/folder/test_b.py::test_it"]


def test_contributing_lists_files_with_complete_tests() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    listed = set(
        re.findall(r"`(tests/[\w/]*test_\w+\.py)`", page.split("## Tests")[1].split("\n## ")[0])
    )
    marked = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("test_*.py")
        if re.search(r"\bmark\.complete\b", path.read_text(encoding="utf-8"))
    }
    assert listed == marked
    assert "make test SKIP=complete\n" in (ROOT / ".ci" / "run").read_text()
