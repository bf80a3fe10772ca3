"""Rules over several flags of a run, and checks of the files and devices that they name.

Both run before the first file is read. flag_ranges.py has the range of each flag.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from cpo_fast.errors import UsageError
from cpo_fast.folders import TRAINING, check_free
from cpo_fast.locks import check_folder
from cpo_fast.loss.options import LOSS_TYPES
from cpo_fast.run.flag_names import find_option_fault
from cpo_fast.run.flag_ranges import SOURCES
from cpo_fast.training.stage_settings import TRAINING_STAGES

if TYPE_CHECKING:
    from cpo_fast.run.arguments import TrainArguments

TINY = "tiny"  # name of the random model that a run creates
MANY_STEPS = 1000  # steps for trying a schedule while the number of steps is unknown


def check_rules(args: TrainArguments) -> None:
    """Raise UsageError if flags contradict each other."""
    if args.sft_checkpoint is not None and "sft" in args.stage_names:
        raise UsageError("--sft_checkpoint replaces SFT: leave sft out of --stages")
    if args.min_pixels > args.max_pixels:
        raise UsageError(
            f"--min_pixels {args.min_pixels}: must be at most --max_pixels {args.max_pixels}"
        )
    if not any(args.source_weights(SOURCES).values()):
        raise UsageError(
            "no pair is left: --thinking_weight or --perception_weight must be above 0 for one "
            "of --counterfactual_sources"
        )
    if args.fsdp and args.use_peft and args.sft_use_peft:
        raise UsageError("--fsdp shards full tuning; set --use_peft or --sft_use_peft false")
    if args.torch_compile and args.fsdp:
        raise UsageError("--torch_compile and --fsdp cannot be combined yet")
    _check_loss(args)
    for prefix in ("", "sft_"):
        _check_json(f"{prefix}lr_scheduler_kwargs", getattr(args, f"{prefix}lr_scheduler_kwargs"))
    if args.sft_lr_scheduler_kwargs and not args.sft_lr_scheduler_type:
        raise UsageError("--sft_lr_scheduler_kwargs needs --sft_lr_scheduler_type")
    _check_schedule(args, "cpo")
    _check_schedule(args, "sft")


def _check_loss(args: TrainArguments) -> None:
    loss = LOSS_TYPES[args.loss_type]
    smoothing = f"--label_smoothing {args.label_smoothing:g}"
    if args.label_smoothing and not loss.smoothing:
        raise UsageError(f"{smoothing}: must be 0: --loss_type {args.loss_type} does not use it")
    if loss.needs_smoothing and not args.label_smoothing:
        raise UsageError(f"{smoothing}: must be above 0 for --loss_type {args.loss_type}")
    if args.precompute_ref_log_probs and not loss.reference:
        raise UsageError(f"--loss_type {args.loss_type} has no reference to precompute")


def _check_json(name: str, text: str | None) -> None:
    try:
        usable = isinstance(json.loads(text or "{}"), dict)
    except ValueError:
        usable = False
    if not usable:
        raise UsageError(
            f"--{name} must be a JSON object, such as '{{\"min_lr\": 1e-7}}', not {text}"
        )


def _check_schedule(args: TrainArguments, stage: str) -> None:
    settings = args.stage_settings(stage)
    name, options = settings.lr_scheduler_type, settings.lr_scheduler_kwargs or {}
    if fault := find_option_fault(name, options):
        raise UsageError(f"{_format_schedule_flags(args, stage)}: {fault}")


def _try_schedules(args: TrainArguments) -> None:
    """Raise UsageError for option values that a schedule cannot use."""
    from cpo_fast.training.schedule import find_schedule_fault

    for stage in TRAINING_STAGES:
        settings = args.stage_settings(stage)
        steps = settings.max_steps if settings.max_steps > 0 else MANY_STEPS
        if fault := find_schedule_fault(settings, steps):
            raise UsageError(f"{_format_schedule_flags(args, stage)}: {fault}")


def _format_schedule_flags(args: TrainArguments, stage: str) -> str:
    """The flags that set the schedule of a stage, with their values."""
    prefix = "sft_" if stage == "sft" and args.sft_lr_scheduler_type else ""
    kwargs = getattr(args, f"{prefix}lr_scheduler_kwargs")
    given = f" with --{prefix}lr_scheduler_kwargs {kwargs}" if kwargs else ""
    return f"--{prefix}lr_scheduler_type {getattr(args, f'{prefix}lr_scheduler_type')}{given}"


def check_machine(args: TrainArguments) -> None:
    """Raise UsageError if a file or device that a flag names is missing.

    Paths are checked first, without heavy imports.
    """
    _check_paths(args)
    _check_resume(args)
    _check_output(args)
    _check_data(args)
    _try_schedules(args)
    _check_device(args)


def _check_paths(args: TrainArguments) -> None:
    from cpo_fast.run.find_checkpoint import check_named

    for name in ("concept_graph", "counterfactuals"):
        path = getattr(args, name)
        if path is not None and not Path(path).is_file():
            raise UsageError(f"--{name} {path}: no such file")
    if args.image_root is not None and not Path(args.image_root).is_dir():
        raise UsageError(f"--image_root {args.image_root}: no such folder")
    name = "model_name_or_path" if args.sft_checkpoint is None else "sft_checkpoint"
    if getattr(args, name) != TINY:
        check_named(getattr(args, name), f"--{name}")
    if args.fsdp and _count_processes() == 1:
        raise UsageError("--fsdp shards over several processes; start them with torchrun")


def _count_processes() -> int:
    """The number of processes that torchrun started for this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _check_output(args: TrainArguments) -> None:
    """Check that the run's folder is writable and holds no checkpoints of another run."""
    from cpo_fast.run.find_checkpoint import check_unused

    if args.dry_run:
        return  # nothing is written
    check_folder(args.output_dir)
    check_free(args.output_dir, TRAINING)
    if args.resume_from_checkpoint is None and not args.overwrite_output_dir:
        check_unused(Path(args.output_dir), args.trained_stages)


