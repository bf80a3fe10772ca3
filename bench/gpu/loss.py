"""Time, extra memory and error of the loss op, each implementation and peer beside a floor.

The floor is what a loss around a vendor's GEMM cannot do without: H W^T of policy and reference
and P W for a frozen head, P^T H more for a trained one, as bare `torch.mm` into preallocated
outputs, in chunks whose logits fit 4 GiB. It is timed under the vendor library's default settings
and under those that ours sets; the faster of the two counts. Its rounds alternate with those
compared with it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench.gpu import cases
from bench.gpu.cases import FROZEN, HEADS, LSE_ONLY, TRAINED, VENDOR_SETTINGS
from bench.gpu.kernel_times import profile
from bench.gpu.timing import (
    EVENTS,
    GRAPHS,
    ROUNDS,
    extra_bytes,
    in_turn,
    in_turn_small,
    release,
    under_both_settings,
)
from bench.gpu.units import NotHere, Setting, Unit
from bench.gpu.variants import LSE, using, variants
from bench.loss_peers import (
    CASES,
    PACKAGES,
    PEERS,
    CannotCompute,
    Problem,
    Truth,
    ours,
    problem,
    tensors,
    truth,
    version,
)
from cpo_fast.loss import linear_logprobs

FORWARD = "frozen head, forward only"
TOKENS = (cases.TOKENS, 1024, 2048, 4096, 16384)
EAGER = "eager"  # it judges the errors of ours
PEER_ORDER = ("trl chunked", "Liger fused DPO", "cut-cross-entropy")  # the last one may hang
QUACK = "quack"  # its wheels are a kit of their own
SMALL = 4e12  # FLOP of the floor, 5 ms: below, the host's launches may take as long
Shape = tuple[int, int, int]  # T, D, V


def shapes(quick: bool) -> list[tuple[str, Shape]]:
    """(model, shape), the headline first, then one T of every model, then the others."""
    if quick:
        return [("tiny", (64, 32, 1000))]
    order = [(T, name) for T in TOKENS for name in HEADS]
    return [(name, (T, *HEADS[name])) for T, name in order]


@functools.lru_cache(maxsize=1)
def buffers(shape: Shape, device: str, trained: bool) -> tuple[Tensor, Tensor, Tensor]:
    T, D, V = shape
    weight = tensors(*shape, device)[2]
    rows = min(T, max(128, 2**32 // (2 * V) // 128 * 128))
    return (
        weight.new_empty(rows, V),
        weight.new_empty(T, D),
        weight.new_empty(V if trained else 0, D),
    )


def products(shape: Shape, case: str, device: str) -> Callable[[], None]:
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


def beside_floor(
    floor: Callable[[], None], op: Callable[[], object], flops: float, device: str, rounds: int
) -> dict[str, Any]:
    """Times of `op`, and of a floor of so many FLOP under both settings of the vendor library."""

    runs = {**under_both_settings({"floor": floor}), "op": op}
    timed_by: dict[str, Any] = {"timed_by": EVENTS}
    if flops < SMALL:
        times, timed_by["timed_by"] = in_turn_small(runs, device, rounds)
        if device == "cuda" and timed_by["timed_by"] != GRAPHS:
            timed_by["fresh_process"] = True
    else:
        times = in_turn(runs, device, rounds)
    floors = {name: times[f"floor, {name}"]["median"] for name in VENDOR_SETTINGS}
    fastest = min(floors.values())
    return {
        "seconds": times["op"]["median"],
        "floor_seconds": fastest,
        "floors": floors,
        "ratio_to_floor": times["op"]["median"] / fastest,
        "floor_flops_per_second": flops / fastest,
        "times": times,
        **timed_by,
    }


@functools.lru_cache(maxsize=1)
def exact(shape: Shape, online: bool, device: str) -> Truth:
    return truth(problem(shape, FROZEN, device), rows=512)


@contextlib.contextmanager
def stepping(
    provider: str, shape: Shape, case: str, device: str
) -> Iterator[Callable[[], list[Tensor]]]:
    """A function that computes [loss, gradient of hidden, gradient of a trained head]."""
    package = PACKAGES.get(provider)
    if package is not None and version(package) is None:
        raise NotHere(f"not installed: pip install {package}")
    trained, _, backward = CASES[case]
    p = problem(shape, case, device)
    leaves = [p.hidden, p.weight] if trained else [p.hidden]
    with contextlib.ExitStack() as stack:
        loss_of: Callable[[Problem], Tensor]
        if provider in PEERS:
            loss_of = PEERS[provider]
        else:
            loss_of = functools.partial(ours, impl=stack.enter_context(using(provider)))

        # Gradients are returned, not stored: a captured graph cannot hold what stores them.
        def step() -> list[Tensor]:
            with torch.set_grad_enabled(backward):
                loss = loss_of(p)
            grads = torch.autograd.grad(loss, leaves) if backward else ()
            return [loss.detach(), *grads]

        yield step


def measure(
    provider: str, model: str, shape: Shape, case: str, device: str, rounds: int
) -> dict[str, Any]:
    release(device)
    trained, online, backward = CASES[case]
    with stepping(provider, shape, case, device) as step:
        try:
            loss, *grads = step()
        except CannotCompute as reason:
            raise NotHere(str(reason)) from None
        want_loss, want_grad, _ = exact(shape, online, device)
        errors = {"loss": abs(float(loss.double() / want_loss) - 1)}
        if backward:
            difference = (grads[0].double() - want_grad).norm() / want_grad.norm()
            errors["gradient"] = float(difference)
        assert all(error == error for error in errors.values()), "NaN"
        del loss, grads
        memory = extra_bytes(step, device)
        T, D, V = shape
        flops = (2 + backward + trained) * 2 * T * V * D
        figures = beside_floor(products(shape, case, device), step, flops, device, rounds)
    return {
        "provider": provider,
        "model": model,
        "case": case,
        "tokens": T,
        "hidden": D,
        "vocabulary": V,
        "dtype": "bfloat16",
        "extra_bytes": memory,
        "errors": errors,
        **figures,
    }


def lse_only(provider: str, model: str, shape: Shape, device: str, rounds: int) -> dict[str, Any]:
    """Log-probs of the policy without gradients: the rate of one H W^T beside the bare product.

    "triton lse" is the fused log-sum-exp by itself, which `linear_logprobs` never takes: its bits
    are not those of training."""
    release(device)
    hidden, _, weight, labels = tensors(*shape, device)
    T, D, V = shape
    logits = buffers(shape, device, False)[0]

    def bare() -> None:
        for part in hidden.split(len(logits)):
            torch.mm(part, weight.t(), out=logits[: len(part)])

    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if provider == LSE:
            from cpo_fast.kernels.linear_lse import linear_lse_logps

            run: Callable[[], Tensor] = functools.partial(linear_lse_logps, hidden, weight, labels)
        else:
            impl = stack.enter_context(using(provider))
            run = functools.partial(linear_logprobs, hidden, weight, labels, impl=impl)
        work = 2 * T * V * D
        figures = beside_floor(bare, run, work, device, rounds)
        memory = extra_bytes(run, device)
    return {
        "provider": provider,
        "model": model,
        "case": LSE_ONLY,
        "tokens": T,
        "hidden": D,
        "vocabulary": V,
        "flops_per_second": work / figures["seconds"],
        "extra_bytes": memory,
        **figures,
    }


# --- units ----------------------------------------------------------------------------------------


def sound(setting: Setting) -> list[str]:
    """Variants to time, the fastest so far first."""
    names = [name for name in variants(setting.device) if name not in setting.red]
    names = [name for name in names if name != "reference"] or names
    place = {name: i for i, name in enumerate(setting.best)}
    return sorted(names, key=lambda name: place.get(name, len(place)))


def case_units(
    setting: Setting, model: str, shape: Shape, case: str, names: tuple[str, ...], limit: float
) -> list[Unit]:
    """Units that measure the providers `names` in one case."""
    rounds = 3 if setting.quick else ROUNDS
    title = f"{model} T={shape[0]}, {case}"
    return [
        Unit(
            f"{title}: {name}",
            functools.partial(measure, name, model, shape, case, setting.device, rounds),
            limit,
            variant=name,
            phase="loss",
        )
        for name in names
    ]


def lse_units(setting: Setting, model: str, shape: Shape, limit: float) -> list[Unit]:
    names = sound(setting)
    if "triton lean" in variants(setting.device) and LSE not in setting.red:
        names.append(LSE)
    rounds = 3 if setting.quick else ROUNDS
    return [
        Unit(
            f"{model} T={shape[0]}, {LSE_ONLY}: {name}",
            functools.partial(lse_only, name, model, shape, setting.device, rounds),
            limit,
            variant=name,
            phase="loss",
        )
        for name in names
    ]


def units(setting: Setting) -> list[Unit]:
    """All shapes and cases, the headline's first; within a shape ours first and peers last."""
    mine = tuple(sound(setting))
    every = (FROZEN, TRAINED, FORWARD)
    found = []
    for model, shape in shapes(setting.quick):
        at = functools.partial(case_units, setting, model, shape)
        found += at(FROZEN, mine, 60) + lse_units(setting, model, shape, 60)
        for case in every[1:]:
            found += at(case, mine, 60)
        for peer in (EAGER,) if setting.quick else (EAGER, *PEER_ORDER):
            for case in every:
                found += at(case, (peer,), 60)
    return found


