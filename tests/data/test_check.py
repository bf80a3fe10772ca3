"""`python -m cpo_fast.data check`: files, output and exit status."""

from __future__ import annotations

import io
import json
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cpo_fast.console import run_command
from cpo_fast.data import open_studies
from cpo_fast.data.__main__ import main
from cpo_fast.data.check import check, table
from cpo_fast.data.openi import installed_file
from cpo_fast.errors import DataError
from tests.data.samples import REPORT, SECRET, write_mimic


def run(dataset: Path | str, out: Path, *flags: str) -> tuple[int, dict[str, Any], list[dict]]:
    code = main(["check", "--dataset", str(dataset), "--output_dir", str(out), *flags])
    if not (out / "summary.json").exists():
        return code, {}, []
    records = (out / "rejected_records.jsonl").read_text().splitlines()
    return (
        code,
        json.loads((out / "summary.json").read_text())["data"],
        list(map(json.loads, records)),
    )


@pytest.fixture
def mimic(tmp_path: Path) -> Path:
    studies: list[dict[str, Any]] = [
        {
            "study": 50000000 + i,
            "patient": 10000000 + i // 2,
            "report": REPORT.format(body=f"{SECRET} {i}."),
            "labels": {"Edema": "1.0"} if i % 2 else {"Edema": "1.0", "Fracture": "-1.0"},
            "split": "test" if i == 9 else "train",
        }
        for i in range(10)
    ]
    return write_mimic(tmp_path / "mimic", studies)


