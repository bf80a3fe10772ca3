"""Import time of cpo_fast, and of the loss op beyond `import torch`.

    pytest --benchmark bench/bench_import.py

Each round is a new interpreter. `import cpo_fast` does not load torch. Target for "torch and the
op": less than 0.3 s beyond torch, and little more for the first call.
"""

from __future__ import annotations

import os
import subprocess
import sys
from statistics import median
from time import perf_counter

import pytest

STATEMENTS = {
    "python": "pass",
    "import cpo_fast": "import cpo_fast",
    "import torch": "import torch",
    "torch and the op": "import torch; from cpo_fast import cpo_loss, linear_logprobs",
    "the op called": (
        "import torch; from cpo_fast import linear_logprobs as f; "
        "f(torch.ones(2, 4), torch.ones(5, 4), torch.tensor([0, 1]))"
    ),
}
ROUNDS = 7


def time_statement(statement: str) -> tuple[float, float]:
    """Wall time and CPU time of a new interpreter that runs `statement`."""
    begun, before = perf_counter(), os.times()
    subprocess.run([sys.executable, "-c", statement], check=True)
    after = os.times()
    used = after.children_user + after.children_system
    return perf_counter() - begun, used - before.children_user - before.children_system


def test_import_times(capsys: pytest.CaptureFixture[str]) -> None:
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in STATEMENTS}
    for statement in STATEMENTS.values():
        time_statement(statement)  # warms byte code and page cache
    for _ in range(ROUNDS):  # alternating, so that other load affects all equally
        for name, statement in STATEMENTS.items():
            taken[name].append(time_statement(statement))
    figures = {
        name: (median(wall for wall, _ in times), median(cpu for _, cpu in times))
        for name, times in taken.items()
    }
    with capsys.disabled():
        print(f"\nmedians of {ROUNDS} rounds, seconds: wall, cpu; beyond torch: wall, cpu")
        for name, (wall, cpu) in figures.items():
            torch_wall, torch_cpu = figures["import torch"]
            beyond = f"{wall - torch_wall:+8.3f}{cpu - torch_cpu:+8.3f}"
            print(f"{name:18}{wall:8.3f}{cpu:8.3f}   {beyond if 'op' in name.split() else ''}")
