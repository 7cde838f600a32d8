"""The transport of device tensors, on a backend that is late, completes out of order, or fails: what it gives is what gloo gives."""

import contextlib
import time
import weakref

import late
import pytest
import test_levels
import torch
import torch.distributed as dist
from given import Given, integers, missing, register, seed_of, unit_sgd
from processes import error_of, run_workers
from torch.nn.parallel import DistributedDataParallel
from training import make_state, train_ddp

import regtopk_torch as rt

WAYS = ("late", "reversed")


@pytest.fixture(scope="module")
def backend():
    return late.build()


def train_both(rank, path, way, method, entry):
    with late.served_late(path, way):
        ours = train_ddp(rank, method, 0.05, 6, entry)
    theirs = train_ddp(rank, method, 0.05, 6, entry)
    return ours, theirs


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method, entry", [("topk", "attach"), ("regtopk", "register_comm_hook")])
def test_a_late_backend_gives_the_bits_of_gloo(backend, way, method, entry):
    for ours, theirs in run_workers(train_both, 2, backend, way, method, entry):
        assert all(torch.equal(a, b) for a, b in zip(ours[0], theirs[0], strict=True))
        assert ours[1].keys() == theirs[1].keys() and all(torch.equal(ours[1][name], theirs[1][name]) for name in ours[1])
        timeless = [{k: v for k, v in statistics.items() if not k.endswith("_seconds")} for statistics in (ours[2], theirs[2])]
        assert timeless[0] == timeless[1] and timeless[0]["sent_entries"] > 0


SIZES = [300] * 6


def fail_once(rank, path, entry):
    """The seventh collective ends with an error on both ranks; they go on. Returns (its message, what is missing in the end)."""
    with late.served_late(path, "failing", failing=7):
        module = Given(*SIZES)
        ddp = DistributedDataParallel(module, bucket_cap_mb=0.001)
        state = make_state("topk", 0.1)
        register(ddp, state, entry)
        optimizer = unit_sgd(module)
        given = [torch.zeros(size, dtype=torch.float64) for size in SIZES]
        messages = []
        for step in range(5):
            gradients = integers(*SIZES, seed=seed_of(rank, step))
            optimizer.zero_grad()
            for total, gradient in zip(given, gradients, strict=True):
                total += gradient
            try:
                ddp(gradients).backward()
            except RuntimeError as error:
                messages.append((type(error).__name__, str(error)))
                # What the other buckets of the step have brought is not applied either: DDP may have copied some of it.
                optimizer.zero_grad()
                ddp = DistributedDataParallel(module, bucket_cap_mb=0.001)
                register(ddp, state, entry)
                continue
            optimizer.step()
        return messages, missing(state, ddp, given)


@pytest.mark.parametrize("entry", ["attach", "register_comm_hook"])
def test_a_collective_that_fails_is_an_error_that_names_the_step_and_loses_nothing(backend, entry):
    for messages, lost in run_workers(fail_once, 2, backend, entry):
        ((kind, message),) = messages
        assert kind == "DistBackendError" and "expected the payloads of all 2 ranks of step" in message and "the network is gone" in message
        assert not any(lost)


def close_meanwhile(rank, path):
    """A state is closed while collectives are on their way: nothing hangs, and what they hold is let go of."""
    with late.served_late(path, "late"):
        module = Given(*SIZES)
        ddp = DistributedDataParallel(module, bucket_cap_mb=0.001)
        state = make_state("regtopk", 0.1)
        register(ddp, state, "attach")
        ddp(integers(*SIZES, seed=0)).backward()
        state.close()
        try:
            ddp(integers(*SIZES, seed=1)).backward()
        except RuntimeError as error:
            message = str(error)
        exchange = weakref.ref(state)
        del state, ddp
        return message, exchange() is None


def test_after_close_a_bucket_is_an_error(backend):
    for message, gone in run_workers(close_meanwhile, 2, backend):
        assert "expected an open exchange, got one that was closed" in message and gone


def holders_of_results(rank, path):
    """How many hold the memory of a bucket that DDP has replaced after its step, and of an average that nobody wants any more: over such a
    backend, and over gloo."""
    found = []
    for way in ("late", None):
        with late.served_late(path, way) if way else contextlib.nullcontext():
            seen, module = [], Given(40)
            ddp, state, other = DistributedDataParallel(module), rt.TopKState(0.1), rt.TopKState(0.1)

            def hook(state, bucket, seen=seen):
                seen.append(bucket.buffer().untyped_storage())
                return rt.sparse_hook(state, bucket)

            ddp.register_comm_hook(state, hook)
            ddp(integers(40, seed=rank)).backward()
            ddp(integers(40, seed=rank))  # DDP makes its buckets anew
            (average,) = other.average(integers(40, seed=rank))
            seen.append(average.untyped_storage())
            del average
            time.sleep(0.2)  # whoever completed it lets go a moment later
            found.append([torch._C._storage_Use_Count(storage._cdata) for storage in seen])
    return found


