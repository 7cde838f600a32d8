"""Whatever a GradScaler skips and whatever it applies, with several models, optimizers and states: nothing is lost or applied twice."""

import math

import pytest
import torch
import torch.nn as nn
from given import ENTRIES, Given, finite, integers, missing, register, seed_of, unit_sgd
from processes import run_workers
from torch.nn.parallel import DistributedDataParallel
from training import make_state

import regtopk_torch as rt

STEPS, BAD_STEP, SIZES = 8, 3, (40, 24)
# Powers of two: scaling costs no bit.
SCALER = {"init_scale": 16.0, "growth_interval": 3}


class Account:
    """What this rank gave of each parameter of a model."""

    def __init__(self, *sizes):
        self.given = [torch.zeros(size, dtype=torch.float64) for size in sizes]

    def enter(self, gradients):
        for total, gradient in zip(self.given, gradients, strict=True):
            total += finite(gradient)
        return gradients


def overflow(gradients, index):
    gradients[index][5] = math.inf
    return gradients


def train_two_models(rank, method, entry, overflowing, together):
    """Two models with a state each, one scaler and one optimizer; `overflowing` is the model whose gradient is infinite on rank 1."""
    scaler = torch.amp.GradScaler("cpu", **SCALER)
    modules = Given(*SIZES), Given(*SIZES)
    models = [DistributedDataParallel(module, bucket_cap_mb=1e-4) for module in modules]
    states = [make_state(method, 0.25, grad_scaler=scaler) for _ in models]
    accounts = [Account(*SIZES) for _ in models]
    for model, state in zip(models, states, strict=True):
        register(model, state, entry)
    optimizer = unit_sgd(*modules)
    for step in range(STEPS):
        optimizer.zero_grad()
        losses = []
        for index, (model, account) in enumerate(zip(models, accounts, strict=True)):
            gradients = integers(*SIZES, seed=2 * seed_of(rank, step) + index)
            if step == BAD_STEP and rank == 1 and index == overflowing:
                overflow(gradients, 0)
            losses.append(model(account.enter(gradients)))
            if not together:
                scaler.scale(losses.pop()).backward()
        if together:
            scaler.scale(sum(losses)).backward()
        scaler.step(optimizer)
        scaler.update()
    lost = [missing(state, module, account.given) for state, module, account in zip(states, modules, accounts, strict=True)]
    return lost, [state.stats()["void_steps"] for state in states]


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("together", [True, False], ids=["one backward", "one after the other"])
@pytest.mark.parametrize("overflowing", [0, 1])
@pytest.mark.parametrize("method", ["topk", "regtopk"])
def test_an_overflow_in_one_model_returns_what_the_other_sent_under_the_same_scaler(method, overflowing, together, entry):
    for lost, void_steps in run_workers(train_two_models, 2, method, entry, overflowing, together):
        assert lost == [[0.0] * len(SIZES)] * 2
        assert void_steps == [1, 1]


def train_with_two_optimizers(rank, method, entry, overflowing, bucket_cap_mb):
    """An optimizer for each parameter of one model, under one scaler, which then skips one of them and applies the other."""
    scaler = torch.amp.GradScaler("cpu", **SCALER)
    module = Given(*SIZES)
    ddp = DistributedDataParallel(module, bucket_cap_mb=bucket_cap_mb)
    state = make_state(method, 0.25, grad_scaler=scaler)
    register(ddp, state, entry)
    optimizers = [torch.optim.SGD([parameter], lr=1.0) for parameter in module.parameters()]
    account = Account(*SIZES)
    moved = []
    for step in range(STEPS):
        ddp.zero_grad()
        gradients = integers(*SIZES, seed=seed_of(rank, step))
        if step == BAD_STEP and rank == 1:
            overflow(gradients, overflowing)
        scaler.scale(ddp(account.enter(gradients))).backward()
        before = [parameter.detach().clone() for parameter in module.parameters()]
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        moved.append([not torch.equal(*pair) for pair in zip(before, module.parameters(), strict=True)])
        if bucket_cap_mb == 1:
            state.state_dict(ddp)  # what returns is decided when it is read, as it is at the next step
    return missing(state, module, account.given), moved[BAD_STEP]


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("bucket_cap_mb", [1e-4, 1], ids=["two buckets", "one bucket"])
@pytest.mark.parametrize("overflowing", [0, 1])
@pytest.mark.parametrize("method", ["topk", "regtopk"])
def test_of_two_optimizers_the_one_that_applied_its_step_gets_nothing_twice(method, overflowing, bucket_cap_mb, entry):
    for lost, moved in run_workers(train_with_two_optimizers, 2, method, entry, overflowing, bucket_cap_mb):
        assert lost == [0.0] * len(SIZES)
        assert moved == [overflowing == 1, overflowing == 0]


