"""What a profiler's trace of training steps shows: what waits for the device, where the time goes."""

import time
from collections import Counter
from typing import NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# What waits: on a GPU the calls of the CUDA runtime that do; a CPU's own operators that would make a GPU's host wait.
WAITS = {"cuda": {"cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy"},
         "cpu": {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero"}}
OPTIMIZER = "Optimizer.step"                         # reads its counts of steps, which lie on the host where it does so
SHOWN = 8


class Trace(NamedTuple):
    seconds: float                       # of all steps, by the clock
    busy: float                          # of the device: the sum over its kernels; on a CPU over its operators
    top: list[tuple[str, float]]         # kernels (on a CPU operators) with their seconds, the longest first
    waits: dict[str, int]                # calls that wait for the device, by name


def profile_steps(step, num: int, device: torch.device) -> Trace:
    """Call ``step()`` ``num`` times under the profiler; what stands around them, a wait at the end, is not counted."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    if cuda:
        torch.cuda.synchronize(device)
    with profile(activities=activities) as profiler:
        began = time.perf_counter()
        with torch.profiler.record_function("steps"):
            for _ in range(num):
                step()
        if cuda:
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - began
    events = profiler.events()
    host = [event for event in events if event.device_type == DeviceType.CPU]
    span = next(event.time_range for event in host if event.name == "steps")
    aside = [event.time_range for event in host if event.name.startswith(OPTIMIZER)] if not cuda else []
    waits = Counter(event.name for event in host
                    if event.name in WAITS[device.type] and _inside(event.time_range, span)
                    and not any(_inside(event.time_range, other) for other in aside))
    times = Counter()
    for event in events:
        if cuda and event.device_type != DeviceType.CPU and not event.is_user_annotation:
            times[event.name] += event.time_range.elapsed_us() / 1e6
        elif not cuda and event.name != "steps":
            times[event.name] += event.self_cpu_time_total / 1e6
    return Trace(seconds, sum(times.values()), times.most_common(SHOWN), dict(waits))


def _inside(inner, outer) -> bool:
    return outer.start <= inner.start <= outer.end
