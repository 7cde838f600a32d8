"""While an exchange is pending: what needs it done waits for it, and a shutdown is its error."""

import datetime
import threading

import pytest
import torch
import torch.distributed as dist
from processes import run_workers
from torch.nn.parallel import DistributedDataParallel
from training import batch, loss_of, make_model, make_state

import regtopk_torch as rt

LIMIT = 60  # seconds, against hanging
BEFORE = 2  # steps after which DDP's one bucket has its final layout, and the ranks have agreed on it


def hold_a_callback(rank):
    """The completer's thread is held up by a callback of the user: what must not run beside it waits, at most the timeout."""
    group = dist.new_group(timeout=datetime.timedelta(seconds=2))
    ddp = DistributedDataParallel(make_model(), bucket_cap_mb=100, process_group=group)
    state = make_state("topk", 0.1, process_group=group)
    held, released = threading.Event(), threading.Event()
    messages, steps = [], []

    def hold(done):
        held.set()
        released.wait(LIMIT)
        return done.value()

    def hook(state, bucket):
        steps.append(bucket.index())
        if len(steps) <= BEFORE:
            return rt.sparse_hook(state, bucket)
        if rank == 1:
            dist.barrier()
            return rt.sparse_hook(state, bucket)
        future = rt.sparse_hook(state, bucket).then(hold)
        # Only now may the other rank's payload come: the callback is not run at once, in this thread.
        dist.barrier()
        assert held.wait(LIMIT)
        state.stats()  # waits for nothing
        for action in (state.residual_norm, lambda: state.state_dict(ddp), state.reset, lambda: rt.sparse_hook(state, bucket)):
            try:
                action()
            except dist.DistBackendError as error:
                messages.append(str(error))
        released.set()
        return future

    ddp.register_comm_hook(state, hook)
    for step in range(BEFORE + 1):
        loss_of(ddp, batch(rank, step)).backward()
    return messages, state.stats()["steps"], state.residual_norm()


def test_what_needs_a_pending_exchange_done_waits_for_it_and_then_says_so():
    (messages, steps, norm), other = run_workers(hold_a_callback, 2)
    assert messages == ["rank 0: sparse_hook: expected no pending exchange within 2 s, got one"] * 4
    assert other[0] == [] and steps == other[1] == BEFORE + 1
    assert norm > 0, "the reset that failed changed nothing"


def shut_down(rank):
    ddp = DistributedDataParallel(make_model(), bucket_cap_mb=100)
    state = make_state("regtopk", 0.1)
    errors, steps = [], []

    def hook(state, bucket):
        future = rt.sparse_hook(state, bucket)
        steps.append(bucket.index())
        if len(steps) <= BEFORE:
            return future
        state.close()
        try:
            future.wait()
        except Exception as error:
            errors.append(str(error))
        return future

    ddp.register_comm_hook(state, hook)
    try:
        for step in range(BEFORE if rank else BEFORE + 1):
            loss_of(ddp, batch(rank, step)).backward()
    except RuntimeError as error:
        errors.append(str(error))
    dist.barrier()
    return errors


def test_a_shutdown_is_the_error_of_a_pending_exchange():
    errors, nothing = run_workers(shut_down, 2)
    assert nothing == [] and len(errors) == 2
    for error in errors:
        assert "rank 0: sparse_hook: expected the payloads of all 2 ranks of step 2 within 30 s, got a shutdown of this process" in error


def exchange_a_foreign_buffer(rank):
    ddp = DistributedDataParallel(make_model())
    state = make_state("topk", 0.1)

    def hook(state, bucket):
        bucket.set_buffer(torch.zeros(7))
        return rt.sparse_hook(state, bucket)

    ddp.register_comm_hook(state, hook)
    with pytest.raises(ValueError) as caught:
        loss_of(ddp, batch(rank, 0)).backward()
    return str(caught.value), sum(parameter.numel() for parameter in ddp.parameters())


def test_a_buffer_that_is_not_its_parameters_is_an_error():
    for rank, (message, entries) in enumerate(run_workers(exchange_a_foreign_buffer, 2)):
        assert message == f"rank {rank}: sparse_hook: expected a bucket that holds its parameters' {entries} entries, got 7"


def call_before_the_other_rank(rank, support):
    """Rank 1 begins a step when rank 0 has called the hook for all its buckets: those are pending, and its backward pass goes on."""
    ddp = DistributedDataParallel(make_model(), bucket_cap_mb=0.008)
    state = rt.TopKState(0.1, support=support)
    store, pending = dist.distributed_c10d._get_default_store(), []

    def hook(state, bucket):
        if step >= BEFORE and rank == 1 and bucket.index() == 0:
            store.wait([f"called in {step}"], datetime.timedelta(seconds=LIMIT))
        future = rt.sparse_hook(state, bucket)
        if step >= BEFORE and rank == 0:
            pending.append(not future.done())
            if bucket.is_last():
                store.set(f"called in {step}", "yes")
        return future

    ddp.register_comm_hook(state, hook)
    for step in range(BEFORE + 2):  # in the last ones each rank leads once
        loss_of(ddp, batch(rank, step)).backward()
    return pending


@pytest.mark.parametrize("support", ["own", "leader"])
def test_buckets_travel_while_the_backward_pass_goes_on(support):
    pending, _ = run_workers(call_before_the_other_rank, 2, support)
    assert len(pending) > 2 and all(pending)
