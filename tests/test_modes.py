"""DDP's other modes: replicas stay identical and no gradient mass is lost.

Mass: over all ranks and steps, everything given to the exchange equals everything it handed out plus what is kept.
"""

import pytest
import torch
import torch.nn as nn
from processes import run_workers
from torch.nn.parallel import DistributedDataParallel
from training import BUCKET_CAP_MB, batch, loss_of, make_model, make_optimizer, make_state

import regtopk_torch as rt

STEPS = 8


class WithUnused(nn.Module):
    """A branch that only rank `user` takes; None: nobody."""

    def __init__(self, rank, user):
        super().__init__()
        self.model = make_model()
        self.branch = nn.Linear(24, 24)
        self.takes_branch = rank == user

    def forward(self, x):
        return self.model(self.branch(x) if self.takes_branch else x)


class Ledger:
    """What went into the exchange and what came out, by parameter, in fp64."""

    def __init__(self, module):
        self.names = {parameter: name for name, parameter in module.named_parameters()}
        self.given = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in module.named_parameters()}
        self.handed_out = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in module.named_parameters()}

    def add(self, sums, bucket):
        for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            # A bucket holds each gradient in its parameter's memory order, whatever shape it shows.
            sums[self.names[parameter]] += gradient.flatten().as_strided(parameter.size(), parameter.stride()).double()


def booked_hook(books, bucket):
    """sparse_hook that enters the bucket in a ledger before and after."""
    state, ledger = books
    ledger.add(ledger.given, bucket)

    def book(done):
        ledger.add(ledger.handed_out, bucket)  # the result is the bucket's own buffer
        return done.value()

    return rt.sparse_hook(state, bucket).then(book)


def train(rank, mode, method):
    torch.manual_seed(0)
    options = {
        "static_graph": {"static_graph": True},
        "batched_grad_copy": {"batched_grad_copy": True},
        "batched_grad_copy, bucket view": {"batched_grad_copy": True, "gradient_as_bucket_view": True},
        "unused on one rank": {"find_unused_parameters": True},
        "unused skipped": {"find_unused_parameters": True, "skip_all_reduce_unused_params": True},
    }.get(mode, {})
    if mode == "unused on one rank":
        module = WithUnused(rank, 0)
    elif mode == "unused skipped":
        module = WithUnused(rank, None)
    else:
        module = make_model()
    if mode == "frozen":
        module.layers[0].weight.requires_grad_(False)
    if mode == "channels_last":
        module = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 3, padding=1)).to(memory_format=torch.channels_last)
    if mode == "two dtypes":
        module = nn.Sequential(nn.Linear(24, 24), Cast(), nn.Linear(24, 24).double())
    ddp = DistributedDataParallel(module, bucket_cap_mb=BUCKET_CAP_MB, **options)
    state = make_state(method, 0.05)
    ledger = Ledger(module)
    ddp.register_comm_hook((state, ledger), booked_hook)
    optimizer = make_optimizer(module)

    def loss(step):
        x = batch(rank, step)
        if mode == "channels_last":
            x = x.reshape(8, 1, 4, 6)
            return (ddp(x) - x).square().mean()
        return loss_of(ddp, x)

    def step_once(step):
        optimizer.zero_grad()
        loss(step).backward()
        optimizer.step()

    if mode == "no_sync":
        for step in range(STEPS):
            optimizer.zero_grad()
            with ddp.no_sync():
                loss(step).backward()
            loss(step + 100).backward()
            optimizer.step()
    elif mode == "join":
        with ddp.join():
            for step in range(STEPS - 3 * rank):
                step_once(step)
    else:
        for step in range(STEPS):
            step_once(step)
    kept = {name: entry.get("residual") for name, entry in state.state_dict(ddp)["parameters"].items()}
    return [p.detach().clone() for p in module.parameters()], ledger.given, ledger.handed_out, kept, state.stats()


class Cast(nn.Module):
    def forward(self, x):
        return x.double()


@pytest.mark.parametrize("method", ["topk", "regtopk"])
@pytest.mark.parametrize(
    "mode",
    [
        "plain", "static_graph", "batched_grad_copy", "batched_grad_copy, bucket view", "no_sync", "join", "unused on one rank",
        "unused skipped", "frozen", "channels_last", "two dtypes",
    ],
)  # fmt: skip
def test_replicas_stay_identical_and_nothing_is_lost(mode, method):
    results = run_workers(train, 2, mode, method)
    parameters = [result[0] for result in results]
    assert all(torch.equal(a, b) for a, b in zip(*parameters, strict=True))
    given, handed_out = (sum_by_name(result[i] for result in results) for i in (1, 2))
    kept = sum_by_name({name: r for name, r in result[3].items() if r is not None} for result in results)
    assert kept
    for name in given:
        # Every rank is handed the average, so both together the sum. fp32 sums of about 20 terms.
        total = handed_out[name] + kept.get(name, torch.zeros_like(given[name])).double()
        torch.testing.assert_close(total, given[name], rtol=1e-5, atol=1e-6)
    assert any(residual.any() for residual in kept.values())
    assert {result[4]["steps"] for result in results} == {STEPS}


def sum_by_name(dicts):
    total = {}
    for one in dicts:
        for name, tensor in one.items():
            total[name] = total[name] + tensor if name in total else tensor
    return total
