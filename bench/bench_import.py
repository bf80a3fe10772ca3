"""What `import cpo_fast` costs, and what the loss op costs beyond `import torch`.

    pytest --benchmark bench/bench_import.py

Each round is a fresh interpreter. The difference of a line to the one of torch is what we add; the
last line is the measurement of the promise (less than 0.3 s), the first that of `import cpo_fast`
alone, which loads not even torch.
"""

from __future__ import annotations

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
    "the op, called": (
        "import torch; from cpo_fast import linear_logprobs as f; "
        "f(torch.ones(2, 4), torch.ones(5, 4), torch.tensor([0, 1]))"
    ),
}
ROUNDS = 9


def seconds(statement: str) -> float:
    begun = perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return perf_counter() - begun


def test_import_times(capsys: pytest.CaptureFixture[str]) -> None:
    taken: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    for statement in STATEMENTS.values():
        seconds(statement)  # byte code and page cache
    for _ in range(ROUNDS):  # in turn, so that a busy moment falls on all of them
        for name, statement in STATEMENTS.items():
            taken[name].append(seconds(statement))
    torch = median(taken["import torch"])
    with capsys.disabled():
        print(f"\n{'':18} {'median s':>9} {'min s':>7} {'beyond torch':>13}   {ROUNDS} rounds")
        for name, times in taken.items():
            beyond = f"{median(times) - torch:+.3f}" if "op" in name else ""
            print(f"{name:18} {median(times):9.3f} {min(times):7.3f} {beyond:>13}")
