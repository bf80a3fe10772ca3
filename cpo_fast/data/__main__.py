"""Check a data set before training on it (`check`), or write it in the formats of other tools
(`export`)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cpo_fast.command_line import Parser, program, report_error
from cpo_fast.console import run_command
from cpo_fast.counting import counted
from cpo_fast.data import DATASET_FORMATS, is_preference_file, open_preferences, open_studies
from cpo_fast.data.check import IMAGE_CHECKS, check, table, write
from cpo_fast.data.export import FORMATS, export
from cpo_fast.data.lengths import Lengths
from cpo_fast.data.sections import RULES
from cpo_fast.data.source import Source
from cpo_fast.errors import CpoFastError, DataError, UsageError
from cpo_fast.flags import POSITIVE, SHARE
from cpo_fast.folders import CHECK, check_free
from cpo_fast.locks import check_file, check_folder, lock_file, lock_folder

USABLE, TOO_MANY_BAD, UNREADABLE = 0, 1, 2


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog=program("data"), description=__doc__)
    commands = parser.add_subparsers(required=True, dest="command")
    command = commands.add_parser(
        "check",
        help="read everything and report what is usable",
        description="Read a whole data set; write summary.json and rejected_records.jsonl. "
        "Exit code 0: usable, 1: too many records set aside, 2: cannot be read.",
    )
    _add_data(command)
    command.add_argument("--output_dir", required=True, help="folder of the results")
    command.add_argument(
        "--max_bad_fraction", type=SHARE, default=0.05,
        help="exit code 1 if more than this share of records is set aside",
    )  # fmt: skip
    command.add_argument(
        "--images",
        choices=IMAGE_CHECKS,
        default="decode",
        help="how to check images; header is faster but misses truncated files",
    )
    command.add_argument(
        "--sample",
        type=SHARE,
        default=1.0,
        help="share of the records whose images and tokens are checked, chosen by id",
    )
    command.add_argument(
        "--model_name_or_path", "--tokenizer", dest="model", metavar="FOLDER",
        help="model or tokenizer to count tokens with",
    )  # fmt: skip
    command.add_argument("--max_length", type=POSITIVE, help="count records longer than N tokens")

    command = commands.add_parser(
        "export",
        help="write the records for another tool",
        description="Write a data set as own rows (jsonl), CXR-CounterFact, trl or ms-swift. "
        "Exit code 0: written, 2: could not be read or written.",
    )
    _add_data(command)
    command.add_argument("--output", required=True, help="file to write")
    command.add_argument("--format", choices=FORMATS, required=True, help="format to write")
    args = parser.parse_args(argv)
    if args.command == "check" and args.max_length and not args.model:
        parser.error("--max_length needs --model_name_or_path or --tokenizer to count tokens with")
    return args


def _add_data(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--dataset", required=True, help="folder, file, or the name open-i")
    add("--dataset_format", choices=DATASET_FORMATS, default="auto", metavar="NAME",
        help=f"format (auto: detected automatically): {', '.join(DATASET_FORMATS)}")  # fmt: skip
    add("--image_root", metavar="PATH", help="folder that image paths are relative to")
    add("--sections", choices=RULES, default="careful", help="parser of report sections")
    add("--max_images", type=POSITIVE, default=1, help="images per study, frontal views first")


def _source(args: argparse.Namespace) -> Source[Any]:
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


def _check(args: argparse.Namespace) -> int:
    check_folder(args.output_dir)
    check_free(args.output_dir, CHECK)
    source = _source(args)
    lengths = None
    if args.model:
        lengths = Lengths.of_model(
            args.model, max_length=args.max_length, max_images=args.max_images
        )
    checked = check(
        source,
        args.images,
        lengths=lengths,
        sample=args.sample,
        max_images=args.max_images,
    )
    with lock_folder(args.output_dir):
        write(checked, args.output_dir)
    print(table(checked))
    if checked.facts["used"] == 0 or checked.bad_fraction > args.max_bad_fraction:
        allowed = f"more than --max_bad_fraction {args.max_bad_fraction} allows"
        report_error(
            f"{program('data')} check",
            DataError(
                f"{len(checked.rejected)} of {counted(checked.facts['read'], 'record')} set aside, "
                f"{allowed if checked.facts['used'] else 'none is left'}; "
                f"see {args.output_dir}/rejected_records.jsonl"
            ),
        )
        return TOO_MANY_BAD
    return USABLE


def _export(args: argparse.Namespace) -> int:
    check_file(args.output)
    source = _source(args)
    if Path(args.output).exists() and Path(args.output).samefile(source.path):
        raise UsageError(f"--output {args.output} is the data set itself; name another file")
    with lock_file(Path(args.output)):
        done = export(source, args.output, args.format, max_images=args.max_images)
    print(
        f"{args.output}: "
        f"{counted(done.rows, 'row')} of {counted(done.records, 'record')} ({source.kind})"
    )
    for reason, count in done.rejected.items():
        print(f"set aside: {count}  {reason}")
    if done.paths:
        print("image paths are relative to the folder they were read from: name it as --image_root")
    return USABLE


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 usable or written, 1 too many records set aside (or none left), 2 unreadable."""
    args = _arguments(argv)
    try:
        return _check(args) if args.command == "check" else _export(args)
    except CpoFastError as error:
        report_error(f"{program('data')} {args.command}", error)
        return UNREADABLE


if __name__ == "__main__":
    sys.exit(run_command(main))
