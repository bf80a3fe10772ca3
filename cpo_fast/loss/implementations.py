"""The implementations of `token_logps`: which are available, and which one a call uses."""

from __future__ import annotations

import functools
import importlib
import warnings
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from cpo_fast.loss.options import IMPLS

_modules: dict[str, Any] = {}  # the imported modules, or their ImportErrors


def _load(name: str) -> ModuleType | ImportError:
    if name not in _modules:
        try:
            _modules[name] = importlib.import_module(f"cpo_fast.loss.{name}")
        except ImportError as error:
            _modules[name] = error
    return _modules[name]


def impl_obstacles(device: torch.device | str = "cpu") -> dict[str, str | None]:
    """Every implementation, the preferred one last, and why it is unavailable for tensors on
    `device` (None: it is available)."""
    device = torch.device(device)
    modules = {name: _load(name) for name in IMPLS}
    return {
        name: f"cannot be imported: {module}"
        if isinstance(module, ImportError)
        else module.obstacle(device)
        for name, module in modules.items()
    }


def available_impls(device: torch.device | str = "cpu") -> tuple[str, ...]:
    """Names that `impl=` accepts for tensors on `device`, the preferred one last."""
    return tuple(name for name, obstacle in impl_obstacles(device).items() if obstacle is None)


def choose(impl: str | None, hidden: Tensor, weight: Tensor) -> ModuleType:
    """The implementation that a call uses: the one that was measured to be the fastest for such a
    head [V, D] (`cpo_fast.loss.cuda.MEASURED`), else the preferred one.

    An explicit `impl` is used or refused (ValueError, TypeError), never replaced.
    """
    names = _candidates(impl, hidden.device.type, hidden.dtype)
    V, D = weight.shape  # can be symbols of torch.compile
    for name in names[:-1]:
        if hasattr(_modules[name], "wins") and _modules[name].wins(V, D):
            return _modules[name]
    return _modules[names[-1]]


def _candidates(impl: str | None, device: str, dtype: torch.dtype) -> tuple[str, ...]:
    """Names of implementations that can take the call, the preferred one last."""
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


# Set directly: torch.compiler.assume_constant_result imports the compiler, which takes a second.
_candidates._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _supports(name: str, dtype: torch.dtype) -> bool:
    module = _load(name)
    return isinstance(module, ModuleType) and module.supports(dtype)


@functools.cache
def _warn_no_native() -> None:
    warnings.warn(
        "cpo_fast._cpu is not built (no C++ compiler at install time?): CPU tensors use the slower "
        "'reference' implementation. To use the native one, reinstall with a compiler.",
        RuntimeWarning,
        stacklevel=5,
    )
