"""SFT and CPO of a run: models, objectives, and results for the next stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from cpo_fast.errors import DataError
from cpo_fast.model.adapters import merge
from cpo_fast.model.build import add_lora, freeze_vision
from cpo_fast.model.checkpoint import default_device
from cpo_fast.model.packed import PackedModel
from cpo_fast.run.arguments import SOURCES
from cpo_fast.run.begin import check_beginning
from cpo_fast.run.context import RunContext
from cpo_fast.run.find_checkpoint import MERGED
from cpo_fast.run.reference_cache import ReferenceCache
from cpo_fast.run.samples import Samples
from cpo_fast.run.start import lora_targets
from cpo_fast.training.checkpoint import find_result_checkpoint, find_resume_checkpoint
from cpo_fast.training.loop import StageData, StageOutput, StageResult, Trainer
from cpo_fast.training.objectives import CPOObjective, SFTObjective
from cpo_fast.training.sharding import name_weights_in_files, shard
from cpo_fast.types import PreferenceGroup

Splits = dict[str, list[PreferenceGroup]]


def train_sft(run: RunContext, samples: Samples) -> dict[str, Any]:
    """SFT on the chosen answers; an adapter is merged, so that CPO starts from a whole model.

    Returns the stage's part of summary.json, as `train_cpo` does.
    """
    args = run.args
    resume = find_resume_point(run, "sft")
    begun = _check_beginning(run, "sft", [run.checkpoint.path], samples.sft, resume)
    packed, objective = build_sft(run, resume)
    result = run_stage(run, "sft", packed, objective, samples.sft, resume, begun)
    if args.sft_use_peft:
        model = packed.model
        run.world.on_main(lambda: _save_merged(run, model, result.checkpoint))
    return _summarize(run, "sft", result, begun)


def train_cpo(run: RunContext, samples: Samples) -> dict[str, Any]:
    """CPO from the SFT model; the reference is that model (adapters off, or a frozen copy)."""
    args = run.args
    resume = find_resume_point(run, "cpo")
    begun = _check_beginning(run, "cpo", find_cpo_origin(run), samples.cpo, resume)
    packed, reference = build_cpo_models(run, resume)
    splits = samples.cpo
    if args.precompute_ref_log_probs:
        splits = add_reference_logps(run, reference or packed, splits)
        reference = None  # frees its memory
    objective = build_cpo_objective(run, packed, reference, splits["train"])
    result = run_stage(run, "cpo", packed, objective, splits, resume, begun)
    return _summarize(run, "cpo", result, begun)


# --- models and objectives -----------------------------------------------------------------------


def build_sft(run: RunContext, resume: Path | None) -> tuple[PackedModel, SFTObjective]:
    """The model that SFT trains, and its objective."""
    packed = _wrap(run, _load_trainable(run, "sft", run.checkpoint.path, resume))
    return packed, SFTObjective(packed, impl=run.args.loss_impl)


def build_cpo_models(
    run: RunContext, resume: Path | None
) -> tuple[PackedModel, PackedModel | None]:
    """The policy, and the reference of full tuning: a frozen copy."""
    args = run.args
    start = find_sft_result(run)
    model = _load_trainable(run, "cpo", start, resume)
    reference = None
    if not args.use_peft:
        shared = args.fsdp and not args.precompute_ref_log_probs
        reference = load_reference(run, start, shared=shared)
    return _wrap(run, model), reference


def load_reference(run: RunContext, start: Path, *, shared: bool = False) -> PackedModel:
    """The frozen model in `start`, sharded over the ranks if `shared`."""
    frozen = run.checkpoint.load(
        dtype=run.dtype, path=start, device=torch.device("cpu") if shared else None
    )
    frozen = frozen.requires_grad_(False).eval()
    if shared:
        shard(frozen, default_device())
    return PackedModel(frozen, attention=run.args.attn_implementation)


def build_cpo_objective(
    run: RunContext,
    packed: PackedModel,
    reference: PackedModel | None,
    groups: Sequence[PreferenceGroup],
) -> CPOObjective:
    """The objective under the run's flags for training on `groups`."""
    args = run.args
    held = {name for group in groups for name in group.sources}
    weights = {name: w for name, w in args.source_weights(SOURCES).items() if name in held}
    return CPOObjective(
        packed,
        reference,
        beta=args.beta,
        loss_type=args.loss_type,
        label_smoothing=args.label_smoothing,
        rpo_alpha=args.rpo_alpha,
        impl=args.loss_impl,
        source_weights=weights,
        normalize=args.normalize_source_weights,
    )


def _load_trainable(run: RunContext, stage: str, start: Path, resume: Path | None) -> Any:
    """The model in `start` prepared for training, or as checkpoint `resume` left it."""
    args = run.args
    peft, freeze_vit = args.tuning_of(stage)
    on = torch.device("cpu") if args.fsdp and not peft else None
    source = start if peft and resume else resume or start
    model = run.checkpoint.load(dtype=run.dtype, path=source, device=on)
    if peft and resume is not None:
        from peft import PeftModel

        return PeftModel.from_pretrained(model, resume, is_trainable=True)
    if peft:
        return add_lora(
            model,
            r=args.lora_r,
            alpha=args.lora_alpha,
            dropout=args.lora_dropout,
            target_modules=lora_targets(args),
            freeze_vit=freeze_vit,
            seed=args.seed,
        )
    if freeze_vit:
        freeze_vision(model)
    return shard(model, default_device()) if args.fsdp else model


def _wrap(run: RunContext, model: Any) -> PackedModel:
    if run.args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    attention = run.args.attn_implementation
    return PackedModel(model, attention=attention, compile=run.args.torch_compile)


