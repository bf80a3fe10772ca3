"""Device time of a call by kernel, from PyTorch's profiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from bench.gpu.units import NotHere

CALLS = 3


def profile(run: Callable[[], object], device: str) -> dict[str, Any]:
    """{"seconds", "kernels": [{"name", "calls", "seconds"}]} of one call, the longest kernel first;
    on a CPU of operators. Raises NotHere where the profiler sees no kernel."""
    cuda = device == "cuda"
    run()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with torch.profiler.profile(activities=activities, acc_events=True) as found:
        for _ in range(CALLS):
            run()
        if cuda:
            torch.cuda.synchronize()
    kernels = []
    for event in found.key_averages():
        # An operator's row repeats the time of the kernels that it launched.
        if event.device_type == (DeviceType.CUDA if cuda else DeviceType.CPU):
            microseconds = event.self_device_time_total if cuda else event.self_cpu_time_total
            if microseconds > 0:
                seconds = microseconds / 1e6 / CALLS
                name = event.key[:200]
                kernels.append({"name": name, "calls": event.count / CALLS, "seconds": seconds})
    if not kernels:
        raise NotHere("the profiler sees no kernel here")
    kernels.sort(key=lambda kernel: -kernel["seconds"])
    return {"seconds": sum(kernel["seconds"] for kernel in kernels), "kernels": kernels[:40]}
