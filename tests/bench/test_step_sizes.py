"""The step benchmark: figures at a tiny size, parameter counts of the real sizes."""

from __future__ import annotations

import math

import pytest
import torch

from bench.gpu.units import describe_error
from bench.step_sizes import SIZES, build_random_model, run
from cpo_fast.testing.samples import tokenizer


@pytest.mark.complete
def test_figures_of_a_step_at_the_tiny_size():
    found = run(
        "tiny",
        device="cpu",
        studies=2,
        side=112,
        peers=("unshared", "unpacked", "sdpa", "flex"),
        rounds=1,
    )
    assert found["pairs"] == 4
    steps = found["steps"]
    for name in ("ours", "unshared", "unpacked", "sdpa"):
        figures = steps[name]
        assert math.isclose(figures["loss"], math.log(2), abs_tol=1e-5)
        assert figures["pairs_per_second"] > 0 and figures["mfu"] > 0
        assert math.isclose(sum(figures["time_shares"].values()), 1.0)
        want = {"data", "vision", "policy", "reference", "loss", "backward", "optimiser"}
        assert set(figures["time_shares"]) == want
    assert steps["unshared"]["physical_tokens"] == found["logical_tokens"]
    for name in ("unpacked", "sdpa"):
        assert steps["ours"]["physical_tokens"] == steps[name]["physical_tokens"]
    assert steps["ours"]["packs"] == 1 and steps["unpacked"]["packs"] == 2
    assert steps["ours"]["physical_tokens"] < found["logical_tokens"] / 1.5
    assert "needs a CUDA model" in steps["flex"]["error"]


@pytest.mark.parametrize(("size", "parameters"), [("3B", 3_754_622_976), ("7B", 8_292_166_656)])
def test_real_sizes_have_the_published_number_of_parameters(size, parameters):
    model = build_random_model(SIZES[size], tokenizer(), torch.device("meta"), torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_unknown_names():
    with pytest.raises(ValueError, match="8B"):
        run("8B")
    with pytest.raises(ValueError, match="peer"):
        run("tiny", peers=("swift",))


def test_an_error_without_a_message_is_described():
    assert describe_error(ValueError()) == "ValueError: "
    assert describe_error(ValueError("first\nsecond"), limit=3) == "ValueError: fir"
