"""The transport of device tensors, on a backend that is late, completes out of order, or fails: what it gives is what gloo gives."""

import weakref

import late
import pytest
import torch
from given import Given, integers, missing, register, seed_of, unit_sgd
from processes import run_workers
from torch.nn.parallel import DistributedDataParallel
from training import make_state, train_ddp

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