def add_reference_logps(run: RunContext, reference: PackedModel, splits: Splits) -> Splits:
    """The groups of CPO with the reference's log-probs, from the folder's cache or computed.

    Groups whose image fails are left out. Raises DataError when a split loses all its groups.
    """
    args = run.args
    train, watched = splits["train"], splits["validate"][: args.max_eval_samples]
    cache = ReferenceCache(
        run.folder.path,
        reference,
        adapters_off=args.use_peft,
        checkpoint=run.checkpoint,
        device=default_device(),
        stop=run.stop,
        packing_length=args.packing_length,
        num_workers=args.dataloader_num_workers,
        impl=args.loss_impl,
        overwrite=args.overwrite_output_dir or args.allow_changed_data,
    )
    filled = run.world.main_first(lambda: cache.fill([*train, *watched]))
    run.folder.reject_unreadable("reference", list(cache.rejected.values()))
    parts = {"train": filled[: len(train)], "validate": filled[len(train) :]}
    for split, groups in parts.items():
        parts[split] = [group for group in groups if group.ref_logps]
        if groups and not parts[split]:
            raise DataError(f"cpo: no sample of split {split} could be read for the reference")
    return {**splits, **parts}


# --- results and starting points -----------------------------------------------------------------


def find_sft_result(run: RunContext) -> Path:
    """The model that CPO starts from: `sft_checkpoint`, else this folder's SFT, else the base."""
    stage_dir = (run.folder.path / "sft").resolve()
    if run.args.sft_checkpoint is not None:
        return run.checkpoint.path
    if (stage_dir / MERGED).is_dir():
        return stage_dir / MERGED
    return find_stage_result(run, stage_dir) or run.checkpoint.path


def find_stage_result(run: RunContext, stage_dir: Path) -> Path | None:
    """`find_result_checkpoint` under the run's flags; only rank 0 hashes its files, and once."""
    if (found := run.results.get(stage_dir)) is None:
        best = run.args.load_best_model_at_end
        found = _find_on_main(run, lambda: find_result_checkpoint(stage_dir, best=best))
        if found is not None:
            run.results[stage_dir] = found
    return found


def _find_on_main(run: RunContext, find: Callable[[], Path | None]) -> Path | None:
    """The path that `find` returns on rank 0, on all ranks."""
    found = run.world.on_main(lambda: str(find() or ""))
    return Path(found) if found else None


def find_cpo_origin(run: RunContext) -> list[Path]:
    """The folders of the model that CPO starts from. A merged model counts as its adapter and base,
    because the sum can differ in the last bit between devices."""
    start = find_sft_result(run)
    if start.name != MERGED:
        return [start]
    adapter = find_stage_result(run, start.parent)
    return [adapter, run.checkpoint.path] if adapter else [start]


def find_resume_point(run: RunContext, stage: str) -> Path | None:
    """The checkpoint to resume a stage from, as rank 0 sees it."""
    named, stage_dir = run.args.resume_from_checkpoint, run.folder.path / stage
    found = _find_on_main(run, lambda: find_resume_checkpoint(stage_dir, named))
    if found is None and named is not None and run.folder.is_writer:
        print(f"{stage}: no checkpoint in {stage_dir}: starts from the beginning")
    return found


def _check_beginning(
    run: RunContext, stage: str, model: Sequence[Path], splits: Splits, resume: Path | None
) -> dict[str, Any]:
    held_out = splits["validate"][: run.args.max_eval_samples]
    flags = run.folder.flags
    return check_beginning(
        stage, flags, run.checkpoint, model, splits["train"], held_out, resume, run.world
    )


def _save_merged(run: RunContext, model: Any, checkpoint: Path) -> None:
    """Save SFT's adapter, the last or the best, merged into the base as a whole model."""
    if run.args.load_best_model_at_end:
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(model, load_file(checkpoint / "adapter_model.safetensors"))
    run.checkpoint.save(merge(model), run.folder.path / "sft" / MERGED)


# --- one stage -----------------------------------------------------------------------------------


def run_stage(
    run: RunContext,
    stage: str,
    packed: PackedModel,
    objective: SFTObjective | CPOObjective,
    splits: Splits,
    resume: Path | None,
    begun_with: dict[str, Any],
) -> StageResult:
    """Train on the split "train", watching the split "validate"."""

    def save(folder: Path, sharded: bool) -> dict[str, str]:
        def write(weights: dict[str, torch.Tensor] | None) -> Path:
            run.checkpoint.save(packed.model, folder, weights=weights)
            return folder / "model.safetensors"

        if sharded:
            return name_weights_in_files(packed.model, write)
        write(None)
        return {}

    checkpoint = run.checkpoint
    held_out = splits["validate"][: run.args.max_eval_samples]
    return Trainer(
        run.args.stage_settings(stage),
        packed,
        objective,
        StageData(splits["train"], held_out, checkpoint.pixels, checkpoint.image_token_id),
        StageOutput(run.folder.path / stage, run.folder.metrics, save, begun_with),
        device=default_device(),
        stop=run.stop,
        resume=resume,
        world=run.world,
    ).run()


def _summarize(
    run: RunContext, stage: str, result: StageResult, begun: dict[str, Any]
) -> dict[str, Any]:
    """The stage's part of summary.json; samples that it left out are rejected."""
    run.folder.reject_unreadable(stage, result.rejected)
    changes = {"resumed_with_changes": begun["changes"]} if begun["changes"] else {}
    return {
        "steps": result.steps,
        **changes,
        "seconds": round(result.seconds, 2),
        **result.throughput,
        "checkpoint": str(result.checkpoint),
        "final": result.final,
    }
