"""Schedules, their options and the rules of the losses match transformers and the loss op."""

from __future__ import annotations

import inspect
from dataclasses import replace
from itertools import product

import pytest
import torch
from transformers import SchedulerType, get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from cpo_fast.errors import UsageError
from cpo_fast.loss import checks
from cpo_fast.loss.losses import FORMULAS
from cpo_fast.loss.options import LOSS_TYPES, LossOptions
from cpo_fast.run import flag_names
from cpo_fast.run.arguments import TrainArguments
from cpo_fast.run.flag_ranges import find_range
from cpo_fast.training.schedule import find_schedule_fault, make_schedule
from cpo_fast.training.stage_settings import StageSettings

BY_METRIC = {"reduce_lr_on_plateau", "greedy"}  # need a metric at every step
GIVEN_BY_TRAINING = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
VALUES = {"num_decay_steps": 2, "num_stable_steps": 2, "warmup_type": "linear", "timescale": 9,
          "decay_type": "linear", "num_cycles": 1, "power": 2.0, "min_lr_rate": 0.1,
          "warmup_lr_rate": 0.1, "min_lr_ratio": 0.1}  # fmt: skip


def test_schedules_and_options_match_transformers() -> None:
    names = {one.value for one in SchedulerType}
    assert names - BY_METRIC == set(flag_names.SCHEDULES)
    for name in SchedulerType:
        if name.value not in BY_METRIC:
            parameters = set(inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[name]).parameters)
            assert parameters - GIVEN_BY_TRAINING == set(flag_names.SCHEDULES[name.value])


@pytest.mark.parametrize("name", flag_names.SCHEDULES)
def test_accepted_schedules_can_be_built(name: str) -> None:
    settings = StageSettings("cpo", learning_rate=0.1, lr_scheduler_type=name)
    needed = flag_names.NEEDED_OPTIONS.get(name, ())
    for options in ({one: VALUES.get(one, 0.01)} for one in flag_names.SCHEDULES[name]):
        accepted = flag_names.find_option_fault(name, options) is None
        assert accepted is (not needed or bool(set(options) & set(needed)))
        with_options = replace(settings, lr_scheduler_kwargs=options)
        assert accepted is (find_schedule_fault(with_options, 10) is None), options
    assert "no option 'a'" in str(flag_names.find_option_fault(name, {"a": 1}))
    usable = find_schedule_fault(settings, 10) is None
    assert (flag_names.find_option_fault(name, {}) is None) is usable


def test_loss_rules_match_the_loss_op() -> None:
    for name, smoothing, beta, alpha in product(LOSS_TYPES, (0.0, 0.3), (0.1, 0.0), (0.0, -1.0)):
        try:
            checks.check_options(LossOptions(beta, name, smoothing, rpo_alpha=alpha))
            usable = True
        except ValueError:
            usable = False
        try:
            TrainArguments(loss_type=name, beta=beta, label_smoothing=smoothing, rpo_alpha=alpha)
            accepted = True
        except UsageError:
            accepted = False
        assert accepted is usable, (name, smoothing, beta, alpha)


def test_ranges_allow_nothing_that_all_losses_reject() -> None:
    for value in (0.5, 0.9):  # at 0.5 the preferences cancel, above it the rejected are preferred
        assert "below 0.5" in str(find_range("label_smoothing").fault(value))
    assert torch.isfinite(FORMULAS["robust"](*torch.ones(2, 1), 0.1, 0.49)).all()


@pytest.mark.parametrize(("ratio", "first"), [(0.0, 0.1), (0.3, 0.0)])
def test_first_learning_rate_with_and_without_warmup(ratio: float, first: float) -> None:
    """As in get_scheduler of transformers: 3 of 10 steps warm up."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    settings = StageSettings("cpo", warmup_ratio=ratio)
    schedule = make_schedule(optimizer, settings, 10)
    assert schedule.get_last_lr() == [first]
    same = get_scheduler("cosine", optimizer, round(10 * ratio), 10)
    assert isinstance(same, torch.optim.lr_scheduler.LambdaLR)
    for step in range(11):
        assert schedule.lr_lambdas[0](step) == same.lr_lambdas[0](step)
