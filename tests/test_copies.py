"""Copies and pickles of a state: options and residual travel with the parameters beside them, process groups do not."""

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
from given import Given, held, integers, missing, seed_of, unit_sgd
from processes import run_workers
from torch.nn.parallel import DistributedDataParallel

import regtopk_torch as rt

SIZES = (40, 24)
STATES = {
    "topk": lambda **options: rt.TopKState(0.25, **options),
    "regtopk": lambda **options: rt.RegTopKState(0.25, mu=2.0, distortion="current", **options),
}


def through_a_file(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {"deepcopy": copy.deepcopy, "pickle": lambda thing: pickle.loads(pickle.dumps(thing)), "torch.save": through_a_file}


def train(rank, ddp, optimizer, steps, given):
    for step in steps:
        optimizer.zero_grad()
        gradients = integers(*SIZES, seed=seed_of(rank, step))
        ddp(gradients).backward()
        optimizer.step()
        for total, gradient in zip(given, gradients, strict=True):
            total += gradient


def copy_and_go_on(rank, method, way, what):
    """Copy a model with its state after some steps, and train original and copy on; return what is to be compared."""
    # DDP's own copies are for the default group only.
    group = dist.new_group() if what == "module and state" else None
    module = Given(*SIZES)
    ddp = DistributedDataParallel(module, process_group=group)
    state = STATES[method](process_group=group)
    ddp.register_comm_hook(state, rt.sparse_hook)
    given = [torch.zeros(size, dtype=torch.float64) for size in SIZES]
    train(rank, ddp, unit_sgd(module), range(4), given)
    if what == "module and state":
        copied_module, copied = WAYS[way]((module, state))
    else:
        copied_ddp = WAYS[way](ddp)
        copied_module = copied_ddp.module
        ((_, copied),) = copied_ddp._comm_hooks  # where DDP keeps what was registered
    kept = [held(*pair).values() for pair in ((state, module), (copied, copied_module))]
    names = ("density", "mu", "distortion") if method == "regtopk" else ("density",)
    results = {
        "residuals": all(map(torch.equal, *kept)) and any(residual.any() for residual in kept[1]),
        "options": type(copied) is type(state) and all(getattr(copied, name) == getattr(state, name) for name in names),
    }
    copied_given = [total.clone() for total in given]
    copied_ddp = DistributedDataParallel(copied_module)
    rt.attach(copied_ddp, copied)
    # One after the other: what one does is none of the other's business.
    train(rank, copied_ddp, unit_sgd(copied_module), range(4, 8), copied_given)
    train(rank, ddp, unit_sgd(module), range(4, 8), given)
    results["ranks"] = copied.ranks == [0, 1]
    results["copy"], results["original"] = missing(copied, copied_module, copied_given), missing(state, module, given)
    return results


@pytest.mark.parametrize("what", ["DDP", "module and state"])
@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("method", list(STATES))
def test_a_copy_goes_on_with_what_its_original_held_and_apart_from_it(method, way, what):
    expected = {"residuals": True, "options": True, "ranks": True, "copy": [0.0] * 2, "original": [0.0] * 2}
    assert run_workers(copy_and_go_on, 2, method, way, what) == [expected] * 2


def copy_alone(rank, method, way):
    """A copy without the parameters keeps the options, and begins at zero with another model."""
    module = Given(*SIZES)
    ddp = DistributedDataParallel(module)
    state = STATES[method]()
    rt.attach(ddp, state)
    ddp(integers(*SIZES, seed=rank)).backward()
    copied = WAYS[way](state)
    other = Given(*SIZES)
    other_ddp = DistributedDataParallel(other)
    rt.attach(other_ddp, copied)
    optimizer = unit_sgd(other)
    given = [torch.zeros(size, dtype=torch.float64) for size in SIZES]
    train(rank, other_ddp, optimizer, range(3), given)
    return copied.density == state.density, missing(copied, other, given)


@pytest.mark.parametrize("way", ["pickle", "torch.save"])
@pytest.mark.parametrize("method", list(STATES))
def test_a_pickled_state_without_its_parameters_keeps_its_options(method, way):
    assert run_workers(copy_alone, 2, method, way) == [(True, [0.0] * 2)] * 2


def copy_under_a_scaler(rank, way):
    """A scaler that is copied beside the state is the copy's own, with another scale soon."""
    module = Given(*SIZES)
    ddp = DistributedDataParallel(module)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)
    state = rt.TopKState(0.25, grad_scaler=scaler)
    rt.attach(ddp, state)
    optimizer = unit_sgd(module)

    def step(ddp, scaler, optimizer, gradients):
        optimizer.zero_grad()
        scaler.scale(ddp(gradients)).backward()
        scaler.step(optimizer)
        scaler.update()

    given = integers(*SIZES, seed=rank)
    step(ddp, scaler, optimizer, given)
    copied_module, copied, copied_scaler = WAYS[way]((module, state, scaler))
    copied_ddp = DistributedDataParallel(copied_module)
    rt.attach(copied_ddp, copied)
    copied_scaler.scale(torch.zeros(1))  # a copied scaler has no scale before its first use
    copied_scaler.update(32.0)
    more = integers(*SIZES, seed=10 + rank)
    step(copied_ddp, copied_scaler, unit_sgd(copied_module), more)
    total = [(one + other).double() for one, other in zip(given, more, strict=True)]
    return missing(copied, copied_module, total), missing(state, module, [gradient.double() for gradient in given])


@pytest.mark.parametrize("way", list(WAYS))
def test_a_scaler_that_is_copied_with_the_state_is_the_copys_own(way):
    assert run_workers(copy_under_a_scaler, 2, way) == [([0.0] * 2, [0.0] * 2)] * 2


def train_with_a_state_from_elsewhere(rank, state):
    module = Given(*SIZES)
    ddp = DistributedDataParallel(module)
    ddp.register_comm_hook(state, rt.sparse_hook)
    given = [torch.zeros(size, dtype=torch.float64) for size in SIZES]
    train(rank, ddp, unit_sgd(module), range(3), given)
    return state.density, state.ranks, missing(state, module, given)


@pytest.mark.parametrize("method", list(STATES))
def test_a_state_is_an_argument_of_the_processes_that_train_with_it(method):
    # The state is made here, where no process group is, and pickled to each of them.
    assert run_workers(train_with_a_state_from_elsewhere, 2, STATES[method]()) == [(0.25, [0, 1], [0.0] * 2)] * 2