def test_nobody_holds_a_bucket_or_an_average_after_its_end(backend):
    for late_ones, of_gloo in run_workers(holders_of_results, 2, backend):
        assert late_ones == of_gloo and len(of_gloo) == 2, "until the next step, whose forward pass has better use for the memory"


# Two levels: groups of a host's ranks and of those of one place, of the kind of the model's.


def train_hosts(rank, path, way, method, cap):
    with late.served_late(path, way):
        ours = test_levels.train(rank, 2, method, "hook", cap, False, {})
    return ours, test_levels.train(rank, 2, method, "hook", cap, False, {})


@pytest.mark.parametrize("way, method, cap", [("late", "regtopk", test_levels.SEVERAL), ("reversed", "topk", 1024)])
def test_hosts_on_a_late_backend_have_the_bits_of_gloo(backend, way, method, cap):
    for ours, theirs in run_workers(train_hosts, 4, backend, way, method, cap):
        for one, other in zip(ours[0] + ours[1], theirs[0] + theirs[1], strict=True):
            assert torch.equal(one, other)
        counted = [{name: value for name, value in statistics.items() if not name.endswith("_seconds")} for statistics in (ours[2], theirs[2])]
        assert counted[0] == counted[1] and counted[0]["bytes_local"] > 0 < counted[0]["bytes_sent"]


def known():
    return {tuple(dist.get_process_group_ranks(group)): dist.get_backend(group) for group in dist.distributed_c10d._world.pg_map}


def open_and_close(rank, path):
    """(groups with the state open, those with it closed, and with another one that is dropped; what a group that is not known, or not in order, is told)."""
    seen, tensors = [], [torch.arange(30.0)]
    if rank in (0, 3):  # ranks may have made different numbers of groups
        dist.new_group([0, 3], use_local_synchronization=True)
    with late.served_late(path, "late"):
        for ends in ("close", "drop"):
            state = rt.TopKState(0.5, levels=2)
            state.average(tensors)
            seen.append(known())
            if ends == "close":
                state.close()
            del state
            seen.append(known())
        own = dist.ProcessGroup(dist.PrefixStore("own", dist.group.WORLD.get_group_store()), rank, 4)
        unknown = error_of(rt.TopKState(0.5, levels=2, process_group=own).average, tensors)
        asked = dist.get_process_group_ranks
        dist.get_process_group_ranks = lambda group: list(reversed(asked(group)))
        unordered = error_of(rt.TopKState(0.5, levels=2).average, tensors)
        dist.get_process_group_ranks = asked
    return seen, unknown, unordered


def test_groups_of_hosts_are_opened_where_they_are_needed_and_given_back(backend):
    for rank, (seen, unknown, unordered) in enumerate(run_workers(open_and_close, 4, backend)):
        host, place = (0, 1) if rank < 2 else (2, 3), (rank % 2, rank % 2 + 2)
        assert [set(groups) - {(0, 3)} for groups in seen] == [{(0, 1, 2, 3), host, place}, {(0, 1, 2, 3)}] * 2
        assert set(seen[0].values()) == {"gloo"}
        assert unknown[0] is ValueError and unknown[1].startswith(f"rank {rank}: average: expected a process group of torch.distributed's with levels= on a GPU, got one that it does not know")
        assert unordered[0] is ValueError and "expected a process group of ascending ranks with levels= on a GPU, got [3, 2, 1, 0]" in unordered[1]


def fail_among_hosts(rank, path, failing):
    """A collective ends with an error on all ranks. Returns (its message, the time until the state is closed)."""
    with late.served_late(path, "failing", failing=failing):
        ddp = DistributedDataParallel(Given(300))
        state = rt.TopKState(0.1, levels=2)
        register(ddp, state, "attach")
        error = error_of(ddp(integers(300, seed=rank)).backward)
        return error, error_of(state.close)


def test_a_collective_among_hosts_that_fails_is_an_error_that_names_the_step(backend):
    for failed, closed in run_workers(fail_among_hosts, 4, backend, 0):
        assert "expected the payloads of all 4 ranks of step 0" in failed[1] and "the network is gone" in failed[1]
        assert closed[0] is None and closed[2] < 5

