"""The public functions `linear_logprobs` and `cpo_loss`.

Implementations compute one primitive, the log-prob of every token (see the package docstring).
Everything here is plain PyTorch on T, S or P numbers, so autograd gives correct gradients through
every returned tensor. Sums and losses are float64: at these sizes that costs nothing, and the
difference of two long sums keeps its digits.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from cpo_fast.loss import checks, implementations
from cpo_fast.loss.implementations import available_impls, impl_obstacles
from cpo_fast.loss.losses import pair_losses
from cpo_fast.loss.options import LossOptions
from cpo_fast.loss.segments import sums_and_counts

__all__ = [
    "CPOOutput",
    "available_impls",
    "cpo_loss",
    "impl_obstacles",
    "linear_logprobs",
]

MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)


class CPOOutput(NamedTuple):
    """The result of `cpo_loss`, float32 (float64 for float64 inputs). Log-probs are sums over
    tokens."""

    loss: Tensor  # [] weighted mean of `losses`, differentiable
    losses: Tensor  # [P] unweighted, differentiable
    logps: Tensor  # [S] differentiable
    ref_logps: Tensor  # [S] zeros for losses without a reference
    chosen_rewards: Tensor  # [P] beta * (logp - ref_logp), detached
    rejected_rewards: Tensor  # [P]


def _autocast(tensor: MaybeTensor) -> MaybeTensor:
    """Cast as autocast casts the inputs of a linear layer; float64 stays float64."""
    if tensor is None or tensor.dtype == torch.float64:
        return tensor
    kind = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else tensor


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    impl: str | None = None,
) -> Tensor:
    """Log-probability of every label under a linear head.

    Not all logits are stored at a time (the eager reference does; a trained head can keep its
    residuals).

    - `hidden` [T, D]: the states after the final norm, before the output layer; bfloat16, float16
      or float32 (float64 with the reference implementation only).
    - `weight` [V, D], contiguous, and `bias` [V]: the output layer (`model.lm_head.weight`), of the
      same dtype as `hidden` except under autocast. A frozen sharded weight or bias (FSDP2) is
      gathered, on all ranks together.
    - `labels` [T] int64, already shifted: `hidden[t]` predicts `labels[t]`. Unshifted labels cannot
      be detected; `cpo_fast.from_padded` shifts. `ignore_index` marks tokens not to score.
    - Logits are `hidden @ weight.T + bias`, then `softcap * tanh(z / softcap)`, then
      `z / temperature`. A model that caps its logits (Gemma 2) needs its `softcap` here.
    - `impl`: a name of `available_impls(device)`; default: the preferred one.

    Returns log-probs [T] in nats, float32 (float64 for float64), 0 where the label is
    `ignore_index`; differentiable in hidden, weight and bias.

    Raises TypeError (type or dtype) or ValueError (shape, device, range) before any work is done;
    the message names the argument and says what to pass. Label values are checked on CPU tensors;
    on CUDA tensors only with `CPO_FAST_CHECKS=1`, because the check waits for the device.
    """
    weight, bias = checks.gather_full("weight", weight), checks.gather_full("bias", bias)
    checks.check_head(hidden, weight, bias)
    options = LossOptions(
        softcap=softcap, temperature=temperature, ignore_index=ignore_index, impl=impl
    )
    checks.check_options(options)
    checks.check_indices("labels", labels, (hidden.shape[0],), hidden.device)
    checks.check_label_range(labels, weight.shape[0], ignore_index)
    hidden, weight, bias = _autocast(hidden), _autocast(weight), _autocast(bias)
    module = implementations.choose(impl, hidden, weight)
    logps, _ = module.token_logps(hidden, weight, labels, bias, None, options)
    return logps


def cpo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    segment_ids: Tensor,
    pairs: Tensor,
    *,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    ref_logps: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    average_log_prob: bool = False,
    simpo_gamma: float = 0.5,
    rpo_alpha: float = 0.0,
    pair_weights: Tensor | None = None,
    num_segments: int | None = None,
    ignore_index: int = -100,
    impl: str | None = None,
) -> CPOOutput:
    """Preference loss of pairs of sequences, from the hidden states before the output layer.

    Call `.loss.backward()` on the result. For a padded batch [B, L], `cpo_fast.from_padded` builds
    `hidden`, `labels`, `segment_ids`, `pairs`, `ref_hidden` and `num_segments`.

    - `hidden` [T, D], `weight` [V, D], `labels` [T], `bias` [V], `softcap`, `impl`: as in
      `linear_logprobs`.
    - `segment_ids` [T] int64: the sequence 0..S-1 of each token, -1 for none, in any order.
      `num_segments` is S; default: max(segment_ids) + 1, which waits for a GPU.
    - `pairs` [P, 2] int64: a row is (chosen, rejected), two different segments. A segment can be in
      any number of pairs. P can be 0.
    - `ref_hidden` [T, D]: the same tokens under the reference model, scored by `ref_weight` [V, D]
      and `ref_bias` [V], without gradients. Or `ref_logps` [S] float32 from a cache: sums of
      log-probs over the tokens of each segment, in nats, at most 0. Exactly one of `ref_hidden`
      and `ref_logps`; neither for simpo and orpo.
    - `loss_type`: a name of `cpo_fast.loss.losses.FORMULAS`, whose functions cite their sources;
      DPO is sigmoid. An option that a loss does not use is an error.
    - `beta` > 0 scales the log-ratios. `average_log_prob` divides them by the number of tokens;
      otherwise they are sums. `label_smoothing`, `simpo_gamma`: as in trl.
    - `rpo_alpha` times the chosen side's mean NLL per token is added. orpo adds the NLL per chosen
      token of the batch.
    - `pair_weights` [P] float32, finite, >= 0: `loss` is the weighted mean, divided by their sum.

    Returns `CPOOutput`. `loss` is the mean over the pairs, not their sum. For plackett_luce, pairs
    with the same chosen segment form one group; `loss` is the mean over groups, each weighted with
    the mean of its pairs. A pair without scored tokens on both sides is left out; one empty side
    counts as log-prob 0; if no pair remains, the loss is 0.

    Trained head: without `ref_weight`, the policy's `weight`, detached, scores `ref_hidden`. That
    is right for a frozen head. A trained head changes the reference, too, which gives a
    UserWarning. It is not an error, because policy and reference can share a head on purpose, and
    are equal in the first step; `ref_weight=weight` suppresses the warning. The same holds for
    `bias` and `ref_bias`.

    Not detected: chosen and rejected swapped; `pairs` [2, 2] transposed, unless a row then names
    one segment twice; unshifted labels; hidden states before the final norm; a missing `softcap`;
    hidden states computed without gradients (`loss.requires_grad` is False).

    Raises TypeError (type or dtype) or ValueError (shape, device, range) before any work is done;
    the message names the argument and says what to pass. Warns where no label is left to score and
    where `ref_logps` are positive. Values are checked on CPU tensors; on CUDA tensors only with
    `CPO_FAST_CHECKS=1`, because the check waits for the device.
    """
    weight, bias = checks.gather_full("weight", weight), checks.gather_full("bias", bias)
    ref_weight = checks.gather_full("ref_weight", ref_weight, trained=False)
    ref_bias = checks.gather_full("ref_bias", ref_bias, trained=False)
    checks.check_head(hidden, weight, bias)
    options = LossOptions(
        beta=beta,
        loss_type=loss_type,
        label_smoothing=label_smoothing,
        average_log_prob=average_log_prob,
        simpo_gamma=simpo_gamma,
        rpo_alpha=rpo_alpha,
        softcap=softcap,
        ignore_index=ignore_index,
        impl=impl,
    )
    checks.check_options(options)
    checks.check_references(loss_type, ref_hidden, ref_logps, ref_weight, ref_bias)
    T, V, device = hidden.shape[0], weight.shape[0], hidden.device
    wide = (torch.float32, torch.float64)
    checks.check_indices("labels", labels, (T,), device)
    checks.check_indices("segment_ids", segment_ids, (T,), device)
    checks.check_indices("pairs", pairs, ("P", 2), device)
    if pair_weights is not None:
        checks.check_tensor("pair_weights", pair_weights, (pairs.shape[0],), wide, device)
        checks.check_pair_weights(pair_weights)
    if num_segments is None:
        S = int(segment_ids.max()) + 1 if T else 0
    else:
        checks.check_integer("num_segments", num_segments, at_least=0)
        S = num_segments
    if ref_logps is not None:
        checks.check_tensor("ref_logps", ref_logps, (S,), wide, device)
        checks.check_ref_logps(ref_logps)
    if ref_hidden is not None:
        checks.check_reference_head(hidden, weight, bias, ref_hidden, ref_weight, ref_bias)
        checks.warn_of_trained_head(weight, bias, ref_weight, ref_bias)
    checks.check_token_values(labels, segment_ids, V, S, ignore_index)
    checks.check_pairs(pairs, S)

    # Tokens without a segment are not scored.
    labels = labels.where(segment_ids >= 0, ignore_index)
    ref_head = weight if ref_weight is None else ref_weight
    shift = bias if ref_bias is None else ref_bias
    same_head = ref_head is weight and shift is bias
    hidden, weight, bias = _autocast(hidden), _autocast(weight), _autocast(bias)
    module = implementations.choose(impl, hidden, weight)
    tokens, ref_tokens = module.token_logps(
        hidden,
        weight,
        labels,
        bias,
        _autocast(ref_hidden.detach()) if ref_hidden is not None and same_head else None,
        options,
    )
    if ref_hidden is not None and not same_head:
        # The arithmetic can depend on whether the head is trained: it must match the policy's.
        ref_head = _autocast(ref_head.detach())
        if weight.requires_grad:
            ref_head.requires_grad_()
        with torch.no_grad():
            ref_tokens, _ = module.token_logps(
                _autocast(ref_hidden), ref_head, labels, _autocast(shift), None, options
            )

    sums = getattr(module, "sums_and_counts", sums_and_counts)
    logps, counts = sums(tokens, segment_ids, labels, S, ignore_index)  # [S], [S]
    if ref_tokens is not None:
        ref, _ = sums(ref_tokens, segment_ids, labels, S, ignore_index)
    else:
        ref = torch.zeros_like(logps) if ref_logps is None else ref_logps.detach().double()

    loss, losses = pair_losses(logps, ref, counts, pairs, pair_weights, options)
    rewards = (beta * (logps - ref)).detach()[pairs]  # [P, 2]
    dtype = tokens.dtype
    return CPOOutput(
        loss.to(dtype),
        losses.to(dtype),
        logps.to(dtype),
        ref.to(dtype),
        rewards[:, 0].to(dtype),
        rewards[:, 1].to(dtype),
    )