def headline_units(setting: Setting) -> list[Unit]:
    """7B, T = 8192, frozen head: every sound variant, then their profiles, then log-probs alone."""
    model, shape = shapes(setting.quick)[0]
    mine = tuple(sound(setting))
    return [
        *case_units(setting, model, shape, FROZEN, mine, limit=25),
        *profile_units(setting, model, shape, mine),
        *lse_units(setting, model, shape, limit=15),
    ]


def profile_units(setting: Setting, model: str, shape: Shape, names: tuple[str, ...]) -> list[Unit]:
    def run(name: str) -> dict[str, Any]:
        release(setting.device)
        with stepping(name, shape, FROZEN, setting.device) as step:
            return {"provider": name, "model": model, **profile(step, setting.device)}

    return [
        Unit(
            f"profile of {model} T={shape[0]}, {FROZEN}: {name}",
            functools.partial(run, name),
            limit=20,
            variant="profiler",  # what hangs here is not the variant, which has been timed
            phase="profile",
        )
        for name in names
        if name not in setting.hung
    ]


def heads_units(setting: Setting) -> list[Unit]:
    """A trained head of 7B, then frozen heads of 3B and 0.5B, all at T = 8192."""
    (model, shape), *others = shapes(setting.quick)[: len(HEADS)]
    mine = tuple(sound(setting))
    found = case_units(setting, model, shape, TRAINED, mine, limit=25)
    for model, shape in others:
        found += case_units(setting, model, shape, FROZEN, mine, limit=20)
    return found


def peers_units(setting: Setting) -> list[Unit]:
    """Eager, which judges the errors of ours, and the peers, at the headline and with a trained
    head; then eager for the other heads."""
    (model, shape), *others = shapes(setting.quick)[: len(HEADS)]
    found = case_units(setting, model, shape, FROZEN, (EAGER,), limit=20)
    found += case_units(setting, model, shape, TRAINED, (EAGER,), limit=20)
    # The first call of a peer imports and compiles it.
    peers = () if setting.quick else PEER_ORDER
    found += case_units(setting, model, shape, FROZEN, peers, limit=40)
    for other, size in others:
        found += case_units(setting, other, size, FROZEN, (EAGER,), limit=15)
    return found + case_units(setting, model, shape, TRAINED, peers, limit=40)


def quack_units(setting: Setting) -> list[Unit]:
    """The headline by the two fastest variants of ours, by eager, which judges them, by quack."""
    model, shape = shapes(setting.quick)[0]
    names = (*sound(setting)[:2], EAGER, QUACK)
    return case_units(setting, model, shape, FROZEN, names, limit=40)
