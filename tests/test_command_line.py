"""Wrong usage of every command: one line, status 2, no heavy import; short help."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from cpo_fast.cli import COMMANDS, main
from cpo_fast.command_line import Parser
from cpo_fast.flags import COUNT, Number, near
from cpo_fast.run.arguments import SECTIONS, TrainArguments
from cpo_fast.run.settings import make_parser

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "transformers", "peft", "pandas", "triton", "sklearn", "matplotlib", "trl"}
REFUSED = [
    *([name, "--hlep"] for name in COMMANDS),
    *([name, "--help"] for name in COMMANDS),
    *([name, "--version"] for name in COMMANDS),
    ["data", "check", "--hlep"],
    ["train", "--learning_rat", "1"],
    ["train", "--lr_scheduler_type", "cosin"],
    ["train", "--loss_type", "sigmod"],
    ["train", "--loss_type", "hinge", "--label_smoothing", "0.1"],
    ["train", "--metric_for_best_model", "los"],
    ["train", "--dataset", "/nowhere/data"],
    ["train", "--model_name_or_path", "/nowhere/model"],
    ["train", "--config", "/nowhere/run.yaml"],
]


def run_all(cases: list[list[str]], folder: Path) -> list[tuple[list[str], int, list[str], str]]:
    """Run command lines in one process: (words, status, loaded heavy modules, stderr) of each."""
    code = f"""
import contextlib, io, json, sys
from cpo_fast.cli import main
found = []
for words in json.loads({json.dumps(json.dumps(cases))}):
    output = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(output):
        try:
            status = main(words)
        except SystemExit as stopped:
            status = stopped.code
    found.append((words, status, sorted({HEAVY!r} & set(sys.modules)), output.getvalue()))
print(json.dumps(found))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment, cwd=folder, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert len(found) == len(cases)
    return found


def test_flag_errors_import_nothing_heavy(tmp_path: Path) -> None:
    for words, status, modules, _ in run_all(REFUSED, tmp_path):
        valid = words[-1] in ("--help", "--version")
        assert (status, modules) == (0 if valid else 2, []), words


WRONG_PATHS = {
    "train --output_dir old --stages sft": "holds checkpoints of an earlier run",
    "train --output_dir old --resume_from_checkpoint nowhere": "nowhere: not a checkpoint of",
    "train --output_dir new --resume_from_checkpoint nowhere": "it has none",
    "train --output_dir old --resume_from_checkpoint auto --seed 7": "--seed",
    "train --output_dir pairs.jsonl": "pairs.jsonl is not a folder",
    "train --output_dir pairs.jsonl/x": "pairs.jsonl is not a folder",
    "train --dataset pairs.jsonl --output_dir new --model_name_or_path empty": "no config.json",
    "train --dataset pairs.jsonl --output_dir new --model_name_or_path old": "folder of a run",
    "train --dataset pairs.jsonl --output_dir new --stages cpo --sft_checkpoint empty":
        "--sft_checkpoint empty: it has no config.json",
    "train --dataset pairs.jsonl --output_dir new --stages cpo --sft_checkpoint adapter":
        "the base model of the adapter adapter is not there: gone",
    "train --dataset pairs.jsonl --dataset_format mimic-cxr --output_dir new": "no such folder",
    "train --dataset pairs.jsonl --output_dir new --image_root nowhere": "no such folder",
    "train --output_dir new --fsdp --no_use_peft --no_sft_use_peft": "start them with torchrun",
    "train --output_dir new --counterfactuals empty": "no such file",
    "export --merge nowhere --output_dir new": "--merge nowhere: no such model folder",
    "export --merge empty --output_dir new": "--merge empty: it has no config.json",
    "export --merge old/sft --output_dir new": "it has no complete adapter checkpoint",
    "export --merge adapter --output_dir new": "not there: gone",
    "export --merge adapter --base_model nowhere --output_dir new": "base_model nowhere: no such",
    "export --merge adapter --base_model empty --output_dir old": "old is not empty",
    "export --merge adapter --base_model empty --output_dir pairs.jsonl": "is not a folder",
    "evaluate --model nowhere --dataset open-i --output_dir new": "--model nowhere: no such",
    "evaluate --model empty --dataset pairs.jsonl --output_dir new": "--model empty: it has no",
    "evaluate --model adapter --dataset pairs.jsonl --base_model no --output_dir new":
        "base_model no: no such",
    "evaluate --model adapter --dataset no.jsonl --dataset_format trl --output_dir new":
        "--dataset no.jsonl: no such file",
    "evaluate --model adapter --dataset no.csv --image_root empty --output_dir new":
        "--dataset no.csv: no such file",
    "evaluate --model adapter --base_model empty --dataset open-i --output_dir pairs.jsonl":
        "is not a folder",
    "data check --dataset pairs.jsonl --output_dir pairs.jsonl": "is not a folder",
    "data check --dataset pairs.jsonl --output_dir new --tokenizer nowhere":
        "no tokenizer in nowhere",
    "data export --dataset pairs.jsonl --output pairs.jsonl --format trl": "the data set itself",
    "data export --dataset pairs.jsonl --output empty --format trl": "empty cannot be written",
    "counterfactual --dataset open-i --output out.jsonl --generator local --model empty":
        "--model empty: ",
    "counterfactual --dataset open-i --output empty --generator local --model old": "is a folder",
    "concepts mine --dataset open-i --output empty": "is a folder",
    "study --output_dir new --sft_from nowhere": "holds no study",
}  # fmt: skip


