"""The flags of `cpo-fast train`, named as in trl and transformers.

Fields with the prefix `sft_` belong to the SFT stage; the others to CPO or to both. The defaults
are the paper's hyper-parameters (arXiv 2505.13081, its table of settings and its script);
phantom.yaml beside this file has the settings for the phantom with a tiny random model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from cpo_fast.data.pixels import MAX_PIXELS, MIN_PIXELS
from cpo_fast.errors import UsageError
from cpo_fast.flags import Number, Switch, near, split
from cpo_fast.run.config_file import read_entries
from cpo_fast.run.flag_ranges import SOURCES as SOURCES
from cpo_fast.run.flag_ranges import STAGES, find_range
from cpo_fast.run.flag_rules import check_rules
from cpo_fast.training.stage_settings import TRAINING_STAGES, StageSettings

EMBEDDED = Path(__file__).with_name("phantom.yaml")


def _flag(default: Any, text: str, metavar: str | None = None) -> Any:
    return field(default=default, metadata={"help": text, "metavar": metavar})


@dataclass
class TrainArguments:
    """One run: data, model, both training stages, evaluation and report."""

    dataset: str = _flag(
        "phantom", "MIMIC-CXR folder, preference file, 'open-i' or 'phantom'", "DATA"
    )
    model_name_or_path: str = _flag(
        "tiny", "folder of a model or adapter, or 'tiny' (small, random)", "PATH"
    )
    output_dir: str = _flag("runs/cpo", "folder of all results (mode 0700)", "PATH")
    preset: str = _flag(
        "default",
        "base settings; flags override. paper: arXiv 2505.13081; lowmem: bf16, gradient "
        "checkpointing, cached reference, vision tower frozen in SFT, max_length 2048, images of "
        "at most 512 x 512, packs of 1024 tokens",
    )
    stages: str = _flag(
        ",".join(STAGES),
        "comma-separated stages to run; results of the others are read from output_dir",
        "NAMES",
    )
    beta: float = _flag(0.1, "scale of the log-ratios to the reference model")
    learning_rate: float = _flag(2e-5, "peak learning rate of CPO")
    num_train_epochs: float = _flag(1.0, "epochs of CPO")
    bf16: bool = _flag(False, "bfloat16 model weights; LoRA and its optimiser stay float32")

    dataset_format: str = _flag("auto", "format of the data (auto: detected automatically)", "NAME")
    image_root: str | None = _flag(None, "folder of the images if not in the data set", "PATH")
    sections: str = _flag("careful", "parser of report sections (authors: the paper's rule)")
    uncertain_labels: str = _flag("negative", "how uncertain labels count")
    max_images: int = _flag(1, "images per study, frontal views first")
    max_pixels: int = _flag(MAX_PIXELS, "largest image area after resizing, in pixels")
    min_pixels: int = _flag(MIN_PIXELS, "smallest image area after resizing, in pixels")
    num_studies: int = _flag(2000, "studies in the phantom data set")
    eval_fraction: float = _flag(0.05, "share of a preference file held out for evaluation")
    max_train_samples: int | None = _flag(None, "limit of training studies or records")
    max_eval_samples: int | None = _flag(None, "limit of evaluated studies and pairs")
    max_bad_fraction: float = _flag(0.05, "stop if more than this share of records is set aside")

    sft_checkpoint: str | None = _flag(
        None, "model, adapter or SFT stage to start CPO from", "PATH"
    )
    lora_r: int = _flag(8, "LoRA rank")
    lora_alpha: int = _flag(32, "LoRA alpha")
    lora_dropout: float = _flag(0.1, "LoRA dropout")
    lora_target_modules: str = _flag(
        "all-linear", "comma-separated module names, or all-linear", "NAMES"
    )
    attn_implementation: str = _flag("auto", "attention of packs (varlen, flex: CUDA only)", "NAME")
    gradient_checkpointing: bool = _flag(False, "recompute activations in the backward pass")
    torch_compile: bool = _flag(False, "compile the decoder layers (takes about a minute)")
    fsdp: bool = _flag(False, "shard full tuning over the processes (FSDP2)")

    concept_graph: str | None = _flag(
        None, "concept graph in JSON (default: the package's)", "PATH"
    )
    counterfactuals: str | None = _flag(None, "counterfactuals.jsonl of an earlier run", "PATH")
    counterfactual_sources: str | None = _flag(
        None,
        "thinking, perception or both (default: thinking; for a preference file: all it has)",
        "NAMES",
    )
    num_targets: int = _flag(2, "target diseases per study")
    rejected_answer: str = _flag("target", "findings named in rejected answers")
    print_example: bool = _flag(
        False, "print one counterfactual (it contains text of a real report)"
    )

    sft_use_peft: bool = _flag(
        True, "train LoRA adapters in SFT; --no_sft_use_peft trains all weights"
    )
    sft_freeze_vit: bool = _flag(False, "freeze the vision tower in SFT")
    sft_learning_rate: float = _flag(1e-4, "peak learning rate of SFT")
    sft_num_train_epochs: float = _flag(1.0, "epochs of SFT")
    sft_max_steps: int = _flag(-1, "optimiser steps of SFT; -1: by --sft_num_train_epochs")
    sft_per_device_train_batch_size: int = _flag(15, "samples per device and batch in SFT")
    sft_gradient_accumulation_steps: int = _flag(16, "batches per optimiser step of SFT")
    sft_lr_scheduler_type: str | None = _flag(
        None, "schedule of SFT (default: --lr_scheduler_type)", "SCHEDULE"
    )
    sft_lr_scheduler_kwargs: str | None = _flag(None, "options of --sft_lr_scheduler_type", "JSON")
    sft_warmup_ratio: float = _flag(0.05, "share of warm-up steps in SFT")
    sft_metric_for_best_model: str | None = _flag(None, "the same for SFT: loss", "METRIC")

    loss_type: str = _flag("sigmoid", "loss on the pairs (sigmoid: DPO)", "NAME")
    label_smoothing: float = _flag(0.0, "only for losses that support it")
    rpo_alpha: float = _flag(0.0, "weight of the NLL of chosen answers")
    thinking_weight: float = _flag(1.0, "weight of pairs with another text; 0: not used")
    perception_weight: float = _flag(1.0, "weight of pairs with another image; 0: not used")
    normalize_source_weights: bool = _flag(
        True, "divide the loss by the sum of weights; --no_...: by the number of pairs"
    )
    precompute_ref_log_probs: bool = _flag(
        False, "score the reference once before CPO; saves memory"
    )
    loss_impl: str | None = _flag(None, "implementation of the loss (default: the fastest)", "NAME")
    use_peft: bool = _flag(True, "train LoRA adapters in CPO; --no_use_peft trains all weights")
    freeze_vit: bool = _flag(True, "freeze the vision tower in CPO; --no_freeze_vit trains it")
    max_steps: int = _flag(-1, "optimiser steps of CPO; -1: by --num_train_epochs")
    per_device_train_batch_size: int = _flag(4, "pairs per device and batch in CPO")
    gradient_accumulation_steps: int = _flag(8, "batches per optimiser step of CPO")
    lr_scheduler_type: str = _flag("cosine", "learning-rate schedule of transformers", "NAME")
    lr_scheduler_kwargs: str | None = _flag(
        None, """options of the schedule, e.g. '{"min_lr": 1e-7}'""", "JSON"
    )
    warmup_ratio: float = _flag(0.0, "share of warm-up steps in CPO")
    metric_for_best_model: str | None = _flag(
        None,
        "held-out metric of CPO (loss, rewards/margins, ...) that saves each new best",
        "METRIC",
    )

    weight_decay: float = _flag(0.05, "AdamW weight decay")
    adam_beta1: float = _flag(0.9, "AdamW beta 1")
    adam_beta2: float = _flag(0.98, "AdamW beta 2")
    max_grad_norm: float = _flag(1.0, "gradient clipping norm; 0: off")
    max_nonfinite_steps: int = _flag(3, "stop after N non-finite steps in a row")
    eval_steps: int = _flag(0, "held-out loss and rewards every N steps; 0: at the end")
    load_best_model_at_end: bool = _flag(
        False, "end with the best checkpoint instead of the last (default metric: loss)"
    )

    max_length: int = _flag(
        4096, "tokens of one prompt with one response; longer ones: see --truncation"
    )
    sft_max_length: int | None = _flag(None, "max_length of SFT (default: --max_length)")
    truncation: str = _flag("drop", "what happens to samples over --max_length", "NAME")
    packing: bool = _flag(True, "several samples per forward pass; --no_packing: one")
    packing_length: int = _flag(
        4096,
        "tokens of one forward pass, filled with samples of up to --max_length; a longer sample "
        "has a separate pass",
    )
    expand_pairs: bool = _flag(
        False, "make each pair its own sample, in the paper's order (prompts are not shared)"
    )

    overwrite_output_dir: bool = _flag(False, "delete earlier checkpoints in output_dir")
    seed: int = _flag(42, "random seed")
    dry_run: bool = _flag(False, "print the plan with memory and time; write nothing")
    resume_from_checkpoint: str | None = _flag(
        None, "resume from a checkpoint folder, or 'auto': the last one in output_dir", "PATH"
    )
    allow_changed_data: bool = _flag(
        False, "resume although the data or the starting model changed"
    )
    save_steps: int = _flag(100, "save a checkpoint every N steps; 0: only at the end")
    save_total_limit: int = _flag(2, "keep the last N checkpoints per stage; 0: all")
    logging_steps: int = _flag(1, "log every N steps")
    report_to: str = _flag(
        "none", "comma-separated trackers: tensorboard, wandb, trackio, mlflow", "NAMES"
    )
    max_minutes: float | None = _flag(None, "save and stop after this time (exit status 3)")
    dataloader_num_workers: int = _flag(2, "processes that prepare batches")
    ddp_timeout: int = _flag(1800, "seconds that processes wait for one another")
    max_new_tokens: int = _flag(256, "longest generated answer in tokens")
    eval_batch_size: int = _flag(64, "studies per generation batch")
    num_examples: int = _flag(4, "example studies in the report")

    def __post_init__(self) -> None:
        for f in fields(self):
            value, allowed = getattr(self, f.name), find_range(f.name)
            if fault := find_fault(f.name, value):
                raise UsageError(f"--{f.name} {value}: {fault}")
            if isinstance(allowed, Number) and not allowed.whole and value is not None:
                setattr(self, f.name, float(value))
        check_rules(self)

    def source_weights(self, default: tuple[str, ...]) -> dict[str, float]:
        """The counterfactual sources of the run, else `default`, with their weights.

        A source with weight 0 is left out: its pairs are neither generated nor counted.
        """
        named = split(self.counterfactual_sources or "") or default
        weights = {name: getattr(self, f"{name}_weight") for name in SOURCES if name in named}
        return {name: weight for name, weight in weights.items() if weight > 0}

    @property
    def stage_names(self) -> tuple[str, ...]:
        return split(self.stages)

    @property
    def trained_stages(self) -> tuple[str, ...]:
        """The training stages of this run."""
        return tuple(stage for stage in TRAINING_STAGES if stage in self.stage_names)

    def tuning_of(self, stage: str) -> tuple[bool, bool]:
        """(trains LoRA adapters, freezes the vision tower) of "sft" or "cpo"."""
        if stage == "sft":
            return self.sft_use_peft, self.sft_freeze_vit
        return self.use_peft, self.freeze_vit

    def max_length_of(self, stage: str) -> int:
        """Longest sample of "sft" or "cpo", in tokens."""
        if stage == "sft" and self.sft_max_length is not None:
            return self.sft_max_length
        return self.max_length

    def stage_settings(self, stage: str) -> StageSettings:
        """The settings of "sft" or "cpo"."""
        prefix = "sft_" if stage == "sft" else ""
        own = {name: getattr(self, prefix + name) for name in OWN_OF_SFT}
        if own["lr_scheduler_type"] is None:
            own |= {name: getattr(self, name) for name in own if "lr_scheduler" in name}
        given = own["lr_scheduler_kwargs"]
        own["lr_scheduler_kwargs"] = json.loads(given) if given else None
        shared = {
            f.name: getattr(self, f.name)
            for f in fields(StageSettings)
            if f.name not in own and f.name != "stage"
        }
        return StageSettings(stage=stage, **own, **shared)


OWN_OF_SFT = (
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_ratio",
    "metric_for_best_model",
)
"""Stage settings with a separate flag for SFT, which has the prefix `sft_`."""

SECTIONS = {
    "most used": "dataset",
    "data": "dataset_format",
    "model": "sft_checkpoint",
    "counterfactuals": "concept_graph",
    "SFT": "sft_use_peft",
    "CPO": "loss_type",
    "SFT and CPO": "weight_decay",
    "packing": "max_length",
    "run": "overwrite_output_dir",
}
"""Sections of the help by their first flag; each ends before the next."""


def find_fault(name: str, value: Any) -> str | None:
    """The allowed values, if the flag cannot have this value; else None."""
    optional = TrainArguments.__dataclass_fields__[name].default is None
    return None if value is None and optional else find_range(name).fault(value)


def read_flags_file(path: Path) -> dict[str, Any]:
    """The flags that a YAML file sets.

    Raises UsageError with file, line and key when the file cannot be read or has a wrong form, an
    unknown flag or a value that is not allowed.
    """
    return {key: _parse_value(place, key, value) for place, key, value in read_entries(path)}


def _parse_value(place: str, name: str, value: Any) -> Any:
    """The value as the type of the flag, checked: YAML reads 1e-4 as text."""
    flags = TrainArguments.__dataclass_fields__
    if name not in flags:
        meant = near(name, flags)
        hint = f"did you mean {meant}?" if meant else "see cpo-fast train --help"
        raise UsageError(f"{place}: {name} is not a flag; {hint}")
    allowed = find_range(name)
    read = allowed.read(value) if isinstance(value, str) else value
    if fault := find_fault(name, read):
        shown = "null" if value is None else value if isinstance(value, str) else str(value).lower()
        if not isinstance(allowed, Number | Switch) and not isinstance(value, str):
            fault += "; quote it to make it text in YAML"
        raise UsageError(f"{place}: {name} {shown}: {fault}")
    return read
