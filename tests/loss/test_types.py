"""Every loss type against its library (trl, Liger) and against finite differences."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cpo_fast.loss import CPOLoss, cpo_loss
from cpo_fast.loss.options import LOSS_TYPES

V, D, B, L = 37, 12, 4, 9
SMOOTHING = {"robust": 0.1, "exo_pair": 0.05}


def batch(seed: int = 0, dtype: torch.dtype = torch.float64) -> SimpleNamespace:
    """B pairs, chosen rows first, padded to L tokens; a random number of tokens is scored."""
    g = torch.Generator().manual_seed(seed)
    b = SimpleNamespace()
    b.hidden = torch.randn(2 * B, L, D, generator=g, dtype=dtype)
    b.ref_hidden = torch.randn(2 * B, L, D, generator=g, dtype=dtype)
    b.weight = torch.randn(V, D, generator=g, dtype=dtype)
    b.labels = torch.randint(0, V, (2 * B, L), generator=g)
    b.mask = torch.arange(L) < torch.randint(2, L + 1, (2 * B, 1), generator=g)
    b.labels[~b.mask] = -100
    b.segments = torch.arange(2 * B).repeat_interleave(L)
    b.pairs = torch.stack([torch.arange(B), torch.arange(B) + B], 1)
    return b


def compute(b: SimpleNamespace, loss_type: str, beta: float = 0.1, **options: object):
    if LOSS_TYPES[loss_type].reference and "ref_logps" not in options:
        options["ref_hidden"] = b.ref_hidden.flatten(0, 1)
    return cpo_loss(
        b.hidden.flatten(0, 1),
        b.weight,
        b.labels.flatten(),
        b.segments,
        b.pairs,
        beta=beta,
        loss_type=loss_type,
        impl="reference",
        **options,
    )


def token_logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logps = (hidden @ weight.T).log_softmax(-1)
    return logps.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1) * (labels != -100)


def trl_loss(b: SimpleNamespace, loss_type: str, beta: float, label_smoothing: float) -> Tensor:
    """The loss code of trl with a model that returns our log-probs."""
    dpo = pytest.importorskip("trl.trainer.dpo_trainer")
    logps = token_logps(b.hidden, b.weight, b.labels)
    ref = token_logps(b.ref_hidden, b.weight, b.labels).sum(1)
    zeros = torch.zeros(2 * B, L)

    def same(x: Tensor) -> Tensor:
        return x

    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            device=torch.device("cpu"), gather_for_metrics=same, gather=same
        ),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=label_smoothing,
        use_weighting=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    pad = torch.zeros(2 * B, 1, dtype=torch.bool)  # trl drops the first column as the prompt
    inputs = {
        "input_ids": torch.zeros(2 * B, L + 1, dtype=torch.long),
        "attention_mask": torch.ones(2 * B, L + 1),
        "completion_mask": torch.cat([pad, b.mask], 1),
        "ref_chosen_logps": ref[:B],
        "ref_rejected_logps": ref[B:],
    }

    class Model:
        def __call__(self, **kwargs: object) -> SimpleNamespace:
            return SimpleNamespace(
                log_probs=logps,
                entropy=zeros,
                mean_logits=zeros,
                is_top1=zeros.bool(),
            )

    return dpo.DPOTrainer._compute_loss(trainer, Model(), inputs, False)


@pytest.mark.parametrize(
    "loss_type",
    ["sigmoid", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard"]
    + ["apo_zero", "apo_down"],
)
@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_equals_trl(loss_type: str, beta: float) -> None:
    b = batch()
    smoothing = SMOOTHING.get(loss_type, 0.0)
    b.hidden.requires_grad_()
    want = trl_loss(b, loss_type, beta, smoothing)
    (want_grad,) = torch.autograd.grad(want, b.hidden)
    got = compute(b, loss_type, beta, label_smoothing=smoothing)
    (got_grad,) = torch.autograd.grad(got.loss, b.hidden)
    # exo_pair of trl rounds the smoothing to float32
    rtol = 1e-6 if loss_type == "exo_pair" else 1e-10
    torch.testing.assert_close(got.loss, want, rtol=rtol, atol=1e-12)
    torch.testing.assert_close(got_grad, want_grad, rtol=rtol, atol=1e-8 * rtol + 1e-13)


@pytest.mark.parametrize("loss_type", ["sigmoid", "simpo"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_smoothing_and_simpo_equal_trl_cpo(loss_type: str, smoothing: float) -> None:
    """trl's CPOTrainer has both; with log-ratios as input its sigmoid is cDPO."""
    cpo = pytest.importorskip("trl.experimental.cpo.cpo_trainer")
    b = batch(1)
    logps = token_logps(b.hidden, b.weight, b.labels).sum(1)
    options = {"label_smoothing": smoothing}
    if loss_type == "sigmoid":
        compared = logps - token_logps(b.ref_hidden, b.weight, b.labels).sum(1)
    else:
        compared = logps / b.mask.sum(1)
        options["simpo_gamma"] = 0.8
    trainer = SimpleNamespace(
        alpha=0.0,
        beta=0.3,
        loss_type=loss_type,
        simpo_gamma=0.8,
        label_smoothing=smoothing,
        accelerator=SimpleNamespace(device="cpu"),
    )
    want, _, _ = cpo.CPOTrainer.cpo_loss(trainer, compared[:B], compared[B:])
    got = compute(b, loss_type, 0.3, **options)
    torch.testing.assert_close(got.losses, want, rtol=1e-10, atol=1e-12)


