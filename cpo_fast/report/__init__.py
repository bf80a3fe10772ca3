"""A run as one self-contained page: report.html, with its figures beside it as PNG files.

`write_report(run_dir)` reads what `python -m cpo_fast.train` left in a run folder; nothing is
computed again. `write_comparison(run_dirs, path)` lays several runs side by side.
"""

from cpo_fast.report.page import write_comparison, write_report

__all__ = ["write_comparison", "write_report"]
