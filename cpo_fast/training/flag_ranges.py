"""What every flag of `python -m cpo_fast.train` may be: one table, for the command line and for the
YAML files of `--config`.

A flag with the prefix `sft_` has the range of the flag without it unless it has a line of its own.
A flag whose default is None may also be left out. What depends on several flags or on the machine
stands in flag_rules.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from cpo_fast.flags import (
    COUNT,
    POSITIVE,
    SEED,
    SHARE,
    Allowed,
    Choice,
    Choices,
    Number,
    Switch,
    Text,
    whole,
)

STAGES = ("graph", "counterfactual", "sft", "cpo", "evaluate")
SOURCES = ("thinking", "perception")  # of counterfactuals, as CPO++ names them
PRESETS = ("default", "paper", "lowmem")


def _dataset_formats() -> Sequence[str]:
    from cpo_fast.data import STUDY_FORMATS
    from cpo_fast.data.preferences import PREFERENCE_FORMATS

    return tuple(dict.fromkeys((*STUDY_FORMATS, *PREFERENCE_FORMATS)))


def _section_rules() -> Sequence[str]:
    from cpo_fast.data.sections import RULES

    return RULES


def _label_policies() -> Sequence[str]:
    from cpo_fast.data.labels import UNCERTAIN_POLICIES

    return sorted(UNCERTAIN_POLICIES)


def _truncations() -> Sequence[str]:
    from cpo_fast.packing.encode import OverLong

    return get_args(OverLong)


def _attentions() -> Sequence[str]:
    from cpo_fast.model.packed import ATTENTIONS

    return ATTENTIONS


def _loss_types() -> Sequence[str]:
    from cpo_fast.loss.losses import LOSS_TYPES

    return tuple(LOSS_TYPES)


def _schedules() -> Sequence[str]:
    from transformers import SchedulerType

    return [one.value for one in SchedulerType]


def _trackers() -> Sequence[str]:
    from cpo_fast.training.report_to import TRACKERS

    return ("none", *TRACKERS)


def _cpo_metrics() -> Sequence[str]:
    from cpo_fast.training.objectives import METRICS

    of_source = [f"{name}/{source}" for source in SOURCES for name in METRICS]
    return _with_prefix([*METRICS, *of_source])


def _with_prefix(names: Sequence[str]) -> Sequence[str]:
    return [*names, *(f"eval_{name}" for name in names)]


SWITCH = Switch()
OP = Number()  # a finite number; the bounds are the loss op's own, see flag_rules.py
STEPS = whole(1, also=-1)

RANGES: dict[str, Allowed] = {
    # --- the run
    "output_dir": Text("made if it is not there"),
    "overwrite_output_dir": SWITCH,
    "stages": Choices(STAGES, ordered=True),
    "seed": SEED,
    "preset": Choice(PRESETS),
    # --- data
    "dataset": Text("a path or a name, see check_machine"),
    "dataset_format": Choice(_dataset_formats),
    "image_root": Text("a path, see check_machine"),
    "sections": Choice(_section_rules),
    "uncertain_labels": Choice(_label_policies),
    "max_images": POSITIVE,
    "eval_fraction": Number(low=0, below=1),
    "num_studies": POSITIVE,
    "max_train_samples": POSITIVE,
    "max_eval_samples": POSITIVE,
    "max_bad_fraction": SHARE,
    "max_length": POSITIVE,
    "truncation": Choice(_truncations),
    "max_pixels": POSITIVE,
    "min_pixels": POSITIVE,
    "dataloader_num_workers": COUNT,
    # --- counterfactuals
    "concept_graph": Text("a path, see check_machine"),
    "counterfactuals": Text("a path, see check_machine"),
    "counterfactual_sources": Choices(SOURCES),
    "num_targets": POSITIVE,
    "rejected_answer": Choice(("target", "all")),
    "print_example": SWITCH,
    # --- model
    "model_name_or_path": Text("a path, see check_machine"),
    "sft_checkpoint": Text("a path, see check_machine"),
    "attn_implementation": Choice(_attentions),
    "use_peft": SWITCH,
    "lora_r": POSITIVE,
    "lora_alpha": POSITIVE,
    "lora_dropout": Number(low=0, below=1),
    "lora_target_modules": Text("names of modules of the model, known when it is loaded"),
    "freeze_vit": SWITCH,
    "fsdp": SWITCH,
    "bf16": SWITCH,
    "gradient_checkpointing": SWITCH,
    "torch_compile": SWITCH,
    # --- loss
    "beta": OP,
    "loss_type": Choice(_loss_types),
    "label_smoothing": OP,
    "thinking_weight": Number(low=0),
    "perception_weight": Number(low=0),
    "normalize_source_weights": SWITCH,
    "rpo_alpha": OP,
    "precompute_ref_log_probs": SWITCH,
    "loss_impl": Text("depends on the device, see check_machine"),
    # --- packing
    "packing": SWITCH,
    "packing_length": POSITIVE,
    "expand_pairs": SWITCH,
    # --- optimisation
    "per_device_train_batch_size": POSITIVE,
    "gradient_accumulation_steps": POSITIVE,
    "num_train_epochs": Number(above=0),
    "max_steps": STEPS,
    "learning_rate": Number(above=0),
    "lr_scheduler_type": Choice(_schedules),
    "lr_scheduler_kwargs": Text("the schedule is built from them, see flag_rules.py"),
    "warmup_ratio": SHARE,
    "weight_decay": Number(low=0),
    "adam_beta1": Number(low=0, below=1),
    "adam_beta2": Number(low=0, below=1),
    "max_grad_norm": Number(low=0),
    # --- keeping track
    "logging_steps": POSITIVE,
    "eval_steps": COUNT,
    "report_to": Choices(_trackers),
    "dry_run": SWITCH,
    "resume_from_checkpoint": Text("'auto' or a path, see check_machine"),
    "allow_changed_data": SWITCH,
    "ddp_timeout": whole(1, 10**9),
    "max_minutes": Number(above=0),
    "max_nonfinite_steps": POSITIVE,
    "save_steps": COUNT,
    "save_total_limit": COUNT,
    "metric_for_best_model": Choice(_cpo_metrics),
    "sft_metric_for_best_model": Choice(_with_prefix(["loss"])),
    "load_best_model_at_end": SWITCH,
    "max_new_tokens": POSITIVE,
    "eval_batch_size": POSITIVE,
    "num_examples": COUNT,
}


def range_of(name: str) -> Allowed:
    """The line of the table that holds for a flag."""
    return RANGES.get(name) or RANGES[name.removeprefix("sft_")]
