"""Device time of a call by kernel and by kernel class, from PyTorch's profiler."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from bench.gpu.cases import CLASSES
from bench.gpu.units import NotHere

CALLS = 3
KERNELS = 40  # number kept in a record
OURS = (
    *("lean_rows_kernel", "row_scale_kernel", "segment_sums_kernel"),
    *("swiglu_kernel", "swiglu_backward_kernel", "rotate_kernel"),
)
"""Triton kernels of kernels/; CUDA kernels are recognised by their namespace `cpo`."""
RULES = (
    ("ours", rf"\bcpo(_fast)?::|^_zn3cpo|^({'|'.join(OURS)})"),
    # torch.compile names a kernel by its kind, then by the operators that it fuses.
    ("elementwise", r"^triton_poi_"),
    ("reductions", r"^triton_(red|per|split_scan)_"),
    ("attention", r"flash|fmha|sdpa|attention"),
    ("products", r"gemm|cutlass|nvjet|cublas|xmma|gemv|convolve|^triton_tem_|aten::(add)?b?mm$"),
    (
        "copies and casts",
        r"memcpy|memset|copy_kernel|catarray|fillfunctor|gather|scatter|index"
        r"|aten::(_to_)?(copy_?|cat|fill_|zero_)$",
    ),
    ("reductions", r"reduce|softmax|norm(?!al)|cunn_|\bcub::|aten::(sum|mean)$"),
    (
        "elementwise",
        r"elementwise|vectorized|pointwise|multi_tensor_apply|^triton_"
        r"|aten::(add|sub|mul|div|neg|pow|rsqrt|silu|silu_backward|sigmoid)_?$",
    ),
)
"""(class, pattern): the first match counts; patterns are for lower-case names."""
ANNOTATIONS = ("Optimizer.", "ProfilerStep", "## Call CompiledFxGraph", "Torch-Compiled Region")
"""Prefixes of spans that the profiler lists on the device although they are not kernels."""


def classify_kernel(kernel: str) -> str:
    """The class of a kernel, from its name in the profiler."""
    name = kernel.lower()
    return next((kind for kind, pattern in RULES if re.search(pattern, name)), "other")


def profile(
    run: Callable[[], object],
    device: str,
    *,
    calls: int = CALLS,
    warm: bool = True,
    host: bool = True,
) -> dict[str, Any]:
    """{"seconds", "classes": {class: seconds}, "kernels": [{"name", "calls", "seconds"}]} per call,
    longest kernel first; operators on a CPU.

    Records `calls` calls, after a warm-up call with `warm`. Without `host`, host events are not
    recorded: a training step has hundreds of thousands. Raises NotHere if the profiler reports no
    kernel.
    """
    cuda = device == "cuda"
    if warm:
        run()
    both = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    attempts = [both] if host or not cuda else [[ProfilerActivity.CUDA], both]
    kernels: list[dict[str, Any]] = []
    for activities in attempts:
        kernels = kernels or record_kernels(run, cuda, calls, activities)
    if not kernels:
        raise NotHere("the profiler reports no kernel")
    kernels.sort(key=lambda kernel: -kernel["seconds"])
    classes = dict.fromkeys(CLASSES, 0.0)
    for kernel in kernels:
        classes[classify_kernel(kernel["name"])] += kernel["seconds"]
    total = sum(kernel["seconds"] for kernel in kernels)
    return {"seconds": total, "classes": classes, "kernels": kernels[:KERNELS]}


def record_kernels(
    run: Callable[[], object], cuda: bool, calls: int, activities: list[ProfilerActivity]
) -> list[dict[str, Any]]:
    with torch.profiler.profile(activities=activities, acc_events=True) as found:
        for _ in range(calls):
            run()
        if cuda:
            torch.cuda.synchronize()
    kernels = []
    for event in found.key_averages():
        # Rows of operators repeat the time of the kernels that they launched.
        if event.device_type != (DeviceType.CUDA if cuda else DeviceType.CPU):
            continue
        if getattr(event, "is_user_annotation", False) or event.key.startswith(ANNOTATIONS):
            continue
        microseconds = event.self_device_time_total if cuda else event.self_cpu_time_total
        if microseconds > 0:
            seconds = microseconds / 1e6 / calls
            name = event.key[:200]
            kernels.append({"name": name, "calls": event.count / calls, "seconds": seconds})
    return kernels
