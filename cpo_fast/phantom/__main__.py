"""`cpo-fast phantom --output_dir D --num_studies N [--seed 42] [--image_size 256]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from cpo_fast.command_line import Parser, program, report_error
from cpo_fast.console import run_command
from cpo_fast.counting import counted
from cpo_fast.errors import CpoFastError
from cpo_fast.flags import SEED
from cpo_fast.locks import lock_file
from cpo_fast.phantom.dataset import IMAGE_SIZE, NUM_STUDIES, write_phantom


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the data set and print its path. Returns 0, or 2 for invalid settings."""
    parser = Parser(
        prog=program("phantom"),
        description="Write a synthetic data set in the layout of MIMIC-CXR-JPG (not medical data).",
    )
    parser.add_argument("--output_dir", required=True, help="a new or empty folder")
    parser.add_argument("--num_studies", required=True, type=NUM_STUDIES, help="number of studies")
    parser.add_argument("--seed", type=SEED, default=42, help="random seed")
    parser.add_argument(
        "--image_size", type=IMAGE_SIZE, default=256, help="image size in pixels per side"
    )
    flags = parser.parse_args(arguments)
    try:
        with lock_file(Path(flags.output_dir).resolve(), "--output_dir"):
            root = write_phantom(
                flags.output_dir,
                num_studies=flags.num_studies,
                seed=flags.seed,
                image_size=flags.image_size,
            )
    except (CpoFastError, OSError) as error:
        report_error(program("phantom"), error)
        return 2
    print(f"{counted(flags.num_studies, 'study', 'studies')} in {root}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
