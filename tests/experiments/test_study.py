"""A small study: training data of every arm; tables from synthetic results."""

from __future__ import annotations

import json

import pytest

from cpo_fast.concepts import load_graph
from cpo_fast.counterfactual import counterfactuals
from cpo_fast.data import open_studies
from cpo_fast.data.labels import DEFAULT_PROMPT, parse_answer
from cpo_fast.data.preferences import open_preferences
from cpo_fast.errors import DataError
from cpo_fast.experiments.study.__main__ import list_settings, main, parse_arguments
from cpo_fast.experiments.study.arms import (
    ANSWERS,
    ARMS,
    CPO,
    DIRECT,
    PLUS,
    RANDOM,
    SFT,
    write_arms,
    write_plus,
)
from cpo_fast.experiments.study.figures import average, build_results, format_markdown, summarise
from cpo_fast.experiments.study.measure import find_drifted_studies, measure_answers
from cpo_fast.experiments.study.page import write_study_page
from cpo_fast.phantom import write_phantom
from cpo_fast.testing.runs import read_rows


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    return write_phantom(tmp_path_factory.mktemp("study") / "data", num_studies=40, seed=3)


def test_arms_have_the_same_studies_and_numbers_of_pairs(phantom, tmp_path):
    studies = list(open_studies(str(phantom)))
    cfs = list(counterfactuals(studies, load_graph(), num_targets=2, seed=3))
    files = write_arms(tmp_path, studies, [one for one in cfs if one.passed], seed=3)
    read = {arm: list(open_preferences(str(path), image_root=str(phantom)))
            for arm, path in files.items()}  # fmt: skip
    assert set(read) == {SFT, RANDOM, ANSWERS, CPO}
    learned = [(p.id.partition("/")[0], p.chosen) for p in read.pop(SFT)]
    assert learned == [(p.id, p.chosen) for arm in (CPO, ANSWERS) for p in read[arm]]
    assert [read[arm][0].prompt[0]["content"][1]["text"] for arm in (CPO, RANDOM, ANSWERS)] == [
        DEFAULT_PROMPT, DEFAULT_PROMPT, DIRECT]  # fmt: skip
    shape = [(p.id, len(p.rejected), p.images) for p in read[CPO]]
    assert shape and all(len(p.images) == 1 for p in read[CPO])
    for arm in (RANDOM, ANSWERS):
        assert [(p.id, len(p.rejected), p.images) for p in read[arm]] == shape
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in files.values())
    for random, full, bare in zip(read[RANDOM], read[CPO], read[ANSWERS], strict=True):
        assert random.chosen == full.chosen and random.chosen not in random.rejected
        assert "<think>" not in bare.chosen and parse_answer(bare.chosen)
        assert parse_answer(bare.chosen) == parse_answer(full.chosen)
        assert list(map(parse_answer, bare.rejected)) == list(map(parse_answer, full.rejected))
    write_plus(tmp_path / "plus.jsonl", files[CPO], studies, seed=3)
    plus = list(open_preferences(str(tmp_path / "plus.jsonl"), image_root=str(phantom)))
    assert [p for p in plus if p.source == "thinking"] == read[CPO]
    seen = [p for p in plus if p.source == "perception"]
    assert [p.id for p in seen] == [p.id for p in read[CPO]]
    assert all(p.rejected == (p.chosen,) and p.rejected_images[0] != p.images for p in seen)
    reports = {f"<think> {s.report.text} </think>": s for s in studies}
    for one in read[RANDOM]:
        for text in one.rejected:
            assert text[: text.index("</think>") + 8] in reports, "not a report of the data"
    with pytest.raises(DataError, match="no training study"):
        write_arms(tmp_path, studies, [], seed=3)


def test_phantom_truth_lists_drifted_reports(phantom, tmp_path):
    drifted = find_drifted_studies(phantom)
    rows = [json.loads(line) for line in (phantom / "phantom_truth.jsonl").open()]
    assert drifted == {row["study_id"] for row in rows if row["drift"]} != set()
    with pytest.raises(DataError, match="not the truth file of a phantom"):
        find_drifted_studies(tmp_path)


def test_answer_figures_equal_hand_computation():
    truth = [("Edema",), ("Pneumonia",), ("No Finding",), ("Edema", "Pneumonia")]
    parsed = [("Edema",), ("Edema",), None, ("Edema", "Pneumonia")]
    found = measure_answers(truth, parsed, [1, 3])
    assert found["accuracy/Edema"] == 0.5, "an unparsed answer counts as wrong"
    assert found["f1/Edema"] == pytest.approx(2 * 2 / (2 * 2 + 1))
    assert found["unparsable"] == 0.25 and found["exact"] == 0.5
    assert found["drifted/studies"] == 2
    assert found["drifted/pairs"] == pytest.approx((1 + 0.5 + 0.5) / 3), "Edema, Pneumonia: 1 of 2"
    assert measure_answers(truth, parsed, [])["drifted/accuracy"] is None


