"""The kit and the verdict between plans: present, missing, of other sources, or damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import gpu_kit
from bench.gpu import build, environment, report, units, verdict
from tests.bench.stand_in import MACHINE, SMOKE, StandIn, get_statuses, make_step

pytestmark = pytest.mark.complete


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return StandIn(tmp_path, monkeypatch)


def test_a_missing_kit_is_reported(tmp_path: Path) -> None:
    kit = units.Setting("cpu", True, "", kit=str(tmp_path / "none"), scratch=str(tmp_path / "s"))
    unpack, native = build.list_kit_units(kit)
    figures = unpack.run()
    assert figures["environment"] == {} and figures["cuda"] is False
    assert "no GPU kit" in figures["notes"][0]
    with pytest.raises(units.NotHere):
        native.run()
    record = {"phase": "build", "key": "kit", "status": "ok", "unit_seconds": 0.1, **figures}
    data = {"started": "now", "records": [record], "not_run": []}
    assert "Kit: no GPU kit" in report.make_summary(data) and "Kit: no GPU kit" in report.render(
        data
    )


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

    def fail(*_: Any) -> None:
        raise gpu_kit.Missing("nvcc is not on the PATH")

    (tmp_path / "cpo_fast").mkdir()
    setting = units.Setting("cuda", False, "")
    monkeypatch.setattr(gpu_kit, "Builder", Builder)
    assert build.build_cuda(tmp_path) == {"built": ["_cuda"]}
    (made,) = (tmp_path / "cpo_fast").iterdir()
    assert made.name.startswith("_cuda.") and made.read_text() == "binary"
    monkeypatch.setattr(gpu_kit, "Builder", fail)
    with pytest.raises(units.NotHere, match="nvcc"):
        build.build_unless_installed(setting)
    monkeypatch.setattr(build, "_installed", True)
    with pytest.raises(units.NotHere, match="binary is installed"):
        build.build_unless_installed(setting)


GOOD = {
    **MACHINE,
    "sound": ["reference"],
    "red": [],
    "hung": ["cpu"],
    "fastest": {"tiny T=64, frozen head, reference on-line": "reference"},
    "ceilings": {},
}


def test_the_second_plan_uses_a_valid_verdict(stand_in: StandIn, tmp_path: Path) -> None:
    path = tmp_path / "verdict.json"
    path.write_text(json.dumps(GOOD))
    data = stand_in(
        make_step("machine"), SMOKE, make_step("setting"), make_step("again"),
        kept=path, reads_verdict=True,
    )  # fmt: skip
    assert data["verdict"] == "Sound by the verdict of the first plan: reference."
    assert get_statuses(data, "smoke") == {}, "known variants are not checked again"
    found = next(r for r in data["records"] if r["key"] == "setting")
    assert found["best"] == ["reference"] and found["red"] == ["cpu"]
    assert get_statuses(data, "again") == {"reference: again": "ok"}, "hung variants are skipped"
    assert json.loads(path.read_text()) == GOOD, "the second plan does not change it"


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
def test_an_invalid_verdict_is_not_used(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "verdict.json"
    if text is not None:
        path.write_text(text)
    found, text = verdict.read(path, MACHINE)
    assert found is None and words in text and "the smoke check decides" in text
    path.write_text(json.dumps(GOOD))
    assert verdict.read(path, MACHINE)[0] == GOOD
    assert verdict.read(path, {})[0] is None, "the machine is unknown"


def test_a_verdict_depends_on_the_kernels_only() -> None:
    assert "bench" in environment.SOURCES and "bench" not in environment.KERNELS
    assert environment.hash_sources(environment.KERNELS) != environment.hash_sources()
    assert {"csrc/cuda", "kernels", "cpo_fast/loss"} == set(environment.KERNELS)


def test_without_a_verdict_the_second_plan_checks_first(stand_in: StandIn, tmp_path: Path) -> None:
    data = stand_in(
        make_step("machine"), SMOKE, make_step("headline", phase="loss"),
        kept=tmp_path / "none.json", reads_verdict=True,
    )  # fmt: skip
    assert "No verdict" in data["verdict"] and "No verdict" in report.make_summary(data)
    assert get_statuses(data, "smoke") == {"cpu: smoke": "ok", "reference: smoke": "ok"}
    assert get_statuses(data, "headline") == {"cpu": "ok", "reference": "ok", "eager": "ok"}


def test_a_verdict_of_tiny_shapes_applies_to_tiny_shapes(tmp_path: Path) -> None:
    path = tmp_path / "verdict.json"
    path.write_text(json.dumps({**GOOD, "quick": True}))
    assert verdict.read(path, MACHINE, quick=True)[0] is not None
