"""`pytest` runs tests/; `pytest --benchmark` runs bench/ (pytest-benchmark) and nothing else."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for a hub


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--benchmark", action="store_true", help="run the benchmarks of bench/")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--benchmark") and config.args_source == config.ArgsSource.TESTPATHS:
        config.args = [str(config.rootpath / "bench")]
