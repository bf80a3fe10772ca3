"""The allowed values of every flag of `cpo-fast train`, on the command line and in YAML files.

A flag with the prefix `sft_` has the range of the flag without the prefix unless the table lists
it. A flag whose default is None can be left out. flag_rules.py has the rules over several flags and
the checks of the machine.
"""

from __future__ import annotations

from collections.abc import Sequence

from cpo_fast.data import DATASET_FORMATS
from cpo_fast.data.labels import UNCERTAIN_POLICIES
from cpo_fast.data.sections import RULES
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
from cpo_fast.loss.options import IMPLS, LOSS_TYPES, OTHER_NAMES
from cpo_fast.run.flag_names import METRICS, SCHEDULES
from cpo_fast.run.report_to import TRACKERS
from cpo_fast.types import ATTENTIONS, OVER_LONG

STAGES = ("graph", "counterfactual", "sft", "cpo", "evaluate")
SOURCES = ("thinking", "perception")  # of counterfactuals, as CPO++ names them
PRESETS = ("default", "paper", "lowmem")


def _with_prefix(names: Sequence[str]) -> Sequence[str]:
    return [*names, *(f"eval_{name}" for name in names)]


CPO_METRICS = [*METRICS, *(f"{name}/{source}" for source in SOURCES for name in METRICS)]
SWITCH = Switch()
STEPS = whole(1, also=-1)

LOSS_ADVICE = tuple(
    (name, hint) for name, hint in OTHER_NAMES.items() if name not in ("sft", "sigmoid_norm")
)
"""Without hints at arguments of the loss op."""

RANGES: dict[str, Allowed] = {
    # --- the run
    "output_dir": Text("created if missing"),
    "overwrite_output_dir": SWITCH,
    "stages": Choices(STAGES, ordered=True),
    "seed": SEED,
    "preset": Choice(PRESETS),
    # --- data
    "dataset": Text("a path or a name; check_machine checks it"),
    "dataset_format": Choice(DATASET_FORMATS),
    "image_root": Text("a path; check_machine checks it"),
    "sections": Choice(RULES),
    "uncertain_labels": Choice(tuple(UNCERTAIN_POLICIES)),
    "max_images": POSITIVE,
    "eval_fraction": Number(low=0, below=1),
    "num_studies": POSITIVE,
    "max_train_samples": POSITIVE,
    "max_eval_samples": POSITIVE,
    "max_bad_fraction": SHARE,
    "max_length": POSITIVE,
    "truncation": Choice(OVER_LONG),
    "max_pixels": POSITIVE,
    "min_pixels": POSITIVE,
    "dataloader_num_workers": COUNT,
    # --- counterfactuals
    "concept_graph": Text("a path; check_machine checks it"),
    "counterfactuals": Text("a path; check_machine checks it"),
    "counterfactual_sources": Choices(SOURCES),
    "num_targets": POSITIVE,
    "rejected_answer": Choice(("target", "all")),
    "print_example": SWITCH,
    # --- model
    "model_name_or_path": Text("a path; check_machine checks it"),
    "sft_checkpoint": Text("a path; check_machine checks it"),
    "attn_implementation": Choice(ATTENTIONS),
    "use_peft": SWITCH,
    "lora_r": POSITIVE,
    "lora_alpha": POSITIVE,
    "lora_dropout": Number(low=0, below=1),
    "lora_target_modules": Text("names of modules; checked when the model is loaded"),
    "freeze_vit": SWITCH,
    "fsdp": SWITCH,
    "bf16": SWITCH,
    "gradient_checkpointing": SWITCH,
    "torch_compile": SWITCH,
    # --- loss
    "beta": Number(above=0),
    "loss_type": Choice(tuple(LOSS_TYPES), LOSS_ADVICE),
    "label_smoothing": Number(low=0, below=0.5),
    "thinking_weight": Number(low=0),
    "perception_weight": Number(low=0),
    "normalize_source_weights": SWITCH,
    "rpo_alpha": Number(low=0),
    "precompute_ref_log_probs": SWITCH,
    "loss_impl": Choice(IMPLS),
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
    "lr_scheduler_type": Choice(tuple(SCHEDULES)),
    "lr_scheduler_kwargs": Text("JSON; flag_rules.py builds the schedule from it"),
    "warmup_ratio": SHARE,
    "weight_decay": Number(low=0),
    "adam_beta1": Number(low=0, below=1),
    "adam_beta2": Number(low=0, below=1),
    "max_grad_norm": Number(low=0),
    # --- logging, checkpoints, evaluation
    "logging_steps": POSITIVE,
    "eval_steps": COUNT,
    "report_to": Choices(("none", *TRACKERS)),
    "dry_run": SWITCH,
    "resume_from_checkpoint": Text("'auto' or a path; check_machine checks it"),
    "allow_changed_data": SWITCH,
    "ddp_timeout": whole(1, 10**9),
    "max_minutes": Number(above=0),
    "max_nonfinite_steps": POSITIVE,
    "save_steps": COUNT,
    "save_total_limit": COUNT,
    "metric_for_best_model": Choice(_with_prefix(CPO_METRICS)),
    "sft_metric_for_best_model": Choice(_with_prefix(["loss"])),
    "load_best_model_at_end": SWITCH,
    "max_new_tokens": POSITIVE,
    "eval_batch_size": POSITIVE,
    "num_examples": COUNT,
}


def find_range(name: str) -> Allowed:
    """The allowed values of a flag."""
    return RANGES.get(name) or RANGES[name.removeprefix("sft_")]