class WithEmbedding(nn.Module):
    """A sparse embedding, whose bucket takes a plain all-reduce, beside a parameter that is exchanged sparsely."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 4, sparse=True)
        self.given = Given(*SIZES)

    def forward(self, tokens, gradients, factor):
        return factor * self.embedding(tokens).sum() + self.given(gradients)


def overflow_in_an_embedding(rank, entry):
    scaler = torch.amp.GradScaler("cpu", **SCALER)
    model = WithEmbedding()
    ddp = DistributedDataParallel(model)
    state = make_state("topk", 0.25, grad_scaler=scaler)
    register(ddp, state, entry)
    optimizer = unit_sgd(model)
    account = Account(*SIZES)
    for step in range(STEPS):
        optimizer.zero_grad()
        gradients = account.enter(integers(*SIZES, seed=seed_of(rank, step)))
        factor = math.inf if step == BAD_STEP and rank == 1 else 1.0
        scaler.scale(ddp(torch.tensor([rank, 5]), gradients, factor)).backward()
        scaler.step(optimizer)
        scaler.update()
    # The embedding's part of the module is no parameter that the exchange holds anything of.
    given = [torch.zeros_like(model.embedding.weight, dtype=torch.float64), *account.given]
    return missing(state, model, given)[1:], state.stats()["void_steps"]


@pytest.mark.parametrize("entry", ENTRIES)
def test_an_overflow_in_a_sparse_embedding_alone_returns_what_the_other_buckets_sent(entry):
    for lost, void_steps in run_workers(overflow_in_an_embedding, 2, entry):
        assert lost == [0.0] * len(SIZES) and void_steps == 1


def overflow_in_a_paused_model(rank, entry):
    """Two models under one scaler; the second exchanges dense gradients, and overflows."""
    scaler = torch.amp.GradScaler("cpu", **SCALER)
    modules = Given(*SIZES), Given(*SIZES)
    models = [DistributedDataParallel(module) for module in modules]
    states = [make_state("topk", 0.25, grad_scaler=scaler) for _ in models]
    for model, state in zip(models, states, strict=True):
        register(model, state, entry)
    states[1].pause()
    optimizer = unit_sgd(*modules)
    account = Account(*SIZES)
    for step in range(STEPS):
        optimizer.zero_grad()
        dense = integers(*SIZES, seed=seed_of(rank, step) + 500)
        if step == BAD_STEP and rank == 1:
            overflow(dense, 0)
        scaler.scale(models[0](account.enter(integers(*SIZES, seed=seed_of(rank, step)))) + models[1](dense)).backward()
        scaler.step(optimizer)
        scaler.update()
    return missing(states[0], modules[0], account.given), [state.stats()["void_steps"] for state in states]


@pytest.mark.parametrize("entry", ENTRIES)
def test_an_overflow_in_a_paused_states_dense_bucket_returns_what_the_other_state_sent(entry):
    for lost, void_steps in run_workers(overflow_in_a_paused_model, 2, entry):
        assert lost == [0.0] * len(SIZES) and void_steps == [1, 1]


@pytest.mark.parametrize("method", ["topk", "regtopk"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_finite_gradients_whose_sum_overflows_make_a_step_void_and_come_back(dtype, method):
    # bfloat16 is summed in float32, whose largest number it nearly shares.
    exponent = 1023 if dtype == torch.float64 else 127
    exchange = rt.LocalExchange(2, density=0.5, method=method)
    average = exchange.step([torch.tensor([1.5 * 2.0**exponent, 1.0, 1.0, 1.0], dtype=dtype)] * 2)
    assert average[0] == math.inf
    back = exchange.step([torch.tensor([-(2.0**exponent), 0.0, 0.0, 0.0], dtype=dtype)] * 2)
    assert back.tolist() == [2.0 ** (exponent - 1), 1.0, 0.0, 0.0]
    assert exchange.stats()["void_steps"] == 1
    assert all(exchange.residuals(rank)[0].tolist() == [0.0, 0.0, 1.0, 1.0] for rank in range(2))


def overflow_in_the_sum(rank, entry):
    """An entry is finite on both ranks and its sum is not, in one step; the scale halves, and the sum of what comes back is finite."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0, growth_interval=1000)
    module = Given(*SIZES)
    ddp = DistributedDataParallel(module, bucket_cap_mb=1e-4)
    state = make_state("topk", 0.25, grad_scaler=scaler)
    register(ddp, state, entry)
    optimizer = unit_sgd(module)
    account = Account(*SIZES)
    for step in range(STEPS):
        optimizer.zero_grad()
        gradients = integers(*SIZES, seed=seed_of(rank, step))
        gradients[0][7] = 2e38 if step == BAD_STEP else 0.0
        scaler.scale(ddp(account.enter(gradients))).backward()
        scaler.step(optimizer)
        scaler.update()
    return missing(state, module, account.given), state.stats()["void_steps"]


