"""Counterfactual reports for each target, their checks, targets and preferences."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest

from cpo_fast.concepts import label_report
from cpo_fast.concepts.graph import graph_from_json, read_graph_json
from cpo_fast.counterfactual import (
    DEFAULT_PROMPT,
    build_sft_preference,
    checks,
    counterfactuals,
    pair_with_counterfactuals,
    study_labels,
)
from cpo_fast.counterfactual.checks import check
from cpo_fast.counterfactual.generate import read_study
from cpo_fast.counterfactual.graph.rewrite import rewrite
from cpo_fast.counterfactual.graph.text import split_units
from cpo_fast.counterfactual.graph.wording import TARGET_WORDINGS, fill_template
from cpo_fast.counterfactual.targets import (
    drift_proneness,
    list_candidates,
    pick_targets,
    score_targets,
)
from cpo_fast.errors import UsageError
from cpo_fast.types import Counterfactual, Report
from tests.counterfactual.samples import (
    CAPITALS,
    FINDINGS_ONLY,
    GRAPH,
    IMPRESSION_ONLY,
    INFLATED,
    LOW_VOLUMES,
    NORMAL,
    OPACITY,
    REPORTS,
    study,
)

DATA = Path(__file__).parent


def generate(report: Report, target: str, **fields: object) -> Counterfactual:
    return next(counterfactuals([study(report)], GRAPH, targets=[target], **fields))  # type: ignore[arg-type]


def test_every_disease_of_the_graph_has_wordings() -> None:
    assert set(TARGET_WORDINGS) == set(GRAPH.diseases)


@pytest.mark.parametrize("target", TARGET_WORDINGS)
def test_wordings_assert_their_target_without_contradiction(target: str) -> None:
    wording = TARGET_WORDINGS[target]
    for place in wording.places:
        both = len(place.sides) == 2
        findings = wording.both if both else wording.one
        phrases = wording.impression_both if both else wording.impression_one
        assert len(findings) >= 4 and len(phrases) >= 2
        for size in wording.sizes:
            for template in (*findings, *phrases):
                text = fill_template(template, place, size)
                labels = {n for n, v in label_report(text).items() if v == 1}
                assert target in labels, text
                assert not GRAPH.excluded[target] & labels
                assert "{" not in text and "  " not in text and text.endswith(".")
                assert text[0].isupper() or text[0].isdigit()


@pytest.mark.parametrize("target", TARGET_WORDINGS)
def test_normal_report_is_rewritten_for_each_target(target: str) -> None:
    made = generate(NORMAL, target)
    assert made.passed, [name for name, ok in made.checks.items() if not ok]
    assert "old healed fracture of the left clavicle" in made.counterfactual
    assert made.counterfactual_labels == ("Fracture", target)
    assert made.labels == ("Fracture",)
    assert made.report == NORMAL.text
    findings, impression = made.counterfactual.split("\n\nIMPRESSION: ")
    assert findings.startswith("FINDINGS: ")
    assert label_report(findings)[target] == label_report(impression)[target] == 1
    assert impression.startswith("1. ") and "2. " in impression


@pytest.mark.parametrize("report", REPORTS)
def test_all_targets_of_all_styles_pass(report: Report) -> None:
    for made in counterfactuals([study(report)], GRAPH, num_targets=5):
        assert made.passed, (made.target, made.checks)


def test_unrelated_sentences_stay_unchanged() -> None:
    made = generate(NORMAL, "Pleural Effusion")
    kept = {u.plain for u in split_units(NORMAL.findings)} & {
        u.plain for u in split_units(made.counterfactual)
    }
    assert "The lungs are clear." in kept
    assert "Heart size and pulmonary vascularity are within normal limits." in made.counterfactual
    assert "The pleural spaces are clear." not in made.counterfactual
    assert "No focal consolidation or pneumothorax is seen." in made.counterfactual


def test_capitals_and_sections_are_preserved() -> None:
    made = generate(CAPITALS, "Pneumonia")
    assert made.counterfactual.isupper()
    assert generate(IMPRESSION_ONLY, "Pneumonia").counterfactual.startswith("IMPRESSION: ")
    assert "IMPRESSION" not in generate(FINDINGS_ONLY, "Pneumonia").counterfactual


@pytest.mark.parametrize("seed", range(8))
def test_side_and_lobe_agree_with_the_report_and_between_sections(seed: int) -> None:
    made = generate(OPACITY, "Pneumonia", seed=seed)
    findings, impression = made.counterfactual.split("\n\nIMPRESSION: ")
    named = [s for s in findings.split(". ") if "pneumonia" in s.lower()]
    assert named and all("left lower lobe" in s.lower() for s in named)
    assert "left lower lobe" in impression.split(".")[0].lower()
    assert "The right lung is clear." in made.counterfactual


def test_excluded_findings_are_removed() -> None:
    made = generate(LOW_VOLUMES, "Emphysema")
    assert made.passed
    assert "atelectasis" not in made.counterfactual.lower()
    assert "low lung volumes" not in made.counterfactual.lower()
    assert made.labels == ("Atelectasis", "Support Devices")
    assert made.counterfactual_labels == ("Support Devices", "Emphysema")
    made = generate(INFLATED, "Atelectasis")
    assert made.passed
    assert "emphysema" not in made.counterfactual.lower()
    assert "hyperinflated" not in made.counterfactual


def test_finding_in_a_sentence_with_an_excluded_one_is_removed() -> None:
    report = Report("Left basal opacity reflects atelectasis. A chest port is in place.", "")
    made = generate(report, "Emphysema")
    assert made.passed
    assert made.labels == ("Atelectasis", "Lung Opacity", "Support Devices")
    assert made.counterfactual_labels == ("Support Devices", "Emphysema")


def test_present_disease_is_not_a_target() -> None:
    made = generate(LOW_VOLUMES, "Atelectasis")
    assert not made.passed
    assert made.checks == {"report": True, "target_absent": False}
    assert made.counterfactual == ""


def test_report_without_text_is_set_aside() -> None:
    made = generate(Report(" ", ""), "Edema")
    assert made.checks == {"report": False, "target_absent": True}
    assert made.counterfactual == ""


def test_disease_without_wordings_is_not_a_target() -> None:
    data = read_graph_json()
    data["diseases"]["Fracture"] = {
        "hallmarks": ["D10"],
        "associations": ["D10"],
        "exclusions": [],
    }
    graph = graph_from_json(data)
    assert "Fracture" in graph.diseases and "Fracture" not in list_candidates(graph, {})
    with pytest.raises(UsageError, match="target Fracture is unknown"):
        next(counterfactuals([study(NORMAL)], graph, targets=["Fracture"]))


def test_targets_are_neither_present_nor_uncertain_nor_implied() -> None:
    labels = {"Pneumonia": 1, "Edema": -1, "Pneumothorax": 0}
    free = list_candidates(GRAPH, labels)
    assert not {"Pneumonia", "Edema", "Consolidation", "Lung Opacity"} & set(free)
    assert "Pneumothorax" in free


def test_near_diseases_come_first_and_excluded_ones_last() -> None:
    ranks = {"Edema": 0, "Emphysema": 0}
    for number in range(200):
        scores = score_targets(GRAPH, str(number), {"Atelectasis": 1}, {}, (), frozenset(), 42)
        order = pick_targets(scores, {}, 11)
        for name in ranks:
            ranks[name] += order.index(name)
        assert len(set(order)) == len(order)
    assert ranks["Emphysema"] > ranks["Edema"]


def test_targets_that_share_the_report_wording_are_preferred() -> None:
    shared = drift_proneness(GRAPH, ["D6"])  # reticular interstitial opacities
    assert shared["Pneumonia"] == shared["Edema"] == 1 / 3
    assert shared["Pneumothorax"] == 0
    assert not any(drift_proneness(GRAPH, []).values())
    both = drift_proneness(GRAPH, ["D6", "A5"])
    assert sum(both.values()) == pytest.approx(1) and both["Pneumonia"] < shared["Pneumonia"]
    plain = Report("Reticular markings are seen. Heart size is normal.", "")
    named = Counter[str]()
    for number in range(60):
        _, _, scores = read_study(study(plain, number), GRAPH, 42)
        named.update(pick_targets(scores, {}, 2))
    assert {name for name, _ in named.most_common(2)} <= {n for n, v in shared.items() if v}


def test_choice_depends_only_on_seed_and_study() -> None:
    first = list(counterfactuals([study(NORMAL, n) for n in range(40)], GRAPH))
    again = list(counterfactuals([study(NORMAL, n) for n in range(40)], GRAPH))
    shard = list(counterfactuals([study(NORMAL, n) for n in range(1, 40, 3)], GRAPH))
    other = list(counterfactuals([study(NORMAL, n) for n in range(40)], GRAPH, seed=7))
    assert first == again
    assert shard == [cf for cf in first if int(cf.study_id[1:]) % 3 == 1]
    assert [cf.target for cf in first] != [cf.target for cf in other]
    assert len({cf.target for cf in first}) > 6
    assert len({cf.counterfactual for cf in first}) > 60


def test_retries_use_other_wordings() -> None:
    texts = {rewrite(GRAPH, NORMAL, "Pneumonia", "s", 42, n).text for n in range(6)}
    assert len(texts) > 3


def test_checks_find_each_kind_of_fault() -> None:
    good = rewrite(GRAPH, NORMAL, "Pneumonia", "s", 42, 0)
    assert all(check(GRAPH, NORMAL, good, "Pneumonia").values())

    def failed(changed: Report, target: str = "Pneumonia", original: Report = NORMAL) -> set[str]:
        return {name for name, ok in check(GRAPH, original, changed, target).items() if not ok}

    assert "differs" in failed(NORMAL)
    assert "target" in failed(NORMAL)
    assert failed(replace(good, impression="")) >= {"format"}
    assert failed(replace(good, findings=good.findings + " The lungs are clear.")) == {"no_denial"}
    assert failed(replace(good, findings=good.findings + " No pneumonia.")) == {"no_denial"}
    assert failed(replace(good, findings=good.findings + " Left apical pneumothorax.")) == {
        "nothing_else"
    }
    assert failed(replace(good, findings=good.findings.replace("fracture", "thing"))) == set()
    both = Report(good.findings.replace("fracture", "thing"), good.impression.split(" 2.")[0])
    assert failed(both) == {"survivors", "assertions"}
    assert "length" in failed(replace(good, findings=good.findings + " word" * 400))
    assert "edits" in failed(Report("Right lower lobe pneumonia.", "Right lower lobe pneumonia."))
    excluded = generate(INFLATED, "Atelectasis").counterfactual + " Emphysema."
    findings, impression = excluded.removeprefix("FINDINGS: ").split("\n\nIMPRESSION: ")
    assert "no_exclusion" in failed(Report(findings, impression), "Atelectasis", INFLATED)
    sided = "Pneumonia in the left lower lobe. The left lung is clear."
    assert "sides" in failed(Report(sided, ""), "Pneumonia", Report("The left lung is clear.", ""))


CASES = [json.loads(line) for line in (DATA / "rewriting.jsonl").open()]


@pytest.mark.parametrize("case", [c for c in CASES if "rest" in c], ids=itemgetter("text"))
def test_assertions_of_a_report_are_preserved(case: dict[str, Any]) -> None:
    made = generate(Report(case["text"], ""), case["target"])
    assert made.passed, [name for name, ok in made.checks.items() if not ok]
    sentences = [unit.plain for unit in split_units(made.counterfactual.removeprefix("FINDINGS: "))]
    assert [s for s in sentences if s in case["rest"]] == case["rest"]
    assert len(sentences) == len(case["rest"]) + 1  # the target's sentence
    labels = label_report(made.counterfactual)
    assert {n: int(labels[n] == 1) for n in case["labels"]} == case["labels"]
    assert {n for n, v in case["labels"].items() if v} <= set(made.counterfactual_labels)


@pytest.mark.parametrize("case", [c for c in CASES if "set_aside" in c], ids=itemgetter("text"))
def test_ambiguous_reports_are_set_aside(case: dict[str, Any]) -> None:
    made = generate(Report(case["text"], ""), case["target"])
    assert made.checks == {case["set_aside"]: False}
    assert made.counterfactual == ""


BAD = [  # (original, target, faulty counterfactual, failed checks)
    (
        "No pneumothorax, small left pleural effusion.",
        "Pneumothorax",
        "Small right pneumothorax. No small left pleural effusion.",
        {"assertions", "no_new_denial"},
    ),
    (
        "No pneumothorax and the left effusion is unchanged.",
        "Pneumothorax",
        "Small right pneumothorax. No the left effusion is unchanged.",
        {"assertions", "no_new_denial"},
    ),
    (
        "No consolidation, bibasilar atelectasis.",
        "Consolidation",
        "Right lower lobe consolidation. No bibasilar atelectasis.",
        {"assertions", "no_new_denial"},
    ),
    (
        "Interval resolution of the pneumothorax, persistent left effusion.",
        "Pneumothorax",
        "Small right pneumothorax.",
        {"assertions"},
    ),
    (
        "No change calcified left hilar node and left small granuloma.",
        "Lung Lesion",
        "A 14 mm nodule is seen in the left lower lobe. No change calcified left hilar node.",
        {"assertions"},
    ),
    (
        "No change in the opacities in the lower lobes.",
        "Consolidation",
        "Right middle lobe consolidation.",
        {"assertions"},
    ),
    (
        "Left effusion. No pneumothorax, small right effusion.",
        "Pneumothorax",
        "Left effusion. Small right pneumothorax.",
        {"assertions"},
    ),
    (
        "Left effusion. No pneumothorax or consolidation.",
        "Pneumothorax",
        "Left effusion. Small right pneumothorax. No effusion or consolidation.",
        {"no_new_denial"},
    ),
    (
        "The lungs are clear except for a calcified granuloma.",
        "Pneumonia",
        "Right lower lobe pneumonia. The lungs are clear except for a calcified granuloma.",
        {"exemptions"},
    ),
    (
        "Left basilar atelectasis, otherwise clear lungs.",
        "Pneumonia",
        "Right upper lobe pneumonia. Left basilar atelectasis, otherwise clear lungs.",
        {"exemptions"},
    ),
]
ASSERTION_CHECKS = ("assertions", "no_new_denial", "exemptions")


@pytest.mark.parametrize(("before", "target", "after", "failed"), BAD)
def test_lost_and_denied_findings_are_found_without_the_labeller(
    before: str, target: str, after: str, failed: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "find_mentions", lambda line: ())
    made = check(GRAPH, Report(before, ""), Report(after, ""), target)
    assert {name for name in ASSERTION_CHECKS if not made[name]} == failed


@pytest.mark.parametrize(
    ("before", "target", "after"),
    [
        (
            "No consolidation, pneumothorax, or large pleural effusion.",
            "Consolidation",
            "Left lower lobe consolidation. No pneumothorax or large pleural effusion.",
        ),
        (
            "No focal consolidation, pleural effusion, pneumothorax.",
            "Consolidation",
            "Left lower lobe consolidation. No pleural effusion, pneumothorax.",
        ),
        (
            "Left basal opacity reflects atelectasis.",
            "Emphysema",
            "The lungs are hyperexpanded, consistent with emphysema.",
        ),
        (
            "There is no pneumothorax or change in the left effusion.",
            "Pneumothorax",
            "Small right pneumothorax. There is no change in the left effusion.",
        ),
        (
            "The pneumothorax has resolved.",
            "Pneumonia",
            "The pneumothorax has resolved. Right upper lobe pneumonia.",
        ),
    ],
)
def test_correct_edits_pass_the_assertion_checks(before: str, target: str, after: str) -> None:
    made = check(GRAPH, Report(before, ""), Report(after, ""), target)
    assert all(made[name] for name in ASSERTION_CHECKS)


def test_inserted_sentence_is_separated() -> None:
    made = generate(Report("Mild cardiomegaly. Small left effusion", ""), "Pneumonia", seed=3)
    assert "Small left effusion" in made.counterfactual
    assert not re.search(r"effusion [A-Z]", made.counterfactual)
    otherwise = generate(Report("Left granuloma. The lungs are otherwise clear.", ""), "Pneumonia")
    assert otherwise.counterfactual.endswith("The lungs are otherwise clear.")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"generator": "oracle"}, "generator oracle is unknown"),
        ({"targets": ["Gout"]}, "target Gout is unknown"),
        ({"num_targets": 0}, "at least 1"),
    ],
)
def test_bad_arguments_are_named(fields: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        list(counterfactuals([study(NORMAL)], GRAPH, **fields))  # type: ignore[arg-type]


def test_labels_come_from_the_study_or_the_labeller() -> None:
    assert study_labels(study(NORMAL))["Fracture"] == 1
    assert study_labels(study(NORMAL, labels={"Edema": 1})) == {"Edema": 1}
    indexed = study_labels(study(NORMAL, labels={"Emphysema": 0, "Edema": 1, "No Finding": 0}))
    assert (indexed["Edema"], indexed["Fracture"], indexed["No Finding"]) == (1, 1, None)


def test_preferences_have_prompt_answers_and_images() -> None:
    made = study(LOW_VOLUMES, labels={"Atelectasis": 1, "Support Devices": 1})
    sft = build_sft_preference(made)
    assert sft.rejected == ()
    assert sft.prompt[0]["role"] == "user"
    assert sft.prompt[0]["content"] == [{"type": "image"}, {"type": "text", "text": DEFAULT_PROMPT}]
    assert sft.chosen == (
        f"<think> {LOW_VOLUMES.text} </think> "
        "The disease of this patient is Atelectasis, Support Devices."
    )
    cfs = list(counterfactuals([made], GRAPH, targets=["Edema", "Emphysema"]))
    alone = pair_with_counterfactuals(made, cfs)
    everything = pair_with_counterfactuals(made, cfs, rejected_answer="all", prompt="Read it.")
    assert alone.chosen == sft.chosen and alone.images == made.images and alone.id == "s0"
    assert [text.rsplit("</think> ")[1] for text in alone.rejected] == [
        "The disease of this patient is Edema.",
        "The disease of this patient is Emphysema.",
    ]
    assert [text.rsplit("</think> ")[1] for text in everything.rejected] == [
        "The disease of this patient is Atelectasis, Support Devices, Edema.",
        "The disease of this patient is Support Devices, Emphysema.",
    ]
    assert everything.prompt[0]["content"][-1]["text"] == "Read it."


def test_preferences_refuse_bad_counterfactuals() -> None:
    cfs = list(counterfactuals([study(NORMAL)], GRAPH))
    with pytest.raises(ValueError, match="at least one"):
        pair_with_counterfactuals(study(NORMAL), [])
    with pytest.raises(ValueError, match="rejected_answer"):
        pair_with_counterfactuals(study(NORMAL), cfs, rejected_answer="none")
    with pytest.raises(ValueError, match="s0/"):
        pair_with_counterfactuals(study(NORMAL, 1), cfs)
