"""SFT and CPO: which model, which objective, and where the result lies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from cpo_fast.counting import counted
from cpo_fast.errors import DataError
from cpo_fast.model.adapters import merge
from cpo_fast.model.build import add_lora, freeze_vision, load_model, save_model
from cpo_fast.model.packed import PackedModel
from cpo_fast.packing import image_token_id
from cpo_fast.run.arguments import SOURCES, TrainArguments
from cpo_fast.run.base import Base, lora_targets
from cpo_fast.run.find_checkpoint import MERGED
from cpo_fast.run.reference_cache import ReferenceCache
from cpo_fast.run.resume import checked_start
from cpo_fast.run.run_folder import RunFolder
from cpo_fast.run.samples import Samples
from cpo_fast.training.checkpoint import result_checkpoint, resume_point
from cpo_fast.training.interrupt import StopRequest
from cpo_fast.training.loop import StageResult, Trainer
from cpo_fast.training.objectives import CPOObjective, SFTObjective
from cpo_fast.training.pairs import score_pairs
from cpo_fast.training.sharding import names_in_files, shard
from cpo_fast.types import PreferenceGroup, RejectedRecord


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load(args: TrainArguments, path: Path, *, on: torch.device | None = None) -> Any:
    """The model in `path` on the device; bf16 weights under `--bf16`, else fp32."""
    model: Any = load_model(path, dtype=torch.bfloat16 if args.bf16 else torch.float32)
    return model.to(on or device())


def train_sft(
    args: TrainArguments, folder: RunFolder, samples: Samples, base: Base, stop: StopRequest
) -> None:
    """SFT of the chosen answers; an adapter is merged, so that CPO starts from a whole model."""
    resume = resume_of(args, folder, "sft")
    begun = begun_with(args, folder, base, "sft", [base.path], samples.sft, resume)
    packed, objective = sft_parts(args, folder, base, resume)
    parts = (packed, objective, samples.sft)
    result = run_stage(args, folder, base, "sft", *parts, stop, resume, begun)
    if args.sft_use_peft:
        model = packed.model
        folder.world.on_main(lambda: save_merged(args, folder, base, model, result.checkpoint))
    record(folder, "sft", result, begun)


def sft_parts(
    args: TrainArguments, folder: RunFolder, base: Base, resume: Path | None
) -> tuple[PackedModel, SFTObjective]:
    """The model that SFT trains, and its objective."""
    model = trainable(
        args, base.path, resume, peft=args.sft_use_peft, freeze_vit=args.sft_freeze_vit
    )
    packed = prepare(args, model)
    return packed, SFTObjective(packed, impl=args.loss_impl)


def save_merged(
    args: TrainArguments, folder: RunFolder, base: Base, model: Any, checkpoint: Path
) -> None:
    """SFT's adapter, the last or the best, merged into the base as a whole model."""
    if args.load_best_model_at_end:
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(model, load_file(checkpoint / "adapter_model.safetensors"))
    target = folder.path / "sft" / MERGED
    save_model(merge(model), target, tokenizer=base.tokenizer, images=base.images)


def train_cpo(
    args: TrainArguments, folder: RunFolder, samples: Samples, base: Base, stop: StopRequest
) -> None:
    """CPO from the SFT model; the reference is that model (adapters off, or a frozen copy)."""
    resume = resume_of(args, folder, "cpo")
    made_of = cpo_start(args, folder, base)
    begun = begun_with(args, folder, base, "cpo", made_of, samples.cpo, resume)
    packed, reference = cpo_models(args, folder, base, resume)
    splits = samples.cpo
    if args.precompute_ref_log_probs:
        splits = with_reference(args, folder, base, reference or packed, splits, stop)
        reference = None  # its memory is free for the training
    objective = cpo_objective(args, packed, reference, splits["train"])
    parts = (packed, objective, splits)
    result = run_stage(args, folder, base, "cpo", *parts, stop, resume, begun)
    record(folder, "cpo", result, begun)


def cpo_models(
    args: TrainArguments, folder: RunFolder, base: Base, resume: Path | None
) -> tuple[PackedModel, PackedModel | None]:
    """The policy, and its frozen copy as the reference where it has no adapters to turn off."""
    start = sft_model(args, folder, base)
    model = trainable(args, start, resume, peft=args.use_peft, freeze_vit=args.freeze_vit)
    reference = None
    if not args.use_peft:
        shared = args.fsdp and not args.precompute_ref_log_probs
        frozen = load(args, start, on=torch.device("cpu") if shared else None)
        frozen = frozen.requires_grad_(False).eval()
        if shared:
            shard(frozen, device())
        reference = PackedModel(frozen, attention=args.attn_implementation)
    return prepare(args, model), reference


