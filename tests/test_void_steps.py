"""A non-finite gradient on one rank voids the step on every rank, and costs no finite gradient."""

import math

import pytest
import torch
from buckets import DTYPES
from processes import run_workers
from torch.nn.parallel import DistributedDataParallel
from training import batch, loss_of, make_model, make_state

import regtopk_torch as rt


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", ["topk", "regtopk"])
def test_what_a_void_step_sent_returns_to_the_residual(method, dtype, bad):
    exchange = rt.LocalExchange(2, 0.5, method=method)
    first = [torch.tensor([1.0, 2.0, 0.25, 0.0]), torch.tensor([1.0, 0.5, 0.25, 4.0])]
    exchange.step([g.to(dtype) for g in first])
    before = [exchange.residuals(rank)[0] for rank in range(2)]
    second = [torch.tensor([0.5, bad, 0.25, 8.0]), torch.tensor([2.0, 1.0, 1.0, 3.0])]
    average = exchange.step([g.to(dtype) for g in second])
    assert not average.isfinite().all(), "the user, or GradScaler, must see it"
    after = [exchange.residuals(rank)[0] for rank in range(2)]
    # Worker 0 keeps what it had in the bad entry; everything finite was added.
    assert after[0].tolist() == [before[0][0] + 0.5, before[0][1], before[0][2] + 0.25, before[0][3] + 8.0]
    assert after[1].tolist() == (before[1] + second[1]).tolist()
    # The next step sends what the void one tried to.
    third = exchange.step([torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=dtype)] * 2)
    assert third.isfinite().all() and third[3] == (after[0][3] + after[1][3]) / 2 + 1
    stats = exchange.stats()
    assert stats["void_steps"] == 1 and stats["history_dropped"] == 4


def scale_until_overflow(rank):
    """GradScaler on the CPU with an overflow on rank 1 in step 3; returns what every step did."""
    model = make_model()
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.008)
    state = make_state("regtopk", 0.05)
    ddp.register_comm_hook(state, rt.sparse_hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=1000)
    skipped = []
    for step in range(6):
        optimizer.zero_grad()
        loss = loss_of(ddp, batch(rank, step))
        if rank == 1 and step == 3:
            loss = loss * math.inf
        before = [p.detach().clone() for p in model.parameters()]
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        skipped.append(all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)))
    residual_finite = all(e["residual"].isfinite().all() for e in state.state_dict(ddp)["parameters"].values())
    return skipped, [p.detach().clone() for p in model.parameters()], residual_finite, state.stats()["void_steps"]


def test_an_overflow_on_one_rank_skips_the_step_on_every_rank():
    results = run_workers(scale_until_overflow, 2)
    for skipped, parameters, residual_finite, void_steps in results:
        assert skipped == [False, False, False, True, False, False]
        assert residual_finite and void_steps == 1
        assert all(torch.equal(a, b) for a, b in zip(parameters, results[0][1], strict=True))
