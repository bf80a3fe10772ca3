"""The doctor reports broken parts without failing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cpo_fast import doctor


def test_everything_here_works(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([]) == 0
    text = capsys.readouterr().out
    for line in ("ok       torch ", "reference on cpu", "triton on cuda"):
        assert line in text
    assert text.rstrip().endswith("everything required works")


TORCH = {"torch": ("raise ImportError('libgone.so: cannot open')", "ImportError: libgone.so")}
OTHERS = {
    "peft": ("1 / 0", "ZeroDivisionError"),
    "triton": ("import sys; sys.exit(9)", "SystemExit: 9"),
}


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param(TORCH, id="torch"),
        pytest.param(OTHERS, id="peft,triton", marks=pytest.mark.complete),
    ],
)
def test_broken_package_gives_a_line(tmp_path: Path, broken: dict[str, tuple[str, str]]) -> None:
    for package, (code, _) in broken.items():
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "-m", "cpo_fast.doctor"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stdout.splitlines()
    for package, (_, sign) in broken.items():
        (line,) = (line for line in lines if line.startswith("  broken   " + package))
        assert sign in line
        assert f"{package} is broken" in lines[-1]


def test_missing_and_too_old_packages() -> None:
    from packaging.specifiers import SpecifierSet

    state, line = doctor.package("no-such-package-here", ">=1", SpecifierSet(">=1").contains)
    assert (state, line) == ("missing", "no-such-package-here, asked for: >=1")
    state, line = doctor.package("numpy", ">=1000", SpecifierSet(">=1000").contains)
    assert state == "outside" and line.endswith("asked for: >=1000")


def test_wrong_implementation_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "deviation", lambda device, name: float("nan"))
    lines = list(doctor.implementations())
    assert any(fault == "reference on cpu is wrong" for _, fault in lines)


def test_failing_check_gives_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def look() -> doctor.Lines:
        yield "first", None
        raise RuntimeError("driver gone\nand more")

    monkeypatch.setattr(doctor, "SECTIONS", {"devices": look})
    assert doctor.main([]) == 1
    assert "broken   RuntimeError: driver gone\n" in capsys.readouterr().out
