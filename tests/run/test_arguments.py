"""Flags, config files and their errors."""

from __future__ import annotations

import json
import math
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from cpo_fast.errors import DataError, UsageError
from cpo_fast.flags import Number, Text
from cpo_fast.run.arguments import TrainArguments, find_fault
from cpo_fast.run.flag_ranges import RANGES, find_range
from cpo_fast.run.flag_rules import check_machine
from cpo_fast.run.samples import Samples, check_samples
from cpo_fast.testing.runs import parse_arguments
from cpo_fast.train import main
from cpo_fast.types import PreferenceGroup, Prompt


def test_no_arguments_use_the_embedded_default() -> None:
    args = parse_arguments([])
    assert (args.dataset, args.model_name_or_path) == ("phantom", "tiny")
    assert args.output_dir == "runs/phantom"
    assert not args.sft_use_peft and args.use_peft


def test_flag_overrides_one_value_of_the_embedded_default() -> None:
    args = parse_arguments(["--seed", "7"])
    assert args.seed == 7
    assert args.output_dir == "runs/phantom"


def test_own_model_or_data_set_uses_the_paper_settings() -> None:
    args = parse_arguments(["--dataset", "/data/mimic"])
    assert (args.learning_rate, args.sft_learning_rate) == (2e-5, 1e-4)
    assert (args.lora_r, args.lora_alpha, args.lora_dropout) == (8, 32, 0.1)
    assert (args.adam_beta1, args.adam_beta2, args.weight_decay) == (0.9, 0.98, 0.05)


