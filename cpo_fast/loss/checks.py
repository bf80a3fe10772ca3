"""Validation of the loss op's arguments. Errors name the argument and what it must be.

Values are checked on CPU tensors, and on CUDA tensors only with CPO_FAST_CHECKS=1, because the
check waits for the device. While torch.compile traces, values are not checked.
"""

from __future__ import annotations

import math
import os
import warnings
from typing import Any, TypeVar

import torch
from torch import Tensor

from cpo_fast.loss import advice
from cpo_fast.loss.options import LOSS_TYPES, LossOptions

MaybeTensor = TypeVar("MaybeTensor", bound=Any)

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def looks_at_values(tensor: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False
    return tensor.device.type == "cpu" or os.environ.get("CPO_FAST_CHECKS") == "1"


def check_tensor(
    name: str,
    value: object,
    shape: tuple[int | str, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device | None = None,
    like: str = "",
    shape_hint: str | None = None,
) -> Tensor:
    """`value`, checked to be a tensor of this shape (a str stands for any size), of one of these
    dtypes and on this device; `like` names the argument that sets the dtype."""
    if not isinstance(value, Tensor):
        got = f"got {type(value).__name__}{advice.on_type(name, value)}"
        raise TypeError(f"{name} must be a torch.Tensor, {got}")
    if hasattr(value, "device_mesh"):
        raise ValueError(f"{name} must be a plain tensor, got a DTensor: pass {name}.full_tensor()")
    fits = value.dim() == len(shape) and all(
        isinstance(want, str) or want == got for want, got in zip(shape, value.shape, strict=True)
    )
    if not fits:
        expected = ", ".join(str(size) for size in shape)
        hint = advice.on_shape(name, value, shape) if shape_hint is None else f": {shape_hint}"
        raise ValueError(f"{name} must have shape [{expected}], got {list(value.shape)}{hint}")
    if value.dtype not in dtypes:
        expected = " or ".join(str(dtype) for dtype in dtypes)
        as_other = f" as {like} is" if like else ""
        hint = advice.on_dtype(name, value, dtypes)
        raise TypeError(f"{name} must be {expected}{as_other}, got {value.dtype}{hint}")
    if device is not None and value.device != device:
        raise ValueError(
            f"{name} must be on {device} as hidden is, got {value.device}: pass "
            f"{name}.to(hidden.device)"
        )
    return value


def gather_full(name: str, value: MaybeTensor, trained: bool = True) -> MaybeTensor:
    """The full tensor of a DTensor, by a collective; other values unchanged.

    Raises ValueError where a gradient would flow back (`trained`): ranks with different tokens must
    sum their gradients, ranks with the same tokens must not, and a DTensor does not say which.
    """
    if not hasattr(value, "device_mesh"):
        return value
    if trained and value.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} must be a plain tensor when it is trained, got a sharded DTensor: call inside "
            "the forward of the module that owns it, where FSDP2 has gathered it, or pass "
            f"{name}.full_tensor(grad_placements=...) with the placement of its gradient"
        )
    return value.detach().full_tensor()


def check_head(
    hidden: object,
    weight: object,
    bias: object | None,
    *,
    names: tuple[str, str, str] = ("hidden", "weight", "bias"),
    rows: int | str = "T",
    vocabulary: int | str = "V",
    device: torch.device | None = None,
) -> None:
    """hidden [T, D], weight [V, D] and bias [V] on one device and of one dtype (any dtypes under
    autocast); `names` are the caller's argument names."""
    h = check_tensor(names[0], hidden, (rows, "D"), FLOATS, device)
    dtypes = _beside(h)
    if isinstance(weight, Tensor) and weight.dim() == 2:
        message = advice.on_head(h, weight, names[:2])
        if message is not None:
            raise ValueError(message)
    w = check_tensor(names[1], weight, (vocabulary, h.shape[1]), dtypes, h.device, like=names[0])
    if not w.is_contiguous():
        raise ValueError(
            f"{names[1]} must be contiguous [V, D], got strides {w.stride()}: pass "
            f"{names[1]}.contiguous()"
        )
    if w.shape[0] == 0 or w.shape[1] == 0:
        raise ValueError(f"{names[1]} must have V >= 1 and D >= 1, got {list(w.shape)}")
    if bias is not None:
        check_tensor(names[2], bias, (w.shape[0],), dtypes, h.device, like=names[0])


