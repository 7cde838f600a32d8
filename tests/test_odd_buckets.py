"""Buckets that hold nothing, models that share a state, and a function of the extension that is asked for something odd."""

import math

import pytest
import torch
import torch.nn as nn
from given import ENTRIES, Given, finite, integers, missing, register, seed_of, unit_sgd
from processes import run_workers
from torch.nn.parallel import DistributedDataParallel
from training import make_state

import regtopk_torch as rt

SIZES, STEPS, BAD_STEP = (40, 24), 8, 4


class WithEmptyParameter(nn.Module):
    """The empty parameter's gradient comes last, when the buckets before are full."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.empty = nn.Parameter(torch.empty(0, 24))
        self.layers = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24))

    def forward(self, x):
        return self.layers(torch.cat([x, x @ self.empty.T], 1))


def train_with_an_empty_parameter(rank, entry, bucket_cap_mb):
    """Return the parameters after some steps at density 1, and the sizes of the last step's buckets where a hook sees them."""
    model = WithEmptyParameter()
    ddp = DistributedDataParallel(model, bucket_cap_mb=bucket_cap_mb)
    state = make_state("topk", 1.0)
    sizes = []

    def hook(state, bucket):
        if bucket.index() == 0:
            sizes.clear()
        sizes.append(bucket.buffer().numel())
        return rt.sparse_hook(state, bucket)

    if entry == "attach":
        rt.attach(ddp, state)
    elif entry is not None:
        ddp.register_comm_hook(state, hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(4):
        optimizer.zero_grad()
        ddp(torch.randn(8, 24, generator=torch.Generator().manual_seed(seed_of(rank, step)))).square().mean().backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()], sizes, state.stats() if entry else None


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("bucket_cap_mb", [1e-6, 25], ids=["alone", "beside others"])
def test_an_empty_parameter_trains_as_without_the_hook(bucket_cap_mb, entry):
    plain, _, _ = run_workers(train_with_an_empty_parameter, 2, None, bucket_cap_mb)[0]
    for parameters, sizes, stats in run_workers(train_with_an_empty_parameter, 2, entry, bucket_cap_mb):
        assert all(map(torch.equal, parameters, plain)), "two workers at density 1: halving is exact, so is the sum"
        assert stats["steps"] == 4
        if entry == "register_comm_hook":
            assert (0 in sizes) == (bucket_cap_mb < 1)


def share_a_state(rank, method, entry, void, order):
    """Two models with an optimizer each under one state; the gradient of model `void` is infinite in one step, which is left out."""
    modules = Given(*SIZES), Given(*SIZES)
    models = [DistributedDataParallel(module, bucket_cap_mb=1e-4) for module in modules]
    state = make_state(method, 0.25)
    for model in models:
        register(model, state, entry)
    optimizers = [unit_sgd(module) for module in modules]
    given = [[torch.zeros(size, dtype=torch.float64) for size in SIZES] for _ in models]

    def gradients_of(index, step):
        gradients = integers(*SIZES, seed=2 * seed_of(rank, step) + index)
        if step == BAD_STEP and index == void and rank == 1:
            gradients[0][3] = math.inf
        for total, gradient in zip(given[index], gradients, strict=True):
            total += finite(gradient)
        return gradients

    def apply(index):
        if all(parameter.grad.isfinite().all() for parameter in modules[index].parameters()):
            optimizers[index].step()
        optimizers[index].zero_grad()

    for step in range(STEPS):
        if order == "one backward":
            sum(model(gradients_of(index, step)) for index, model in enumerate(models)).backward()
            for index in range(2):
                apply(index)
        else:
            for index, model in enumerate(models):
                model(gradients_of(index, step)).backward()
                apply(index)
    # Where one module alone is asked about, what is held of the other is an error: both in one.
    both = nn.ModuleList(modules)
    parameters = [parameter.detach().clone() for parameter in both.parameters()]
    return missing(state, both, given[0] + given[1]), parameters


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("order", ["one backward", "one after the other"])
@pytest.mark.parametrize("void", [None, 0, 1])
@pytest.mark.parametrize("method", ["topk", "regtopk"])
def test_two_models_that_share_a_state_lose_nothing_and_get_nothing_twice(method, void, order, entry):
    results = run_workers(share_a_state, 2, method, entry, void, order)
    assert all(map(torch.equal, results[0][1], results[1][1]))
    for lost, _ in results:
        assert lost == [0.0] * 4


@pytest.mark.parametrize("dtype", ["float32", 3, None, torch.zeros(1)], ids=["string", "integer", "None", "tensor"])
def test_the_bytes_of_a_payload_of_something_that_is_no_dtype_are_a_type_error(dtype):
    with pytest.raises(TypeError, match=r"payload_bytes: expected .*dtype.*, got "):
        rt._C.payload_bytes(10, 1, dtype)
    assert rt._C.payload_bytes(10, 1, torch.float32) > 0
