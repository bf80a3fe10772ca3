"""Perception counterfactuals: another patient's image for which the answer is wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cpo_fast.counterfactual.__main__ import main
from cpo_fast.counterfactual.perception import (
    build_pool,
    perception_counterfactuals,
    with_perception,
)
from cpo_fast.counterfactual.preferences import build_sft_preference
from cpo_fast.data.preference_rows import parse_counterfactual
from cpo_fast.types import Counterfactual, ImageRef, Report
from tests.counterfactual.samples import (
    GRAPH,
    INFLATED,
    LOW_VOLUMES,
    NORMAL,
    OPACITY,
    read_jsonl,
    study,
    write_open_i,
)

PLAIN = Report("The heart is normal. The lungs are clear.", "No acute disease.")
STUDIES = [
    study(report, number)
    for number, report in enumerate([NORMAL, OPACITY, INFLATED, LOW_VOLUMES, PLAIN] * 4)
]


def test_other_image_contradicts_the_answer() -> None:
    pool = build_pool(STUDIES, GRAPH)
    found = list(perception_counterfactuals(STUDIES, pool, GRAPH))
    assert [cf.study_id for cf in found] == [s.study_id for s in STUDIES]
    for cf in found:
        assert cf.passed and cf.kind == "perception"
        assert cf.rejected_images and cf.rejected_images[0] not in cf.images
        shown = set(cf.counterfactual_labels)
        assert not set(cf.labels) <= shown
        assert cf.counterfactual == cf.report
        assert cf.target in shown


def test_study_with_the_nearest_attributes_is_chosen() -> None:
    near = Report("Lungs are hyperinflated with flattened diaphragms. Left pleural effusion.", "")
    pool = build_pool([*STUDIES, study(near, 99)], GRAPH)
    (cf,) = perception_counterfactuals([study(INFLATED, 100)], pool, GRAPH)
    assert cf.rejected_images == ("p/99.jpg",)


def test_choice_does_not_depend_on_the_shard() -> None:
    pool = build_pool(STUDIES, GRAPH)
    whole = list(perception_counterfactuals(STUDIES, pool, GRAPH))
    part = list(perception_counterfactuals(STUDIES[1::3], pool, GRAPH))
    assert part == whole[1::3]


def test_study_without_image_or_neighbour_is_set_aside() -> None:
    pool = build_pool(STUDIES[:1], GRAPH)
    alone = next(perception_counterfactuals(STUDIES[:1], pool, GRAPH))
    assert alone.checks == {"image": True, "neighbour": False}
    bare = study(NORMAL, 7)
    bare = type(bare)(bare.study_id, bare.patient_id, bare.report)
    without = next(perception_counterfactuals([bare], pool, GRAPH))
    assert without.checks["image"] is False and without.rejected_images == ()


def test_preference_changes_only_the_image() -> None:
    other = (ImageRef("p/9.jpg"),)
    own = build_sft_preference(STUDIES[0])
    made = with_perception(own, other)
    assert made.rejected == (made.chosen,)
    assert made.rejected_images == (other,) and made.images == STUDIES[0].images
    assert made.source == "perception" and made.sources == ("perception",)
    both = with_perception(replace(own, rejected=("a", "b")), other)
    assert both.rejected == ("a", "b", own.chosen)
    assert both.sources == ("thinking", "thinking", "perception")
    with pytest.raises(ValueError, match="two images"):
        with_perception(own, ())


def test_rows_are_read_back_by_the_preference_reader() -> None:
    pool = build_pool(STUDIES, GRAPH)
    cf = next(perception_counterfactuals(STUDIES, pool, GRAPH))
    row = json.loads(json.dumps(cf.to_json()))
    assert Counterfactual.from_json(row) == cf
    made = parse_counterfactual(row, "", "x")
    assert made.source == "perception"
    assert made.rejected == (made.chosen,)
    assert made.rejected_images[0] == tuple(map(ImageRef, cf.rejected_images))


def test_command_needs_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_open_i(tmp_path / "reports", (NORMAL, INFLATED))
    command = ["--dataset", str(data), "--output", str(tmp_path / "p"), "--kind", "perception"]
    assert main(command) == 1  # no image folder: nothing can be paired
    rows = read_jsonl(tmp_path / "p.rejected.jsonl")
    assert {row["reason"] for row in rows} == {"image,neighbour"}
    assert main([*command, "--targets", "Edema"]) == 2
    assert "--targets" in capsys.readouterr().err
