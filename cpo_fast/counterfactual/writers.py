"""Interface of the generators, the parts that they share, and the `graph` generator.

A writer turns tasks into drafts. The choice of targets, checks, retries and order do not depend on
the writer (`cpo_fast.counterfactual.generate`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Protocol

from cpo_fast.counterfactual.graph.rewrite import rewrite
from cpo_fast.counterfactual.prompt import Task
from cpo_fast.counterfactual.seeding import hash_seed
from cpo_fast.errors import RecordError, UsageError
from cpo_fast.types import ConceptGraph, Report

Draft = Report | RecordError
"""A rewritten report, or the reason for its absence."""

RETRY_TEMPERATURE = 0.7
"""Minimum temperature of retries, so that they differ from the failed draft."""


class GaveUpError(RecordError):
    """No draft, and a retry of the same record would fail as well."""


class Writer(Protocol):
    """A generator: its `name` in the records, the number of tasks per call (`window`), and counts
    of failed requests or drafts by reason (`faults`)."""

    name: str
    window: int
    faults: Counter[str]

    def write(self, graph: ConceptGraph, tasks: Sequence[Task]) -> Iterable[tuple[int, Draft]]:
        """Yield (index of the task, its draft) for each task, in order of completion.

        An error of one record is its draft: a RecordError (`GaveUpError` if a retry cannot help).
        An error of the whole run is raised."""
        ...


def check_minimums(*settings: tuple[str, float, float]) -> None:
    """Raise UsageError for a (flag, value, minimum) that is too small or not finite."""
    for flag, value, least in settings:
        if not least <= value < float("inf"):
            raise UsageError(f"--{flag} must be at least {least}, not {value}")


def choose_sampling(task: Task, temperature: float) -> tuple[float, int]:
    """(temperature, 64-bit seed) of a draft: `temperature`, for retries `RETRY_TEMPERATURE` or
    more."""
    if task.attempt:
        temperature = max(temperature, RETRY_TEMPERATURE)
    return temperature, hash_seed(task.seed, task.study_id, task.target, str(task.attempt))


class GraphWriter:
    """The default generator, without a model: small edits along the concept graph."""

    name = "graph"
    window = 1

    def __init__(self) -> None:
        self.faults: Counter[str] = Counter()

    def write(self, graph: ConceptGraph, tasks: Sequence[Task]) -> Iterable[tuple[int, Draft]]:
        return enumerate(self._write(graph, task) for task in tasks)

    def _write(self, graph: ConceptGraph, task: Task) -> Draft:
        try:
            return rewrite(graph, task.report, task.target, task.study_id, task.seed, task.attempt)
        except RecordError as error:
            return GaveUpError(error.reason, error.detail)
