"""CPODPOTrainer equals trl's DPOTrainer: loss curve, metrics and weights after 20 steps."""

from __future__ import annotations

import math
import re
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from trl import DPOTrainer

from cpo_fast.integrations.token_statistics import token_statistics
from cpo_fast.integrations.trl import LOSSES, CPODPOTrainer, check_version
from cpo_fast.testing.samples import (
    image,
    images,
    preference,
    text_model,
    tokenizer,
    vision_language_model,
)
from cpo_fast.testing.trl_oracle import rows, trainer

TEXT = [preference(name, 2, words=words) for name, words in (("a", 9), ("b", 1), ("c", 4))]
SEEN = [
    preference("a", 2, image(100, 80), words=9),
    preference("b", 1, image(120, 60)),
    preference("c", 1, image(56, 56), words=2),
]
TIMES = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos",
         "eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}  # fmt: skip


def build_trainer(
    kind: Any,
    folder: Any,
    *,
    with_images: bool = False,
    r: int = 4,
    held_out: bool = False,
    **options: Any,
) -> Any:
    """A trainer of the class `kind` on the small model, with the same settings for each class."""
    torch.manual_seed(3)
    if held_out:
        kind = partial(kind, eval_dataset=Dataset.from_list(rows(TEXT[:2])))
    options = {"logging_steps": 1, "max_steps": 20, "per_device_train_batch_size": 2, "seed": 3,
               "learning_rate": 1e-3, "lr_scheduler_type": "constant"} | options  # fmt: skip
    return trainer(
        vision_language_model() if with_images else text_model(),
        SEEN if with_images else TEXT,
        tokenizer(),
        images(),
        output_dir=str(folder),
        r=r,
        alpha=8,
        kind=kind,
        **options,
    )


def build_both(folder: Any, **options: Any) -> tuple[Any, Any]:
    kinds = (DPOTrainer, CPODPOTrainer)
    return tuple(build_trainer(kind, folder / str(n), **options) for n, kind in enumerate(kinds))  # type: ignore[return-value]


def assert_equal_rows(theirs: list[dict[str, Any]], ours: list[dict[str, Any]]) -> None:
    assert len(theirs) == len(ours)
    for want, got in zip(theirs, ours, strict=True):
        assert want.keys() == got.keys()
        first = {"rewards/accuracies"} if want.get("step") == 1 else set()  # depends on rounding
        for name in want.keys() - TIMES - first:
            assert got[name] == pytest.approx(want[name], rel=1e-4, abs=1e-4), name


@pytest.mark.complete
@pytest.mark.slow
@pytest.mark.parametrize("r", [4, 0], ids=["lora", "full"])
@pytest.mark.parametrize("with_images", [False, True], ids=["text", "images"])
def test_twenty_steps_equal_trl(with_images: bool, r: int, tmp_path: Any) -> None:
    theirs, ours = build_both(
        tmp_path, with_images=with_images, r=r, learning_rate=1e-3 if r else 1e-4
    )
    theirs.train()
    ours.train()
    losses = [row["loss"] for row in theirs.state.log_history if "loss" in row]
    assert len(losses) == 20
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4) and losses[-1] < 0.68
    assert_equal_rows(theirs.state.log_history, ours.state.log_history)
    for (name, want), got in zip(
        theirs.model.named_parameters(), ours.model.parameters(), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=2e-4, msg=name)


