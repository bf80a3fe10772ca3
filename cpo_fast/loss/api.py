"""The public face: `linear_logprobs`, `cpo_loss`, `CPOLoss`, `available_impls`.

One primitive, the log-prob of every token, is implemented several times (see the package
docstring); what is built on it here is plain PyTorch on T, S or P numbers, so that gradients
through any returned tensor are right by construction. Sums and losses are formed in float64: that
costs nothing at these sizes, and the difference of two long sums keeps its digits.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from cpo_fast.loss import checks
from cpo_fast.loss.losses import pair_losses
from cpo_fast.loss.segments import segment_sums

MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)

# From the least to the most preferred. "cuda" comes before "triton" for the heads for which it was
# measured to win (`cpo_fast.loss.cuda.MEASURED`).
_IMPLS = ("reference", "cuda", "triton", "cpu")


class CPOOutput(NamedTuple):
    """What `cpo_loss` returns; float32 (float64 for float64 inputs). Log-probs are sums over
    tokens."""

    loss: Tensor  # [] weighted mean of `losses`, differentiable
    losses: Tensor  # [P] unweighted, differentiable
    logps: Tensor  # [S] differentiable
    ref_logps: Tensor  # [S] zeros for the losses without a reference
    chosen_rewards: Tensor  # [P] beta * (logp - ref_logp) of the chosen side, detached
    rejected_rewards: Tensor  # [P]


_modules: dict[str, Any] = {}  # those asked for so far, or why they cannot be imported here


def _load(name: str) -> ModuleType | ImportError:
    if name not in _modules:
        try:
            _modules[name] = importlib.import_module(f"cpo_fast.loss.{name}")
        except ImportError as error:
            _modules[name] = error
    return _modules[name]


def impl_obstacles(device: torch.device | str = "cpu") -> dict[str, str | None]:
    """Every implementation, the preferred one last, and why it takes no tensors on `device`
    (None: it does)."""
    device = torch.device(device)
    modules = {name: _load(name) for name in _IMPLS}
    return {
        name: f"cannot be imported: {module}"
        if isinstance(module, ImportError)
        else module.obstacle(device)
        for name, module in modules.items()
    }


def available_impls(device: torch.device | str = "cpu") -> tuple[str, ...]:
    """Names that `impl=` accepts for tensors on `device`, the preferred one last."""
    return tuple(name for name, obstacle in impl_obstacles(device).items() if obstacle is None)


@functools.cache
def _warn_no_native() -> None:
    warnings.warn(
        "cpo_fast._cpu is not built (no C++ compiler at install time?): CPU tensors use the slower "
        "'reference' implementation. Reinstall with a compiler to change this.",
        RuntimeWarning,
        stacklevel=4,
    )


def _candidates(impl: str | None, device: str, dtype: torch.dtype) -> tuple[str, ...]:
    """Names of implementations, the preferred one last; an explicit one is used or refused, never
    replaced.
    """
    names = available_impls(device)
    if impl is None:
        if device == "cpu" and dtype != torch.float64 and "cpu" not in names:
            _warn_no_native()
        return tuple(name for name in names if _supports(name, dtype))
    if impl not in names:
        raise ValueError(
            f"impl must be None or one of {', '.join(names)} on {device}, got {impl!r}"
        )
    if not _supports(impl, dtype):
        raise TypeError(f"impl {impl!r} does not take hidden of {dtype}; use 'reference'")
    return (impl,)


# As torch.compiler.assume_constant_result does it, which takes a second to import the compiler.
_candidates._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _chosen(impl: str | None, hidden: Tensor, weight: Tensor) -> ModuleType:
    """The candidate that was measured to win for such a head [V, D], else the preferred one."""
    names = _candidates(impl, hidden.device.type, hidden.dtype)
    V, D = weight.shape  # symbols, perhaps, of torch.compile
    for name in names[:-1]:
        if hasattr(_modules[name], "wins") and _modules[name].wins(V, D):
            return _modules[name]
    return _modules[names[-1]]


def _supports(name: str, dtype: torch.dtype) -> bool:
    module = _load(name)
    return isinstance(module, ModuleType) and module.supports(dtype)


def _autocast(tensor: MaybeTensor) -> MaybeTensor:
    """As the head's linear layer would cast it under autocast (which leaves float64 alone)."""
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
    """Log-probability of every label under a linear head, without keeping the logits.

    - `hidden` [T, D]: the states after the final norm, before the output layer; bfloat16, float16
      or float32 (float64 with the reference implementation only).
    - `weight` [V, D], contiguous, and `bias` [V]: the output layer (`model.lm_head.weight`), of the
      dtype of `hidden` except under autocast. A frozen weight or bias that is sharded (FSDP2) is
      gathered, on all ranks together.
    - `labels` [T] int64, already shifted: `hidden[t]` predicts `labels[t]`. Labels that are not
      shifted cannot be detected; `cpo_fast.from_padded` shifts. `ignore_index` marks tokens that
      are not scored.
    - Logits are `hidden @ weight.T + bias`, then `softcap * tanh(z / softcap)`, then
      `z / temperature`. A model that caps its logits (Gemma 2) needs its `softcap` here.
    - `impl`: a name of `available_impls(device)`; default: the preferred one.

    Returns log-probs [T] in nats, float32 (float64 for float64), 0 where the label is
    `ignore_index`; differentiable in hidden, weight and bias.

    Raises TypeError (type or dtype) or ValueError (shape, device, range) before any work is done;
    the message names the argument and says what to pass. Label values are checked on CPU tensors,
    on CUDA tensors with `CPO_FAST_CHECKS=1` only, because the check waits for the device.
    """
    weight, bias = checks.gathered("weight", weight), checks.gathered("bias", bias)
    checks.head(hidden, weight, bias)
    checks.scoring_options(softcap, temperature, ignore_index)
    checks.indices("labels", labels, (hidden.shape[0],), hidden.device)
    checks.label_range(labels, weight.shape[0], ignore_index)
    hidden, weight, bias = _autocast(hidden), _autocast(weight), _autocast(bias)
    module = _chosen(impl, hidden, weight)
    logps, _ = module.token_logps(
        hidden,
        weight,
        labels,
        bias,
        None,
        softcap=softcap,
        temperature=float(temperature),
        ignore_index=ignore_index,
    )
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

    Call `.loss.backward()` on what it returns. For a padded batch [B, L], `cpo_fast.from_padded`
    makes `hidden`, `labels`, `segment_ids`, `pairs`, `ref_hidden` and `num_segments`.

    - `hidden` [T, D], `weight` [V, D], `labels` [T], `bias` [V], `softcap`, `impl`: as in
      `linear_logprobs`.
    - `segment_ids` [T] int64: the sequence 0..S-1 that a token scores for, -1 for none, in any
      order. `num_segments` is S; default: max(segment_ids) + 1, which waits for a GPU.
    - `pairs` [P, 2] int64: a row is (chosen, rejected), two different segments. A segment may be
      in several pairs, or in none. P may be 0.
    - `ref_hidden` [T, D]: the same tokens under the reference model, scored by `ref_weight` [V, D]
      and `ref_bias` [V], without gradients. Or `ref_logps` [S] float32 from a cache: sums of
      log-probs over the tokens of each segment, in nats, at most 0. Exactly one of `ref_hidden`
      and `ref_logps`; none for simpo and orpo.
    - `loss_type`: a name of `cpo_fast.loss.losses.LOSS_TYPES`, where each has its source; DPO is
      sigmoid. An option that a loss does not use is an error.
    - `beta` > 0 scales the log-ratios. `average_log_prob` divides them by the number of tokens;
      otherwise they are sums. `label_smoothing`, `simpo_gamma`: as in trl.
    - `rpo_alpha` adds that many times the chosen side's mean NLL per token. orpo adds the NLL per
      chosen token of the batch.
    - `pair_weights` [P] float32, finite, >= 0: `loss` is the weighted mean, divided by their sum.

    Returns `CPOOutput`. `loss` is the mean over the pairs, not their sum. For plackett_luce, pairs
    that share their chosen segment form one group; `loss` is the mean over groups, each weighing
    the mean of its pairs. A pair without a scored token on either side is left out; one empty side
    counts as log-prob 0; with no pair left the loss is 0.

    A trained head: without `ref_weight` the policy's `weight`, detached, scores `ref_hidden`. That
    is right for a frozen head. A trained head moves, and the reference with it, so a UserWarning
    says so. It is no error because a head that policy and reference share on purpose is valid, as
    is the first step, where both are equal; `ref_weight=weight` says that it is meant. The same
    holds for `bias` and `ref_bias`.

    What cannot be detected: chosen and rejected swapped; `pairs` [2, 2] transposed, if no row then
    names one segment twice; labels that are not shifted; hidden states before the final norm; a
    missing `softcap`; hidden states computed without gradients (`loss.requires_grad` is False).

    Raises TypeError (type or dtype) or ValueError (shape, device, range) before any work is done;
    the message names the argument and says what to pass. Warns where no label is left to score and
    where `ref_logps` are positive. Values are checked on CPU tensors, on CUDA tensors with
    `CPO_FAST_CHECKS=1` only, because the check waits for the device.
    """
    weight, bias = checks.gathered("weight", weight), checks.gathered("bias", bias)
    ref_weight = checks.gathered("ref_weight", ref_weight, trained=False)
    ref_bias = checks.gathered("ref_bias", ref_bias, trained=False)
    checks.head(hidden, weight, bias)
    checks.scoring_options(softcap, 1.0, ignore_index)
    checks.loss_options(loss_type, beta, label_smoothing, average_log_prob, simpo_gamma, rpo_alpha)
    checks.references(loss_type, ref_hidden, ref_logps, ref_weight, ref_bias)
    T, V, device = hidden.shape[0], weight.shape[0], hidden.device
    wide = (torch.float32, torch.float64)
    checks.indices("labels", labels, (T,), device)
    checks.indices("segment_ids", segment_ids, (T,), device)
    checks.indices("pairs", pairs, ("P", 2), device)
    if pair_weights is not None:
        checks.tensor("pair_weights", pair_weights, (pairs.shape[0],), wide, device)
        checks.weights_of_pairs(pair_weights)
    if num_segments is None:
        S = int(segment_ids.max()) + 1 if T else 0
    else:
        checks.integer("num_segments", num_segments, at_least=0)
        S = num_segments
    if ref_logps is not None:
        checks.tensor("ref_logps", ref_logps, (S,), wide, device)
        checks.sums_of_logps(ref_logps)
    if ref_hidden is not None:
        checks.reference_head(hidden, weight, bias, ref_hidden, ref_weight, ref_bias)
        checks.frozen_reference(weight, bias, ref_weight, ref_bias)
    checks.token_values(labels, segment_ids, V, S, ignore_index)
    checks.pair_values(pairs, S)

    # Per-token log-probs: tokens of no segment are not worth scoring.
    labels = labels.where(segment_ids >= 0, ignore_index)
    ref_head = weight if ref_weight is None else ref_weight
    shift = bias if ref_bias is None else ref_bias
    same_head = ref_head is weight and shift is bias
    hidden, weight, bias = _autocast(hidden), _autocast(weight), _autocast(bias)
    options = {"softcap": softcap, "temperature": 1.0, "ignore_index": ignore_index}
    module = _chosen(impl, hidden, weight)
    tokens, ref_tokens = module.token_logps(
        hidden,
        weight,
        labels,
        bias,
        _autocast(ref_hidden.detach()) if ref_hidden is not None and same_head else None,
        **options,
    )
    if ref_hidden is not None and not same_head:
        # The same arithmetic as for the policy, which may depend on whether its head is trained.
        ref_head = _autocast(ref_head.detach())
        if weight.requires_grad:
            ref_head.requires_grad_()
        with torch.no_grad():
            ref_tokens, _ = module.token_logps(
                _autocast(ref_hidden), ref_head, labels, _autocast(shift), None, **options
            )

    sums = getattr(module, "segment_sums", segment_sums)
    logps, counts = sums(tokens, segment_ids, labels, S, ignore_index)  # [S], [S]
    if ref_tokens is not None:
        ref, _ = sums(ref_tokens, segment_ids, labels, S, ignore_index)
    else:
        ref = torch.zeros_like(logps) if ref_logps is None else ref_logps.detach().double()

    loss, losses = pair_losses(
        logps,
        ref,
        counts,
        pairs,
        pair_weights,
        loss_type=loss_type,
        beta=beta,
        label_smoothing=label_smoothing,
        average_log_prob=average_log_prob,
        simpo_gamma=simpo_gamma,
        rpo_alpha=rpo_alpha,
    )
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


class CPOLoss(nn.Module):
    """`cpo_loss` with its options held by a module; the tensors are passed to `forward`."""

    def __init__(
        self,
        beta: float = 0.1,
        loss_type: str = "sigmoid",
        *,
        label_smoothing: float = 0.0,
        average_log_prob: bool = False,
        simpo_gamma: float = 0.5,
        rpo_alpha: float = 0.0,
        softcap: float | None = None,
        ignore_index: int = -100,
        impl: str | None = None,
    ) -> None:
        super().__init__()
        checks.scoring_options(softcap, 1.0, ignore_index)
        checks.loss_options(
            loss_type, beta, label_smoothing, average_log_prob, simpo_gamma, rpo_alpha
        )
        self.beta = beta
        self.loss_type = loss_type
        self.label_smoothing = label_smoothing
        self.average_log_prob = average_log_prob
        self.simpo_gamma = simpo_gamma
        self.rpo_alpha = rpo_alpha
        self.softcap = softcap
        self.ignore_index = ignore_index
        self.impl = impl

    def extra_repr(self) -> str:
        return f"beta={self.beta}, loss_type={self.loss_type!r}, impl={self.impl!r}"

    def forward(
        self,
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
        pair_weights: Tensor | None = None,
        num_segments: int | None = None,
    ) -> CPOOutput:
        """See `cpo_loss`."""
        return cpo_loss(
            hidden,
            weight,
            labels,
            segment_ids,
            pairs,
            ref_hidden=ref_hidden,
            ref_weight=ref_weight,
            ref_bias=ref_bias,
            ref_logps=ref_logps,
            bias=bias,
            softcap=self.softcap,
            beta=self.beta,
            loss_type=self.loss_type,
            label_smoothing=self.label_smoothing,
            average_log_prob=self.average_log_prob,
            simpo_gamma=self.simpo_gamma,
            rpo_alpha=self.rpo_alpha,
            pair_weights=pair_weights,
            num_segments=num_segments,
            ignore_index=self.ignore_index,
            impl=self.impl,
        )