def test_flags_override_the_config_file(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("beta: 0.3\nlearning_rate: 1e-4\nseed: 5\n")
    args = parse_arguments(["--config", str(config), "--beta", "0.5"])
    assert (args.beta, args.learning_rate, args.seed) == (0.5, 1e-4, 5)


def test_stage_settings_have_plain_names() -> None:
    args = parse_arguments(["--sft_learning_rate", "3e-4", "--learning_rate", "1e-5"])
    assert args.stage_settings("sft").learning_rate == 3e-4
    assert args.stage_settings("cpo").learning_rate == 1e-5


def test_paper_preset_equals_the_paper_table() -> None:
    args = parse_arguments(["--dataset", "/data/mimic", "--preset", "paper"])
    sft, cpo = args.stage_settings("sft"), args.stage_settings("cpo")
    for name, of_sft, of_cpo in (
        ("learning_rate", 1e-4, 2e-5),
        ("lr_scheduler_type", "cosine_with_min_lr", "cosine"),
        ("lr_scheduler_kwargs", {"min_lr": 1e-7}, None),
        ("warmup_ratio", 0.05, 0.0),
        ("per_device_train_batch_size", 15, 4),
        ("gradient_accumulation_steps", 16, 8),
        ("num_train_epochs", 1.0, 1.0),
    ):
        assert (getattr(sft, name), getattr(cpo, name)) == (of_sft, of_cpo), name
    assert (args.max_length_of("sft"), args.max_length_of("cpo")) == (2048, 4096)
    assert (args.tuning_of("sft"), args.tuning_of("cpo")) == ((True, False), (True, True))
    assert (args.adam_beta1, args.adam_beta2, args.weight_decay) == (0.9, 0.98, 0.05)
    assert (args.lora_r, args.lora_alpha, args.lora_dropout) == (8, 32, 0.1)
    assert (args.beta, args.loss_type, args.max_pixels) == (0.1, "sigmoid", 512 * 512)
    assert args.expand_pairs and args.num_targets == 2


def test_file_and_flags_override_the_preset(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("preset: lowmem\npacking_length: 3000\nmax_length: 700\n")
    args = parse_arguments(["--config", str(config), "--max_length", "900"])
    assert (args.preset, args.packing_length, args.max_length) == ("lowmem", 3000, 900)
    assert args.precompute_ref_log_probs and args.gradient_checkpointing and args.bf16
    args = parse_arguments(["--config", str(config), "--preset", "default"])
    assert (args.packing_length, args.bf16) == (3000, False)
    args = parse_arguments(["--preset", "lowmem", "--bf16", "false"])
    assert (args.dataset, args.packing_length, args.bf16) == ("phantom", 1024, False)
    plain = parse_arguments(["--dataset", "/data/mimic"])
    assert parse_arguments(["--dataset", "/data/mimic", "--preset", "default"]) == plain


def test_sft_inherits_schedule_and_length_of_cpo() -> None:
    flags = ["--lr_scheduler_type", "cosine_with_min_lr", "--max_length", "99",
             "--lr_scheduler_kwargs", '{"min_lr": 1e-6}']  # fmt: skip
    args = parse_arguments(flags)
    sft = args.stage_settings("sft")
    assert (sft.lr_scheduler_type, args.max_length_of("sft")) == ("cosine_with_min_lr", 99)
    assert sft.lr_scheduler_kwargs == {"min_lr": 1e-6}
    sft = parse_arguments([*flags, "--sft_lr_scheduler_type", "linear"]).stage_settings("sft")
    assert (sft.lr_scheduler_type, sft.lr_scheduler_kwargs) == ("linear", None)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--preset", "fast"], "--preset fast: choose from default, paper, lowmem"),
        (["--sft_max_length", "-1"], "--sft_max_length"),
        (["--lr_scheduler_kwargs", "[1]"], "--lr_scheduler_kwargs must be a JSON object"),
        (["--sft_lr_scheduler_kwargs", "{}{"], "--sft_lr_scheduler_kwargs must be a JSON"),
        (["--sft_lr_scheduler_kwargs", '{"a": 1}'], "needs --sft_lr_scheduler_type"),
        (["--stages", "sft,fly"], "--stages"),
        (["--per_device_train_batch_size", "0"], "--per_device_train_batch_size"),
        (["--sft_gradient_accumulation_steps", "0"], "--sft_gradient_accumulation_steps"),
        (["--truncation", "cut"], "drop, truncate_response, error"),
        (["--max_bad_fraction", "3"], "--max_bad_fraction"),
        (["--config", "/nowhere/run.yaml"], "/nowhere/run.yaml"),
        (["--sft_checkpoint", "x"], "leave sft out of --stages"),
    ],
)
def test_wrong_values_are_named(argv: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_arguments(argv)


def test_every_flag_has_a_range() -> None:
    flags = {f.name: f for f in fields(TrainArguments)}
    for name in flags:
        allowed = find_range(name)  # a KeyError names a flag without range
        if isinstance(allowed, Text):
            assert allowed.why, name
    assert set(RANGES) <= set(flags)


def test_numeric_flags_reject_nonfinite_values() -> None:
    numbers = [f.name for f in fields(TrainArguments) if isinstance(find_range(f.name), Number)]
    assert {"learning_rate", "sft_warmup_ratio", "beta", "max_minutes", "seed"} <= set(numbers)
    for name in numbers:
        for value in (math.nan, math.inf, -math.inf, "x", True):
            assert find_fault(name, value), (name, value)


OUTSIDE = """
warmup_ratio: 1.5 -0.5 nan inf
sft_warmup_ratio: 1.01
eval_fraction: -1 1
num_train_epochs: 0 -3
sft_num_train_epochs: 0
max_steps: 0 -2
sft_max_steps: -5
lora_r: 0
lora_alpha: 0
lora_dropout: 1 -0.1
max_grad_norm: -1
beta: 0 -1 nan
rpo_alpha: -1
loss_type: sigmod
learning_rate: nan -1 0 inf
sft_learning_rate: 0
adam_beta1: 1.5 1
adam_beta2: -0.1
weight_decay: -1
lr_scheduler_type: nonsense reduce_lr_on_plateau cosine_with_min_lr
sft_lr_scheduler_type: nonsense greedy
metric_for_best_model: accuracy
sft_metric_for_best_model: rewards/margins
report_to: nonsense
save_total_limit: -1
save_steps: -1
eval_steps: -1
logging_steps: 0
max_minutes: 0 inf
max_train_samples: 0 -1
max_eval_samples: 0
max_new_tokens: 0
eval_batch_size: 0
num_examples: -1
num_studies: 0
seed: -1 4294967296
dataloader_num_workers: -1
preset: nonsense
dataset_format: nonsense
sections: nonsense
uncertain_labels: nonsense
rejected_answer: nonsense
attn_implementation: nonsense
counterfactual_sources: thinking,dreaming thinking,thinking
thinking_weight: -1 nan
max_pixels: 0
min_pixels: 1003521
stages: sft,sft cpo,sft train
ddp_timeout: 0
lora_target_modules: ,
output_dir: ,
"""
CASES = [
    (name, "" if value == "," else value)
    for name, _, values in (line.partition(":") for line in OUTSIDE.strip().splitlines())
    for value in values.split()
]


@pytest.mark.parametrize(("name", "value"), CASES)
def test_out_of_range_values_are_rejected_in_flags_and_files(
    name: str, value: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=rf"^--{name} {re.escape(value)}"):
        parse_arguments([f"--{name}", value])
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps({name: value}))  # JSON is valid YAML
    with pytest.raises(UsageError, match=rf"{re.escape(str(config))}.*") as refused:
        parse_arguments(["--config", str(config)])
    assert name in str(refused.value) and value in str(refused.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--warmup_ratio 1.5", "--warmup_ratio 1.5: must be a finite number from 0 to 1"),
        ("--eval_fraction 1", "must be a finite number of at least 0 and below 1"),
        ("--max_steps 0", "--max_steps 0: must be a whole number of at least 1, or -1"),
        ("--loss_type sigmod", "did you mean sigmoid?"),
        ("--loss_type dpo", "'sigmoid' is the DPO loss"),
        ("--lr_scheduler_type cosin", "did you mean cosine?"),
        ("--beta 0", "--beta 0: must be a finite number above 0"),
        ("--loss_type hinge --label_smoothing 0.1",
         "--label_smoothing 0.1: must be 0: --loss_type hinge does not use it"),
        ("--label_smoothing 0.5", "--label_smoothing 0.5: must be a finite number of at least 0 "
         "and below 0.5"),
        ("--learning_rate -1e-5", "--learning_rate -1e-05: must be"),
        ("--loss_type exo_pair", "--label_smoothing 0: must be above 0 for --loss_type exo_pair"),
        ("--loss_type simpo --precompute_ref_log_probs", "has no reference to precompute"),
        ("--stages cpo,sft", "write sft,cpo"),
        ("--stages sft,sft", "names sft more than once"),
        ('--lr_scheduler_kwargs {"min_lr":1}', "no option 'min_lr'; it takes num_cycles"),
        ("--lr_scheduler_type constant --lr_scheduler_kwargs {\"a\":1}", "takes no options"),
        ("--sft_lr_scheduler_type cosine_with_min_lr", "--sft_lr_scheduler_type cosine_with_min"
         "_lr: needs one of min_lr and min_lr_rate"),
        ("--loss_impl nonsense", "--loss_impl nonsense: choose from reference, cuda"),
        ("--min_pixels 5000 --max_pixels 4000", "must be at most --max_pixels 4000"),
    ],
)  # fmt: skip
def test_range_errors_list_allowed_values(argv: str, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        parse_arguments(argv.split())


def test_range_bounds_are_allowed() -> None:
    text = (
        "--warmup_ratio 1 --eval_fraction 0 --lora_dropout 0 --max_grad_norm 0 --weight_decay 0 "
        "--adam_beta1 0 --seed 0 --dataloader_num_workers 0 --save_steps 0 --max_minutes 1e-9 "
        "--learning_rate 1e30 --max_steps -1 --num_train_epochs 0.01 --num_examples 0 "
        "--loss_type robust --label_smoothing 0.49 --stages sft,evaluate --report_to none "
        "--metric_for_best_model eval_rewards/margins/perception"
    )
    assert parse_arguments(text.split()).label_smoothing == 0.49


def test_file_accepts_other_number_formats(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("learning_rate: 1e-4\nbeta: 1\nuse_peft: 'false'\n")
    args = parse_arguments(["--config", str(config)])
    assert (args.learning_rate, args.beta, args.use_peft) == (1e-4, 1.0, False)
    for line in ("beta: [1]", "bf16: 3", "seed: 1.5", "seed: null", "dataset: 7",
                 "lr_scheduler_kwargs: {min_lr: 1}"):  # fmt: skip
        config.write_text(line)
        with pytest.raises(UsageError, match=line.partition(":")[0]):
            parse_arguments(["--config", str(config)])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--concept_graph /nowhere/g.json", "--concept_graph /nowhere/g.json: no such file"),
        ("--counterfactuals /nowhere/c.jsonl", "--counterfactuals /nowhere/c.jsonl: no such file"),
        ("--image_root /nowhere/i", "--image_root /nowhere/i: no such folder"),
        (
            "--model_name_or_path /nowhere/m",
            "--model_name_or_path /nowhere/m: no such model folder",
        ),
        (
            "--resume_from_checkpoint /nowhere/c",
            "--resume_from_checkpoint /nowhere/c: not a checkpoint",
        ),
        ("--loss_impl nonsense", "--loss_impl nonsense: choose from reference"),
        ("--report_to tensorboard,nonsense", "--report_to tensorboard,nonsense: choose from"),
        ("--loss_type sigmod", "--loss_type sigmod: choose from"),
        ("", "--dataset /nowhere/data: no such file or folder; give a preference file"),
    ],
)
def test_wrong_flags_are_rejected_before_reading_data(
    flags: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    status = main(["--dataset", "/nowhere/data", "--output_dir", str(out), *flags.split()])
    assert status == 2 and message in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize(
    "flags", ["--attn_implementation varlen", "--attn_implementation flex", "--loss_impl cuda"]
)
def test_gpu_settings_are_rejected_without_gpu(flags: str) -> None:
    with pytest.raises(UsageError, match=flags):
        check_machine(parse_arguments(flags.split()))


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        (["--lr_scheduler_type", "polynomial", "--lr_scheduler_kwargs", '{"lr_end": -1}'],
         "becomes negative"),
        (["--lr_scheduler_kwargs", '{"num_cycles": "many"}'], "cannot be built"),
    ],
)  # fmt: skip
def test_schedule_options_are_tried_before_reading_data(flags: list[str], fault: str) -> None:
    with pytest.raises(UsageError, match=f"--lr_scheduler_type .*{fault}"):
        check_machine(parse_arguments(flags))


