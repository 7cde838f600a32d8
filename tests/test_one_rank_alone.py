"""What one rank does alone, or with a group of its own, is an error in words on every rank long before the timeout, or it works."""

import datetime
import gc
import time

import pytest
import torch
import torch.distributed as dist
from given import ENTRIES, Given, integers, register
from processes import error_of, run_workers
from torch.nn.parallel import DistributedDataParallel
from training import make_state

import regtopk_torch as rt
from regtopk_torch import groups

TIMEOUT = datetime.timedelta(seconds=60)
WITHIN = 30.0  # seconds: long before the timeout, on a machine that does other things as well
SIZES = (40, 24)


def train_steps(rank, ddp, steps):
    for step in steps:
        ddp(integers(*SIZES, seed=10 * step + rank)).backward()


def act_alone(rank, entry, method, what, directory):
    """After three steps one rank does `what`, and all go on with the next step; return the first error of each."""
    group = dist.new_group(timeout=TIMEOUT)
    ddp = DistributedDataParallel(Given(*SIZES), process_group=group, bucket_cap_mb=1e-4)
    state = make_state(method, 0.25, process_group=group)
    register(ddp, state, entry)
    train_steps(rank, ddp, range(3))
    if what == "save":
        return error_of(rt.save, state, ddp, directory) if rank == 0 else error_of(train_steps, rank, ddp, [3])
    if rank == 1:
        if what == "reset":
            state.reset()
        elif what == "load_state_dict":
            state.load_state_dict(state.state_dict(ddp), ddp)
        else:
            state.pause()
    return error_of(train_steps, rank, ddp, [3])


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("method", ["topk", "regtopk"])
@pytest.mark.parametrize("what", ["reset", "load_state_dict", "pause"])
def test_what_one_rank_does_alone_is_an_error_on_every_rank_that_names_the_rank_and_the_call(what, method, entry):
    for rank, (kind, message, seconds) in enumerate(run_workers(act_alone, 2, entry, method, what, None)):
        assert kind in (ValueError, dist.DistBackendError), message
        assert message.startswith(f"rank {rank}: sparse_hook: expected ")
        assert what in message and "rank 1" in message
        assert seconds < WITHIN


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_save_on_one_rank_alone_is_an_error_in_words_on_both(tmp_path, entry):
    results = run_workers(act_alone, 2, entry, "topk", "save", tmp_path / "checkpoint")
    for rank, (kind, message, seconds) in enumerate(results):
        assert kind is not None and f"rank {rank}" in message and "expected" in message and "save" in message
        assert seconds < WITHIN
    assert "gradient scale" not in results[1][1], "that is not what is wrong"


# Two states and one directory


def save_two_states(rank, directory, first):
    """A second state saves where the first one, which lives, has saved to or loaded from; then the first one ends."""
    ddps, states = [], []
    for _ in range(2):
        ddps.append(DistributedDataParallel(Given(*SIZES)))
        states.append(make_state("topk", 0.25))
        rt.attach(ddps[-1], states[-1])
        train_steps(rank, ddps[-1], range(2))
    rt.save(states[0], ddps[0], directory)
    if first == "loaded":
        states[0].close()
        del states[0], ddps[0]
        gc.collect()
        ddps.append(DistributedDataParallel(Given(*SIZES)))
        states.append(make_state("topk", 0.25))
        rt.attach(ddps[-1], states[-1])
        rt.load(states[-1], ddps[-1], directory)
        states.reverse()
        ddps.reverse()
    found = error_of(rt.save, states[1], ddps[1], directory)
    again = error_of(rt.save, states[0], ddps[0], directory)  # its own directory
    del states[0], ddps[0]
    gc.collect()
    dist.barrier()  # no rank saves before the first state has ended on all of them
    return found, again, error_of(rt.save, states[0], ddps[0], directory)


@pytest.mark.parametrize("first", ["saved", "loaded"])
def test_a_second_live_state_may_not_save_into_the_first_ones_directory(tmp_path, first):
    directory = tmp_path / "checkpoint"
    for (kind, message, _), again, after in run_workers(save_two_states, 2, directory, first):
        assert kind is ValueError, message
        assert "save: expected" in message and str(directory) in message
        assert again[0] is None and after[0] is None, (again, after)


# Groups


def train_in_a_subgroup(rank, entry):
    """Rank 0 has made one more group than its partner; return the gradients of both ranks of the pair."""
    pair = dist.new_group([0, 1])
    other = rank in (0, 2) and dist.new_group([0, 2], use_local_synchronization=True)
    result = None
    if rank < 2:
        state = rt.TopKState(0.1, process_group=pair)
        ddp = DistributedDataParallel(Given(*SIZES), process_group=pair)
        register(ddp, state, entry)
        train_steps(rank, ddp, range(3))
        result = [parameter.grad for parameter in ddp.parameters()]
    dist.barrier()
    assert other is not None
    return result


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_state_works_in_a_subgroup_where_a_rank_has_made_one_more_group_than_its_partner(entry):
    one, two, _ = run_workers(train_in_a_subgroup, 3, entry)
    assert all(map(torch.equal, one, two)) and any(gradient.any() for gradient in one)


SHORT = datetime.timedelta(seconds=3)


