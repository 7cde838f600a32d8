"""A non-finite gradient on one rank voids the step on every rank, and costs no finite gradient."""

import math

import pytest
import torch
import torch.nn as nn
from books import Books, add_gradients, booked_hook, check_against_simulation, check_equal, check_mass, nothing_applied, residuals_of
from buckets import DTYPES
from processes import run_workers
from test_modes import STEPS, WithBranch, all_or_nobody, two_dtypes
from torch.nn.parallel import DistributedDataParallel
from training import BUCKET_CAP_MB, batch, loss_of, make_model, make_optimizer, make_state

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


OTHER_BUCKETS = [[8, 9], [6, 7], [4, 5], [0, 1, 2, 3]]
BRANCH_COMES_AND_GOES = [[[10], *OTHER_BUCKETS], OTHER_BUCKETS, OTHER_BUCKETS, [[10], *OTHER_BUCKETS]]
SKIPPING = {"find_unused_parameters": True, "skip_all_reduce_unused_params": True}


def with_branch(rank):
    return WithBranch(rank, all_or_nobody)


def with_two_dtypes(rank):
    return two_dtypes()


def train_with_a_void_step(rank, method, model, options, void_step, parameter):
    """One rank's gradient of one parameter is NaN in one step."""
    module = model(rank)
    ddp = DistributedDataParallel(module, bucket_cap_mb=BUCKET_CAP_MB / 4, **options)
    state, books = make_state(method, 0.05), Books(module)
    ddp.register_comm_hook((state, books), booked_hook)
    list(module.parameters())[parameter].register_hook(lambda g: g * math.nan if rank == 1 and module.step == void_step else g)
    optimizer, applied = make_optimizer(module), nothing_applied(module)
    for step in range(STEPS):
        module.step = step
        optimizer.zero_grad()
        loss_of(ddp, batch(rank, step)).backward()
        if step != void_step:
            add_gradients(applied, module)
            optimizer.step()
    return books.steps, residuals_of(state, module), applied, state.stats()


@pytest.mark.parametrize(
    ("model", "options", "void_step", "parameter", "layouts"),
    [
        # In every third step the branch is used, and its bias is the first bucket.
        (with_branch, SKIPPING, 2, 6, BRANCH_COMES_AND_GOES),
        (with_branch, SKIPPING, 3, 6, BRANCH_COMES_AND_GOES),
        (with_branch, SKIPPING, 4, 6, BRANCH_COMES_AND_GOES),
        # Two dtypes are two buckets from the first step on, in which both say index 0.
        (with_two_dtypes, {"static_graph": True}, 0, 0, [[[2, 3], [0, 1]]]),
        (with_two_dtypes, {"static_graph": True}, 0, 2, [[[2, 3], [0, 1]]]),
    ],
    ids=["skipped, next comes", "comes", "skipped", "first of a static graph, last bucket", "first of a static graph, first bucket"],
)
@pytest.mark.parametrize("method", ["topk", "regtopk"])
def test_a_void_step_returns_all_that_it_sent_and_no_more(method, model, options, void_step, parameter, layouts):
    results = run_workers(train_with_a_void_step, 2, method, model, options, void_step, parameter)
    for books, _, _, stats in results:
        assert [step["layouts"] for step in books][: len(layouts)] == layouts
        assert stats["void_steps"] == 1 and stats["steps"] == STEPS
    exchange = check_against_simulation([result[0] for result in results], method)
    for rank, result in enumerate(results):
        check_equal(result[1], exchange.residuals(rank))
    check_mass([result[0] for result in results], [result[1] for result in results], results[0][2])


def take_turns(rank, entry):
    """Two heads, each a bucket, that are used in turn: no step shares a bucket with the next, and the second head's comes first.

    The first step overflows on rank 1, so that GradScaler halves its scale. Return what was given, unscaled, and what is kept, of
    each head, what the second step handed out, and the steps counted.
    """
    torch.manual_seed(0)
    heads = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(2))
    heads.forward = lambda x, which: heads[which](x)
    ddp = DistributedDataParallel(heads, bucket_cap_mb=1e-6, **SKIPPING)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    state = make_state("topk", 0.25, grad_scaler=scaler)
    if entry == "attach":
        rt.attach(ddp, state)
    else:
        ddp.register_comm_hook(state, rt.sparse_hook)
    optimizer = torch.optim.SGD(heads.parameters(), lr=0.1)
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(rank))

    def step(which, weight=1.0):
        optimizer.zero_grad()
        scaler.scale(weight * ddp(x, which).square().sum()).backward()
        averages = heads[which].weight.grad / scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        return averages

    for which in (1, 0) * 3:  # until DDP has rebuilt its buckets
        step(which)
    before, steps = state.state_dict(ddp)["parameters"], state.stats()["steps"]
    given = []
    for head in heads:
        given.append(torch.autograd.grad(head(x).square().sum(), head.weight)[0])
    given[1][0, 0] = 0.0 if rank == 1 else given[1][0, 0]  # where it is not finite, nothing was given
    handle = heads[1].weight.register_hook(lambda g: g.index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(math.inf)) if rank == 1 else g)
    step(1)
    handle.remove()
    averages = step(0)
    kept = state.state_dict(ddp)["parameters"]
    difference = [kept[f"{head}.weight"]["residual"] - before[f"{head}.weight"]["residual"] for head in (0, 1)]
    return given, difference, averages, state.stats()["steps"] - steps


@pytest.mark.parametrize("entry", ["register_comm_hook", "attach"])
def test_a_new_scale_begins_a_step_though_no_bucket_comes_back(entry):
    results = run_workers(take_turns, 2, entry)
    for given, kept, _, steps in results:
        assert steps == 2
        torch.testing.assert_close(kept[1], given[1], rtol=1e-5, atol=1e-6)  # all of the void step
    given, kept = (sum(result[part][0] for result in results) for part in (0, 1))
    torch.testing.assert_close(2 * results[0][2] + kept, given, rtol=1e-5, atol=1e-6)
