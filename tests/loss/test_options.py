"""Tables and options of the loss op, and the sums that all callers share."""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import Any

import pytest
import torch

from cpo_fast import loss
from cpo_fast.evaluation.likelihood import score_answers
from cpo_fast.loss import CPOLoss, cpo_loss
from cpo_fast.loss.losses import FORMULAS
from cpo_fast.loss.options import LOSS_TYPES, LossOptions
from cpo_fast.loss.segments import segment_sums
from cpo_fast.model.packed import PackedModel
from cpo_fast.testing.samples import text_model
from cpo_fast.types import Prompt

LOST = [-(2.0**24), -1.0, -1.0]  # summed in float32, term by term, this is -2^24


def test_every_loss_type_has_a_formula() -> None:
    assert list(FORMULAS) == list(LOSS_TYPES)


def test_signatures_have_the_defaults_of_the_options() -> None:
    for function in (cpo_loss, loss.linear_logprobs, CPOLoss.__init__):
        for name, parameter in inspect.signature(function).parameters.items():
            if hasattr(LossOptions, name):
                assert parameter.default == getattr(LossOptions, name), (function, name)


def test_options_of_the_module_can_be_changed() -> None:
    module = CPOLoss(0.1, "hinge")
    module.beta = 0.7
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 5, generator=generator) for n in (4, 7))
    tensors = (hidden, weight, torch.arange(4), torch.tensor([0, 0, 1, 1]), torch.tensor([[0, 1]]))
    out = module(*tensors, ref_logps=-torch.ones(2))
    assert (
        out.loss == cpo_loss(*tensors, ref_logps=-torch.ones(2), beta=0.7, loss_type="hinge").loss
    )
    with pytest.raises(ValueError, match="beta"):
        CPOLoss(beta=0.0)


def test_options_load_without_torch() -> None:
    code = "import cpo_fast.loss.options, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_segment_sums_are_float64() -> None:
    sums = segment_sums(torch.tensor([*LOST, 0.5]), torch.tensor([1, 1, 1, 0]), 3)
    assert sums.dtype == torch.float64
    assert sums.tolist() == [0.5, -(2.0**24) - 2, 0]


def test_scores_of_answers_are_summed_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    def linear_logprobs(hidden: Any, weight: Any, labels: Any, **options: Any) -> torch.Tensor:
        return torch.tensor(LOST)[: len(labels)]

    monkeypatch.setattr(loss, "linear_logprobs", linear_logprobs)
    model = PackedModel(text_model())
    scores = score_answers(model, [Prompt((5, 6))], [(7, 8, 9)])
    assert scores.tolist() == [[-(2.0**24) - 2]]