def test_wrong_paths_are_rejected_before_torch_is_imported(tmp_path: Path) -> None:
    row = {"prompt": "Q", "chosen": "x", "rejected": "y"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "old/sft/checkpoint-3").mkdir(parents=True)
    (tmp_path / "old/config.json").write_text('{"seed": 42, "stages": "sft"}')
    (tmp_path / "empty").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text('{"base_model_name_or_path": "gone"}')
    (tmp_path / "adapter/adapter_model.safetensors").touch()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    found = run_all([words.split() for words in WRONG_PATHS], tmp_path)
    assert all((status, modules) == (2, []) for _, status, modules, _ in found), found
    messages = {" ".join(words): output for words, _, _, output in found}
    assert {w: output for w, output in messages.items() if WRONG_PATHS[w] not in output} == {}
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def read_error_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The error line of a command that ends with status 2."""
    try:
        status: object = main(words)
    except SystemExit as stopped:
        status = stopped.code
    output = capsys.readouterr()
    assert status == 2 and output.out == "", output
    (line,) = output.err.splitlines()
    return line


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("train --learning_rat 1",
         "cpo-fast train: --learning_rat is not a flag; did you mean --learning_rate?"),
        ("train --hlep", "cpo-fast train: --hlep is not a flag; did you mean --help?"),
        ("train --epochs 3",
         "cpo-fast train: --epochs is not a flag; did you mean --num_train_epochs?"),
        ("train -lora_r 3", "cpo-fast train: -lora_r is not a flag; did you mean --lora_r?"),
        ("train --lora-rr 3", "cpo-fast train: --lora-rr is not a flag; did you mean --lora_r?"),
        ("train --qqqq", "cpo-fast train: --qqqq is not a flag; see cpo-fast train --help"),
        ("train --lora_r x", "cpo-fast train: --lora_r x: must be a whole number of at least 1"),
        ("train --lora_r", "cpo-fast train: --lora_r: needs a value"),
        ("train --bf16=maybe", "cpo-fast train: --bf16 maybe: must be true or false"),
        ("train --no_bf16=1", "cpo-fast train: --no_bf16: takes no value"),
        ("train data.jsonl", "cpo-fast train: unexpected argument 'data.jsonl'; settings have the "
         "form --flag value"),
        ("train --sections carefull", "cpo-fast train: --sections carefull: choose from careful, "
         "authors (did you mean careful?)"),
        ("train --learning-rate -1e-5",
         "cpo-fast train: --learning_rate -1e-05: must be a finite number above 0"),
        ("evaluate --modle m", "cpo-fast evaluate: --modle is not a flag; did you mean --model?"),
        ("evaluate --dataset d", "cpo-fast evaluate: missing --model, --output_dir; see cpo-fast "
         "evaluate --help"),
        ("evaluate --model m --dataset d --output_dir o --bf16=1",
         "cpo-fast evaluate: --bf16: takes no value"),
        ("data chek", "cpo-fast data: command chek: choose from check, export (did you mean "
         "check?)"),
        ("data check --output_dri o",
         "cpo-fast data check: --output_dri is not a flag; did you mean --output_dir?"),
        ("data check --dataset d --output_dir o --tokenizer",
         "cpo-fast data check: --tokenizer: needs a value"),
        ("trian", "cpo-fast: trian is not a command; did you mean train?"),
        ("sing", "cpo-fast: sing is not a command; see cpo-fast --help"),
    ],
)  # fmt: skip
def test_wrong_usage_is_one_line(words: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    program, _, fault = line.partition(": ")
    assert read_error_line(words.split(), capsys) == f"{program}: error: {fault}"


@pytest.mark.parametrize(
    ("words", "program"),
    [
        ("train --config /nowhere", "cpo-fast train"),
        ("train --dataset /nowhere", "cpo-fast train"),
        ("evaluate --model m --dataset open-i --output_dir o --suite x", "cpo-fast evaluate"),
        ("data check --dataset /nowhere --output_dir {here}/out", "cpo-fast data check"),
        ("data export --dataset /nowhere --output {here}/o --format trl", "cpo-fast data export"),
        ("counterfactual --dataset open-i --output o --shard 9", "cpo-fast counterfactual"),
        ("concepts export --output graph.txt", "cpo-fast concepts"),
        ("report /nowhere", "cpo-fast report"),
        ("phantom --output_dir /proc/x --num_studies 4", "cpo-fast phantom"),
        ("study --output_dir /proc/x", "cpo-fast study"),
        ("export --merge /nowhere --output_dir {here}/out", "cpo-fast export"),
    ],
)
def test_later_errors_have_the_same_form(
    words: str, program: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words.format(here=tmp_path).split()) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"{program}: error: ")


@pytest.mark.parametrize(
    ("called", "name"),
    [(["cpo_fast.train"], "python -m cpo_fast.train"),
     (["cpo_fast.cli", "train"], "cpo-fast train"),
     (["cpo_fast.data", "check"], "python -m cpo_fast.data check")],
)  # fmt: skip
def test_messages_name_the_program_as_called(called: list[str], name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *called, "--hlep"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"{name}: error: --hlep is not a flag; did you mean --help?\n"


def test_train_help_is_short_and_in_sections() -> None:
    text = make_parser().format_help()
    assert text.startswith("usage: cpo-fast train [--config FILE] [--preset NAME] [--flag value")
    assert text.index("\n\n") < 100  # the usage is one line
    positions = [text.index(f"\n{title}:\n") for title in SECTIONS]
    assert positions == sorted(positions)
    names = {f.name for f in fields(TrainArguments)}
    assert set(SECTIONS.values()) <= names
    first = text[text.index("\nmost used:") : text.index("\ndata:")]
    assert first.count("\n  --") == 10  # with --config
    for name in names:
        assert text.count(f"\n  --{name} ") == 1, name
    assert "\n  --no_" not in text
    entries = text.split("\n  --")
    assert all(entry.count("(default") <= 1 for entry in entries)
    text = " ".join(text.split())  # independent of the terminal width
    assert "--no_use_peft trains all weights" in text
    assert "longer ones: see --truncation" in text and "filled with samples of up to --max" in text


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("data", "concepts")])
def test_every_flag_has_help_and_shows_its_default_once(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    assert text.startswith(f"usage: cpo-fast {command}")
    for entry in text.split("\n  -")[1:]:
        lines = entry.split("\n\n")[0].splitlines()
        assert "  " in lines[0].strip() or len(lines) > 1, entry
        assert entry.count("(default") <= 1, entry


def test_flags_accept_dashes_signs_and_equals() -> None:
    parser = Parser(prog="x")
    parser.add_argument("--some_flag", type=Number())
    parser.add_argument("--count", type=COUNT)
    for words in (["--some-flag", "-1e-5"], ["--some_flag", "-1e-5"], ["--some-flag=-1e-5"]):
        assert parser.parse_args(words).some_flag == -1e-5
    train = make_parser()
    for words, value in ((["--bf16"], True), (["--no_bf16"], False), (["--no-bf16"], False),
                         (["--bf16", "no"], False), (["--bf16=true"], True)):  # fmt: skip
        assert vars(train.parse_args(words)) == {"bf16": value}
    given = ["--lr_scheduler_kwargs", '{"a": -1}', "--output-dir", "a - b"]
    assert vars(train.parse_args(given)) == {"lr_scheduler_kwargs": given[1], "output_dir": "a - b"}


def test_near_suggests_similar_names() -> None:
    assert near("--lora_rank", ["--lora_r", "--beta"]) == "--lora_r"
    assert near("--model", ["--model_name_or_path", "--beta"]) == "--model_name_or_path"
    assert near("--qqq", ["--model_name_or_path", "--beta"]) is None
