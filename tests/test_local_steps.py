"""Local steps: models with the same bits after each round, equal to the loop written out over the simulation."""

import copy
import functools
import math
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from processes import run_workers
from torch.nn.parallel import DistributedDataParallel
from training import batch, loss_of, make_model, make_state

import regtopk_torch as rt

STEPS, DENSITY = 12, 0.05
NESTEROV = functools.partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)


def make_inner(model):
    """Two parameter groups, and a state of its own for every parameter."""
    parameters = list(model.parameters())
    return torch.optim.AdamW([{"params": parameters[:3], "lr": 0.01}, {"params": parameters[3:], "lr": 0.003}])


def local_step(rank, model, inner, step, scaler=None):
    inner.zero_grad()
    for part in range(2):  # gradient accumulation
        loss = loss_of(model, batch(rank, 2 * step + part))
        (loss if scaler is None else scaler.scale(loss)).backward()
    if scaler is None:
        inner.step()
    else:
        scaler.step(inner)
        scaler.update()


def weights_of(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def train(rank, every, outer, scaled=False, stop=None):
    """Weights after each step; with a stop, after which all that goes on is what was saved."""
    model = make_model()
    inner = make_inner(model)
    local = rt.LocalSteps(model, inner, make_state("topk", DENSITY), every, outer)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0) if scaled else None
    seen = []
    for step in range(STEPS):
        if step == stop:
            saved = pickle.loads(pickle.dumps([model.state_dict(), inner.state_dict(), local.state_dict()]))
            model = make_model()
            inner = make_inner(model)
            local = rt.LocalSteps(model, inner, make_state("topk", DENSITY), every, outer)
            for part, of in zip((model, inner, local), saved, strict=True):
                part.load_state_dict(of)
        local_step(rank, model, inner, step, scaler)
        assert local.step() == ((step + 1) % every == 0)
        seen.append(weights_of(model))
    return seen


def simulate(workers, every, outer):
    """The same, written out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    models = [make_model() for _ in range(workers)]
    inners = [make_inner(model) for model in models]
    exchange = rt.LocalExchange(workers, DENSITY, method="topk")
    common = [weights.requires_grad_() for weights in weights_of(models[0])]
    optimizer = None if outer == "sgd" else outer(common)
    seen = []
    for step in range(STEPS):
        for rank in range(workers):
            local_step(rank, models[rank], inners[rank], step)
        if (step + 1) % every == 0:
            with torch.no_grad():
                averages = exchange.step([[c - w for c, w in zip(common, model.parameters(), strict=True)] for model in models])
                for weights, average in zip(common, averages, strict=True):
                    if optimizer is None:
                        weights.sub_(average)
                    else:
                        weights.grad = average
                if optimizer is not None:
                    optimizer.step()
                for model in models:
                    for parameter, weights in zip(model.parameters(), common, strict=True):
                        parameter.copy_(weights)
        seen.append([weights_of(model) for model in models])
    torch.set_num_threads(threads)
    return seen


@pytest.mark.parametrize(("workers", "every", "outer"), [(2, 1, "sgd"), (3, 4, "sgd"), (2, 3, NESTEROV)])
def test_local_steps_equal_the_loop_over_the_simulation_bit_for_bit(workers, every, outer):
    expected = simulate(workers, every, outer)
    results = run_workers(train, workers, every, outer)
    for step in range(STEPS):
        for rank in range(workers):
            assert all(map(torch.equal, results[rank][step], expected[step][rank])), (step, rank)
            same = all(map(torch.equal, results[rank][step], results[0][step]))
            assert same == (rank == 0 or (step + 1) % every == 0)


def test_a_grad_scaler_of_a_power_of_two_changes_no_bit():
    assert all(
        all(map(torch.equal, scaled, plain))
        for scaled, plain in zip(run_workers(train, 2, 3, "sgd", True)[0], run_workers(train, 2, 3, "sgd")[0], strict=True)
    )


@pytest.mark.parametrize("outer", ["sgd", NESTEROV], ids=["sgd", "nesterov"])
@pytest.mark.parametrize("stop", [6, 7], ids=["after a round", "between rounds"])
def test_a_run_that_stops_and_goes_on_has_the_bits_of_one_that_never_stopped(stop, outer):
    for stopped, never in zip(run_workers(train, 2, 3, outer, False, stop), run_workers(train, 2, 3, outer), strict=True):
        assert all(all(map(torch.equal, one, other)) for one, other in zip(stopped, never, strict=True))


class Weights(nn.Module):
    """What a worker's own steps do is what a test says."""

    def __init__(self, values):
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values))
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))


def move(model, by):
    with torch.no_grad():
        model.values.sub_(torch.tensor(by))


def go_through_a_void_round(rank, outer):
    model = Weights([0.0, 0.0, 0.0, 0.0])
    state = rt.TopKState(0.25)
    local = rt.LocalSteps(model, torch.optim.SGD(model.parameters(), lr=1.0), state, 1, outer)
    seen = []

    def step(by):
        move(model, by)
        equal = local.step()
        seen.append((equal, weights_of(model)[0].tolist(), state.state_dict(None)["parameters"]["values"]["residual"].tolist()))

    step([4.0, 1.0, 0.0, 0.0])
    step([1.0, 2.0, 8.0, math.nan if rank == 1 else 1.0])  # void
    if rank == 1:
        with torch.no_grad():
            model.values[3] = 0.0  # as its owner found it before
    saved = pickle.loads(pickle.dumps([model.state_dict(), local.state_dict()]))
    model = Weights([0.0, 0.0, 0.0, 0.0])
    local = rt.LocalSteps(model, torch.optim.SGD(model.parameters(), lr=1.0), state, 1, outer)
    model.load_state_dict(saved[0])
    local.load_state_dict(saved[1])
    assert local.void_rounds == 1
    step([0.0, 0.0, 1.0, 0.0])
    return seen


