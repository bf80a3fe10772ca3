"""Time, extra memory and error of the loss op: implementations and peers relative to a floor.

The floor is the GEMM work of a loss around the vendor library's GEMM: H W^T of policy and reference
and P W for a frozen head, plus P^T H for a trained one, as bare `torch.mm` into preallocated
outputs, in chunks whose logits fit 4 GiB. It is timed with the vendor library's default settings
and with our op's; the faster one counts. Its rounds alternate with the provider's.
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
from bench.gpu.environment import find_version
from bench.gpu.kernel_times import profile
from bench.gpu.timing import (
    EVENTS,
    GRAPHS,
    ROUNDS,
    apply_both_settings,
    measure_extra_bytes,
    release,
    time_in_turn,
    time_small_in_turn,
)
from bench.gpu.units import NotHere, Setting, Unit
from bench.gpu.variants import force_variant, list_variants
from bench.loss_peers import (
    CASES,
    PACKAGES,
    PEERS,
    CannotCompute,
    Problem,
    Shape,
    Truth,
    allocate_outputs,
    build_floor,
    compute_errors,
    compute_ours,
    compute_truth,
    make_problem,
    make_tensors,
)
from cpo_fast.loss import linear_logprobs

FORWARD = "frozen head, forward only"
TOKENS = (cases.TOKENS, 1024, 2048, 4096, 16384)
EAGER = "eager"  # baseline of the error rule
PEER_ORDER = ("trl chunked", "Liger fused DPO", "cut-cross-entropy")  # the last one can hang
QUACK = "quack"  # needs a separate kit
SMALL = 4e12  # FLOP of the floor, 5 ms: below it, launches on the host can take as long


def list_shapes(quick: bool) -> list[tuple[str, Shape]]:
    """(model, shape): the headline's T for every model, then the other T."""
    if quick:
        return [("tiny", (64, 32, 1000))]
    order = [(T, name) for T in TOKENS for name in HEADS]
    return [(name, (T, *HEADS[name])) for T, name in order]


