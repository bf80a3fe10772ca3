"""Checks of every implementation against float64 and the rules of the loss op.

The truth is the reference implementation in float64 on the same inputs. The bound on errors is
twice the error of eager PyTorch in the same precision plus one rounding; NaN always fails. On a GPU
no call synchronises with the host, and results are bit-identical between runs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor

from bench.gpu.device_rules import DEVICE_RULES
from bench.gpu.units import NotHere, Setting, Unit
from bench.gpu.variants import find_obstacle, force_variant, list_variants
from bench.gpu.workspace import limit_workspace
from cpo_fast.loss import linear_logprobs
from cpo_fast.loss.operators import Plan
from cpo_fast.testing.error_rule import assert_all_as_good
from cpo_fast.testing.loss_problems import IGNORED, KINDS, LossProblem

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SMALL = [(37, 1013, 24), (1, 77, 8), (5, 1, 16), (33, 129, 7)]  # T, V, D
LARGE = [(129, 50257, 896), (700, 32000, 1024), (300, 151936, 2048), (260, 152064, 3584)]


# --- rules: functions of (variant, device, quick) that return figures or raise AssertionError -----


def check_accuracy(
    variant: str,
    device: str,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    kind: str = "random",
    mib: int = 1024,
    **options: Any,
) -> dict[str, Any]:
    bias = options.pop("bias", False)
    plain = not bias and "softcap" not in options
    if reason := find_obstacle(variant, dtype, shape[2], plain=plain, device=device):
        raise NotHere(reason)
    data = LossProblem(kind, *shape, dtype, device, bias=bias)
    exact = data.score(torch.float64, "reference", **options)
    eager = data.score(dtype, "reference", **options)
    with force_variant(variant) as impl, limit_workspace(mib):
        ours = data.score(dtype, impl, **options)
    assert (ours["logps"] <= 0).all(), "a log-prob is positive"
    return {"errors": assert_all_as_good(ours, eager, exact, torch.finfo(dtype).eps)}


def choose_dtype(variant: str, device: str) -> torch.dtype:
    return torch.float16 if variant.startswith("triton") and device == "cpu" else torch.bfloat16


def check_log_2(variant: str, device: str, quick: bool) -> dict[str, Any]:
    """With policy equal to reference the loss is log 2 and the rewards are 0, also for a pair that
    exceeds a chunk."""
    shape = (300, 1013, 24) if quick else (1500, 32003, 512)
    data = LossProblem("random", *shape, choose_dtype(variant, device), device)
    for head in (False, True):
        for mib in (1, 1024):
            hidden, weight = data.leaves(head=head)
            with force_variant(variant) as impl, limit_workspace(mib):
                out = data.loss(hidden, weight, hidden.detach().clone(), impl)
            assert torch.equal(out.logps, out.ref_logps), "policy and reference log-probs differ"
            assert (out.chosen_rewards == 0).all() and (out.rejected_rewards == 0).all()
            loss = float(out.loss.detach())
            assert abs(loss - math.log(2)) < 1e-7, f"loss {loss}"
    return {}


def check_all_ignored(variant: str, device: str, quick: bool) -> dict[str, Any]:
    """With all labels ignored, loss, log-probs and gradients are 0."""
    data = LossProblem("random", 40, 300, 24, choose_dtype(variant, device), device)
    data.labels[:] = IGNORED
    leaves = data.leaves()
    with force_variant(variant) as impl:
        out = data.loss(*leaves, leaves[0].detach() * 2, impl)
        grads = torch.autograd.grad(out.loss, leaves)
    assert float(out.loss.detach()) == 0 and (out.logps == 0).all()
    assert all((grad == 0).all() for grad in grads)
    return {}


def check_second_backward(variant: str, device: str, quick: bool) -> dict[str, Any]:
    """A second backward with retain_graph gives the same gradient; gradients through several
    outputs sum."""
    data = LossProblem("random", 90, 1013, 24, choose_dtype(variant, device), device)
    for mib in (1, 1024):
        leaves = data.leaves()
        with force_variant(variant) as impl, limit_workspace(mib):
            out = data.loss(*leaves, leaves[0].detach().roll(1, 0), impl)
            first = torch.autograd.grad(out.loss, leaves, retain_graph=True)
            again = torch.autograd.grad(out.loss, leaves, retain_graph=True)
            other = torch.autograd.grad(out.logps.sum(), leaves, retain_graph=True)
            both = torch.autograd.grad(out.loss + out.logps.sum(), leaves)
        for a, b, c, d in zip(first, again, other, both, strict=True):
            assert torch.equal(a, b), "the second backward gives a different gradient"
            error = (a.double() + c.double() - d.double()).abs().max()
            assert error <= 4 * torch.finfo(a.dtype).eps * d.double().abs().max(), float(error)
    return {}


def check_same_bits(variant: str, device: str, quick: bool) -> dict[str, Any]:
    """Losses, log-probs and gradients are bit-identical between runs."""
    if variant == "reference" and device == "cuda":
        raise NotHere("not guaranteed: PyTorch's index_add uses atomics")
    shape = (120, 1013, 24) if quick else (3000, 50257, 896)
    data = LossProblem("random", *shape, choose_dtype(variant, device), device)
    data.segments = data.segments[torch.randperm(shape[0], device=device)]
    for mib in (1 if quick else 64, 1024):
        runs = []
        for _ in range(3 if quick else 6):
            leaves = data.leaves()
            with force_variant(variant) as impl, limit_workspace(mib):
                out = data.loss(*leaves, leaves[0].detach().roll(1, 0), impl)
                grads = torch.autograd.grad(out.loss, leaves)
            runs.append([x.detach() for x in (*out, *grads)])
        for other in runs[1:]:
            assert all(map(torch.equal, runs[0], other)), "bits differ between runs"
    return {}


def check_compiled(variant: str, device: str, quick: bool) -> dict[str, Any]:
    """torch.compile without graph breaks matches eager."""
    data = LossProblem("random", 64, 300, 24, choose_dtype(variant, device), device)
    ref = data.tensors[0].roll(1, 0)
    with force_variant(variant) as impl:

        def step(hidden: Tensor, weight: Tensor) -> Tensor:
            return data.loss(hidden, weight, ref, impl).loss

        found = []
        for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
            leaves = data.leaves()
            loss = function(*leaves)
            found.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for a, b in zip(*found, strict=True):
        error = float((a.double() - b.double()).abs().max())
        allowed = 4 * torch.finfo(a.dtype).eps * float(a.double().abs().max())
        assert error <= allowed, f"{error:.2e} > {allowed:.2e}"
    return {}


def check_autocast(variant: str, device: str, quick: bool) -> dict[str, Any]:
    """Float32 leaves under autocast give the log-probs of cast inputs, and float32 gradients."""
    dtype = choose_dtype(variant, device)
    data = LossProblem("random", 64, 300, 24, torch.float32, device)
    leaves = data.leaves()
    with force_variant(variant) as impl, torch.autocast(device, dtype):
        logps = linear_logprobs(*leaves, data.labels, impl=impl)
    grads = torch.autograd.grad(logps.sum(), leaves)
    with force_variant(variant) as impl:
        want = linear_logprobs(*(x.to(dtype) for x in data.tensors), data.labels, impl=impl)
    assert torch.equal(logps, want) and all(grad.dtype == torch.float32 for grad in grads)
    return {}


def check_operators(variant: str, device: str, quick: bool) -> dict[str, Any]:
    """torch.library.opcheck of the custom operators, with the arguments of a real call."""
    family = variant.partition(" ")[0]
    if family not in ("triton", "cuda"):
        raise NotHere("no custom operator, or covered by the test suite")
    dtype = choose_dtype(variant, device)
    data = LossProblem("random", 20, 50, 16, dtype, device)
    hidden, weight = data.leaves()
    labels = data.labels.clamp(min=-1)
    ops, path = torch.ops.cpo_fast, variant.partition(" ")[2]
    plan = Plan(None, 1.0, -1, True, True, True, 2**20, path, 1)
    arguments = (hidden, weight, labels, None, data.tensors[0])
    if family == "cuda":
        torch.library.opcheck(ops.cuda_logps, (*arguments, *astuple(plan)))
        sums = ops.cuda_segment_sums
    else:
        torch.library.opcheck(ops.triton_logps, (*arguments, *astuple(plan)))
        sums = ops.triton_segment_sums
    logps = torch.randn(20, device=device, requires_grad=True)
    torch.library.opcheck(sums, (logps, data.segments, data.labels, 4, IGNORED))
    return {}


RULES: dict[str, Callable[[str, str, bool], dict[str, Any]]] = {
    "equal states give log 2": check_log_2,
    "nothing to score": check_all_ignored,
    "backward twice": check_second_backward,
    "same bits every run": check_same_bits,
    "torch.compile": check_compiled,
    "autocast": check_autocast,
    "opcheck": check_operators,
}


def list_units(setting: Setting) -> list[Unit]:
    device, quick = setting.device, setting.quick
    found: list[Unit] = []

    def add(variant: str, name: str, function: Callable[..., Any], *args: Any, **kw: Any) -> None:
        run = functools.partial(function, variant, device, *args, **kw)
        found.append(Unit(f"{variant}: {name}", run, limit=60, variant=variant))

    for variant in list_variants(device):
        if variant != "reference":
            for dtype in DTYPES:
                kind_of = str(dtype).removeprefix("torch.")
                for shape in SMALL[:2] if quick else SMALL:
                    size = "T={} V={} D={}".format(*shape)
                    add(variant, f"{kind_of} {size}", check_accuracy, shape, dtype)
                for kind in KINDS[1:]:
                    add(variant, f"{kind_of} {kind}", check_accuracy, SMALL[0], dtype, kind)
                options = {"softcap": 6.0, "temperature": 0.7, "bias": True}
                add(variant, f"{kind_of} all options", check_accuracy, SMALL[0], dtype, **options)
                if not quick:
                    for shape in LARGE:
                        size = "T={} V={} D={}".format(*shape)
                        add(variant, f"{kind_of} {size}", check_accuracy, shape, dtype)
                    add(variant, f"{kind_of} in chunks", check_accuracy, LARGE[1], dtype, mib=16)
        for name, rule in RULES.items():
            add(variant, name, rule, quick)
        if device == "cuda" and variant != "reference":
            for name, device_rule in DEVICE_RULES.items():
                add(variant, name, device_rule)
    return found


COMPILING = ("torch.compile", "opcheck")  # rules that import a compiler, which takes seconds
SAME_BITS = "same bits every run"


def list_rule_units(setting: Setting) -> list[Unit]:
    """Rules that need a device, fastest variant first."""
    device, found = setting.device, []
    for variant in setting.best:
        if variant == "reference":
            continue
        if device == "cuda":
            found += [
                Unit(f"{variant}: {name}", functools.partial(rule, variant, device), 20, variant)
                for name, rule in DEVICE_RULES.items()
            ]
        run = functools.partial(check_same_bits, variant, device, setting.quick)
        found.append(Unit(f"{variant}: {SAME_BITS}", run, 20, variant))
    return found


def rank_unit(unit: Unit) -> int:
    """Sort key, most informative check first: real sizes in bfloat16 and chunks, rules, options,
    small sizes, other dtypes."""
    name = unit.key.partition(": ")[2]
    if name in COMPILING:
        return 3
    if name in RULES or name in DEVICE_RULES:
        return 1
    if not name.startswith("bfloat16"):
        return 4
    if any(words in name for words in ("V=50257", "V=32000", "V=15", "in chunks")):
        return 0
    return 2 if "all options" in name else 3


def list_winner_units(setting: Setting) -> list[Unit]:
    """Every check of the fastest variant, in the order of `rank_unit`."""
    names = [name for name in setting.best if name != "reference"][:1]
    found = [unit for unit in list_units(setting) if unit.variant in names]
    if setting.quick:
        found = [unit for unit in found if unit.key.partition(": ")[2] not in COMPILING]
    return sorted(found, key=rank_unit)