def check_reference_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: object,
    ref_weight: object | None,
    ref_bias: object | None,
) -> None:
    """ref_hidden with its own head or the policy's; the policy's arguments are already checked."""
    T, D = hidden.shape
    shared = ref_weight is None
    narrow = FLOATS if hidden.dtype == torch.float64 else FLOATS[:3]
    dtypes, like = (_beside(hidden), "hidden") if shared else (narrow, "")
    states = check_tensor("ref_hidden", ref_hidden, (T, "D"), dtypes, hidden.device, like=like)
    if shared and states.shape[1] not in weight.shape:
        raise ValueError(
            f"ref_hidden must have D = {D} as hidden has, got {list(states.shape)}: pass the "
            "ref_weight [V, D] of a reference of another size"
        )
    check_head(
        ref_hidden,
        weight if shared else ref_weight,
        bias if ref_bias is None else ref_bias,
        names=(
            "ref_hidden",
            "weight" if shared else "ref_weight",
            "bias" if ref_bias is None else "ref_bias",
        ),
        rows=T,
        vocabulary=weight.shape[0],
        device=hidden.device,
    )


def _beside(hidden: Tensor) -> tuple[torch.dtype, ...]:
    """Dtypes allowed for a head: the dtype of hidden, or under autocast any that autocast casts."""
    mixed = torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64
    return FLOATS[:3] if mixed else (hidden.dtype,)


def warn_of_trained_head(
    weight: Tensor, bias: Tensor | None, ref_weight: object | None, ref_bias: object | None
) -> None:
    """Warn where a trained head also scores the reference and was not passed for it."""
    if torch.compiler.is_compiling():
        return
    parts = (("weight", weight, ref_weight), ("bias", bias, ref_bias))
    for part, own, given in parts:
        if own is not None and own.requires_grad and given is None:
            warnings.warn(
                f"{part} is trained and ref_{part} is not given: ref_hidden is scored with the "
                f"trained {part}, so the reference moves with the policy. Pass "
                f"ref_{part}=reference.lm_head.{part}, or ref_{part}={part} if policy and "
                "reference share it on purpose",
                UserWarning,
                stacklevel=3,
            )


def check_indices(
    name: str, value: object, shape: tuple[int | str, ...], device: torch.device
) -> Tensor:
    return check_tensor(name, value, shape, (torch.int64,), device)


def check_index_range(
    name: str, value: Tensor, low: int, high: int, also: int | None = None, hint: str = ""
) -> None:
    """Every entry is in low..high-1 or equal to `also`."""
    if not looks_at_values(value):
        return
    bad = (value < low) | (value >= high)
    if also is not None:
        bad &= value != also
    if bad.any():
        allowed = f"in [{low}, {high})" + ("" if also is None else f" or {also}")
        place = bad.nonzero()[0].tolist()
        got = f"got {int(value[bad][0])} in {name}{place}"
        raise ValueError(f"{name} must be {allowed}, {got}" + (hint and f": {hint}"))


def check_label_range(labels: Tensor, vocabulary: int, ignore_index: int) -> None:
    hint = "weight has one row for each token id; mark tokens not to score with ignore_index"
    check_index_range("labels", labels, 0, vocabulary, ignore_index, hint)


def check_token_values(
    labels: Tensor, segment_ids: Tensor, vocabulary: int, segments: int, ignore_index: int
) -> None:
    """labels and segment_ids are in range; warns where they leave no token to score."""
    check_label_range(labels, vocabulary, ignore_index)
    check_index_range("segment_ids", segment_ids, 0, segments, also=-1)
    if not (looks_at_values(labels) and looks_at_values(segment_ids)) or not labels.numel():
        return
    if not ((labels != ignore_index) & (segment_ids >= 0)).any():
        warnings.warn(
            "labels leave no token to score: each is ignore_index or its token has segment_ids "
            "-1. The loss is 0 and has no gradient. labels must hold the token ids of the answers",
            UserWarning,
            stacklevel=3,
        )


def check_pairs(
    pairs: Tensor,
    segments: int,
    hint: str = "without num_segments the segments end at segment_ids.max()",
) -> None:
    """Each row names two different segments."""
    check_index_range("pairs", pairs, 0, segments, hint=hint)
    if not looks_at_values(pairs):
        return
    same = pairs[:, 0] == pairs[:, 1]
    if same.any():
        row = int(same.nonzero()[0])
        raise ValueError(
            f"pairs must name two different segments in each row, got {pairs[row].tolist()} in "
            f"pairs[{row}]: a row is (chosen, rejected); for a row of all chosen and a row of all "
            "rejected pass pairs.T"
        )


