"""`--config` files: accepted content, errors, printed origin of settings."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cpo_fast.errors import UsageError
from cpo_fast.run.settings import read_settings
from cpo_fast.testing.runs import parse_arguments
from cpo_fast.train import main


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_file_accepts_dashes_and_numbers_read_as_text(tmp_path: Path) -> None:
    text = "lora-r: 16\nlearning_rate: 1e-4\nuse_peft: 'false'\nmax-steps: 3  # few\n"
    args = parse_arguments(["--config", str(written(tmp_path, text))])
    assert (args.lora_r, args.learning_rate, args.use_peft, args.max_steps) == (16, 1e-4, False, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora_r: [8, 16]", ", line 1: lora_r is a list, but a flag has one value"),
        ("seed: 1\nlora_r:\n- 8\n", ", line 2: lora_r is a list"),
        ("a: &a [*a]", ", line 1: a is a list"),
        ("seed: 1\nlr_scheduler_kwargs: {min_lr: 1}", ", line 2: lr_scheduler_kwargs is a nested"),
        ("lora_r: 8\nbeta: 1\nlora_r: 16", ", line 3: lora_r is set twice, first in line 1"),
        ("lora-r: 8\nlora_r: 16", ", line 2: lora_r is set twice, first in line 1"),
        ("beta: 1\n\nlearning_rat: 1", ", line 3: learning_rat is not a flag; did you mean "
         "learning_rate?"),
        ("no_use_peft: true", ", line 1: no_use_peft is not a flag; did you mean use_peft?"),
        ("qqqq: 1", ", line 1: qqqq is not a flag; see"),
        ("1: 2", ", line 1: 1 is not a flag"),
        ("seed: 1\nlora_r: 0", ", line 2: lora_r 0: must be a whole number of at least 1"),
        ("lora_r: x", ", line 1: lora_r x: must be a whole number"),
        ("lora_r: true", ", line 1: lora_r true: must be a whole number"),
        ("lora_r:", ", line 1: lora_r null: must be a whole number"),
        ("bf16: maybe", ", line 1: bf16 maybe: must be true or false"),
        ("loss_type: sigmod", ", line 1: loss_type sigmod: choose from"),
        ("output_dir: 2026-01-02", "output_dir 2026-01-02: must be text, not empty; quote it to "
         "make it text in YAML"),
        ("output_dir: 2026-99-99", ": not YAML: "),
        ("preset: fast", ", line 1: preset fast: choose from default, paper, lowmem"),
        ("", ": sets no flag; expected lines like"),
        ("# only a comment\n", ": sets no flag"),
        ("- a\n- list", ": expected lines of the form `flag: value`"),
        ("just words", ": expected lines of the form `flag: value`"),
        ("? [a, b]\n: 1", ", line 1: expected `flag: value`"),
        ("beta: 1\nbeta 0.3", ", line 2: not YAML: could not find expected ':'"),
        ("beta: 'open", ", line 1: not YAML: found unexpected end of stream"),
        ("beta: 1\n---\nbeta: 2\n", ", line 2: not YAML: expected a single document in"),
        ("beta: !!python/object:os.system 1", ", line 1: not YAML: could not determine a const"),
        ("beta: *unknown", ", line 1: not YAML: found undefined alias"),
        (b"\x89PNG\r\n\xff\xfe", ": not a text file in UTF-8"),
        (b"PK\x03\x04\x00", ": not YAML: unacceptable character"),
    ],
)  # fmt: skip
def test_wrong_file_gives_one_line_with_file_line_and_key(
    text: str | bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, text)
    assert main(["--config", str(path)]) == 2
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert said.out == "" and line.startswith("cpo-fast train: error: --config ")
    start = f"--config {path}{message}" if message[0] in ",:" else f"--config {path}"
    assert start in line and message in line, line


def test_missing_config_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=re.escape(f"--config {tmp_path}: cannot be read (Is a")):
        parse_arguments(["--config", str(tmp_path)])
    with pytest.raises(UsageError, match=r"--config /nowhere/run.yaml: no such file"):
        parse_arguments(["--config", "/nowhere/run.yaml"])


def test_contradiction_names_the_config_file_if_given(tmp_path: Path) -> None:
    path = written(tmp_path, "loss_type: hinge\n")
    with pytest.raises(UsageError, match=re.escape(f"(with the flags of --config {path})")):
        parse_arguments(["--config", str(path), "--label_smoothing", "0.1"])
    with pytest.raises(UsageError, match=r"--lora_r 0: must be a whole number of at least 1$"):
        parse_arguments(["--config", str(path), "--lora_r", "0"])


def said(*argv: str) -> str:
    return " ".join(" ".join(read_settings(argv).describe()).split())


def test_file_with_one_flag_keeps_the_embedded_base(tmp_path: Path) -> None:
    path = str(written(tmp_path, "lora_r: 16\n"))
    in_file, alone = parse_arguments(["--config", path]), parse_arguments(["--lora_r", "16"])
    assert in_file == alone and in_file.sft_learning_rate == 2e-3
    text = said("--config", path, "--beta", "0.2")
    assert "base settings: phantom.yaml, not the paper's" in text
    assert "neither --dataset nor --model_name_or_path is set" in text
    assert f"--config {path}: lora_r=16 (default 8)" in text
    assert "command line: beta=0.2 (default 0.1)" in text


def test_file_with_dataset_uses_the_paper_base(tmp_path: Path) -> None:
    path = str(written(tmp_path, "dataset: /data/mimic\nbeta: 0.1\nlora_r: 9\n"))
    assert parse_arguments(["--config", path]).sft_learning_rate == 1e-4
    text = said("--config", path, "--lora_r", "16")
    assert "the paper's (defaults of --help), because --dataset is set" in text
    assert "phantom.yaml" not in text and "beta" not in text  # beta has its default
    assert f"--config {path}: dataset=/data/mimic command line: lora_r=16" in text


def test_preset_changes_are_printed() -> None:
    text = said("--dataset", "d", "--preset", "lowmem", "--max_pixels", "5000")
    assert "--preset lowmem: bf16=true, gradient_checkpointing=true" in text
    assert "max_length=2048 (default 4096)" in text and "max_pixels=262144" not in text
    assert "command line: dataset=d, max_pixels=5000 (default 1003520)" in text
    assert said("--dataset", "d", "--preset", "paper").count("expand_pairs=true") == 1


def test_flags_of_inactive_stages_are_named() -> None:
    text = said("--stages", "sft", "--max_steps", "20", "--max_length", "99", "--lora_r", "4")
    assert "not used by --stages sft: --max_steps (SFT has --sft_max_steps)" in text
    assert "not used by --stages cpo: --sft_max_steps" in said(
        "--stages", "cpo", "--sft_max_steps", "20", "--sft_checkpoint", "m", "--max_steps", "3"
    )
    for stages in ("sft,cpo", "evaluate"):
        assert "not used" not in said("--stages", stages, "--max_steps", "20", "--beta", "0.2")


def test_settings_are_printed_before_path_errors(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["--dataset", "/nowhere/data"]) == 2
    assert capsys.readouterr().out.startswith("base settings: the paper's")
    monkeypatch.setenv("RANK", "1")
    assert main(["--dataset", "/nowhere/data"]) == 2
    other = capsys.readouterr()
    assert other.out == "" and other.err.startswith("rank 1: cpo-fast train: error: --dataset /n")


def test_embedded_default_overwrites_only_its_own_folder(tmp_path: Path) -> None:
    assert parse_arguments([]).overwrite_output_dir
    assert not parse_arguments(["--output_dir", str(tmp_path)]).overwrite_output_dir
    path = written(tmp_path, f"output_dir: {tmp_path}\n")
    assert not parse_arguments(["--config", str(path)]).overwrite_output_dir