def cpo_objective(
    args: TrainArguments,
    packed: PackedModel,
    reference: PackedModel | None,
    groups: Sequence[PreferenceGroup],
) -> CPOObjective:
    """The objective under the run's flags; `groups` are those that it trains on."""
    return CPOObjective(
        packed,
        reference,
        beta=args.beta,
        loss_type=args.loss_type,
        label_smoothing=args.label_smoothing,
        rpo_alpha=args.rpo_alpha,
        impl=args.loss_impl,
        source_weights=source_weights(args, groups),
        normalize=args.normalize_source_weights,
    )


def source_weights(args: TrainArguments, groups: Sequence[PreferenceGroup]) -> dict[str, float]:
    """The weights of the sources that the training groups hold."""
    held = {name for group in groups for name in group.sources}
    return {name: w for name, w in args.source_weights(SOURCES).items() if name in held}


def with_reference(
    args: TrainArguments,
    folder: RunFolder,
    base: Base,
    reference: PackedModel,
    splits: dict[str, list[PreferenceGroup]],
    stop: StopRequest,
) -> dict[str, list[PreferenceGroup]]:
    """The groups of CPO with the reference's log-probs, from this folder's cache or computed."""
    train, watched = splits["train"], splits["validate"][: args.max_eval_samples]
    cache = ReferenceCache(
        folder.path,
        reference,
        adapters_off=args.use_peft,
        base=base,
        device=device(),
        stop=stop,
        packing_length=args.packing_length,
        num_workers=args.dataloader_num_workers,
        impl=args.loss_impl,
        overwrite=args.overwrite_output_dir or args.allow_changed_data,
    )
    filled = folder.world.main_first(lambda: cache.fill([*train, *watched]))
    left_out(folder, "reference", list(cache.rejected.values()))
    parts = {"train": filled[: len(train)], "validate": filled[len(train) :]}
    for split, groups in parts.items():
        parts[split] = [group for group in groups if group.ref_logps]
        if groups and not parts[split]:
            raise DataError(f"cpo: no sample of split {split} could be read for the reference")
    return {**splits, **parts}


def left_out(folder: RunFolder, what: str, records: Sequence[RejectedRecord]) -> None:
    """List samples that a stage did without, and say so."""
    folder.reject(records)
    if records:
        samples = counted(len(records), "sample")
        print(f"{what}: {samples} left out, an image could not be read; the first: "
              f"{records[0].id} ({records[0].reason}: {records[0].detail})")  # fmt: skip


def sft_model(args: TrainArguments, folder: RunFolder, base: Base) -> Path:
    """What CPO starts from: `--sft_checkpoint`, this folder's SFT, or, without either, the base."""
    stage_dir = (folder.path / "sft").resolve()
    merged = stage_dir / MERGED
    if args.sft_checkpoint is not None:
        return base.path
    if merged.is_dir():
        return merged
    return result_checkpoint(stage_dir, best=args.load_best_model_at_end) or base.path


def cpo_start(args: TrainArguments, folder: RunFolder, base: Base) -> list[Path]:
    """The folders of what CPO starts from: for a merged model the adapter and its base, since the
    sum of both is not the same to the last bit on every device."""
    start = sft_model(args, folder, base)
    if start.name != MERGED:
        return [start]
    adapter = result_checkpoint(start.parent, best=args.load_best_model_at_end)
    return [adapter, base.path] if adapter else [start]


def begun_with(
    args: TrainArguments,
    folder: RunFolder,
    base: Base,
    stage: str,
    model: Sequence[Path],
    splits: dict[str, list[PreferenceGroup]],
    resume: Path | None,
) -> dict[str, Any]:
    """What the stage begins with; UsageError where it is not what the checkpoint began with."""
    held_out = splits["validate"][: args.max_eval_samples]
    return checked_start(
        stage, folder.flags, base, model, splits["train"], held_out, resume, folder.world
    )


