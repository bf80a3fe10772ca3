"""Time, extra memory and error of the loss op, each implementation and peer beside a floor.

The floor is what a loss around a vendor's GEMM cannot do without: H W^T of policy and reference
and P W for a frozen head, P^T H more for a trained one, as bare `torch.mm` into preallocated
outputs, in chunks whose logits fit 4 GiB. Its rounds alternate with those compared with it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.gpu.timing import ROUNDS, extra_bytes, in_turn, release
from bench.gpu.units import NotHere, Setting, Unit
from bench.gpu.variants import using, variants
from bench.loss_peers import (
    CASES,
    PACKAGES,
    PEERS,
    CannotCompute,
    Truth,
    ours,
    problem,
    tensors,
    truth,
    version,
)
from cpo_fast.loss import linear_logprobs

FROZEN, _, FORWARD, TRAINED, _ = CASES
HEADS = {"7B": (3584, 152064), "3B": (2048, 151936), "0.5B": (896, 151936)}  # D, V
TOKENS = (8192, 1024, 2048, 4096, 16384)
LSE_ONLY = "log-probs alone"
Times = dict[str, Any]


def shapes(quick: bool) -> list[tuple[str, tuple[int, int, int]]]:
    """(model, (T, D, V)), the headline first, then one T of every model, then the others."""
    if quick:
        return [("tiny", (64, 32, 1000))]
    order = [(T, name) for T in TOKENS for name in HEADS]
    return [(name, (T, *HEADS[name])) for T, name in order]


@functools.lru_cache(maxsize=1)
def buffers(shape: tuple[int, ...], device: str, trained: bool) -> tuple[Tensor, Tensor, Tensor]:
    T, D, V = shape
    weight = tensors(*shape, device)[2]
    rows = min(T, max(128, 2**32 // (2 * V) // 128 * 128))
    return (
        weight.new_empty(rows, V),
        weight.new_empty(T, D),
        weight.new_empty(V if trained else 0, D),
    )


def products(shape: tuple[int, ...], case: str, device: str) -> Callable[[], None]:
    """The bare GEMMs of a case."""
    trained, _, backward = CASES[case]
    hidden, ref_hidden, weight, _ = tensors(*shape, device)
    logits, out, grad = buffers(shape, device, trained)

    def run() -> None:
        for start in range(0, shape[0], len(logits)):
            part = slice(start, start + len(logits))
            z = logits[: len(hidden[part])]
            torch.mm(ref_hidden[part], weight.t(), out=z)
            torch.mm(hidden[part], weight.t(), out=z)
            if backward:
                torch.mm(z, weight, out=out[part])
            if trained:
                torch.mm(z.t(), hidden[part], out=grad)

    return run


@functools.lru_cache(maxsize=1)
def exact(shape: tuple[int, ...], online: bool, device: str) -> Truth:
    return truth(problem(shape, FROZEN, device), rows=512)


def measure(
    provider: str, shape: tuple[int, int, int], case: str, device: str, rounds: int
) -> dict[str, Any]:
    release(device)
    package = PACKAGES.get(provider)
    if package is not None and version(package) is None:
        raise NotHere(f"not installed: pip install {package}")
    trained, online, backward = CASES[case]
    p = problem(shape, case, device)
    with contextlib.ExitStack() as stack:
        if provider in PEERS:
            loss_of = PEERS[provider]
        else:
            loss_of = functools.partial(ours, impl=stack.enter_context(using(provider)))

        def step() -> Tensor:
            p.hidden.grad = p.weight.grad = None
            with torch.set_grad_enabled(backward):
                loss = loss_of(p)
            if backward:
                loss.backward()
            return loss.detach()

        try:
            loss = step()
        except CannotCompute as reason:
            raise NotHere(str(reason)) from None
        want_loss, want_grad, _ = exact(shape, online, device)
        errors = {"loss": abs(float(loss.double() / want_loss) - 1)}
        if backward:
            assert p.hidden.grad is not None
            difference = (p.hidden.grad.double() - want_grad).norm() / want_grad.norm()
            errors["gradient"] = float(difference)
        assert all(error == error for error in errors.values()), "NaN"
        p.hidden.grad = p.weight.grad = None
        memory = extra_bytes(step, device)
        runs = {"floor": products(shape, case, device), "op": step}
        times = in_turn(runs, device, rounds)
    T, D, V = shape
    gemms = 2 + backward + trained
    return {
        "provider": provider,
        "case": case,
        "tokens": T,
        "hidden": D,
        "vocabulary": V,
        "dtype": "bfloat16",
        "seconds": times["op"]["median"],
        "floor_seconds": times["floor"]["median"],
        "ratio_to_floor": times["op"]["median"] / times["floor"]["median"],
        "floor_flops_per_second": gemms * 2 * T * V * D / times["floor"]["median"],
        "extra_bytes": memory,
        "errors": errors,
        "times": times,
    }


def lse_only(variant: str, shape: tuple[int, int, int], device: str, rounds: int) -> dict[str, Any]:
    """Log-probs of the policy without gradients: the rate of one H W^T beside the bare product."""
    release(device)
    hidden, _, weight, labels = tensors(*shape, device)
    T, D, V = shape
    logits = buffers(shape, device, False)[0]

    def bare() -> None:
        for part in hidden.split(len(logits)):
            torch.mm(part, weight.t(), out=logits[: len(part)])

    with using(variant) as impl, torch.no_grad():
        if impl == "triton":
            # linear_logprobs writes the logits there, for the same bits as in training.
            from cpo_fast.kernels.linear_lse import linear_lse_logps

            run: Callable[[], Tensor] = functools.partial(linear_lse_logps, hidden, weight, labels)
        else:
            run = functools.partial(linear_logprobs, hidden, weight, labels, impl=impl)
        times = in_turn({"floor": bare, "op": run}, device, rounds)
        memory = extra_bytes(run, device)
    work = 2 * T * V * D
    return {
        "provider": variant,
        "case": LSE_ONLY,
        "tokens": T,
        "hidden": D,
        "vocabulary": V,
        "seconds": times["op"]["median"],
        "floor_seconds": times["floor"]["median"],
        "ratio_to_floor": times["op"]["median"] / times["floor"]["median"],
        "flops_per_second": work / times["op"]["median"],
        "floor_flops_per_second": work / times["floor"]["median"],
        "extra_bytes": memory,
        "times": times,
    }


def units(setting: Setting) -> list[Unit]:
    device = setting.device
    sound = [name for name in variants(device) if name not in setting.red and name != "reference"]
    if device == "cpu" and not sound:
        sound = ["reference"]
    found = []
    rounds = 3 if setting.quick else ROUNDS
    # Eager first: ours is judged by its error. The others take seconds to import and to compile.
    peers = ("eager",) if setting.quick else tuple(PEERS)
    for model, shape in shapes(setting.quick):
        for case in (TRAINED, FORWARD) if setting.quick else (FROZEN, TRAINED, FORWARD):
            if case == FORWARD:
                for name in sound:
                    run = functools.partial(lse_only, name, shape, device, rounds)
                    found.append(Unit(f"{model} T={shape[0]}, {LSE_ONLY}: {name}", run))
            for name in (*peers, *sound):
                run = functools.partial(measure, name, shape, case, device, rounds)
                found.append(Unit(f"{model} T={shape[0]}, {case}: {name}", run))
    return found
