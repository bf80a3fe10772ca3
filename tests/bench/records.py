"""Records of the GPU check's results, and a GPU setting, for tests."""

from __future__ import annotations

from typing import Any

from bench.gpu.units import Setting, Unit

GPU = Setting("cuda", False, "")
H100 = "NVIDIA H100 80GB HBM3"


def list_keys(units: list[Unit]) -> list[str]:
    return [unit.key for unit in units]


def make_record(phase: str, key: str, status: str = "ok", **figures: Any) -> dict[str, Any]:
    reason = {} if status == "ok" else {"reason": "because of /home/someone/tree/kernel.log"}
    return {"phase": phase, "key": key, "status": status, "unit_seconds": 1.0, **reason, **figures}


def make_machine(device: str = H100, sources: str = "aaaa", **figures: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "device": device,
        "capability": "9.0",
        "executable": "/home/someone/venv/bin/python",
        "versions": {"torch": "2.11.0", "triton": "3.6.0"},
        "commit": None,
        "changed_files": 0,
        "source_hash": sources,
    }
    return make_record("environment", "machine", **{**fields, **figures})


def make_timing(
    provider: str, ms: float, case: str = "frozen head", *, T: int = 8192, **figures: Any
) -> dict[str, Any]:
    """A measurement of the 7B head with an on-line reference."""
    case = f"{case}, reference on-line"
    fields: dict[str, Any] = {
        "provider": provider,
        "model": "7B",
        "case": case,
        "tokens": T,
        "hidden": 3584,
        "vocabulary": 152064,
        "seconds": ms / 1e3,
        "ratio_to_floor": ms / 34,
        "floor_seconds": 0.034,
        "floor_flops_per_second": 7.9e14,
        "extra_bytes": 2**30,
        "times": {"op": {"least": ms / 1e3, "most": ms / 1e3}},
        "errors": {"loss": 1e-3, "gradient": 2e-3},
    }
    return make_record("loss", f"7B T={T}, {case}: {provider}", **{**fields, **figures})