def check_ref_logps(ref_logps: Tensor) -> None:
    """ref_logps are finite; warns where positive values show that they are not log-probs."""
    if not looks_at_values(ref_logps):
        return
    if not ref_logps.isfinite().all():
        raise ValueError("ref_logps must be finite")
    if (ref_logps > 1e-3).any():
        warnings.warn(
            "ref_logps are positive, which sums of log-probs cannot be: for losses (negative "
            "log-likelihoods) pass -ref_logps",
            UserWarning,
            stacklevel=3,
        )


def check_pair_weights(pair_weights: Tensor) -> None:
    if looks_at_values(pair_weights) and not (pair_weights.isfinite() & (pair_weights >= 0)).all():
        raise ValueError("pair_weights must be finite and >= 0")


def check_number(
    name: str, value: object, *, above: float | None = None, at_least: float | None = None
) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        got = f"got {type(value).__name__}{advice.on_number(name, value)}"
        raise TypeError(f"{name} must be a number, {got}")
    if not -math.inf < value < math.inf:  # math.isfinite takes no symbolic float of torch.compile
        raise ValueError(f"{name} must be finite, got {value}")
    if above is not None and value <= above:
        raise ValueError(f"{name} must be > {above:g}, got {value}")
    if at_least is not None and value < at_least:
        raise ValueError(f"{name} must be >= {at_least:g}, got {value}")


def check_integer(name: str, value: object, at_least: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if at_least is not None and value < at_least:
        raise ValueError(f"{name} must be >= {at_least}, got {value}")


def check_options(given: LossOptions) -> None:
    """Options have the right type and range, and `loss_type` uses those that are not default."""
    if given.softcap is not None:
        check_number("softcap", given.softcap, above=0)
    check_number("temperature", given.temperature, above=0)
    check_integer("ignore_index", given.ignore_index)
    loss_type, smoothing = given.loss_type, given.label_smoothing
    if not isinstance(loss_type, str):
        raise TypeError(
            f"loss_type must be a str, got {type(loss_type).__name__}: for a sum of losses call "
            "once for each and add them"
        )
    if loss_type not in LOSS_TYPES:
        hint = advice.on_loss_type(loss_type, tuple(LOSS_TYPES))
        raise ValueError(
            f"loss_type must be one of {', '.join(LOSS_TYPES)}, got {loss_type!r}{hint}"
        )
    kind = LOSS_TYPES[loss_type]
    check_number("beta", given.beta, above=0)
    check_number("rpo_alpha", given.rpo_alpha, at_least=0)
    check_number("simpo_gamma", given.simpo_gamma)
    check_number("label_smoothing", smoothing)
    if kind.smoothing is None:
        if smoothing != 0:
            raise ValueError(f"label_smoothing must be 0: loss_type {loss_type!r} does not use it")
    elif not kind.smoothing[0] <= smoothing < kind.smoothing[1]:
        low = "> 0" if kind.needs_smoothing else ">= 0"
        raise ValueError(
            f"label_smoothing must be {low} and < {kind.smoothing[1]:g} "
            f"for loss_type {loss_type!r}, got {smoothing}"
        )
    average = given.average_log_prob
    if not isinstance(average, bool):
        raise TypeError(f"average_log_prob must be a bool, got {type(average).__name__}")
    if average and kind.averages:
        raise ValueError(f"average_log_prob must be False: {loss_type!r} always averages")
    if given.simpo_gamma != 0.5 and loss_type != "simpo":
        raise ValueError(f"simpo_gamma must be left at 0.5: {loss_type!r} does not use it")


def check_references(
    loss_type: str, ref_hidden: object, ref_logps: object, ref_weight: object, ref_bias: object
) -> None:
    """Exactly one source of reference log-probs for a loss with a reference, else none."""
    given = [
        name
        for name, value in (("ref_hidden", ref_hidden), ("ref_logps", ref_logps))
        if value is not None
    ]
    if not LOSS_TYPES[loss_type].reference:
        if given or ref_weight is not None or ref_bias is not None:
            name = (given or ["ref_weight" if ref_weight is not None else "ref_bias"])[0]
            raise ValueError(f"{name} must be None: loss_type {loss_type!r} has no reference")
        return
    if len(given) != 1:
        raise ValueError(
            f"exactly one of ref_hidden and ref_logps must be given for loss_type {loss_type!r}, "
            f"got {' and '.join(given) or 'neither'}"
        )
    if ref_hidden is None:
        for name, value in (("ref_weight", ref_weight), ("ref_bias", ref_bias)):
            if value is not None:
                raise ValueError(f"{name} must be None when ref_logps is given")
