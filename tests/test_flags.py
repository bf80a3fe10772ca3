"""Number and choice types of flags; every command rejects values out of range."""

from __future__ import annotations

import argparse

import pytest

from cpo_fast.cli import main
from cpo_fast.flags import COUNT, POSITIVE, SEED, SHARE, Choices, Number, whole

OUT = ["--output_dir", "/nowhere/out"]
STUDY = ["study", *OUT]
PHANTOM = ["phantom", *OUT, "--num_studies", "4"]
CHECK = ["data", "check", "--dataset", "/nowhere/data", *OUT]
MINE = ["concepts", "mine", "--dataset", "open-i", "--output", "/nowhere/out.json"]
COUNTER = ["counterfactual", "--dataset", "open-i", "--output", "/nowhere/cf.jsonl"]
EVALUATE = ["evaluate", "--model", "/nowhere/m", "--dataset", "open-i", *OUT]


@pytest.mark.parametrize(
    ("command", "wrong"),
    [
        (STUDY, "--seeds 0, --first_seed -1, --num_studies 0, --sft_epochs nan, --steps 0, "
                "--learning_rate inf, --beta nan, --test_samples 0, --reports 0"),
        (PHANTOM, "--num_studies 0, --seed -1, --image_size 63, --image_size 2049"),
        (CHECK, "--max_bad_fraction 1.5, --max_bad_fraction nan, --sample -0.1, --max_length 0, "
                "--max_images 0"),
        (MINE, "--workers 0"),
        (COUNTER, "--seed -1, --num_targets 0, --temperature -1, --temperature nan, "
                  "--max_new_tokens 0, --batch_size 0, --concurrency 0, --requests_per_second -1, "
                  "--requests_per_second inf, --timeout_s 0, --max_retries -1, "
                  "--dataset_format nonsense, --sections nonsense"),
        (EVALUATE, "--max_samples 0, --max_length 0, --max_pixels -5, --max_new_tokens 0, "
                   "--batch_size 0, --packing_length 0, --drift_samples 0, --num_examples -1, "
                   "--seed -1, --split final, --dataset_format nonsense"),
    ],
)  # fmt: skip
def test_commands_reject_out_of_range_values_with_status_2(
    command: list[str], wrong: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for flag, value in (case.split() for case in wrong.split(", ")):
        with pytest.raises(SystemExit) as stopped:
            main([*command, flag, value])
        (error,) = capsys.readouterr().err.splitlines()
        assert stopped.value.code == 2, (flag, value)
        assert error.startswith("cpo-fast ") and f": {flag} {value}: " in error
        assert "must be a" in error or "choose from" in error


def test_number_describes_its_bounds() -> None:
    for allowed, words in (
        (POSITIVE, "a whole number of at least 1"),
        (COUNT, "a whole number of at least 0"),
        (SHARE, "a finite number from 0 to 1"),
        (SEED, "a whole number from 0 to 4294967295"),
        (Number(above=0), "a finite number above 0"),
        (Number(low=0, below=1), "a finite number of at least 0 and below 1"),
        (whole(1, also=-1), "a whole number of at least 1, or -1"),
        (Number(), "a finite number"),
    ):
        assert str(allowed) == words


def test_numbers_keep_their_type() -> None:
    assert POSITIVE("3") == 3 and isinstance(POSITIVE("3"), int)
    assert SHARE("1") == 1.0 and isinstance(SHARE("1"), float)
    assert whole(1, also=-1)("-1") == -1
    for text in ("1.0", "x", "", "nan", "0"):
        with pytest.raises(argparse.ArgumentTypeError):
            POSITIVE(text)
    with pytest.raises(argparse.ArgumentTypeError):
        whole(0)("1" * 5000)  # more digits than Python parses


def test_choices_check_names_and_order() -> None:
    names = Choices(("a", "b", "c"), ordered=True)
    assert names.fault("a, c") is None
    assert names.fault("c,a") == "they run in the order a,b,c: write a,c"
    assert names.fault("a,a") == "names a more than once"
    assert names.fault("") == names.fault("d") == "choose from a,b,c"
    assert names.fault(3) == "choose from a,b,c"
