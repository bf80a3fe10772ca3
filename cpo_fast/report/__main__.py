"""Write the page of one run, or a comparison of several runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from cpo_fast.command_line import Parser, program, report_error
from cpo_fast.console import run_command
from cpo_fast.errors import CpoFastError
from cpo_fast.report import write_comparison, write_report

DEFAULT = "comparison.html"


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog=program("report"), description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="output_dir of a run")
    parser.add_argument(
        "--output",
        type=Path,
        help=f"file of the comparison (default: {DEFAULT} beside the first run)",
    )
    arguments = parser.parse_args(argv)
    if len(arguments.runs) == 1 and arguments.output is not None:
        parser.error("--output is for comparing several runs; one run's page is RUN/report.html")
    if arguments.output is not None and arguments.output.is_dir():
        parser.error(f"--output {arguments.output}: a folder; name the file of the comparison")
    try:
        if len(arguments.runs) == 1:
            path = write_report(arguments.runs[0])
        else:
            # Absolute only if the run's path is: every page is printed as the paths were given.
            beside = Path(os.path.normpath(arguments.runs[0] / ".." / DEFAULT))
            path = write_comparison(arguments.runs, arguments.output or beside)
    except CpoFastError as error:
        report_error(program("report"), error)
        return 2
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
