"""What a state costs beside its residuals: no thread or descriptor before its first use or after its end, and no wait for its numbers."""

import gc
import os
import threading
import time

import pytest
import torch
import torch.distributed as dist
from given import ENTRIES, Given, held, integers, register, unit_sgd
from processes import run_workers
from torch.nn.parallel import DistributedDataParallel
from training import batch, loss_of, make_model, make_state

import regtopk_torch as rt


def resources():
    """(threads, open files) of this process."""
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))


# Constructing

STATES = [lambda: rt.TopKState(0.1), lambda: rt.RegTopKState(0.1, mu=2.0, distortion="current")]


@pytest.mark.parametrize("construct", STATES, ids=["Top-k", "RegTop-k"])
def test_a_state_is_constructed_without_a_process_group_and_opens_nothing(construct):
    assert not dist.is_initialized()
    before = resources()
    states = [construct() for _ in range(5)]
    assert resources() == before
    assert all(state.density == 0.1 and state.stats()["steps"] == 0 for state in states)


def construct_on_one_rank(rank, entry):
    """Rank 0 constructs more states than rank 1, and the ranks train with the last one of each."""
    before = resources()
    states = [rt.TopKState(0.25) for _ in range(4 if rank == 0 else 1)]
    opened = resources() != before
    module = Given(40)
    ddp = DistributedDataParallel(module)
    register(ddp, states[-1], entry)
    for step in range(3):
        ddp(integers(40, seed=step)).backward()
    return opened, module.parts[0].grad


@pytest.mark.parametrize("entry", ENTRIES)
def test_constructing_a_state_is_no_collective(entry):
    (opened_0, gradient_0), (opened_1, gradient_1) = run_workers(construct_on_one_rank, 2, entry)
    assert not opened_0 and not opened_1
    assert torch.equal(gradient_0, gradient_1) and gradient_0.any()


# Ending


def make_use_and_drop(rank, entry, states, close):
    """Return the resources after each of some states that were made, used and dropped, or closed while they live."""
    measured, kept = [], []
    for number in range(states):
        ddp = DistributedDataParallel(make_model(), bucket_cap_mb=0.008)
        state = make_state("regtopk", 0.05)
        register(ddp, state, entry)
        for step in range(3):
            loss_of(ddp, batch(rank, step)).backward()
        if close:
            state.close()
            state.close()
            kept.append((ddp, state))
        del ddp, state
        gc.collect()
        dist.barrier()
        measured.append(resources())
    return measured


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("close", [False, True], ids=["dropped", "closed"])
def test_states_that_are_dropped_or_closed_leave_no_thread_and_no_descriptor(close, entry):
    for measured in run_workers(make_use_and_drop, 2, entry, 20, close):
        assert len(set(measured[1:])) == 1, measured  # what torch opens for a first model stays open


def leave_averages_pending(rank, states, close):
    """Return the resources after each of some states that were dropped, or closed, while an average was under way."""
    measured = []
    for _ in range(states):
        state = rt.TopKState(0.1)
        state.average([torch.ones(200_000)])
        work = state.average([torch.ones(200_000)], async_op=True)
        if close:
            state.close()
        del state, work
        gc.collect()
        dist.barrier()
        measured.append(resources())
    return measured


@pytest.mark.parametrize("close", [False, True], ids=["dropped", "closed"])
def test_what_was_pending_when_a_state_ended_is_given_back_once_it_has_come(close):
    for measured in run_workers(leave_averages_pending, 2, 12, close):
        threads = [threads for threads, _ in measured]
        assert max(threads) - min(threads) < 30, f"some states' threads, of which each has 7: {measured}"


