"""Merge an adapter into its base.

The result is one model with tokenizer and image processor, which transformers, vLLM and others load
without peft.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from cpo_fast.command_line import Parser, program, report_error
from cpo_fast.console import run_command
from cpo_fast.errors import CpoFastError, UsageError
from cpo_fast.locks import check_folder, lock_file


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 written, 1 not written, 2 wrong usage."""
    parser = Parser(prog=program("export"), description=__doc__)
    parser.add_argument(
        "--merge", required=True, type=Path, metavar="CHECKPOINT",
        help="folder of an adapter or of a training stage",
    )  # fmt: skip
    parser.add_argument(
        "--base_model", type=Path, help="folder of its base (default: named by the adapter)"
    )
    parser.add_argument("--output_dir", required=True, type=Path, help="folder of the merged model")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "bfloat16", "float16", "float32"),
        help="dtype of the written weights (default: the base model's)",
    )
    args = parser.parse_args(argv)
    try:
        check_paths(args.merge, args.output_dir, args.base_model)
        with lock_file(args.output_dir.resolve(), "--output_dir"):
            export_merged(args.merge, args.output_dir, dtype=args.dtype, base_model=args.base_model)
    except (CpoFastError, OSError) as error:
        return report_error(program("export"), error)
    print(f"{args.output_dir}: {args.merge} merged into its base")
    return 0


def export_merged(
    checkpoint: Path, output_dir: Path, *, dtype: str = "auto", base_model: Path | None = None
) -> None:
    """Write the base model of an adapter with the adapter added to its weights.

    The sum is computed in float32 and rounded once, to `dtype` ("auto": the dtype of the base
    model's files). The folder (mode 0700) is written under another name and renamed: it is complete
    or absent. For an adapter in the folder of a finished run, README.md is a model card with data,
    settings and evaluation of the run. Raises UsageError when `checkpoint` is not an adapter or is
    damaged, or when `output_dir` is not empty.
    """
    import torch

    from cpo_fast.model.adapters import merge
    from cpo_fast.model.checkpoint import Checkpoint
    from cpo_fast.model.lineage import is_adapter, lineage
    from cpo_fast.model.supported import read_model_config
    from cpo_fast.report.model_card import card_of_export
    from cpo_fast.run.find_checkpoint import find_checkpoint

    check_paths(checkpoint, output_dir, base_model)
    checkpoint = find_checkpoint(checkpoint, "--merge", adapter=True)
    if not is_adapter(checkpoint):
        raise UsageError(
            f"--merge {checkpoint}: trained without LoRA, so there is nothing to merge"
        )
    model = Checkpoint.open(checkpoint, base_model=base_model)
    if dtype == "auto":
        written = read_model_config(lineage(checkpoint, base_model)[-1]).dtype or torch.float32
    else:
        written = getattr(torch, dtype)
    partial = output_dir.with_name(f".{output_dir.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    os.umask(0o077)
    try:
        whole: Any = merge(model.load(dtype=torch.float32, device=torch.device("cpu")))
        model.save(whole.to(written), partial)
        card_of_export(checkpoint, partial)
        if output_dir.exists():
            output_dir.rmdir()
        partial.rename(output_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_paths(checkpoint: Path, output_dir: Path, base_model: Path | None) -> None:
    """Raise UsageError for wrong folders; torch is not imported."""
    from cpo_fast.run.find_checkpoint import check_named

    check_named(checkpoint, "--merge", adapter=True, base_model=base_model)
    check_folder(output_dir)
    if output_dir.exists() and any(output_dir.iterdir()):
        raise UsageError(f"--output_dir {output_dir} is not empty; name a new folder")


if __name__ == "__main__":
    sys.exit(run_command(main))
