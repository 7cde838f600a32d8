"""After an error: what the step had sent already returns, and an exchange that failed is not gone on with."""

import copy
import math

import pytest
import torch
from given import ENTRIES, Given, held, register
from processes import run_workers
from torch.nn.parallel import DistributedDataParallel
from training import make_state

import regtopk_torch as rt

SIZES = (10, 10)


def fail_in_the_second_bucket(rank, entry):
    """The second bucket's scale is refused; the script catches that and leaves the step out."""
    scales = []  # of the next buckets; 1 where there is none

    class Scaler:
        def get_scale(self):
            return scales.pop(0) if scales else 1.0

    module = Given(*SIZES)
    ddp = DistributedDataParallel(module, bucket_cap_mb=1e-5)
    state = make_state("topk", 0.5, grad_scaler=Scaler())
    register(ddp, state, entry)
    given = [torch.arange(1.0, 11.0), torch.arange(1.0, 11.0)]
    for _ in range(3):  # DDP has rebuilt its buckets then: one for each parameter
        ddp.zero_grad()
        ddp(given).backward()
    before = held(state, ddp)
    scales += [1.0, math.inf]
    ddp.zero_grad()
    with pytest.raises(ValueError, match="expected a gradient scale between"):
        ddp(given).backward()
    after = held(state, ddp)
    return [(after[name] - before[name]).tolist() for name in sorted(before)]


@pytest.mark.parametrize("entry", ENTRIES)
def test_what_other_buckets_sent_before_one_failed_returns(entry):
    # The bucket that failed has taken nothing; the one before it took its gradient, and gets back what it sent of it.
    for changes in run_workers(fail_in_the_second_bucket, 1, entry):
        assert sorted(changes) == [[0.0] * 10, torch.arange(1.0, 11.0).tolist()]


def save_alone_and_go_on(rank, directory):
    module = Given(*SIZES)
    ddp = DistributedDataParallel(module)
    state = make_state("topk", 0.5)
    ddp.register_comm_hook(state, rt.sparse_hook)
    for _ in range(3):  # DDP has rebuilt its buckets, which is a collective of its own
        ddp([torch.ones(10), torch.ones(10)]).backward()
    errors = []
    for alone in (True, False):
        try:
            if alone and rank == 1:
                ddp([torch.ones(10), torch.ones(10)]).backward()
            else:
                rt.save(state, ddp, directory)
        except RuntimeError as error:
            errors.append(str(error))
    return errors, sum(float(residual.sum()) for residual in held(state, ddp).values())


def test_after_an_exchange_that_failed_the_state_refuses_to_go_on_and_can_be_saved(tmp_path):
    for errors, kept in run_workers(save_alone_and_go_on, 2, tmp_path):
        assert len(errors) == 2 and kept > 0
        assert "expected a state whose exchanges have all ended, got one of which one failed" in errors[1]


def close_after_a_void_step(rank):
    module = Given(*SIZES)
    ddp = DistributedDataParallel(module, bucket_cap_mb=1e-5)
    state = make_state("topk", 0.5)
    ddp.register_comm_hook(state, rt.sparse_hook)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    overflowing = torch.ones(10)
    overflowing[0] = math.inf
    ddp([torch.arange(1.0, 11.0), overflowing]).backward()
    optimizer.step()
    state.close()
    return held(state, ddp)["parts.0"].tolist(), state.stats()["workers"]


def test_closing_forgets_neither_what_was_applied_nor_the_number_of_workers():
    for residual, workers in run_workers(close_after_a_void_step, 1):
        assert residual == [1.0] + [0.0] * 9 and workers == 1  # the nine largest were sent, and applied


def test_a_copied_state_goes_on_with_the_same_grad_scaler():
    scaler = torch.amp.GradScaler("cpu")
    state = rt.TopKState(0.1, grad_scaler=scaler)
    assert copy.deepcopy({"state": state})["state"]._grad_scaler is scaler