def test_intervals_are_student_t_over_seeds():
    assert average([0.5])["interval"] is None
    found = average([0.4, 0.5, 0.6, None])
    assert found["value"] == pytest.approx(0.5) and found["seeds"] == 3
    half = 4.302653 * 0.1 / 3**0.5  # the 97.5 % quantile at 2 degrees of freedom
    assert found["interval"] == pytest.approx([0.5 - half, 0.5 + half], abs=1e-6)
    assert average([0.9, 1.0], shares=True)["interval"][1] == 1.0
    assert average([None])["value"] is None


def build_sample_results(gain: float) -> dict:
    truth = [("Edema",), ("Pneumonia",)] * 5
    plain = measure_answers(truth, [("Edema",)] * 10, [0, 1])
    swaps = {f"{w}/{k}": 0.1 for w in ("swap", "flip")
             for k in ("synonym", "drifting", "side", "negation", "hallmark")}  # fmt: skip
    seeds = {}
    for seed in (1, 2, 3):
        seeds[seed] = dict.fromkeys(("majority", *ARMS), plain | swaps)
        better = {"accuracy/mean5": plain["accuracy/mean5"] + gain + seed / 1000}
        seeds[seed][CPO] = seeds[seed][CPO] | better
    return build_results(seeds, {"steps": 2})


def test_tables_name_the_paper_and_the_result(tmp_path):
    found = build_sample_results(0.1)
    text = format_markdown(found)
    assert "| CPO (the paper, other data and scale) | 77.7" in text and "81.8" in text
    assert "+10.2 against SFT (+10.0 to +10.4: a difference)" in text.replace("\u00a0", " ")
    assert "no difference shown" in summarise(build_sample_results(-0.002))
    json.dumps(found, allow_nan=False)
    page = write_study_page(tmp_path / "study.html", found)
    assert "other data" in page.read_text() and page.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "figures" / "study_accuracy.png").is_file()
    assert set(found["differences"]) >= {f"{CPO} - {SFT}", f"{CPO} - {RANDOM}"}


def test_quick_is_smaller_and_flags_override_it():
    full, quick = parse_arguments([]), parse_arguments(["--quick", "--seeds", "1"])
    assert full.seeds >= 5 and quick.seeds == 1
    assert list_settings(quick)["num_studies"] < list_settings(full)["num_studies"]


def test_wrong_usage_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--output_dir", str(tmp_path / "new"), "--beta", "0"])
    assert "--beta 0: must be a finite number above 0" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    (tmp_path / "settings.json").write_text(json.dumps({"steps": 1}))
    assert main(["--output_dir", str(tmp_path)]) == 2
    assert "written with other values of" in capsys.readouterr().err
    again = ["--output_dir", str(tmp_path / "b"), "--sft_from"]
    assert main([*again, str(tmp_path / "gone")]) == 2
    assert "holds no study" in capsys.readouterr().err
    assert main([*again, str(tmp_path)]) == 2
    assert "other values of num_studies" in capsys.readouterr().err


@pytest.mark.complete
@pytest.mark.slow
def test_small_study_runs_end_to_end_and_continues(tmp_path):
    flags = ["--output_dir", str(tmp_path), "--seeds", "1", "--num_studies", "60", "--steps", "1",
             "--sft_epochs", "0.2", "--test_samples", "3", "--reports", "1"]  # fmt: skip
    assert main(flags) == 0
    found = json.loads((tmp_path / "study.json").read_text())
    assert list(found["arms"]) == ["majority", *ARMS]
    summaries = [json.loads((tmp_path / "seed-42" / arm / "summary.json").read_text())
                 for arm in (RANDOM, ANSWERS, CPO)]  # fmt: skip
    assert {one["stages"]["cpo"]["steps"] for one in summaries} == {1}
    before = (tmp_path / "seed-42" / CPO / "summary.json").stat().st_mtime_ns
    assert main([*flags, "--cpo_plus"]) == 0  # the arm is added to the study
    assert (tmp_path / "seed-42" / CPO / "summary.json").stat().st_mtime_ns == before
    more = json.loads((tmp_path / "study.json").read_text())
    assert list(more["arms"]) == ["majority", *ARMS, PLUS]
    assert f"{PLUS} - {CPO}" in more["differences"]
    assert read_rows(tmp_path / "seed-42" / PLUS)[0].keys() >= {
        "pairs/perception",
        "pairs/thinking",
    }
    flags[1] = str(tmp_path / "faster")
    assert main([*flags, "--learning_rate", "1e-3", "--sft_from", str(tmp_path)]) == 0
    second = json.loads((tmp_path / "faster" / "study.json").read_text())
    assert second["by_seed"][SFT] == found["by_seed"][SFT]
    assert not (tmp_path / "faster" / "seed-42" / SFT).exists()