def test_orpo_equals_trl_and_liger() -> None:
    orpo = pytest.importorskip("trl.experimental.orpo.orpo_trainer")
    liger = pytest.importorskip("liger_kernel.chunked_loss")
    b = batch(2, torch.float32)
    got = compute(b, "orpo", 0.2)

    logps = token_logps(b.hidden, b.weight, b.labels)
    average = logps.sum(1) / b.mask.sum(1)
    trainer = SimpleNamespace(beta=0.2, accelerator=SimpleNamespace(device="cpu"))
    ratio, *_ = orpo.ORPOTrainer.odds_ratio_loss(trainer, average[:B], average[B:])
    nll = -logps[:B].sum() / b.mask[:B].sum()
    torch.testing.assert_close(got.loss, nll - ratio.mean(), rtol=1e-5, atol=1e-6)

    # Liger has the same layout [2B, L] and the same reduction.
    loss, *_ = liger.LigerFusedLinearORPOLoss(beta=0.2, compiled=False)(
        b.weight, b.hidden, b.labels, nll_target=b.labels
    )
    torch.testing.assert_close(got.loss, loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss_type", ["sigmoid", "robust", "apo_zero", "apo_down", "nca_pair"])
@pytest.mark.parametrize("average", [False, True])
def test_equals_liger_fused_dpo(loss_type: str, average: bool) -> None:
    liger = pytest.importorskip("liger_kernel.chunked_loss")
    b = batch(3, torch.float32)
    smoothing = SMOOTHING.get(loss_type, 0.0)
    got = compute(
        b, loss_type, 0.1, label_smoothing=smoothing, average_log_prob=average, rpo_alpha=0.0
    )
    loss, *_ = liger.LigerFusedLinearDPOLoss(
        beta=0.1,
        loss_type=loss_type,
        label_smoothing=smoothing,
        average_log_prob=average,
        compiled=False,
    )(b.weight, b.hidden, b.labels, ref_input=b.ref_hidden, ref_weight=b.weight)
    torch.testing.assert_close(got.loss, loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss_type", list(LOSS_TYPES))
def test_gradients_equal_finite_differences(loss_type: str) -> None:
    """All differentiable outputs of every loss, for all inputs that can have a gradient."""
    g = torch.Generator().manual_seed(4)
    hidden = torch.randn(10, 5, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 5, generator=g, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(7, generator=g, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 7, (10,), generator=g)
    labels[3] = -100
    segments = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, -1])
    pairs = torch.tensor([[0, 1], [0, 2], [2, 1]])
    options = {}
    if LOSS_TYPES[loss_type].reference:
        options["ref_logps"] = -6 - torch.rand(3, generator=g, dtype=torch.float64)

    def run(h: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out = cpo_loss(
            h,
            w,
            labels,
            segments,
            pairs,
            bias=b,
            softcap=4.0,
            loss_type=loss_type,
            beta=0.4,
            label_smoothing=SMOOTHING.get(loss_type, 0.0),
            rpo_alpha=0.3,
            **options,
        )
        return out.loss, out.losses, out.logps

    assert torch.autograd.gradcheck(run, (hidden, weight, bias))


def test_plackett_luce_is_a_softmax_of_rewards() -> None:
    b = batch(5)
    b.pairs = torch.tensor([[0, 4], [0, 5], [0, 6], [1, 7]])
    out = compute(b, "plackett_luce", 0.2, pair_weights=torch.tensor([1.0, 1.0, 1.0, 3.0]))
    rewards = 0.2 * (out.logps - out.ref_logps)
    first = -torch.log_softmax(rewards[[0, 4, 5, 6]], 0)[0]
    second = -F.logsigmoid(rewards[1] - rewards[7])
    torch.testing.assert_close(out.losses, torch.stack([first, first, first, second]))
    torch.testing.assert_close(out.loss, (first + 3 * second) / 4)
    # with one rejected answer each, it equals the sigmoid loss
    b.pairs = torch.stack([torch.arange(B), torch.arange(B) + B], 1)
    torch.testing.assert_close(compute(b, "plackett_luce").losses, compute(b, "sigmoid").losses)


def test_pair_weights_and_rpo_alpha() -> None:
    b = batch(6)
    weights = torch.tensor([1.0, 0.0, 2.0, 0.5])
    plain = compute(b, "sigmoid")
    out = compute(b, "sigmoid", pair_weights=weights, rpo_alpha=0.5)
    nll = -plain.logps[:B] / b.mask.sum(1)[:B]
    torch.testing.assert_close(out.losses, plain.losses + 0.5 * nll)
    torch.testing.assert_close(out.loss, (weights * out.losses).sum() / weights.sum())
    torch.testing.assert_close(out.chosen_rewards, 0.1 * (out.logps - out.ref_logps)[:B])
    assert not out.chosen_rewards.requires_grad


@pytest.mark.parametrize("loss_type", list(LOSS_TYPES))
def test_empty_pairs_are_left_out(loss_type: str) -> None:
    b = batch(7)
    b.hidden.requires_grad_()
    options = {"label_smoothing": SMOOTHING.get(loss_type, 0.0)}
    b.labels[[1, 5]] = -100
    b.labels[2] = -100  # one side only: the pair stays
    some = compute(b, loss_type, **options)
    kept = [0, 2, 3]
    if loss_type != "orpo":  # its NLL is a mean over tokens
        torch.testing.assert_close(some.loss, some.losses[kept].mean())
    (grad,) = torch.autograd.grad(some.loss, b.hidden)
    assert grad.isfinite().all()
    assert (grad[[1, 5, 2]] == 0).all()

    b.labels[:] = -100
    none = compute(b, loss_type, **options)
    (grad,) = torch.autograd.grad(none.loss, b.hidden)
    assert none.loss == 0 and (grad == 0).all() and none.losses.isfinite().all()
    assert (none.logps == 0).all()


def test_token_order_is_free_and_pairs_can_be_empty() -> None:
    b = batch(8)
    b.pairs = torch.tensor([[0, 1], [1, 0], [0, 2]])
    straight = compute(b, "sigmoid")
    order = torch.randperm(2 * B * L)
    shuffled = cpo_loss(
        b.hidden.flatten(0, 1)[order],
        b.weight,
        b.labels.flatten()[order],
        b.segments[order],
        b.pairs,
        ref_hidden=b.ref_hidden.flatten(0, 1)[order],
        impl="reference",
    )
    torch.testing.assert_close(straight.loss, shuffled.loss)
    torch.testing.assert_close(straight.logps, shuffled.logps)
    b.pairs = torch.zeros(0, 2, dtype=torch.long)
    assert compute(b, "sigmoid").loss == 0


def test_module_equals_the_function() -> None:
    b = batch(9)
    module = CPOLoss(0.3, "robust", label_smoothing=0.1, softcap=5.0)
    tensors = (b.hidden.flatten(0, 1), b.weight, b.labels.flatten(), b.segments, b.pairs)
    got = module(*tensors, ref_hidden=b.ref_hidden.flatten(0, 1))
    want = compute(b, "robust", 0.3, label_smoothing=0.1, softcap=5.0)
    torch.testing.assert_close(got.loss, want.loss)
