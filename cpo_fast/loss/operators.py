"""Operators of torch.library that import no compiler when they first run.

torch.library.custom_op wraps an operator's kernel at its first call, for which it imports torch's
compiler: over a second in a process that compiles nothing. Defined and registered one by one, as
here, the same operator does without.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch

_library = torch.library.Library("cpo_fast", "FRAGMENT")

Function = Callable[..., Any]


class Operator:
    """A functional operator `cpo_fast::name`, on all devices; called like its function."""

    def __init__(self, name: str, function: Function) -> None:
        schema = torch.library.infer_schema(function, mutates_args=())
        _library.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
        _library.impl(name, function, "CompositeExplicitAutograd")
        self._name = f"cpo_fast::{name}"
        self._call = getattr(torch.ops.cpo_fast, name).default

    def __call__(self, *inputs: Any) -> Any:
        return self._call(*inputs)

    def register_fake(self, function: Function) -> Function:
        """`function` makes outputs without values, for torch.compile and FakeTensors."""
        torch.library.register_fake(self._name, function, lib=_library)
        return function

    def register_autograd(self, backward: Function, setup_context: Function) -> None:
        torch.library.register_autograd(
            self._name, backward, setup_context=setup_context, lib=_library
        )


def operator(name: str, *, differentiable: bool = True) -> Callable[[Function], Operator]:
    """Make the decorated function an operator; its annotations are the schema.

    One that is not differentiable raises RuntimeError in a backward through it: without a formula
    torch would only warn, and leave the gradient out.
    """

    def decorate(function: Function) -> Operator:
        made = Operator(name, function)
        if not differentiable:
            made.register_autograd(no_second_derivative, lambda ctx, inputs, output: None)
        return made

    return decorate


def no_second_derivative(*_: Any) -> NoReturn:
    raise RuntimeError("cpo_fast: only first derivatives of the log-probs are implemented")
