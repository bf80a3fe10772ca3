"""What a GPU machine is given and what one plan leaves for the next: the kit and the verdict, where
they are there, absent, of something else, or damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import gpu_kit
from bench.gpu import build, environment, report, units, verdict
from tests.bench.stand_in import MACHINE, SMOKE, StandIn, statuses, step

pytestmark = pytest.mark.complete


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return StandIn(tmp_path, monkeypatch)


def test_an_absent_kit_is_said_and_changes_nothing(tmp_path: Path) -> None:
    kit = units.Setting("cpu", True, "", kit=str(tmp_path / "none"), scratch=str(tmp_path / "s"))
    unpack, native = build.kit_units(kit)
    figures = unpack.run()
    assert figures["environment"] == {} and figures["cuda"] is False
    assert "no GPU kit" in figures["notes"][0]
    with pytest.raises(units.NotHere):
        native.run()
    record = {"phase": "build", "key": "kit", "status": "ok", "unit_seconds": 0.1, **figures}
    data = {"started": "now", "records": [record], "not_run": []}
    assert "Kit: no GPU kit" in report.short(data) and "Kit: no GPU kit" in report.render(data)


def test_without_a_kit_the_cuda_kernels_are_built_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Builder:
        def __init__(self, target: gpu_kit.Target, cache: Path) -> None:
            assert (Path(target.include) / "Python.h").exists() and tmp_path in cache.parents
            self.suffix = target.suffix

        def build(self, flags: tuple[str, ...], place: Path) -> None:
            assert flags == () and place.name.endswith(f"{self.suffix}.new")
            place.write_text("binary")

    def without_nvcc(*_: Any) -> None:
        raise gpu_kit.Missing("nvcc is not on the PATH")

    (tmp_path / "cpo_fast").mkdir()
    setting = units.Setting("cuda", False, "")
    monkeypatch.setattr(gpu_kit, "Builder", Builder)
    assert build.build_cuda(tmp_path) == {"built": ["_cuda"]}
    (made,) = (tmp_path / "cpo_fast").iterdir()
    assert made.name.startswith("_cuda.") and made.read_text() == "binary"
    monkeypatch.setattr(gpu_kit, "Builder", without_nvcc)
    with pytest.raises(units.NotHere, match="nvcc"):
        build.build_unless_placed(setting)
    monkeypatch.setattr(build, "_placed", True)
    with pytest.raises(units.NotHere, match="binary is installed"):
        build.build_unless_placed(setting)


GOOD = {
    **MACHINE,
    "sound": ["reference"],
    "red": [],
    "hung": ["cpu"],
    "fastest": {"tiny T=64, frozen head, reference on-line": "reference"},
    "ceilings": {},
}


def test_the_second_plan_goes_by_a_verdict_that_fits(stand_in: StandIn, tmp_path: Path) -> None:
    path = tmp_path / "verdict.json"
    path.write_text(json.dumps(GOOD))
    data = stand_in(
        step("machine"), SMOKE, step("told"), step("again"),
        kept=path, reads_verdict=True,
    )  # fmt: skip
    assert data["verdict"] == "Sound by the verdict of the first plan: reference."
    assert statuses(data, "smoke") == {}, "what is known is not checked again"
    told = next(r for r in data["records"] if r["key"] == "told")
    assert told["best"] == ["reference"] and told["red"] == ["cpu"]
    assert statuses(data, "again") == {"reference: again": "ok"}, "what hung is left out"
    assert json.loads(path.read_text()) == GOOD, "the second plan leaves it as it is"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "No verdict"),
        ("{", "damaged"),
        ("[]", "damaged"),
        ("null", "damaged"),
        (json.dumps({**MACHINE, "sound": []}), "damaged"),
        (json.dumps({**GOOD, "sound": "cpu"}), "damaged"),
        (json.dumps({**GOOD, "hung": [1]}), "damaged"),
        (json.dumps({**GOOD, "fastest": None}), "damaged"),
        (json.dumps({**GOOD, "sound": []}), "no sound variant"),
        (json.dumps({**GOOD, "sound": ["nonsense"]}), "damaged"),
        (json.dumps({**GOOD, "quick": True}), "other shapes"),
        (json.dumps({**GOOD, "device": "Stand-in 2"}), "Stand-in 2"),
        (json.dumps({**GOOD, "kernel_hash": "def"}), "def"),
    ],
)
def test_a_verdict_that_does_not_hold_is_not_used(
    tmp_path: Path, text: str | None, words: str
) -> None:
    path = tmp_path / "verdict.json"
    if text is not None:
        path.write_text(text)
    found, said = verdict.read(path, MACHINE)
    assert found is None and words in said and "the smoke check decides" in said
    path.write_text(json.dumps(GOOD))
    assert verdict.read(path, MACHINE)[0] == GOOD
    assert verdict.read(path, {})[0] is None, "nothing is known of this machine"


def test_a_verdict_outlives_a_change_of_the_check_but_not_of_the_kernels() -> None:
    assert "bench" in environment.SOURCES and "bench" not in environment.KERNELS
    assert environment.source_hash(environment.KERNELS) != environment.source_hash()
    assert {"csrc/cuda", "kernels", "cpo_fast/loss"} == set(environment.KERNELS)


def test_without_a_verdict_the_second_plan_checks_first(stand_in: StandIn, tmp_path: Path) -> None:
    data = stand_in(
        step("machine"), SMOKE, step("headline", phase="loss"),
        kept=tmp_path / "none.json", reads_verdict=True,
    )  # fmt: skip
    assert "No verdict" in data["verdict"] and "No verdict" in report.short(data)
    assert statuses(data, "smoke") == {"cpu: smoke": "ok", "reference: smoke": "ok"}
    assert statuses(data, "headline") == {"cpu": "ok", "reference": "ok", "eager": "ok"}


def test_tiny_shapes_go_with_tiny_shapes(tmp_path: Path) -> None:
    path = tmp_path / "verdict.json"
    path.write_text(json.dumps({**GOOD, "quick": True}))
    assert verdict.read(path, MACHINE, quick=True)[0] is not None