def test_resume_rejects_checkpoint_of_another_run(tmp_path: Path) -> None:
    own, other = tmp_path / "a" / "sft" / "checkpoint-3", tmp_path / "b" / "sft" / "checkpoint-3"
    for folder in (own, other, own.with_name("merged")):
        folder.mkdir(parents=True)
    flags = ["--output_dir", str(tmp_path / "a"), "--resume_from_checkpoint"]
    check_machine(parse_arguments([*flags, str(own)]))
    check_machine(parse_arguments([*flags, f"{own.parent}/../sft/checkpoint-3"]))
    for wrong in (other, own.with_name("checkpoint-4"), own.with_name("merged"), own.parent):
        with pytest.raises(UsageError, match=f"{wrong}: not a checkpoint .*its newest is {own}"):
            check_machine(parse_arguments([*flags, str(wrong)]))
    with pytest.raises(UsageError, match=f"{tmp_path / 'c'} .it has none"):
        check_machine(parse_arguments(["--output_dir", str(tmp_path / "c"), *flags[2:], str(own)]))
    with pytest.raises(UsageError, match="its stage sft is not in --stages cpo"):
        check_machine(parse_arguments([*flags, str(own), "--stages", "cpo"]))


def test_cpo_of_studies_needs_counterfactuals_and_sft_does_not(tmp_path: Path) -> None:
    flags = ["--dataset", "phantom", "--output_dir", str(tmp_path), "--stages"]
    check_machine(parse_arguments([*flags, "sft,evaluate"]))
    with pytest.raises(UsageError, match="add counterfactual to --stages"):
        check_machine(parse_arguments([*flags, "sft,cpo"]))
    (tmp_path / "counterfactuals.jsonl").write_text("")
    check_machine(parse_arguments([*flags, "cpo"]))