def close_at_once(rank):
    for _ in range(60):
        state = rt.TopKState(0.1)
        state.average([torch.ones(10)])
        together = threading.Barrier(4)
        threads = [threading.Thread(target=lambda: (together.wait(), state.close())) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return len(os.listdir("/proc/self/task"))


def test_threads_may_close_a_state_at_once():
    (threads,) = run_workers(close_at_once, 1)
    assert threads < 20


def use_after_close(rank, entry):
    ddp = DistributedDataParallel(make_model())
    state = make_state("topk", 0.1)
    register(ddp, state, entry)
    loss_of(ddp, batch(rank, 0)).backward()
    state.close()
    try:
        loss_of(ddp, batch(rank, 1)).backward()
    except RuntimeError as error:
        return type(error), str(error), held(state, ddp)


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_bucket_after_close_is_an_error_that_says_so_and_what_was_held_can_still_be_saved(entry):
    for kind, message, kept in run_workers(use_after_close, 2, entry):
        assert kind is RuntimeError
        assert "sparse_hook: expected" in message and "close" in message and "running the callback" not in message
        assert any(residual.any() for residual in kept.values())


def close_in_another_thread(rank, entry):
    """Return how the backward passes ended during which another thread closed the state, at a different moment each."""
    ends = []
    for number in range(12):
        ddp = DistributedDataParallel(Given(*[300] * 6), bucket_cap_mb=0.001)
        state = make_state("regtopk", 0.1)
        register(ddp, state, entry)
        ddp(integers(*[300] * 6, seed=0)).backward()
        closer = threading.Timer(0.0005 * number, state.close)
        closer.start()
        try:
            while True:
                ddp(integers(*[300] * 6, seed=1)).backward()
        except RuntimeError as error:
            ends.append(str(error))
        closer.join()
        assert all(residual.isfinite().all() for residual in held(state, ddp).values())
    return ends


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_state_can_be_closed_by_another_thread_while_buckets_are_exchanged(entry):
    for ends in run_workers(close_in_another_thread, 1, entry):
        assert len(ends) == 12 and all("closed" in end or "a shutdown of this process" in end for end in ends), ends


def close_unused(rank):
    state = make_state("topk", 0.1)
    state.close()
    state.close()
    return state.stats()["steps"]


def test_a_state_that_was_never_used_can_be_closed():
    assert run_workers(close_unused, 2) == [0, 0]


# Statistics


PARAMETERS = 200


def read_statistics_meanwhile(rank, what):
    """A thread reads statistics again and again while the state lets go of parameters that only it still holds.

    It pauses between readings: a thread that never gives up the GIL slows down every other one to a call in 5 ms.
    """
    sizes = [3] * PARAMETERS
    state = make_state("regtopk", 0.1)
    ended = threading.Event()
    reads = []

    def read():
        while not ended.wait(1e-4):
            reads.append(state.stats()["steps"])

    def wrap():
        ddp = DistributedDataParallel(Given(*sizes), bucket_cap_mb=0.001)
        rt.attach(ddp, state)
        return ddp

    ddp = wrap()
    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        for step in range(20):
            for _ in range(2):
                ddp(integers(*sizes, seed=step)).backward()
            saved = state.state_dict(ddp)
            ddp = wrap()
            gc.collect()
            if what == "reset":
                state.reset()
            elif what == "flush":
                state.flush(ddp)
            elif what == "load":
                state.load_state_dict(saved, ddp)
    finally:
        ended.set()
        reader.join(20)
    return len(reads), reader.is_alive()


@pytest.mark.parametrize("what", ["reset", "flush", "load", "next exchange"])
def test_statistics_are_read_in_another_thread_while_parameters_are_let_go_of(what):
    ((reads, hangs),) = run_workers(read_statistics_meanwhile, 1, what)
    assert reads > 0 and not hangs


def read_statistics_while_pending(rank, folder):
    """Rank 1 begins its exchange when rank 0, which has begun, has read its statistics."""
    store = dist.FileStore(os.path.join(folder, "store"), 2)
    module = Given(40)
    ddp = DistributedDataParallel(module)
    state = make_state("topk", 0.25)
    pending = []

    def hook(state, bucket):
        if state.stats()["steps"] < 3:  # the layouts are agreed on first
            return rt.sparse_hook(state, bucket)
        if rank == 1:
            store.wait(["read"])
            return rt.sparse_hook(state, bucket)
        future = rt.sparse_hook(state, bucket)
        pending.append((future.done(), state.stats()["steps"]))
        store.set("read", "")
        return future

    ddp.register_comm_hook(state, hook)
    for step in range(4):
        ddp(integers(40, seed=step)).backward()
    return pending


def test_statistics_do_not_wait_for_an_exchange_that_is_pending(tmp_path):
    (pending, none) = run_workers(read_statistics_while_pending, 2, tmp_path)
    assert none == [] and len(pending) == 1
    done, steps = pending[0]
    assert not done and steps in (3, 4)


LARGE = 8_000_000


def time_statistics(rank):
    module = Given(LARGE)
    ddp = DistributedDataParallel(module, bucket_cap_mb=100)
    state = make_state("topk", 0.001)
    rt.attach(ddp, state)
    ddp([torch.full((LARGE,), 0.5)]).backward()
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        statistics = state.stats()
        seconds.append(time.perf_counter() - start)
    return min(seconds), statistics


def test_statistics_of_a_large_model_take_less_than_a_millisecond():
    # The least of many, for the machine may do other things as well; a pass over the residual takes several milliseconds.
    ((seconds, statistics),) = run_workers(time_statistics, 1)
    assert seconds < 1e-3
    assert "residual_norm" not in statistics, "it is a call of its own"


def norm_after_steps(rank, entry):
    module = Given(40, 24)
    ddp = DistributedDataParallel(module)
    state = make_state("regtopk", 0.1)
    register(ddp, state, entry)
    optimizer = unit_sgd(module)
    before = state.residual_norm()
    for step in range(4):
        optimizer.zero_grad()
        ddp(integers(40, 24, seed=step)).backward()
        optimizer.step()
    norm = state.residual_norm()
    expected = float(torch.cat([*held(state, ddp).values()]).double().norm())
    state.reset()
    return before, norm, expected, state.residual_norm()


@pytest.mark.parametrize("entry", ENTRIES)
def test_the_norm_of_the_residuals_is_that_of_what_is_held(entry):
    for before, norm, expected, after in run_workers(norm_after_steps, 2, entry):
        assert before == after == 0 and norm == pytest.approx(expected, rel=1e-12) and norm > 0
