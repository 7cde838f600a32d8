"""Parameters that come and go under one state: a new one begins at zero, a dead one is dropped, a frozen one keeps its own."""

import ctypes
import gc
import os

import pytest
import torch
from given import ENTRIES, Given, held, integers, register
from processes import run_workers
from torch.nn.parallel import DistributedDataParallel
from training import make_state

TASKS, BODY, LAYERS = 60, 300, 5  # of a head
DENSITY = 0.05


def train_a_head_per_task(rank, entry, sizes):
    """A fresh head on the same body, wrapped anew, for each task, its layers of `sizes` in turn.

    Return how many entries of each head began with something else than its gradient, the entries of each head, and the stats.
    """
    gc.freeze()  # what was imported is not looked at in every collection
    body = torch.nn.Parameter(torch.zeros(BODY))
    state = make_state("topk", DENSITY)
    inherited, dead = [], []
    for task in range(TASKS):
        size = sizes[task % len(sizes)]
        module = Given(*[size] * LAYERS)
        module.parts.append(body)
        ddp = DistributedDataParallel(module)
        register(ddp, state, entry)
        for step in range(2):
            ddp.zero_grad()
            gradients = integers(*[size] * LAYERS, BODY, seed=10 * task + step)
            ddp(gradients).backward()
            if step == 0:  # one worker: what it sent is the average
                parts = zip(module.parts, held(state, ddp).values(), gradients, strict=True)
                inherited.append(sum(int((part.grad + residual != gradient).sum()) for part, residual, gradient in [*parts][:-1]))
        dead.append(LAYERS * size)
        del module, ddp, parts
        gc.collect()
    return inherited, dead, state.stats()


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("sizes", [(200,), (200, 120)], ids=["equal sizes", "two sizes"])
def test_a_fresh_head_for_each_task_begins_at_zero_and_its_dead_forerunners_are_dropped(sizes, entry):
    ((inherited, dead, stats),) = run_workers(train_a_head_per_task, 1, entry, sizes)
    assert inherited == [0] * TASKS
    # The last head, and the one before it, may not have been missed yet.
    assert sum(dead[:-2]) <= stats["residual_dropped"] <= sum(dead)


class WithAdapter(Given):
    """A body, and an adapter where there is one."""

    def __init__(self, size):
        super().__init__(size)
        self.adapter = None

    def forward(self, gradients, adapter_gradients):
        loss = super().forward(gradients)
        return loss if self.adapter is None else loss + self.adapter(adapter_gradients)


def add_and_delete_adapters(rank, entry):
    """Adapters of which each lives for one task; return the parameters in the state dict after the last one, and the stats."""
    module = WithAdapter(BODY)
    state = make_state("regtopk", DENSITY)
    for task in range(9):
        if task < 8:
            module.adapter = Given(40)
        ddp = DistributedDataParallel(module)
        register(ddp, state, entry)
        for step in range(2):
            ddp(integers(BODY, seed=task), integers(40, seed=100 + task)).backward()
        module.adapter = None
        del ddp
        gc.collect()
    return list(state.state_dict(module)["parameters"]), state.stats()


@pytest.mark.parametrize("entry", ENTRIES)
def test_adapters_that_are_deleted_leave_nothing_but_a_count(entry):
    for names, stats in run_workers(add_and_delete_adapters, 2, entry):
        assert names == ["parts.0"] and stats["residual_dropped"] == 8 * 40


LARGE, SMALL = 5_000_000, 10


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def freeze_a_small_parameter(rank, entry, entries):
    """A small parameter beside a large one is frozen, and the model wrapped anew: bytes more, and the small one's residual before and after."""
    torch.manual_seed(0)
    mmap_threshold = -3  # of mallopt: what is freed above it goes back to the system, whatever was freed before
    assert ctypes.CDLL(None).mallopt(mmap_threshold, 1 << 20) == 1
    module = Given(entries, SMALL)
    state = make_state("topk", 0.001)

    def wrap():
        ddp = DistributedDataParallel(module, bucket_cap_mb=100)
        register(ddp, state, entry)
        return ddp

    def step(ddp, *gradients):
        ddp.zero_grad()
        ddp(gradients).backward()
        ddp.zero_grad()

    large, small = torch.ones(entries), 0.5 * torch.ones(SMALL)
    ddp = wrap()
    for _ in range(3):
        step(ddp, large, small)
    before = held(state, ddp)["parts.1"]
    gc.collect()
    resident = resident_bytes()
    module.parts[1].requires_grad_(False)
    del ddp
    gc.collect()
    ddp = wrap()
    for _ in range(3):
        step(ddp, large, None)
    gc.collect()
    return resident_bytes() - resident, before, held(state, ddp)["parts.1"]


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_frozen_parameter_keeps_its_own_entries_and_no_others_memory(entry, entries=LARGE):
    ((grown, before, after),) = run_workers(freeze_a_small_parameter, 1, entry, entries)
    assert grown < 4 * entries / 2
    assert before.tolist() == [1.5] * SMALL
    assert torch.equal(before, after), "what it holds is in the state dict though it is frozen"
