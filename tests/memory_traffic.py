"""What a call copies and what memory it makes, as the profiler sees it."""

import math

import torch


def copied_and_made(function):
    """(entries that one operator copies or gathers, bytes that one operator makes), the most of each, on this thread."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True, profile_memory=True) as profile:
        function()
    events = profile.events()
    copies = [math.prod(shape) for event in events if event.name == "aten::copy_" for shape in event.input_shapes]
    gathers = [math.inf for event in events if event.name == "aten::cat"]
    return max(copies + gathers, default=0), max(event.self_cpu_memory_usage for event in events)
