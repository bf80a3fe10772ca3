"""Worker processes end when the run fails."""

from __future__ import annotations

import subprocess
import sys

CODE = """
from torch.utils.data import Dataset
from cpo_fast.training.feed import load_steps

class Feed(Dataset):
    def __len__(self):
        return 50
    def __getitem__(self, index):
        return index

steps = load_steps(Feed(), num_workers=1)
assert next(steps) == 0
raise RuntimeError("the loop broke")
"""


def test_unexpected_error_ends_the_process() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 1 and "the loop broke" in done.stderr
