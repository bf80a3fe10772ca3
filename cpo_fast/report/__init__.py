"""A run as one self-contained page, report.html, and its figures as PNG files.

`write_report(run_dir)` reads the files of a finished run or evaluation and recomputes nothing.
`write_comparison(run_dirs, path)` shows several runs side by side.
"""

from cpo_fast.report.page import write_comparison, write_report

__all__ = ["write_comparison", "write_report"]
