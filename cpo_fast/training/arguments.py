"""The flags of `python -m cpo_fast.train`, under the names that users of trl and transformers know.

Fields with the prefix `sft_` are those of the SFT stage; without it they belong to CPO or to both.
The defaults are the paper's hyper-parameters (arXiv 2505.13081, its table of settings and its
script); the embedded default (phantom.yaml beside this file) replaces some for a tiny random model.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

from cpo_fast.errors import UsageError
from cpo_fast.flags import Number, split
from cpo_fast.training.flag_ranges import SOURCES as SOURCES
from cpo_fast.training.flag_ranges import STAGES, range_of
from cpo_fast.training.flag_rules import check_rules

EMBEDDED = Path(__file__).with_name("phantom.yaml")


def _flag(default: Any, text: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": text, **more})


@dataclass
class TrainArguments:
    """One run: data, model, both training stages, evaluation and report."""

    # --- the run
    output_dir: str = _flag("runs/cpo", "where everything is written (mode 0700)")
    overwrite_output_dir: bool = _flag(False, "checkpoints of an earlier run there may go")
    stages: str = _flag(
        ",".join(STAGES), "comma-separated stages; the rest is taken from output_dir"
    )
    seed: int = _flag(42, "seed of everything that is random")
    preset: str = _flag("default", "settings that other flags win over: default, paper or lowmem")

    # --- data
    dataset: str = _flag("phantom", "MIMIC-CXR folder, 'open-i', a preference file, or 'phantom'")
    dataset_format: str = _flag("auto", "forces the kind of data set (default: told by itself)")
    image_root: str | None = _flag(None, "folder of the images where the data set has none")
    sections: str = _flag("careful", "report sections: 'careful' parse or the 'authors' rule")
    uncertain_labels: str = _flag("negative", "uncertain labels count as 'negative' or 'positive'")
    max_images: int = _flag(1, "images per study that the model sees, frontal views first")
    eval_fraction: float = _flag(0.05, "share held out of a preference file, which has no splits")
    num_studies: int = _flag(2000, "size of the phantom data set")
    max_train_samples: int | None = _flag(None, "use at most this many training studies or records")
    max_eval_samples: int | None = _flag(None, "evaluate on at most this many studies and groups")
    max_bad_fraction: float = _flag(0.05, "stop when more than this share of records is set aside")
    max_length: int = _flag(4096, "longest prompt + response in tokens")
    sft_max_length: int | None = _flag(None, "the same in SFT (default: --max_length)")
    truncation: str = _flag("drop", "over-long samples: 'drop', 'truncate_response' or 'error'")
    max_pixels: int = _flag(1003520, "largest image area after resizing, in pixels")
    min_pixels: int = _flag(3136, "smallest image area after resizing, in pixels")
    dataloader_num_workers: int = _flag(2, "processes that decode images and build packs ahead")

    # --- counterfactuals
    concept_graph: str | None = _flag(None, "JSON file of a concept graph instead of the package's")
    counterfactuals: str | None = _flag(None, "counterfactuals.jsonl of an earlier run")
    counterfactual_sources: str | None = _flag(
        None, "thinking, perception or both (default: thinking; all that a preference file holds)"
    )
    num_targets: int = _flag(2, "target diseases per study")
    rejected_answer: str = _flag("target", "rejected answers name the 'target' or 'all' findings")

    print_example: bool = _flag(False, "show one counterfactual on the screen (it holds a report)")

    # --- model
    model_name_or_path: str = _flag("tiny", "folder of a model or an adapter, or 'tiny'")
    sft_checkpoint: str | None = _flag(None, "model, adapter or SFT stage to start CPO from")
    attn_implementation: str = _flag("auto", "over packs: gathered, sdpa; CUDA: varlen, flex")
    use_peft: bool = _flag(True, "CPO trains LoRA adapters (else all weights, with a frozen copy)")
    sft_use_peft: bool = _flag(True, "SFT trains LoRA adapters (else all weights)")
    lora_r: int = _flag(8, "LoRA rank")
    lora_alpha: int = _flag(32, "LoRA alpha")
    lora_dropout: float = _flag(0.1, "LoRA dropout")
    lora_target_modules: str = _flag("all-linear", "'all-linear' or comma-separated module names")
    freeze_vit: bool = _flag(True, "the vision tower is frozen in CPO")
    sft_freeze_vit: bool = _flag(False, "the vision tower is frozen in SFT")
    fsdp: bool = _flag(False, "full tuning shards the decoder layers over the processes (FSDP2)")
    bf16: bool = _flag(False, "bfloat16 model weights; LoRA and its optimiser stay float32")
    gradient_checkpointing: bool = _flag(False, "recompute activations in the backward pass")
    torch_compile: bool = _flag(False, "compile the decoder layers (a minute, once)")

    # --- loss
    beta: float = _flag(0.1, "strength of the pull towards the reference")
    loss_type: str = _flag("sigmoid", "any loss type of cpo_fast.cpo_loss")
    label_smoothing: float = _flag(0.0, "for the losses that know it")
    thinking_weight: float = _flag(1.0, "weight of pairs with a counterfactual text; 0: none")
    perception_weight: float = _flag(1.0, "weight of pairs with another image; 0: none")
    normalize_source_weights: bool = _flag(
        True, "the loss is divided by the weights' sum (else by the number of pairs)"
    )
    rpo_alpha: float = _flag(0.0, "weight of the chosen answers' NLL added to each pair's loss")
    precompute_ref_log_probs: bool = _flag(False, "compute the reference once, ahead of CPO")
    loss_impl: str | None = _flag(None, "implementation of the loss op (default: the best)")

    # --- packing
    packing: bool = _flag(True, "several studies per forward pass (else one)")
    packing_length: int = _flag(4096, "tokens per pack")
    expand_pairs: bool = _flag(False, "each pair is a sample of its own, in the paper's order")

    # --- optimisation
    per_device_train_batch_size: int = _flag(4, "pairs (never packs) per device")
    sft_per_device_train_batch_size: int = _flag(15, "samples per device")
    gradient_accumulation_steps: int = _flag(8, "batches per optimiser step")
    sft_gradient_accumulation_steps: int = _flag(16, "batches per optimiser step of SFT")
    num_train_epochs: float = _flag(1.0, "epochs of CPO")
    sft_num_train_epochs: float = _flag(1.0, "epochs of SFT")
    max_steps: int = _flag(-1, "optimiser steps of CPO; replaces num_train_epochs when positive")
    sft_max_steps: int = _flag(-1, "optimiser steps of SFT; replaces sft_num_train_epochs")
    learning_rate: float = _flag(2e-5, "peak learning rate of CPO")
    sft_learning_rate: float = _flag(1e-4, "peak learning rate of SFT")
    lr_scheduler_type: str = _flag("cosine", "a schedule of transformers.get_scheduler")
    sft_lr_scheduler_type: str | None = _flag(None, "that of SFT (default: --lr_scheduler_type)")
    lr_scheduler_kwargs: str | None = _flag(
        None, """its options in JSON, e.g. '{"min_lr": 1e-7}'"""
    )
    sft_lr_scheduler_kwargs: str | None = _flag(None, "those of --sft_lr_scheduler_type")
    warmup_ratio: float = _flag(0.0, "share of the CPO steps that warm up")
    sft_warmup_ratio: float = _flag(0.05, "share of the SFT steps that warm up")
    weight_decay: float = _flag(0.05, "AdamW weight decay")
    adam_beta1: float = _flag(0.9, "AdamW beta 1")
    adam_beta2: float = _flag(0.98, "AdamW beta 2")
    max_grad_norm: float = _flag(1.0, "gradient norm clip; 0 turns it off")

    # --- keeping track
    logging_steps: int = _flag(1, "a row of metrics.jsonl every so many steps")
    eval_steps: int = _flag(0, "held-out loss and rewards every so many steps (0: at the end)")
    report_to: str = _flag("none", "tensorboard, wandb, trackio, mlflow, comma-separated, or none")
    dry_run: bool = _flag(False, "print the plan with memory and time, and write nothing")
    resume_from_checkpoint: str | None = _flag(None, "'auto', or a checkpoint folder to go on from")
    allow_changed_data: bool = _flag(
        False, "a resumed run goes on with other data or another starting model than it began with"
    )
    ddp_timeout: int = _flag(1800, "seconds that several processes wait for one another")
    max_minutes: float | None = _flag(None, "save and stop after this time (exit status 3)")
    max_nonfinite_steps: int = _flag(3, "stop after so many steps in a row that are not finite")
    save_steps: int = _flag(100, "save a checkpoint every N steps (0: only at the end)")
    save_total_limit: int = _flag(2, "keep the last N checkpoints per stage (0: all)")
    metric_for_best_model: str | None = _flag(
        None, "held-out metric of CPO (loss, rewards/margins...); each new best is saved and kept"
    )
    sft_metric_for_best_model: str | None = _flag(None, "held-out metric of SFT: loss")
    load_best_model_at_end: bool = _flag(
        False, "stages end with their best checkpoint, not their last (by loss if not told)"
    )
    max_new_tokens: int = _flag(256, "longest generated answer in the evaluation")
    eval_batch_size: int = _flag(64, "studies per generation batch in the evaluation")
    num_examples: int = _flag(4, "example studies in the report")

    def __post_init__(self) -> None:
        for f in fields(self):
            if fault := fault_of(f.name, getattr(self, f.name)):
                raise UsageError(f"--{f.name} {getattr(self, f.name)}: {fault}")
        check_rules(self)

    def source_weights(self, default: tuple[str, ...]) -> dict[str, float]:
        """The sources to learn from, `default` where the flag is not given, and their weights.

        One whose weight is 0 is no source: its pairs are neither made nor counted.
        """
        asked = split(self.counterfactual_sources or "") or default
        weights = {name: getattr(self, f"{name}_weight") for name in SOURCES if name in asked}
        return {name: weight for name, weight in weights.items() if weight > 0}

    @property
    def stage_names(self) -> tuple[str, ...]:
        return split(self.stages)

    def of_stage(self, stage: str) -> dict[str, Any]:
        """The optimisation settings of "sft" or "cpo" under their plain names."""
        own = {f.name.removeprefix("sft_") for f in fields(self) if f.name.startswith("sft_")}
        prefix = "sft_" if stage == "sft" else ""
        settings = {name: getattr(self, prefix + name) for name in own if hasattr(self, name)}
        if stage == "sft" and settings["max_length"] is None:
            settings["max_length"] = self.max_length
        if stage == "sft" and settings["lr_scheduler_type"] is None:
            settings |= {name: getattr(self, name) for name in settings if "lr_scheduler" in name}
        given = settings["lr_scheduler_kwargs"]
        return settings | {"lr_scheduler_kwargs": json.loads(given) if given else None}


def parse_arguments(argv: list[str] | None = None) -> TrainArguments:
    """Read `[--config run.yaml] [--preset name] [--flag value ...]`; flags win over the file, and
    the file over the preset.

    Without `--config`, `--dataset` and `--model_name_or_path` the embedded default is taken, whose
    settings give way to those of a preset. A
    wrong flag ends the program with argparse's message and status 2; UsageError names what is wrong
    in a file.
    """
    from transformers import HfArgumentParser

    argv = _with_negatives(list(sys.argv[1:] if argv is None else argv))
    parser = HfArgumentParser(
        cast(Any, TrainArguments),
        prog="python -m cpo_fast.train",
        allow_abbrev=False,
        description=__doc__,
    )
    parser.add_argument("--config", default=None, help="YAML file of flags (without the dashes)")
    given = {word.split("=", 1)[0] for word in argv if word.startswith("--")}
    known = parser.parse_args(argv)
    config: dict[str, Any] = {}
    if known.config is not None:
        config = read_config(Path(known.config))
    elif not given & {"--dataset", "--model_name_or_path"}:
        parser.set_defaults(**read_config(EMBEDDED))
    preset = known.preset if "--preset" in given else config.get("preset", known.preset)
    if fault := fault_of("preset", preset):
        raise UsageError(f"--preset {preset}: {fault}")
    parser.set_defaults(**read_config(Path(__file__).with_name("presets") / f"{preset}.yaml"))
    parser.set_defaults(**config)
    values = vars(parser.parse_args(argv))
    del values["config"]
    try:
        return TrainArguments(**values)
    except UsageError as error:
        if known.config is None:
            raise
        raise UsageError(f"{error} (flags of --config {known.config} count, too)") from None


def _with_negatives(argv: list[str]) -> list[str]:
    """`argv` with "--flag -1e-5" as "--flag=-1e-5": argparse takes the number for a flag."""
    joined: list[str] = []
    for word in argv:
        negative = re.fullmatch(r"-(?:[\d.]+e[+-]?\d+|inf|nan)", word, re.I)
        if negative and joined and joined[-1].startswith("--") and "=" not in joined[-1]:
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def fault_of(name: str, value: Any) -> str | None:
    """None where the flag may have this value, else what is allowed."""
    optional = TrainArguments.__dataclass_fields__[name].default is None
    return None if value is None and optional else range_of(name).fault(value)


def read_config(path: Path) -> dict[str, Any]:
    """The flags that a YAML file sets; UsageError for a missing file, an unknown flag or a value
    that the flag may not have.
    """
    import yaml

    if not path.is_file():
        raise UsageError(f"--config {path}: no such file")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise UsageError(f"--config {path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"--config {path}: expected lines of the form `flag: value`")
    names = {f.name for f in fields(TrainArguments)}
    if unknown := sorted(set(values) - names):
        raise UsageError(f"--config {path}: unknown flags {', '.join(map(str, unknown))}")
    return {name: _from_yaml(path, name, value) for name, value in values.items()}


def _from_yaml(path: Path, name: str, value: Any) -> Any:
    """A value as the flag takes it: YAML has "1e-4" for text, and 1 for a whole number."""
    allowed = range_of(name)
    read = allowed.read(value) if isinstance(value, str) else value
    if fault := fault_of(name, read):
        raise UsageError(f"--config {path}: {name}: {value}: {fault}")
    if isinstance(allowed, Number) and not allowed.whole and read is not None:
        return float(read)
    return read