def choose_floor_rows(shape: Shape) -> int:
    """Rows per chunk so that bfloat16 logits fit 4 GiB."""
    T, _, V = shape
    return min(T, max(128, 2**32 // (2 * V) // 128 * 128))


def time_beside_floor(
    floor: Callable[[], None], op: Callable[[], object], flops: float, device: str, rounds: int
) -> dict[str, Any]:
    """Times of `op`, and of a floor of `flops` FLOP with both settings of the vendor library."""
    runs = {**apply_both_settings({"floor": floor}), "op": op}
    timed_by: dict[str, Any] = {"timed_by": EVENTS}
    if flops < SMALL:
        times, timed_by["timed_by"] = time_small_in_turn(runs, device, rounds)
        if device == "cuda" and timed_by["timed_by"] != GRAPHS:
            timed_by["fresh_process"] = True
    else:
        times = time_in_turn(runs, device, rounds)
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
def get_truth(shape: Shape, device: str) -> Truth:
    """Loss and gradient of `hidden`, equal for all cases with an on-line reference."""
    return compute_truth(make_problem(shape, FROZEN, device), rows=512)


@contextlib.contextmanager
def prepare_step(
    provider: str, shape: Shape, case: str, device: str
) -> Iterator[Callable[[], list[Tensor]]]:
    """Yields a function that computes [loss, gradient of hidden, gradient of a trained head].
    Raises NotHere if the peer is not installed."""
    package = PACKAGES.get(provider)
    if package is not None and find_version(package) is None:
        raise NotHere(f"not installed: pip install {package}")
    trained, _, backward = CASES[case]
    p = make_problem(shape, case, device)
    leaves = [p.hidden, p.weight] if trained else [p.hidden]
    with contextlib.ExitStack() as stack:
        loss_of: Callable[[Problem], Tensor]
        if provider in PEERS:
            loss_of = PEERS[provider]
        else:
            loss_of = functools.partial(
                compute_ours, impl=stack.enter_context(force_variant(provider))
            )

        # Returns gradients: accumulation into leaves cannot be captured in a graph.
        def step() -> list[Tensor]:
            with torch.set_grad_enabled(backward):
                loss = loss_of(p)
            grads = torch.autograd.grad(loss, leaves) if backward else ()
            return [loss.detach(), *grads]

        yield step


def measure(
    provider: str, model: str, shape: Shape, case: str, device: str, rounds: int
) -> dict[str, Any]:
    """Figures of a provider in a case of CASES with an on-line reference."""
    release(device)
    trained, _, backward = CASES[case]
    with prepare_step(provider, shape, case, device) as step:
        try:
            found = step()
        except CannotCompute as reason:
            raise NotHere(str(reason)) from None
        errors = compute_errors(get_truth(shape, device), *found)
        assert all(error == error for error in errors.values()), "NaN"
        del found
        memory = measure_extra_bytes(step, device)
        T, D, V = shape
        flops = (2 + backward + trained) * 2 * T * V * D
        floor = build_floor(shape, case, device, choose_floor_rows(shape))
        figures = time_beside_floor(floor, step, flops, device, rounds)
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


def measure_lse(
    provider: str, model: str, shape: Shape, device: str, rounds: int
) -> dict[str, Any]:
    """Log-probs of the policy without gradients, relative to the bare H W^T."""
    release(device)
    hidden, _, weight, labels = make_tensors(*shape, device)
    T, D, V = shape
    logits = allocate_outputs(shape, device, False, choose_floor_rows(shape))[0]

    def run_bare() -> None:
        for part in hidden.split(len(logits)):
            torch.mm(part, weight.t(), out=logits[: len(part)])

    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        impl = stack.enter_context(force_variant(provider))
        run = functools.partial(linear_logprobs, hidden, weight, labels, impl=impl)
        work = 2 * T * V * D
        figures = time_beside_floor(run_bare, run, work, device, rounds)
        memory = measure_extra_bytes(run, device)
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


def list_sound(setting: Setting) -> list[str]:
    """Variants to time, fastest so far first."""
    names = [name for name in list_variants(setting.device) if name not in setting.red]
    names = [name for name in names if name != "reference"] or names
    place = {name: i for i, name in enumerate(setting.best)}
    return sorted(names, key=lambda name: place.get(name, len(place)))


def list_case_units(
    setting: Setting, model: str, shape: Shape, case: str, names: tuple[str, ...], limit: float
) -> list[Unit]:
    """Units that measure the providers `names` in a case of CASES or in LSE_ONLY."""
    rounds = 3 if setting.quick else ROUNDS

    def run(name: str) -> dict[str, Any]:
        if case == LSE_ONLY:
            return measure_lse(name, model, shape, setting.device, rounds)
        return measure(name, model, shape, case, setting.device, rounds)

    title = f"{model} T={shape[0]}, {case}"
    return [
        Unit(
            f"{title}: {name}",
            functools.partial(run, name),
            limit,
            variant=name,
            phase="loss",
        )
        for name in names
    ]


def list_lse_units(setting: Setting, model: str, shape: Shape, limit: float) -> list[Unit]:
    return list_case_units(setting, model, shape, LSE_ONLY, tuple(list_sound(setting)), limit)


def list_units(setting: Setting) -> list[Unit]:
    """All shapes and cases, headline first; within a shape, ours first and peers last."""
    mine = tuple(list_sound(setting))
    every = (FROZEN, TRAINED, FORWARD)
    found = []
    for model, shape in list_shapes(setting.quick):
        at = functools.partial(list_case_units, setting, model, shape)
        found += at(FROZEN, mine, 60) + list_lse_units(setting, model, shape, 60)
        for case in every[1:]:
            found += at(case, mine, 60)
        for peer in (EAGER,) if setting.quick else (EAGER, *PEER_ORDER):
            for case in every:
                found += at(case, (peer,), 60)
    return found


def list_headline_units(setting: Setting) -> list[Unit]:
    """7B, T = 8192, frozen head: every sound variant, their profiles, then log-probs alone."""
    model, shape = list_shapes(setting.quick)[0]
    mine = tuple(list_sound(setting))
    return [
        *list_case_units(setting, model, shape, FROZEN, mine, limit=25),
        *list_profile_units(setting, model, shape, mine),
        *list_lse_units(setting, model, shape, limit=15),
    ]


def list_profile_units(
    setting: Setting, model: str, shape: Shape, names: tuple[str, ...]
) -> list[Unit]:
    def run(name: str) -> dict[str, Any]:
        release(setting.device)
        with prepare_step(name, shape, FROZEN, setting.device) as step:
            return {"provider": name, "model": model, **profile(step, setting.device)}

    return [
        Unit(
            f"profile of {model} T={shape[0]}, {FROZEN}: {name}",
            functools.partial(run, name),
            limit=20,
            variant="profiler",  # a timeout does not exclude the variant, which was timed before
            phase="profile",
        )
        for name in names
        if name not in setting.hung
    ]


def list_head_units(setting: Setting) -> list[Unit]:
    """A trained head of 7B, then frozen heads of 3B and 0.5B, all at T = 8192."""
    (model, shape), *others = list_shapes(setting.quick)[: len(HEADS)]
    mine = tuple(list_sound(setting))
    found = list_case_units(setting, model, shape, TRAINED, mine, limit=25)
    for model, shape in others:
        found += list_case_units(setting, model, shape, FROZEN, mine, limit=20)
    return found


def list_peer_units(setting: Setting) -> list[Unit]:
    """Eager (baseline of the error rule) and the peers, at the headline and with a trained head;
    eager for the other heads."""
    (model, shape), *others = list_shapes(setting.quick)[: len(HEADS)]
    found = list_case_units(setting, model, shape, FROZEN, (EAGER,), limit=20)
    found += list_case_units(setting, model, shape, TRAINED, (EAGER,), limit=20)
    # A peer's first call includes its import and compilation.
    peers = () if setting.quick else PEER_ORDER
    found += list_case_units(setting, model, shape, FROZEN, peers, limit=40)
    for other, size in others:
        found += list_case_units(setting, other, size, FROZEN, (EAGER,), limit=15)
    return found + list_case_units(setting, model, shape, TRAINED, peers, limit=40)


def list_quack_units(setting: Setting) -> list[Unit]:
    """The headline with our two fastest variants, eager (the baseline of errors) and quack."""
    model, shape = list_shapes(setting.quick)[0]
    names = (*list_sound(setting)[:2], EAGER, QUACK)
    return list_case_units(setting, model, shape, FROZEN, names, limit=40)