@pytest.mark.parametrize("entry", ENTRIES)
def test_under_a_scaler_what_overflowed_in_the_sum_alone_is_applied_later(entry):
    for lost, void_steps in run_workers(overflow_in_the_sum, 2, entry):
        assert lost == [0.0] * len(SIZES) and void_steps == 1


def leave_out_a_step(rank, method, entry):
    """No scaler: the script leaves a step out for a reason of its own, on every rank, and says so."""
    module = Given(*SIZES)
    ddp = DistributedDataParallel(module, bucket_cap_mb=1e-4)
    state = make_state(method, 0.25)
    register(ddp, state, entry)
    optimizer = unit_sgd(module)
    account = Account(*SIZES)
    for step in range(STEPS):
        optimizer.zero_grad()
        ddp(account.enter(integers(*SIZES, seed=seed_of(rank, step)))).backward()
        if step == BAD_STEP:
            state.skipped()
        else:
            optimizer.step()
    return missing(state, module, account.given)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("method", ["topk", "regtopk"])
def test_a_script_that_leaves_out_a_step_can_say_so_and_loses_nothing(method, entry):
    assert run_workers(leave_out_a_step, 2, method, entry) == [[0.0] * len(SIZES)] * 2


def step_by_hand(rank, entry):
    """No torch optimizer: the script applies finite steps itself and leaves out one with an overflow."""
    module = Given(*SIZES)
    ddp = DistributedDataParallel(module, bucket_cap_mb=1e-4)
    state = make_state("topk", 0.25)
    register(ddp, state, entry)
    account = Account(*SIZES)
    for step in range(STEPS):
        ddp.zero_grad()
        gradients = integers(*SIZES, seed=seed_of(rank, step))
        if step == BAD_STEP:  # finite on each rank
            gradients[1][3] = 2e38
        elif step > BAD_STEP:
            gradients[1][3] = -1e38 if step == BAD_STEP + 1 else 0.0
        ddp(account.enter(gradients)).backward()
        if all(parameter.grad.isfinite().all() for parameter in module.parameters()):
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter -= parameter.grad
    return missing(state, module, account.given), state.stats()["void_steps"]


@pytest.mark.parametrize("entry", ENTRIES)
def test_without_a_torch_optimizer_everything_sent_in_a_void_step_returns(entry):
    for lost, void_steps in run_workers(step_by_hand, 2, entry):
        # The entry that overflowed is of the order of 1e38, in which fp32 rounds the small integers away.
        assert lost[0] == 0.0 and lost[1] < 1e32 and void_steps == 1
