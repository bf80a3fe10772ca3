"""What the loss op's arguments must be; errors name the argument and what it should have been.

Nothing here computes. Checks that look at values are made for CPU tensors, and for CUDA tensors
only when CPO_FAST_CHECKS=1, because there they wait for the device. They are left out while
torch.compile traces.
"""

from __future__ import annotations

import math
import os
from typing import Any, TypeVar

import torch
from torch import Tensor

from cpo_fast.loss.losses import LOSS_TYPES

MaybeTensor = TypeVar("MaybeTensor", bound=Any)

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def looks_at_values(tensor: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False
    return tensor.device.type == "cpu" or os.environ.get("CPO_FAST_CHECKS") == "1"


def tensor(
    name: str,
    value: object,
    shape: tuple[int | str, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device | None = None,
) -> Tensor:
    """`value` as a tensor of this shape (a str stands for any size), dtype and device."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if hasattr(value, "device_mesh"):
        raise ValueError(f"{name} must be a plain tensor, got a DTensor: pass {name}.full_tensor()")
    fits = value.dim() == len(shape) and all(
        isinstance(want, str) or want == got for want, got in zip(shape, value.shape, strict=True)
    )
    if not fits:
        expected = ", ".join(str(size) for size in shape)
        raise ValueError(f"{name} must have shape [{expected}], got {list(value.shape)}")
    if value.dtype not in dtypes:
        expected = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name} must be {expected}, got {value.dtype}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} must be on {device} as hidden is, got {value.device}")
    return value


def gathered(name: str, value: MaybeTensor, trained: bool = True) -> MaybeTensor:
    """A DTensor's whole value, by a collective; anything else as it is.

    Refused where a gradient would flow back (`trained`): ranks that see different tokens must add
    theirs up, ranks that see the same must not, and the tensor does not tell which it is.
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


def head(
    hidden: object,
    weight: object,
    bias: object | None,
    *,
    prefix: str = "",
    rows: int | str = "T",
    vocabulary: int | str = "V",
    device: torch.device | None = None,
) -> None:
    """hidden [T, D], weight [V, D] and bias [V] of one dtype (any of them under autocast) and
    device."""
    h = tensor(f"{prefix}hidden", hidden, (rows, "D"), FLOATS, device)
    mixed = torch.is_autocast_enabled(h.device.type)
    dtypes = FLOATS if mixed else (h.dtype,)
    w = tensor(f"{prefix}weight", weight, (vocabulary, h.shape[1]), dtypes, h.device)
    if not w.is_contiguous():
        raise ValueError(f"{prefix}weight must be contiguous [V, D], got strides {w.stride()}")
    if w.shape[0] == 0 or w.shape[1] == 0:
        raise ValueError(f"{prefix}weight must have V >= 1 and D >= 1, got {list(w.shape)}")
    if bias is not None:
        tensor(f"{prefix}bias", bias, (w.shape[0],), dtypes, h.device)


def indices(name: str, value: object, shape: tuple[int | str, ...], device: torch.device) -> Tensor:
    return tensor(name, value, shape, (torch.int64,), device)


def index_range(name: str, value: Tensor, low: int, high: int, also: int | None = None) -> None:
    """Every entry in low..high-1, or equal to `also`."""
    if not looks_at_values(value):
        return
    bad = (value < low) | (value >= high)
    if also is not None:
        bad &= value != also
    if bad.any():
        allowed = f"in [{low}, {high})" + ("" if also is None else f" or {also}")
        raise ValueError(f"{name} must be {allowed}, got {int(value[bad][0])}")


def number(
    name: str, value: object, *, above: float | None = None, at_least: float | None = None
) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not -math.inf < value < math.inf:  # math.isfinite takes no symbolic float of torch.compile
        raise ValueError(f"{name} must be finite, got {value}")
    if above is not None and value <= above:
        raise ValueError(f"{name} must be > {above:g}, got {value}")
    if at_least is not None and value < at_least:
        raise ValueError(f"{name} must be >= {at_least:g}, got {value}")


def integer(name: str, value: object, at_least: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if at_least is not None and value < at_least:
        raise ValueError(f"{name} must be >= {at_least}, got {value}")


def scoring_options(softcap: object, temperature: object, ignore_index: object) -> None:
    if softcap is not None:
        number("softcap", softcap, above=0)
    number("temperature", temperature, above=0)
    integer("ignore_index", ignore_index)


def loss_options(
    loss_type: object,
    beta: object,
    label_smoothing: float,
    average_log_prob: object,
    simpo_gamma: float,
    rpo_alpha: object,
) -> None:
    """Options in range, and only those that `loss_type` uses."""
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type must be one of {', '.join(LOSS_TYPES)}, got {loss_type!r}")
    kind = LOSS_TYPES[str(loss_type)]
    number("beta", beta, above=0)
    number("rpo_alpha", rpo_alpha, at_least=0)
    number("simpo_gamma", simpo_gamma)
    number("label_smoothing", label_smoothing)
    if kind.smoothing is None:
        if label_smoothing != 0:
            raise ValueError(f"label_smoothing must be 0: loss_type {loss_type!r} does not use it")
    elif not kind.smoothing[0] <= label_smoothing < kind.smoothing[1]:
        low = "> 0" if kind.smoothing[0] > 0 else ">= 0"
        raise ValueError(
            f"label_smoothing must be {low} and < {kind.smoothing[1]:g} "
            f"for loss_type {loss_type!r}, got {label_smoothing}"
        )
    if not isinstance(average_log_prob, bool):
        raise TypeError(f"average_log_prob must be a bool, got {type(average_log_prob).__name__}")
    if average_log_prob and kind.averages:
        raise ValueError(f"average_log_prob must be False: {loss_type!r} averages by itself")
    if simpo_gamma != 0.5 and loss_type != "simpo":
        raise ValueError(f"simpo_gamma must be left at 0.5: {loss_type!r} does not use it")


def references(
    loss_type: str, ref_hidden: object, ref_logps: object, ref_weight: object, ref_bias: object
) -> None:
    """Exactly one source of reference log-probs where the loss compares with a reference, else
    none."""
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
