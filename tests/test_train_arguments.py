"""Flags, config files and their errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpo_fast.errors import UsageError
from cpo_fast.train import main
from cpo_fast.training.arguments import parse_arguments


def test_no_arguments_mean_the_embedded_default() -> None:
    args = parse_arguments([])
    assert (args.dataset, args.model_name_or_path) == ("phantom", "tiny")
    assert args.output_dir == "runs/phantom"
    assert not args.sft_use_peft and args.use_peft


def test_a_flag_changes_the_embedded_default_and_keeps_the_rest() -> None:
    args = parse_arguments(["--seed", "7"])
    assert args.seed == 7
    assert args.output_dir == "runs/phantom"


def test_a_model_or_data_set_of_ones_own_starts_from_the_papers_settings() -> None:
    args = parse_arguments(["--dataset", "/data/mimic"])
    assert (args.learning_rate, args.sft_learning_rate) == (2e-5, 1e-4)
    assert (args.lora_r, args.lora_alpha, args.lora_dropout) == (8, 32, 0.1)
    assert (args.adam_beta1, args.adam_beta2, args.weight_decay) == (0.9, 0.98, 0.05)


def test_flags_win_over_the_config_file(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("beta: 0.3\nlearning_rate: 1e-4\nseed: 5\n")
    args = parse_arguments(["--config", str(config), "--beta", "0.5"])
    assert (args.beta, args.learning_rate, args.seed) == (0.5, 1e-4, 5)


def test_stage_settings_have_plain_names() -> None:
    args = parse_arguments(["--sft_learning_rate", "3e-4", "--learning_rate", "1e-5"])
    assert args.of_stage("sft")["learning_rate"] == 3e-4
    assert args.of_stage("cpo")["learning_rate"] == 1e-5


def test_the_papers_preset_is_its_table() -> None:
    args = parse_arguments(["--dataset", "/data/mimic", "--preset", "paper"])
    sft, cpo = args.of_stage("sft"), args.of_stage("cpo")
    for name, of_sft, of_cpo in (
        ("learning_rate", 1e-4, 2e-5),
        ("lr_scheduler_type", "cosine_with_min_lr", "cosine"),
        ("lr_scheduler_kwargs", {"min_lr": 1e-7}, None),
        ("warmup_ratio", 0.05, 0.0),
        ("per_device_train_batch_size", 15, 4),
        ("gradient_accumulation_steps", 16, 8),
        ("num_train_epochs", 1.0, 1.0),
        ("max_length", 2048, 4096),
        ("freeze_vit", False, True),
        ("use_peft", True, True),
    ):
        assert (sft[name], cpo[name]) == (of_sft, of_cpo), name
    assert (args.adam_beta1, args.adam_beta2, args.weight_decay) == (0.9, 0.98, 0.05)
    assert (args.lora_r, args.lora_alpha, args.lora_dropout) == (8, 32, 0.1)
    assert (args.beta, args.loss_type, args.max_pixels) == (0.1, "sigmoid", 512 * 512)
    assert args.expand_pairs and args.num_targets == 2


def test_what_wins_over_a_preset(tmp_path: Path) -> None:
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


def test_sft_takes_the_schedule_and_length_of_cpo_unless_told() -> None:
    flags = ["--lr_scheduler_type", "cosine_with_min_lr", "--max_length", "99",
             "--lr_scheduler_kwargs", '{"min_lr": 1e-6}']  # fmt: skip
    sft = parse_arguments(flags).of_stage("sft")
    assert (sft["lr_scheduler_type"], sft["max_length"]) == ("cosine_with_min_lr", 99)
    assert sft["lr_scheduler_kwargs"] == {"min_lr": 1e-6}
    sft = parse_arguments([*flags, "--sft_lr_scheduler_type", "linear"]).of_stage("sft")
    assert (sft["lr_scheduler_type"], sft["lr_scheduler_kwargs"]) == ("linear", None)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--preset", "fast"], "--preset fast: choose from default, paper, lowmem"),
        (["--sft_max_length", "-1"], "--sft_max_length"),
        (["--lr_scheduler_kwargs", "[1]"], "--lr_scheduler_kwargs must be a JSON object"),
        (["--sft_lr_scheduler_kwargs", "{}{"], "--sft_lr_scheduler_kwargs must be a JSON"),
        (["--sft_lr_scheduler_kwargs", '{"a": 1}'], "are those of --sft_lr_scheduler_type"),
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


def test_a_wrong_line_in_a_config_file_is_named(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("bete: 0.3\n")
    with pytest.raises(UsageError, match="bete"):
        parse_arguments(["--config", str(config)])
    config.write_text("- a\n- list\n")
    with pytest.raises(UsageError, match="flag: value"):
        parse_arguments(["--config", str(config)])


def test_an_unknown_flag_ends_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--bete", "0.3"])
    assert stopped.value.code == 2
    assert "--bete" in capsys.readouterr().err


def test_a_missing_data_set_ends_with_a_message_not_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main(["--dataset", "/nowhere/mimic", "--output_dir", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert status == 1
    assert "/nowhere/mimic" in error and "Traceback" not in error
