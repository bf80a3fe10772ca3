"""`pytest` runs tests/; `pytest --benchmark` runs bench/ (pytest-benchmark) and nothing else."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for a hub

_DURATIONS = "cpo_fast/benchmarks"
_seconds: dict[str, float] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--benchmark", action="store_true", help="run the benchmarks of bench/")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--benchmark") and config.args_source == config.ArgsSource.TESTPATHS:
        config.args = [str(config.rootpath / "bench")]


def pytest_report_collectionfinish(config: pytest.Config, items: list[pytest.Item]) -> list[str]:
    """With --benchmark: how many there are, and what those that ran here before took."""
    if not config.getoption("--benchmark"):
        return []
    took = _durations(config)
    known = [took[item.nodeid] for item in items if item.nodeid in took]
    line = f"{len(items)} benchmarks"
    if known:
        line += f"; {len(known)} of them ran here before, in {sum(known) / 60:.1f} minutes"
    if len(known) < len(items):
        which = "the others" if known else "them"
        line += f"; no time is known for {which}, and some take minutes (-k selects)"
    return [line]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.passed:
        _seconds[report.nodeid] = _seconds.get(report.nodeid, 0.0) + report.duration


def pytest_sessionfinish(session: pytest.Session) -> None:
    cache = getattr(session.config, "cache", None)
    if session.config.getoption("--benchmark") and cache is not None:
        cache.set(_DURATIONS, _durations(session.config) | _seconds)


def _durations(config: pytest.Config) -> dict[str, float]:
    """{node id: seconds} of earlier runs, from pytest's cache."""
    cache = getattr(config, "cache", None)
    return cache.get(_DURATIONS, {}) if cache is not None else {}