def test_a_void_round_keeps_what_every_worker_has_and_gives_nothing_twice():
    zero, one = run_workers(go_through_a_void_round, 2, "sgd")
    for first, _, last in (zero, one):
        assert first == (True, [-4.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0])
        assert last[:2] == (True, [-4.0, 0.0, -9.0, 0.0]), "the 8 of the void round and the 1 of this one"
    assert zero[1] == (False, [-5.0, -2.0, -8.0, -1.0], [1.0, 3.0, 8.0, 1.0])
    assert one[1][0] is False and math.isnan(one[1][1][3]) and one[1][2] == [1.0, 3.0, 8.0, 0.0]
    assert zero[2][2] == [1.0, 3.0, 0.0, 1.0] and one[2][2] == [1.0, 3.0, 0.0, 0.0]


def move_buffers(rank, buffers):
    model = Weights([0.0])
    local = rt.LocalSteps(model, torch.optim.SGD(model.parameters(), lr=1.0), rt.TopKState(1.0), 2, buffers=buffers)
    seen = []
    for _ in range(2):
        model.mean += torch.tensor([1.0 + rank, 2.0])
        model.count += 1 + rank
        local.step()
        seen.append((model.mean.tolist(), model.count.item()))
    return seen


def test_buffers_are_kept_or_averaged_as_asked():
    kept = run_workers(move_buffers, 2, "keep")
    assert kept == [[([1.0, 2.0], 1), ([2.0, 4.0], 2)], [([2.0, 2.0], 2), ([4.0, 4.0], 4)]]
    averaged = run_workers(move_buffers, 2, "average")
    assert averaged == [[([1.0, 2.0], 1), ([3.0, 4.0], 2)], [([2.0, 2.0], 2), ([3.0, 4.0], 4)]]


def differ(rank, case):
    model = make_model()
    if rank == 1 and case == "weights":
        with torch.no_grad():
            model.scale.add_(1)
    outer = functools.partial(NESTEROV, lr=0.5 + rank) if case == "outer" else "sgd"
    local = rt.LocalSteps(model, make_inner(model), rt.TopKState(0.5), 2 + (rank if case == "every" else 0), outer, buffers="average" if rank and case == "buffers" else "keep")
    try:
        for step in range(4):
            local_step(rank, model, make_inner(model), step)
            local.step()
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(("case", "words"), [("every", "same every on every rank, got 2 on rank 0 and 3 on rank 1"), ("weights", "same common weights (checksum) on every rank"), ("outer", "same outer on every rank"), ("buffers", "same buffers on every rank, got average on rank 1 and keep on rank 0")])
def test_ranks_that_differ_are_an_error_on_every_rank_in_the_first_round(case, words):
    for rank, message in enumerate(run_workers(differ, 2, case)):
        assert message.startswith(f"rank {rank}: average: expected the ") and words in message, message


@pytest.fixture
def lone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_bad_arguments_are_refused(lone):
    model = make_model()
    inner, state = make_inner(model), rt.TopKState(0.1)
    stranger = torch.optim.SGD(make_model().parameters(), lr=1.0)
    for arguments, kind, words in [
        ((DistributedDataParallel(model), inner, state), TypeError, "that nothing averages already"),
        ((model, model.parameters(), state), TypeError, "expected a torch.optim.Optimizer"),
        ((model, inner, 0.1), TypeError, "expected a TopKState"),
        ((model, inner, rt.TopKState(0.1, grad_scaler=torch.amp.GradScaler("cpu"))), ValueError, "without grad_scaler"),
        ((model, inner, state, 0), ValueError, "expected every to be an integer of at least 1, got 0"),
        ((model, inner, state, True), ValueError, "got True"),
        ((model, inner, state, 1, "adam"), TypeError, "expected outer to be 'sgd'"),
        ((model, stranger, state), ValueError, "expected an optimizer of the model's parameters"),
    ]:
        with pytest.raises(kind, match=words):
            rt.LocalSteps(*arguments)
    with pytest.raises(ValueError, match="expected buffers 'keep' or 'average', got 'sum'"):
        rt.LocalSteps(model, inner, state, buffers="sum")


def test_a_state_dict_of_something_else_is_refused_and_changes_nothing(lone):
    model = make_model()
    local = rt.LocalSteps(model, make_inner(model), rt.TopKState(0.1), 1, NESTEROV)
    local_step(0, model, make_inner(model), 0)
    local.step()
    saved = copy.deepcopy(local.state_dict())
    for change, kind, words in [
        (lambda d: d.pop("common"), TypeError, "expected a state dict of LocalSteps"),
        (lambda d: d["common"].pop("scale"), ValueError, "expected common weights of the model's 9 parameters"),
        (lambda d: d["common"].update(scale=torch.ones(2)), ValueError, "expected scale of dtype"),
        (lambda d: d.update(origin=d["common"] | {"scale": torch.ones((), dtype=torch.float64)}), ValueError, "origin: expected scale of dtype"),
        (lambda d: d.update(outer=None), ValueError, "expected the state of an outer optimizer"),
        (lambda d: d["state"].update(world_size=2), ValueError, "expected a state dict of world_size 1"),
    ]:
        damaged = copy.deepcopy(saved)
        change(damaged)
        with pytest.raises(kind, match=words):
            local.load_state_dict(damaged)
        assert str(local.state_dict()) == str(saved)