def make_a_state_on_one_rank(rank, entry):
    group = dist.new_group(timeout=SHORT)
    ddp = DistributedDataParallel(Given(*SIZES), process_group=group)

    def construct_and_train():
        if rank == 0:
            register(ddp, rt.TopKState(0.1, process_group=group), entry)
        train_steps(rank, ddp, range(2))

    return error_of(construct_and_train)


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_state_on_one_rank_only_is_an_error_in_words_within_the_timeout(entry):
    (kind, message, seconds), _ = run_workers(make_a_state_on_one_rank, 2, entry)
    assert kind in (ValueError, RuntimeError, dist.DistBackendError), message  # not the store's own
    assert message.startswith("rank 0: sparse_hook: expected ")
    assert seconds < SHORT.total_seconds() + WITHIN


class SlowToConnect(dist.ProcessGroupGloo):
    connected = 0.0

    def __init__(self, *arguments):
        super().__init__(*arguments)
        time.sleep(0.3)
        SlowToConnect.connected = time.monotonic()


def open_the_groups_of_a_state(rank):
    """When each of its groups was connected on rank 0, and open on rank 1."""
    if rank == 0:
        dist.ProcessGroupGloo = SlowToConnect
    times = []

    def note():
        times.append(SlowToConnect.connected if rank == 0 else time.monotonic())

    state = make_state("topk", 0.1, levels=2)
    open_stage = groups.open_groups(state)[-1]
    note()
    for among in (0, 1):  # the host of both ranks is all of them
        open_stage(0, among)
        note()
    return times


def test_no_rank_goes_on_before_all_are_connected():
    """One that ended at once, by an error that all ranks have, would cost the others theirs: the connection was closed by a peer."""
    connected, went_on = run_workers(open_the_groups_of_a_state, 2)
    assert all(0 < one < other for one, other in zip(connected, went_on, strict=True)), (connected, went_on)


def use_a_state_of_another_group(rank, entry):
    """Groups of one rank each, under a model of both."""
    groups = [dist.new_group([member]) for member in range(2)]
    ddp = DistributedDataParallel(Given(*SIZES))
    state = rt.TopKState(0.1, process_group=groups[rank])

    def register_and_train():
        register(ddp, state, entry)
        train_steps(rank, ddp, range(2))

    return error_of(register_and_train)


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_state_of_another_group_than_the_models_is_refused(entry):
    for rank, (kind, message, _) in enumerate(run_workers(use_a_state_of_another_group, 2, entry)):
        assert kind is ValueError, message
        assert f"expected a state for the model's ranks [0, 1], got one for [{rank}]" in message


def close_alone(rank, what):
    state = rt.TopKState(0.25, process_group=dist.new_group(timeout=TIMEOUT))
    state.average([torch.ones(50)])
    if rank == 1:
        state.close() if what == "close" else state.regroup(dist.group.WORLD)
        dist.barrier()
        return None
    result = error_of(state.average, [torch.ones(50)])
    dist.barrier()
    return result


def close_with_one_pending(rank):
    """Of lists that take turns, rank 1 begins one and closes its state; what rank 0 hears, which comes to it later."""
    state = rt.TopKState(0.25, process_group=dist.new_group(timeout=TIMEOUT))
    for _ in range(2):
        for name in "ab":
            state.average([torch.ones(50)], [name])
    if rank == 1:
        state.average([torch.ones(50)], ["a"], async_op=True)
        state.close()
        dist.barrier()
        dist.barrier()
        return None
    dist.barrier()
    result = error_of(state.average, [torch.ones(50)], ["a"])
    dist.barrier()
    return result


def test_a_rank_that_closes_with_an_average_under_way_is_named_within_seconds():
    (kind, message, seconds), _ = run_workers(close_with_one_pending, 2)
    assert kind is dist.DistBackendError and "rank 1 has closed its state (after " in message and seconds < WITHIN


@pytest.mark.parametrize("what", ["close", "regroup"])
def test_a_rank_that_closes_its_state_is_named_and_not_taken_for_dead(what):
    (kind, message, seconds), _ = run_workers(close_alone, 2, what)
    assert kind is dist.DistBackendError and "rank 1 has closed its state (after " in message and seconds < WITHIN


def leave_a_step_half_done(rank, entry):
    """On rank 1 something of the script's own fails behind the first bucket, and it goes on with the next step; the first error of each."""
    group = dist.new_group(timeout=TIMEOUT)
    state = make_state("topk", 0.25, process_group=group)
    module = Given(4000, 24)

    def begin():
        ddp = DistributedDataParallel(module, process_group=group, bucket_cap_mb=1e-4, init_sync=False)
        register(ddp, state, entry)
        return ddp

    def train(ddp, steps):
        for step in steps:
            ddp(integers(4000, 24, seed=10 * step + rank)).backward()

    ddp = begin()
    train(ddp, range(3))
    if rank == 1:

        def fail(gradient):
            raise RuntimeError("out of memory")

        hook = module.parts[0].register_hook(fail)
        assert error_of(train, ddp, [3])[1] == "out of memory"
        hook.remove()
        ddp = begin()
    return error_of(train, ddp, [3])


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_step_that_a_rank_leaves_half_done_is_an_error_on_both_though_it_goes_on(entry):
    for rank, (kind, message, seconds) in enumerate(run_workers(leave_a_step_half_done, 2, entry)):
        assert kind is dist.DistBackendError and seconds < WITHIN, message
        assert message.startswith(f"rank {rank}: sparse_hook: expected ") and "in the agreement on a bucket" in message
