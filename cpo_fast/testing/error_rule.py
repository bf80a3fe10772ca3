"""The rule on errors: against float64, at most twice the error of eager PyTorch in the same
precision, plus a band for one rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the GPU check's parent process does not import torch
    from torch import Tensor


def allowed_error(eager_error: float, band: float) -> float:
    return 2 * eager_error + band


def largest_error(value: Tensor, truth: Tensor) -> float:
    """Where the truth is finite; elsewhere both must be the same infinity. NaN never passes."""
    assert not value.isnan().any(), "NaN never passes"
    finite = truth.isfinite()
    assert value[~finite].double().equal(truth[~finite]), "another infinity"
    return float((value.double() - truth)[finite].abs().max()) if finite.any() else 0.0


def norm_of_error(value: Tensor, truth: Tensor) -> float:
    """Euclidean norm; every value must be finite."""
    assert value.isfinite().all(), "a value is not finite"
    return float((value.double() - truth).norm())


def assert_as_good(
    value: Tensor,
    eager: Tensor,
    truth: Tensor,
    band: float,
    *,
    name: str = "value",
    measure: Callable[[Tensor, Tensor], float] = largest_error,
) -> float:
    """Assert the rule for one tensor; returns its error."""
    error, theirs = measure(value, truth), measure(eager, truth)
    assert error <= allowed_error(theirs, band), (
        f"{name}: {measure.__name__} {error:.2e}, eager {theirs:.2e}, band {band:.2e}"
    )
    return error


def assert_all_as_good(
    values: dict[str, Tensor], eager: dict[str, Tensor], truth: dict[str, Tensor], eps: float
) -> dict[str, float]:
    """Assert the rule in norm and elementwise, with bands of `eps` times the size of the truth.

    Returns {name: relative error in the Euclidean norm}.
    """
    errors = {}
    for name, exact in truth.items():
        size, largest = float(exact.norm()), float(exact.abs().max())
        error = assert_as_good(
            values[name], eager[name], exact, eps * size + 1e-6, name=name, measure=norm_of_error
        )
        assert_as_good(values[name], eager[name], exact, 3 * eps * largest + 1e-6, name=name)
        errors[name] = error / (size + 1e-30)
    return errors
