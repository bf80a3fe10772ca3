"""`python -m cpo_fast.data check`: whether a data set can be used, before training on it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from cpo_fast.data import STUDY_FORMATS, is_preference_file, open_preferences, open_studies
from cpo_fast.data.check import IMAGE_CHECKS, check, table, write
from cpo_fast.data.preferences import PREFERENCE_FORMATS
from cpo_fast.data.sections import RULES
from cpo_fast.data.source import Source
from cpo_fast.errors import CpoFastError

USABLE, TOO_MANY_BAD, UNREADABLE = 0, 1, 2


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError("must lie between 0 and 1")
    return value


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m cpo_fast.data", description=__doc__)
    command = parser.add_subparsers(required=True).add_parser(
        "check",
        help="read everything and say what is usable",
        description="Read a whole data set; write summary.json and rejected_records.jsonl. "
        "Exit code 0: usable, 1: too many records set aside, 2: cannot be read.",
    )
    command.add_argument("--dataset", required=True, help="folder, file, or the name open-i")
    command.add_argument("--output_dir", required=True)
    command.add_argument("--max_bad_fraction", type=_fraction, default=0.05)
    formats = dict.fromkeys((*STUDY_FORMATS, *PREFERENCE_FORMATS))
    command.add_argument("--dataset_format", choices=formats, default="auto")
    command.add_argument("--image_root", help="folder that image paths are relative to")
    command.add_argument("--sections", choices=RULES, default="careful")
    command.add_argument(
        "--images",
        choices=IMAGE_CHECKS,
        default="decode",
        help="how far to look at images; header is faster, but does not see truncated files",
    )
    return parser.parse_args(argv)


def _source(args: argparse.Namespace) -> Source:
    if is_preference_file(args.dataset, args.dataset_format):
        return open_preferences(
            args.dataset, dataset_format=args.dataset_format, image_root=args.image_root
        )
    return open_studies(
        args.dataset,
        dataset_format=args.dataset_format,
        sections=args.sections,
        image_root=args.image_root,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0 usable, 1 too many records are set aside (or none is left), 2 unreadable."""
    args = _arguments(argv)
    try:
        checked = check(_source(args), args.images)
        write(checked, args.output_dir)
    except CpoFastError as error:
        print(f"error: {error}", file=sys.stderr)
        return UNREADABLE
    print(table(checked))
    if checked.facts["used"] == 0 or checked.bad_fraction > args.max_bad_fraction:
        print(
            f"error: {len(checked.rejected)} of {checked.facts['read']} records are set aside, "
            f"more than --max_bad_fraction {args.max_bad_fraction} allows; "
            f"see {args.output_dir}/rejected_records.jsonl",
            file=sys.stderr,
        )
        return TOO_MANY_BAD
    return USABLE


if __name__ == "__main__":
    sys.exit(main())