def groups(number: int, *sources: str) -> list[PreferenceGroup]:
    one = PreferenceGroup("a", Prompt((1,)), (2,), ((3,),))
    return [replace(one, source=sources[k % len(sources)]) for k in range(number)]


@pytest.mark.parametrize(
    ("flags", "train", "held_out", "message"),
    [
        ("", [], [], "cpo: no training sample is left"),
        ("--load_best_model_at_end", groups(2, "thinking"), [], "cpo: no sample is held out"),
        ("--metric_for_best_model loss/thinking", groups(2, "thinking"), groups(1, "thinking"),
         "all pairs are of thinking"),
        ("--metric_for_best_model loss/thinking", groups(2, "thinking", "perception"),
         groups(1, "thinking"), None),
    ],
)  # fmt: skip
def test_missing_cpo_samples_stop_the_run_before_sft(
    flags: str, train: list[PreferenceGroup], held_out: list[PreferenceGroup], message: str | None
) -> None:
    args = parse_arguments(["--stages", "sft,cpo", *flags.split()])
    answers = {"train": groups(1, "thinking"), "validate": groups(1, "thinking"), "test": []}
    samples = Samples(answers, {"train": train, "validate": held_out, "test": []})
    if message is None:
        check_samples(args, samples)
    else:
        with pytest.raises(DataError, match=message):
            check_samples(args, samples)


def test_missing_data_set_gives_a_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main(["--dataset", "/nowhere/mimic", "--output_dir", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert status == 2
    assert "/nowhere/mimic" in error and "Traceback" not in error
