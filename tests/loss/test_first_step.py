"""At the first step, policy equals reference: loss log 2 and rewards 0 for every impl."""

from __future__ import annotations

import math

import pytest
import torch

from cpo_fast.loss import available_impls
from cpo_fast.model.build import add_lora, tiny_text_model
from cpo_fast.model.packed import PackedModel
from cpo_fast.model.tokenizer import train_tokenizer
from cpo_fast.packing import collate
from cpo_fast.run.flag_names import METRICS
from cpo_fast.training.objectives import CPOObjective
from cpo_fast.types import PreferenceGroup, Prompt


@pytest.mark.parametrize("impl", available_impls("cpu"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_is_log_2_and_rewards_are_0(impl: str, dtype: torch.dtype) -> None:
    tokenizer = train_tokenizer(["heart lungs effusion"] * 4, vocab_size=300)
    model = add_lora(tiny_text_model(tokenizer, seed=1).to(dtype), r=4)
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, 256, (count,), generator=generator).tolist())

    groups = [
        PreferenceGroup(f"g{i}", Prompt(ids(9)), ids(12 + i), (ids(7), ids(15))) for i in range(3)
    ]
    batch = collate(groups, tuple((i, (0, 1)) for i in range(3)))
    objective = CPOObjective(PackedModel(model), impl=impl)
    loss, values = objective.sum_losses(batch)
    assert float(loss.detach()) / 6 == pytest.approx(math.log(2), abs=5e-5)
    row = objective.average(
        {name: float(torch.as_tensor(v).detach()) for name, v in values.items()}
    )
    assert set(row) == set(METRICS), "the values of --metric_for_best_model"
    assert row["rewards/chosen"] == row["rewards/rejected"] == row["rewards/margins"] == 0
    loss.backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
