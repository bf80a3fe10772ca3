"""Balanced targets, image paths of records, incompatible flags."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from cpo_fast.counterfactual import counterfactuals
from cpo_fast.counterfactual.__main__ import main
from cpo_fast.counterfactual.formats import FORMATS
from cpo_fast.counterfactual.generate import balance, read_study
from cpo_fast.counterfactual.targets import CONFLICT, balance_prices, pick_targets
from cpo_fast.data import open_preferences
from cpo_fast.data.images import load_image
from tests.counterfactual.samples import (
    GRAPH,
    LOW_VOLUMES,
    NORMAL,
    OPACITY,
    REPORTS,
    read_jsonl,
    study,
    write_open_i,
)
from tests.data.samples import write_mimic

STUDIES = [study((NORMAL, OPACITY, LOW_VOLUMES, NORMAL)[n % 4], n) for n in range(480)]


def count_targets(prices: dict[str, float]) -> Counter[str]:
    rows = (read_study(one, GRAPH, 42)[2] for one in STUDIES)
    return Counter(name for row in rows for name in pick_targets(row, prices, 2))


def test_prices_balance_the_targets() -> None:
    plain, even = count_targets({}), count_targets(balance(STUDIES, GRAPH))
    assert max(plain.values()) > 1.5 * min(plain.values())
    assert sum(even.values()) == sum(plain.values())
    assert len(even) == 12
    assert max(even.values()) < 1.15 * min(even.values())


def test_prices_do_not_force_contradicted_targets() -> None:
    rows = [{"a": 0.1 * (n % 5), "b": 0.2, "c": -CONFLICT - 0.6} for n in range(100)]
    prices = balance_prices(rows, 2)
    assert all(abs(price) <= CONFLICT / 2 for price in prices.values())
    assert all("c" not in pick_targets(row, prices, 2) for row in rows)


def test_prices_without_studies_or_with_few_candidates() -> None:
    assert balance_prices([], 2) == {}
    assert balance_prices([{}], 2) == {}
    prices = balance_prices([{"a": 0.5}, {"a": 0.1, "b": 0.4}], 3)
    assert set(prices) == {"a", "b"} and np.isfinite(list(prices.values())).all()
    assert pick_targets({"a": 0.5}, prices, 3) == ["a"]


def test_balanced_shards_equal_the_whole_run(tmp_path: Path) -> None:
    dataset = write_open_i(tmp_path / "reports", REPORTS * 4)
    flags = ["--dataset", str(dataset), "--balance_targets", "--output"]
    assert main([*flags, str(tmp_path / "whole.jsonl")]) == 0
    assert main(["--dataset", str(dataset), "--output", str(tmp_path / "plain.jsonl")]) == 0
    parts: list[str] = []
    for index in range(3):
        main([*flags, str(tmp_path / f"{index}.jsonl"), "--shard", f"{index}/3"])
        parts += (tmp_path / f"{index}.jsonl").read_text().splitlines()
    whole = (tmp_path / "whole.jsonl").read_text().splitlines()
    assert sorted(parts) == sorted(whole)
    targets = [
        Counter(row["target"] for row in read_jsonl(tmp_path / name))
        for name in ("whole.jsonl", "plain.jsonl")
    ]
    assert max(targets[0].values()) < max(targets[1].values())


def test_finished_records_are_skipped() -> None:
    everything = list(counterfactuals(STUDIES[:4], GRAPH))
    skip = {everything[1].id, everything[4].id}
    rest = list(counterfactuals(STUDIES[:4], GRAPH, skip=skip))
    assert rest == [cf for cf in everything if cf.id not in skip]


@pytest.mark.parametrize("where", ["above", "beside", "inside"])
@pytest.mark.parametrize("form", FORMATS)
def test_image_paths_resolve_from_any_folder(
    form: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    studies = [{"study": "50414267"}, {"study": "50414268", "patient": "10000033"}]
    write_mimic(tmp_path / "top" / "data", studies)
    monkeypatch.chdir(tmp_path)
    output = {
        "above": Path("top", "cf.out"),
        "beside": Path("top", "other", "cf.out"),
        "inside": Path("top", "data", "cf.out"),
    }[where]
    assert main(["--dataset", "top/data", "--output", str(output), "--format", form]) == 0
    away = tmp_path / "away"
    away.mkdir()
    monkeypatch.chdir(away)
    # Files above or inside the image folder need no root, except ccf files, which have no paths.
    rootless = where == "inside" or (where == "above" and form != "ccf")
    root = None if rootless else str(tmp_path / "top" / "data")
    found = list(open_preferences(str(tmp_path / output), image_root=root))
    assert found
    for one in found:
        assert len(one.images) == 1
        assert load_image(one.images[0]).size == (8, 6)
    if where == "above" and rootless:  # data and records can move together
        (tmp_path / "top").rename(tmp_path / "moved")
        (one, *_) = open_preferences(str(tmp_path / "moved" / "cf.out"))
        assert load_image(one.images[0]).size == (8, 6)


def test_perception_records_resolve_both_images(tmp_path: Path) -> None:
    report = "\n FINDINGS:\n\n There is a right pleural effusion.\n\n IMPRESSION:\n\n Effusion.\n"
    ill = {"Pleural Effusion": "1.0"}
    studies = [
        {"study": "50414267"},
        {"study": "50414268", "patient": "10000033", "report": report, "labels": ill},
    ]
    data = write_mimic(tmp_path / "data", studies)
    output = tmp_path / "other" / "cf.jsonl"
    assert main(["--dataset", str(data), "--output", str(output), "--kind", "perception"]) == 0
    (first, second) = open_preferences(str(output), image_root=str(data))
    assert first.rejected_images[0] is not None and second.rejected_images[0] is not None
    for ref in (*first.images, *first.rejected_images[0]):
        assert load_image(ref).size == (8, 6)
    assert first.images == second.rejected_images[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--targets", "Edema", "--balance_targets"], "exclude each other"),
        (["--kind", "perception", "--balance_targets"], "--balance_targets"),
        (["--kind", "perception", "--generator", "local"], "--generator"),
        (["--generator", "local"], "needs --model"),
    ],
)
def test_incompatible_flags_are_refused(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = write_open_i(tmp_path / "reports", REPORTS)
    assert main(["--dataset", str(dataset), "--output", str(tmp_path / "o"), *flags]) == 2
    assert message in capsys.readouterr().err
