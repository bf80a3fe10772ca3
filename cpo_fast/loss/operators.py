"""Registration of the custom operators with torch.library.

torch.library.custom_op imports torch's compiler when an operator first runs, which takes over a
second in a process that compiles nothing. Defining and registering the operators step by step, as
here, avoids the import.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NoReturn, get_type_hints

import torch
from torch import Tensor

from cpo_fast.loss.options import LossOptions

_library = torch.library.Library("cpo_fast", "FRAGMENT")

Function = Callable[..., Any]


@dataclass(frozen=True)
class Plan:
    """How one call computes: the scalar arguments of `token_logps` operators."""

    softcap: float | None
    temperature: float
    ignore_index: int
    want_hidden: bool  # gradient of hidden
    want_head: bool  # gradient of weight or bias
    keep: bool  # store d logp / d logits of all rows for the head's gradient
    room: int  # bytes of logits that may exist at once
    kernel: str  # chosen by the implementation
    slots: int  # parts of the vocabulary that the CPU's fused kernel sums separately

    @classmethod
    def of(
        cls,
        options: LossOptions,
        hidden: Tensor,  # [T, D]
        weight: Tensor,  # [V, D]
        bias: Tensor | None,  # [V]
        *,
        room: int,
        keep_bytes: int,
        kernel: str = "",
        slots: int = 1,
    ) -> Plan:
        """`keep_bytes`: memory for `keep`, which must not exceed the room."""
        tracking = torch.is_grad_enabled()
        head = weight.requires_grad or (bias is not None and bias.requires_grad)
        return cls(
            softcap=options.softcap,
            temperature=float(options.temperature),
            ignore_index=options.ignore_index,
            want_hidden=tracking and hidden.requires_grad,
            want_head=tracking and head,
            keep=tracking and head and keep_bytes <= room,
            room=room,
            kernel=kernel,
            slots=slots,
        )


_FIELDS = [field.name for field in fields(Plan)]


class Operator:
    """Functional operator `cpo_fast::name` on all devices, called like `function`.

    The annotations of `function` define the schema; the fields of a last argument `plan: Plan` are
    separate arguments of the operator. `fake` has the arguments of `function` and returns outputs
    without values, for torch.compile and FakeTensors.
    """

    def __init__(self, name: str, function: Function, fake: Function) -> None:
        self._planned = "plan" in inspect.signature(function).parameters
        if self._planned:
            function, fake = _flattened(function), _flattened(fake, function)
        schema = torch.library.infer_schema(function, mutates_args=())
        self._name = f"cpo_fast::{name}"
        _library.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
        _library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(self._name, fake, lib=_library)
        self._call = getattr(torch.ops.cpo_fast, name).default

    def __call__(self, *inputs: Any) -> Any:
        if not self._planned:
            return self._call(*inputs)
        plan = inputs[-1]
        return self._call(*inputs[:-1], *[getattr(plan, name) for name in _FIELDS])

    def register_autograd(self, backward: Function, setup_context: Function) -> None:
        torch.library.register_autograd(
            self._name, backward, setup_context=setup_context, lib=_library
        )

    def refuse_gradients(self) -> Operator:
        """Raise RuntimeError in a backward pass through this operator; by default torch would only
        warn and omit the gradient."""
        self.register_autograd(no_second_derivative, lambda ctx, inputs, output: None)
        return self


def _flattened(function: Function, model: Function | None = None) -> Function:
    """`function` with the fields of its last argument, a Plan, as separate arguments; `model` is
    a function whose annotations are used instead."""
    hints = get_type_hints(model or function)
    returns, _ = hints.pop("return"), hints.pop("plan")
    count = len(hints)

    def flat(*inputs: Any) -> Any:
        return function(*inputs[:count], Plan(*inputs[count:]))

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    flat.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(name, kind, annotation=hint)
            for name, hint in (hints | get_type_hints(Plan)).items()
        ],
        return_annotation=returns,
    )
    return flat


def no_second_derivative(*_: Any) -> NoReturn:
    raise RuntimeError("cpo_fast: only first derivatives of the log-probs are implemented")


def token_operator(
    name: str,
    forward: Function,
    fake: Function,
    head_grads: Function,
    row_scale: Function,
    *,
    has_factors: bool = False,
) -> Operator:
    """Operator `cpo_fast::{name}_logps` of an implementation, with gradients of hidden and head.

        forward(hidden, weight, labels, bias, ref_hidden, plan)
            -> (logps [T], ref_logps [T], product [T, D], *saved)
        row_scale(product, coefficients [T] float32) -> rows [T, D]
        head_grads(coefficients, hidden, weight, labels, bias, *saved, want_weight, want_bias, plan)
            -> (dW [V, D], d bias [V])

    Unwanted outputs have 0 rows. d logp_t / d hidden_t is product[t], with `has_factors` times
    saved[0][t]. `coefficients` are d loss / d logps. `fake` is that of `forward`. `row_scale` and
    `head_grads` become operators, too.
    """
    logps = Operator(f"{name}_logps", forward, fake)
    scale = Operator(f"{name}_row_scale", row_scale, _fake_rows).refuse_gradients()
    head = Operator(f"{name}_head_grads", head_grads, _fake_head_grads).refuse_gradients()

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        hidden, weight, labels, bias, _, *scalars = inputs
        _, _, product, *saved = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:])
        ctx.plan, ctx.dtype = Plan(*scalars), hidden.dtype
        rows = (product, *saved[:has_factors])
        ctx.save_for_backward(
            *rows, *((hidden, weight, labels, bias, *saved) if ctx.plan.want_head else ())
        )

    def backward(
        ctx: Any, coefficients: Tensor | None, *_: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        grads: list[Tensor | None] = [None] * (5 + len(_FIELDS))
        if coefficients is None:
            return tuple(grads)
        coefficients = coefficients.contiguous()
        product, *saved = ctx.saved_tensors
        if ctx.needs_input_grad[0]:
            shares = coefficients * saved[0] if has_factors else coefficients
            grads[0] = scale(product, shares).to(ctx.dtype)
        want_weight, want_bias = ctx.needs_input_grad[1], ctx.needs_input_grad[3]
        if want_weight or want_bias:
            inputs = saved[has_factors:]
            weight, bias = head(coefficients, *inputs, want_weight, want_bias, ctx.plan)
            grads[1] = weight if want_weight else None
            grads[3] = bias if want_bias else None
        return tuple(grads)

    logps.register_autograd(backward, save)
    return logps


def _fake_rows(rows: Tensor, coefficients: Tensor) -> Tensor:
    return torch.empty_like(rows)


def _fake_head_grads(
    coefficients: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    want_weight, want_bias, _ = rest[-3:]
    V, D = weight.shape
    return (
        weight.new_empty((V, D) if want_weight else (0, D)),
        (weight if bias is None else bias).new_empty(V if want_bias else 0),
    )