@pytest.mark.parametrize(
    "options",
    [
        *[{"loss_type": name} for name in LOSSES if name not in ("exo_pair", "sigmoid")],
        {"loss_type": "exo_pair", "label_smoothing": 1e-3},
        {"loss_type": "robust", "label_smoothing": 0.2, "beta": 0.5},
        {"loss_type": ["sigmoid", "bco_pair"], "loss_weights": [0.8, 0.3], "beta": 0.2},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_every_loss_equals_trl(options: dict[str, Any], tmp_path: Any) -> None:
    theirs, ours = build_both(tmp_path, **options)
    generator = torch.Generator().manual_seed(1)
    moved = {
        name: 0.3 * torch.randn(parameter.shape, generator=generator)
        for name, parameter in theirs.model.named_parameters()
        if "lora_B" in name
    }
    gradients = []
    for one in (theirs, ours):
        for name, value in moved.items():
            one.model.get_parameter(name).data.copy_(value)
        batch = one.data_collator([one.train_dataset[i] for i in range(4)])
        one.model.train()
        loss = one.compute_loss(one.model, batch)
        loss.backward()
        grads = [p.grad.clone() for p in one.model.parameters() if p.requires_grad]
        gradients.append((loss.detach(), grads))
    (want, expected), (got, found) = gradients
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for one, other in zip(expected, found, strict=True):
        assert (other - one).abs().max() <= 1e-4 * one.abs().max() + 1e-7


def test_precomputed_references_and_evaluation_equal_trl(tmp_path: Any) -> None:
    for r in (4, 0):
        options = {"precompute_ref_log_probs": True, "eval_strategy": "steps", "eval_steps": 2}
        kinds = build_both(tmp_path / str(r), r=r, max_steps=2, held_out=True, **options)
        for one in kinds:
            one.train()
        assert_equal_rows(kinds[0].state.log_history, kinds[1].state.log_history)
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            torch.testing.assert_close(
                torch.tensor(kinds[1].train_dataset[name]),
                torch.tensor(kinds[0].train_dataset[name]),
                rtol=1e-5,
                atol=1e-4,
            )


def test_bf16_autocast_and_gradient_checkpointing_equal_trl(tmp_path: Any) -> None:
    options = {"bf16": True, "gradient_checkpointing": True, "max_steps": 3}
    theirs, ours = build_both(tmp_path, with_images=True, **options)
    theirs.train()
    ours.train()
    for want, got in zip(theirs.state.log_history[:3], ours.state.log_history[:3], strict=True):
        assert got["loss"] == pytest.approx(want["loss"], abs=0.02)
        assert got["logps/chosen"] == pytest.approx(want["logps/chosen"], rel=0.01)


def test_token_metrics_can_be_disabled(tmp_path: Any) -> None:
    ours = build_trainer(partial(CPODPOTrainer, token_metrics=False), tmp_path, max_steps=1)
    ours.train()
    row = ours.state.log_history[0]
    assert "rewards/margins" in row and "num_tokens" in row
    assert not row.keys() & {"entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "discopop"}, "loss_type discopop: cpo_fast has sigmoid, "),
        ({"label_smoothing": 0.1}, "label_smoothing 0.1 with loss_type sigmoid"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, "< 0.5 for robust"),
        ({"ld_alpha": 0.5}, "ld_alpha is not computed"),
        ({"f_divergence_type": "forward_kl"}, "f_divergence_type forward_kl is not"),
        ({"use_weighting": True}, "use_weighting is not computed"),
    ],
)
def test_other_options_are_refused(options: dict[str, Any], message: str, tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        build_trainer(CPODPOTrainer, tmp_path, **options)


def test_scaled_logits_are_refused(tmp_path: Any) -> None:
    ours = build_trainer(CPODPOTrainer, tmp_path)
    head = ours.model.get_base_model().get_output_embeddings()
    head.register_forward_hook(lambda module, given, out: out / 3)
    with pytest.raises(ValueError, match="scaled logits"):
        ours.train()


@pytest.mark.parametrize("version", ["1.15.0", "1.17.0", "0.29.1", "2.0.0"])
def test_unsupported_trl_versions_are_refused(version: str) -> None:
    with pytest.raises(ImportError, match=rf"{re.escape(version)} is installed: pip install"):
        check_version(version)
    check_version("1.16.0")
    check_version("1.16.3.dev0")


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_token_statistics_equal_full_logits(softcap: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=generator) for n in (40, 9000))
    bias = torch.randn(9000, generator=generator)
    z = hidden @ weight.T + bias
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    labels = z.argmax(1)
    labels[::3] = 5
    found = token_statistics(hidden, weight, labels, bias=bias, softcap=softcap)
    p = F.softmax(z.double(), 1)
    torch.testing.assert_close(found.entropy.double(), -(p * p.log()).sum(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.mean_logit, z.mean(1), rtol=1e-4, atol=1e-5)
    assert torch.equal(found.is_top1, labels == z.argmax(1))