def resume_of(args: TrainArguments, folder: RunFolder, stage: str) -> Path | None:
    """The checkpoint that a stage goes on from, as rank 0 sees it."""

    def find() -> str | None:
        found = resume_point(folder.path / stage, args.resume_from_checkpoint)
        return str(found) if found else None

    found = folder.world.on_main(find)
    if found is None and args.resume_from_checkpoint is not None and folder.writes:
        print(f"{stage}: no checkpoint to resume from in {folder.path / stage}: it starts anew")
    return Path(found) if found else None


def pair_logps(
    args: TrainArguments, folder: RunFolder, base: Base, model: Any, groups: list[PreferenceGroup]
) -> dict[str, Any]:
    """Summed log-probs of P pairs: policy_/reference_ x chosen/rejected, and the pairs' groups
    and sources. A pair whose image cannot be read is left out; DataError when none is left."""
    packed = PackedModel(model.eval(), attention=args.attn_implementation)
    reference = None
    if not args.use_peft:
        frozen = load(args, sft_model(args, folder, base)).eval()
        reference = PackedModel(frozen, attention=args.attn_implementation)
    objective = CPOObjective(packed, reference, impl=args.loss_impl)
    found, failed = score_pairs(
        objective,
        groups,
        base.pixels,
        base.tokenizer,
        packing_length=args.packing_length,
        device=device(),
    )
    left_out(folder, "rewards", failed)
    if not found:
        raise DataError(
            f"evaluation: no held-out pair of {counted(len(groups), 'sample')} could be read"
        )
    return found


def trainable(
    args: TrainArguments, start: Path, resume: Path | None, *, peft: bool, freeze_vit: bool
) -> Any:
    """The model in `start` made ready for training, or the same as a checkpoint left it."""
    if peft and resume is not None:
        from peft import PeftModel

        return PeftModel.from_pretrained(load(args, start), resume, is_trainable=True)
    if peft:
        return lora(args, load(args, resume or start), freeze_vit=freeze_vit)
    model = load(args, resume or start, on=torch.device("cpu") if args.fsdp else None)
    if freeze_vit:
        freeze_vision(model)
    return shard(model, device()) if args.fsdp else model


def lora(args: TrainArguments, model: Any, *, freeze_vit: bool) -> Any:
    return add_lora(
        model,
        r=args.lora_r,
        alpha=args.lora_alpha,
        dropout=args.lora_dropout,
        target_modules=lora_targets(args),
        freeze_vit=freeze_vit,
        seed=args.seed,
    )


def prepare(args: TrainArguments, model: Any) -> PackedModel:
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return PackedModel(model, attention=args.attn_implementation, compile=args.torch_compile)


def run_stage(
    args: TrainArguments,
    folder: RunFolder,
    base: Base,
    stage: str,
    packed: PackedModel,
    objective: SFTObjective | CPOObjective,
    splits: dict[str, list[PreferenceGroup]],
    stop: StopRequest,
    resume: Path | None,
    begun_with: dict[str, Any],
) -> StageResult:
    """Train one stage on its "train" split, watching the "validate" split."""

    def save(path: Path, sharded: bool) -> dict[str, str]:
        def write(weights: dict[str, torch.Tensor] | None) -> Path:
            save_model(
                packed.model, path, tokenizer=base.tokenizer, images=base.images, weights=weights
            )
            return path / "model.safetensors"

        if sharded:
            return names_in_files(packed.model, write)
        write(None)
        return {}

    return Trainer(
        stage=stage,
        model=packed,
        objective=objective,
        groups=splits["train"],
        eval_groups=splits["validate"][: args.max_eval_samples],
        pixels=base.pixels,
        image_token_id=image_token_id(base.tokenizer),
        args=args,
        log=folder.metrics,
        stage_dir=folder.path / stage,
        save_model=save,
        device=device(),
        stop=stop,
        resume=resume,
        world=folder.world,
        begun_with=begun_with,
    ).run()


def record(folder: RunFolder, stage: str, result: StageResult, begun: dict[str, Any]) -> None:
    """The stage's part of summary.json, with what had changed where it was resumed."""
    left_out(folder, stage, result.rejected)
    changes = {"resumed_with_changes": begun["changes"]} if begun["changes"] else {}
    folder.summary["stages"][stage] = {
        "steps": result.steps,
        **changes,
        "seconds": round(result.seconds, 2),
        **result.throughput,
        "checkpoint": str(result.checkpoint),
        "final": result.final,
    }