def _check_data(args: TrainArguments) -> None:
    from cpo_fast.data import is_preference_file, study_kind

    if args.dataset not in ("phantom", "open-i") and not Path(args.dataset).exists():
        raise UsageError(
            f"--dataset {args.dataset}: no such file or folder; give a preference file, a "
            "MIMIC-CXR-JPG folder, or one of the names open-i and phantom"
        )
    preferences = args.dataset != "phantom" and is_preference_file(
        args.dataset, args.dataset_format
    )
    if args.dataset != "phantom" and not preferences:
        study_kind(args.dataset, args.dataset_format)
    makes = "counterfactual" in args.stage_names or args.counterfactuals is not None
    if "cpo" not in args.stage_names or makes:
        return
    made = Path(args.output_dir) / "counterfactuals.jsonl"
    if not preferences and not made.is_file():
        raise UsageError(
            f"--stages {args.stages}: CPO needs counterfactuals, and {made} does not exist; add "
            "counterfactual to --stages, or set --counterfactuals"
        )


def _check_resume(args: TrainArguments) -> None:
    from cpo_fast.run.same_flags import check_folder_flags

    if args.resume_from_checkpoint is None:
        return
    if args.resume_from_checkpoint != "auto":
        _check_resumed(args, args.resume_from_checkpoint)
    check_folder_flags(Path(args.output_dir), {"world_size": _count_processes(), **asdict(args)})


def _check_resumed(args: TrainArguments, given: str) -> None:
    from cpo_fast.training.checkpoint import list_checkpoints

    run = Path(args.output_dir)
    paths = (path for stage in TRAINING_STAGES for path in list_checkpoints(run / stage))
    found = {path.resolve(): path for path in paths}
    path = found.get(Path(given).resolve())
    if path is None:
        newest = list(found.values())[-1:]
        hint = f"its newest is {newest[0]}" if newest else "it has none"
        raise UsageError(
            f"--resume_from_checkpoint {given}: not a checkpoint of --output_dir {run} ({hint}); "
            "give auto, or the folder of a checkpoint"
        )
    if path.parent.name not in args.stage_names:
        raise UsageError(
            f"--resume_from_checkpoint {given}: its stage {path.parent.name} is not in --stages "
            f"{args.stages}"
        )


def _check_device(args: TrainArguments) -> None:
    import torch

    from cpo_fast.loss.api import impl_obstacles
    from cpo_fast.model.packed import check_attention

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.bf16 and device == "cuda" and not torch.cuda.is_bf16_supported():
        raise UsageError("--bf16 true: this GPU does not support bfloat16")
    name, dtype = args.attn_implementation, torch.bfloat16 if args.bf16 else torch.float32
    try:
        check_attention(name, device, dtype)
    except UsageError as error:
        raise UsageError(f"--attn_implementation {name}: {error}") from None
    obstacles = impl_obstacles(device)
    if args.loss_impl is not None and (why := obstacles[args.loss_impl]) is not None:
        usable = [name for name, obstacle in obstacles.items() if obstacle is None]
        raise UsageError(
            f"--loss_impl {args.loss_impl}: {why}; choose from {', '.join(usable)} on {device}"
        )
