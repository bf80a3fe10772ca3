"""What every generator has in common, and the `graph` generator.

A writer turns tasks into drafts; choice of targets, checks, retries and order are the same for all
of them (`cpo_fast.counterfactual.generate`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Protocol

from cpo_fast.counterfactual.graph.rewrite import rewrite
from cpo_fast.counterfactual.prompt import Task
from cpo_fast.errors import RecordError
from cpo_fast.types import ConceptGraph, Report

Draft = Report | RecordError
"""A rewritten report, or why there is none."""


class GaveUpError(RecordError):
    """No draft, and asking again for the same record is of no use."""


class Writer(Protocol):
    """A generator: `name` stands in its records, `window` tasks are in its hands at a time,
    `faults` counts what went wrong inside (requests that were sent again and the like)."""

    name: str
    window: int
    faults: Counter[str]

    def write(self, graph: ConceptGraph, tasks: Sequence[Task]) -> Iterable[tuple[int, Draft]]:
        """(index of the task, its draft), one for each task, as they are done.

        What concerns one record alone is its draft: a RecordError (`GaveUpError` where a retry
        can't help); what concerns the run is raised."""
        ...


class GraphWriter:
    """The offline default: small edits along the concept graph."""

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