def test_results_of_a_training_run_are_not_replaced(
    mimic: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The refusal precedes reading; results of an earlier check are replaced, mode 0600."""
    out = tmp_path / "out"
    assert run(mimic, out)[0] == 0
    (out / "summary.json").chmod(0o644)
    assert run(mimic, out)[0] == 0
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o600}
    capsys.readouterr()
    before = {"config.json": '{"stages": "sft"}', "summary.json": '{"data": {}}'}
    for name, text in before.items():
        (out / name).write_text(text)
    assert main(["check", "--dataset", "gone", "--output_dir", str(out)]) == 2
    assert f"--output_dir {out} holds a training run" in capsys.readouterr().err
    assert {name: (out / name).read_text() for name in before} == before


def test_usable_data_set_passes(mimic: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    code, facts, rejected = run(mimic, tmp_path / "out")
    assert (code, rejected) == (0, [])
    assert (facts["read"], facts["used"], facts["rejected"]) == (10, 10, {})
    assert facts["kind"] == "mimic-cxr"
    assert facts["splits"] == {
        "test": {"studies": 1, "patients": 1},
        "train": {"studies": 9, "patients": 5},
    }
    assert facts["patients_in_several_splits"] == 1
    assert facts["labels"] == {
        "Edema": {"present": 10, "uncertain": 0},
        "Fracture": {"present": 0, "uncertain": 5},
    }
    assert facts["images_per_record"] == {"1": 10}
    printed = capsys.readouterr()
    assert "usable" in printed.out and "Edema" in printed.out
    assert SECRET not in printed.out + printed.err
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o700
    for name in ("summary.json", "rejected_records.jsonl"):
        assert stat.S_IMODE((tmp_path / "out" / name).stat().st_mode) == 0o600
        assert SECRET not in (tmp_path / "out" / name).read_text()


def test_bad_records_are_set_aside(
    mimic: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    reports = sorted(mimic.rglob("s5*.txt"))
    reports[0].unlink()
    reports[1].write_text(f" INDICATION: {SECRET}\n")
    image = next((mimic / "files/p10/p10000001/s50000002").glob("*.jpg"))
    image.write_bytes(image.read_bytes()[:300])
    code, facts, rejected = run(mimic, tmp_path / "out")
    assert code == 1
    assert (facts["read"], facts["used"]) == (10, 7)
    reasons = {"report-missing": 1, "no-findings-or-impression": 1, "image-unreadable": 1}
    assert facts["rejected"] == reasons
    assert {record["reason"] for record in rejected} == set(reasons)
    assert all(record.keys() == {"file", "line", "id", "reason", "detail"} for record in rejected)
    printed = capsys.readouterr()
    assert "3 of 10" in printed.err and "rejected_records.jsonl" in printed.err
    assert "s50000002" in printed.out
    assert SECRET not in printed.out + printed.err + str(rejected)
    assert run(mimic, tmp_path / "out", "--max_bad_fraction", "0.3")[0] == 0
    assert run(mimic, tmp_path / "out", "--max_bad_fraction", "0.29")[0] == 1
    assert run(mimic, tmp_path / "out", "--images", "none")[1]["used"] == 8


def test_only_decoding_finds_a_truncated_image(mimic: Path, tmp_path: Path) -> None:
    image = next(mimic.rglob("s50000000/*.jpg"))
    buffer = io.BytesIO()
    Image.frombytes("L", (64, 64), bytes(i * i % 251 for i in range(64 * 64))).save(buffer, "JPEG")
    image.write_bytes(buffer.getvalue()[:-200])
    assert run(mimic, tmp_path / "out")[1]["rejected"] == {"image-unreadable": 1}
    assert run(mimic, tmp_path / "out", "--images", "header")[1]["rejected"] == {}
    image.write_bytes(b"")
    assert run(mimic, tmp_path / "out", "--images", "header")[1]["rejected"] == {"image-empty": 1}


def test_data_set_without_usable_records_fails(mimic: Path, tmp_path: Path) -> None:
    for report in mimic.rglob("s5*.txt"):
        report.unlink()
    assert run(mimic, tmp_path / "out", "--max_bad_fraction", "1")[0] == 1


def test_unreadable_data_sets_are_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.json").write_text(f'{{"{SECRET}": 1}}')
    for dataset in ("nowhere", "empty", "x.json"):
        code, facts, _ = run(tmp_path / dataset, tmp_path / "out")
        assert (code, facts) == (2, {})
        error = capsys.readouterr().err
        assert (
            error.startswith("cpo-fast data check: error: ") and dataset in error and ";" in error
        )
        assert SECRET not in error


def test_preference_file_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = [
        {"prompt": "Q", "chosen": SECRET, "rejected": "y"},
        {"prompt": "Q", "chosen": SECRET, "rejected": "z"},
        {"prompt": "R", "chosen": SECRET, "rejected": SECRET},
        {"prompt": "S", "chosen": "x", "rejected": "y"},
        {"prompt": "T", "chosen": "x", "rejected": "y", "images": ["nowhere.png"]},
        {"prompt": "S", "chosen": "x", "rejected": "y"},
    ]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows, indent=1))
    code, facts, rejected = run(path, tmp_path / "out")
    assert code == 1
    assert (facts["kind"], facts["read"], facts["used"], facts["merged_rows"]) == ("trl", 5, 3, 1)
    assert facts["rejected"] == {"chosen-equals-rejected": 1, "image-missing": 1}
    assert facts["rejected_per_preference"] == {"1": 2, "2": 1}
    assert facts["repeated_preferences"] == 1
    assert facts["characters"]["chosen"] == {
        "min": 1,
        "p50": 1,
        "p95": len(SECRET),  # three values
        "p99": len(SECRET),
        "max": len(SECRET),
    }
    assert facts["characters"]["prompt"]["max"] == len("Q")  # the text without JSON
    assert SECRET not in str(rejected) + str(capsys.readouterr())
    assert run(path, tmp_path / "out", "--max_bad_fraction", "0.4")[0] == 0


def test_unread_fields_and_repeated_ids_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rows = [
        {"id": "a", "prompt": "Q", "chosen": "x", "rejected": "y", "notes": f"{SECRET} said"},
        {"id": "a", "prompt": "R", "chosen": "x", "rejected": "y"},
        {"id": "c", "prompt": "", "chosen": "x", "rejected": "y"},
    ]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    code, facts, _ = run(path, tmp_path / "out", "--max_bad_fraction", "0.4")
    assert (code, facts["rejected"]) == (0, {"empty-prompt": 1})
    assert (facts["repeated_ids"], facts["unread_fields"]) == (1, {"notes": 1})
    printed = capsys.readouterr().out
    assert "unread fields" in printed and "notes: 1" in printed and SECRET not in printed


def test_closed_pipe_has_the_status_of_sigpipe(tmp_path: Path) -> None:
    """`check | head`: no message, the status of SIGPIPE, results written."""
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"prompt": "Q", "chosen": "x", "rejected": "y"}]))
    command = [sys.executable, "-m", "cpo_fast.data", "check", "--dataset", str(path),
               "--output_dir", str(tmp_path / "out")]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        error = process.stderr.read().decode()
    assert process.returncode == 141
    assert "BrokenPipe" not in error and "Traceback" not in error
    assert (tmp_path / "out/summary.json").is_file()


def test_other_broken_pipes_are_errors() -> None:
    def command() -> int:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        run_command(command)
    assert run_command(lambda: 3) == 3


def test_open_i(tmp_path: Path) -> None:
    try:
        installed_file()
    except DataError as error:
        pytest.skip(str(error))
    code, facts, rejected = run("open-i", tmp_path / "out")
    assert (code, facts["read"], facts["used"]) == (0, 3955, 3927)
    assert facts["rejected"] == {"no-findings-or-impression": 28}
    assert len(rejected) == 28
    assert facts["unlabelled"] == 95


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from cpo_fast.testing.samples import images, tokenizer

    folder = tmp_path_factory.mktemp("model")
    tokenizer().save_pretrained(folder)
    images().save(folder)  # at most 112 x 112 pixels
    return folder


def test_token_lengths_equal_encode(
    mimic: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from cpo_fast.counterfactual import build_sft_preference
    from cpo_fast.packing import encode
    from cpo_fast.testing.samples import images, tokenizer

    groups = [
        encode(build_sft_preference(study), tokenizer(), images().grid, max_length=9999)
        for study in open_studies(str(mimic))
    ]
    prompts = [len(group.prompt.input_ids) for group in groups]
    whole = sorted(len(g.prompt.input_ids) + len(g.chosen) for g in groups)
    flags = ["--model_name_or_path", str(model), "--max_length", str(whole[-1] - 1)]
    code, facts, _ = run(mimic, tmp_path / "out", *flags)
    assert code == 0
    assert set(facts["tokens"]["prompt"].values()) == set(prompts)
    assert facts["tokens"]["whole"]["max"] == whole[-1]
    assert facts["tokens"]["whole"]["min"] == whole[0]
    over = sum(length == whole[-1] for length in whole)
    assert facts["over_max_length"]["records"] == over
    assert facts["over_max_length"]["share"] == over / len(whole)
    printed = capsys.readouterr().out
    assert f"longer than {whole[-1] - 1}" in printed and "tokens, chosen" in printed


def test_token_lengths_of_preferences(model: Path, tmp_path: Path) -> None:
    from cpo_fast.testing.samples import tokenizer

    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "The heart", "chosen": " is", "rejected": " was large"}))
    _, facts, _ = run(path, tmp_path / "out", "--tokenizer", str(model))
    text = "The heart was large" + tokenizer().eos_token
    assert facts["tokens"]["whole"]["max"] == len(tokenizer()(text)["input_ids"])
    assert "over_max_length" not in facts


def test_rows_that_a_model_cannot_encode(mimic: Path, model: Path, tmp_path: Path) -> None:
    """A tokenizer without a chat template, and a text-only model, set rows aside."""
    from cpo_fast.testing.samples import tokenizer

    rows = [
        {"prompt": "The heart", "chosen": " is", "rejected": " was large"},
        {"prompt": [{"role": "user", "content": "Q"}], "chosen": "x", "rejected": "y"},
        {"prompt": "The heart", "chosen": "<|im_end|>", "rejected": " was large"},
    ]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "base/chat_template.jinja").unlink()
    flags = ("--images", "none", "--tokenizer", str(tmp_path / "base"))
    _, facts, _ = run(path, tmp_path / "out", *flags)
    assert facts["rejected"] == {"no-chat-template": 1, "empty-response": 1}
    tokenizer().save_pretrained(tmp_path / "blind")
    (tmp_path / "blind/config.json").write_text('{"model_type": "qwen2"}')
    _, facts, _ = run(mimic, tmp_path / "out", "--model_name_or_path", str(tmp_path / "blind"))
    assert facts["rejected"] == {"model-cannot-see": 10}


def test_folder_without_a_tokenizer_is_named(
    mimic: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run(mimic, tmp_path / "out", "--tokenizer", str(tmp_path))[0] == 2
    assert "no tokenizer in" in capsys.readouterr().err


def test_sample_checks_some_images(mimic: Path, tmp_path: Path) -> None:
    for image in mimic.rglob("*.jpg"):
        image.write_bytes(b"")
    counts = [
        sum(run(mimic, tmp_path / "out", "--sample", share)[1]["rejected"].values())
        for share in ("0", "0.5", "0.5", "1")
    ]
    assert counts[0] == 0 and counts[3] == 10
    assert 0 < counts[1] == counts[2] < 10


def test_table_fits_eighty_columns(mimic: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, report in enumerate(sorted(mimic.rglob("s5*.txt"))):
        report.write_text("" if number % 2 else report.read_text())
    for image in mimic.rglob("p10000003/*/*.jpg"):
        image.unlink()
    monkeypatch.chdir(mimic.parent)
    mimic.rename("a-rather-long-name-of-a-folder" * 4)
    checked = check(open_studies("a-rather-long-name-of-a-folder" * 4))
    rows = table(checked).splitlines()
    assert max(map(len, rows)) <= 80
    assert any("report-empty" in row and "e.g. s5000000" in row for row in rows)


@pytest.mark.parametrize(
    "flags",
    [
        ["--max_length", "9"],
        ["--max_images", "0"],
        ["--colour"],
        ["--max_bad_fraction", "2"],
        ["--images", "all"],
    ],
)
def test_bad_flags_have_status_2(tmp_path: Path, flags: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run("open-i", tmp_path / "out", *flags)
    assert caught.value.code == 2


def test_check_imports_nothing_heavy(mimic: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from cpo_fast.data.__main__ import main;"
        f"code = main(['check', '--dataset', {str(mimic)!r}, '--output_dir', {str(tmp_path)!r}]);"
        "assert not {'torch', 'transformers'} & sys.modules.keys(); sys.exit(code)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
