"""A parameter whose memory has gaps trains, is saved, loaded and flushed as any other."""

import pytest
import torch
import torch.nn as nn
from given import ENTRIES, held, integers, missing, register, seed_of, unit_sgd
from processes import run_workers
from torch.nn.parallel import DistributedDataParallel
from training import make_state

import regtopk_torch as rt

SHAPE, DENSE = (6, 5), 24


class Strided(nn.Module):
    """A parameter that is a part of a wider matrix, one that is every second entry of a vector, and a dense one."""

    def __init__(self):
        super().__init__()
        self.part = nn.Parameter(torch.zeros(6, 9)[:, :5])
        self.every_second = nn.Parameter(torch.zeros(2 * DENSE)[::2])
        self.dense = nn.Parameter(torch.zeros(DENSE))

    def forward(self, gradients):
        return sum((parameter * gradient).sum() for parameter, gradient in zip(self.parameters(), gradients, strict=True))


def gradients_of(rank, step):
    # Large ones: the resumed run begins with DDP's first layout, where equal scores would be in another order.
    part, *others = integers(30, DENSE, DENSE, seed=seed_of(rank, step), largest=100_000)
    return [part.reshape(SHAPE), *others]


def make(method, entry):
    module = Strided()
    assert not module.part.is_contiguous() and not module.every_second.is_contiguous()
    ddp = DistributedDataParallel(module)
    state = make_state(method, 0.25)
    register(ddp, state, entry)
    return module, ddp, state, unit_sgd(module)


def train(rank, ddp, optimizer, steps, given=None):
    for step in steps:
        optimizer.zero_grad()
        gradients = gradients_of(rank, step)
        ddp(gradients).backward()
        optimizer.step()
        for total, gradient in zip(given or [], gradients, strict=given is not None):
            total += gradient


def save_load_and_flush(rank, method, entry, directory):
    """Train, save, go on; load into a new state, go on from there; flush. Return what differs."""
    module, ddp, state, optimizer = make(method, entry)
    given = [torch.zeros(parameter.shape, dtype=torch.float64) for parameter in module.parameters()]
    train(rank, ddp, optimizer, range(4), given)
    lost = missing(state, module, given)
    shapes = {name: tuple(residual.shape) for name, residual in held(state, ddp).items()}
    rt.save(state, ddp, directory)
    parameters = [parameter.detach().clone() for parameter in module.parameters()]
    train(rank, ddp, optimizer, range(4, 8), given)

    resumed, resumed_ddp, resumed_state, resumed_optimizer = make(method, entry)
    with torch.no_grad():
        for parameter, saved in zip(resumed.parameters(), parameters, strict=True):
            parameter.copy_(saved)
    rt.load(resumed_state, resumed_ddp, directory)
    train(rank, resumed_ddp, resumed_optimizer, range(4, 8))
    same = [torch.equal(one, other) for one, other in zip(module.parameters(), resumed.parameters(), strict=True)]
    kept, resumed_kept = held(state, ddp), held(resumed_state, resumed_ddp)
    same += [torch.equal(kept[name], resumed_kept[name]) for name in kept]

    optimizer.zero_grad()
    state.flush(ddp)
    optimizer.step()
    return lost, shapes, same, missing(state, module, given), any(residual.any() for residual in kept.values())


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("method", ["topk", "regtopk"])
def test_parameters_with_gaps_lose_nothing_and_go_on_from_a_checkpoint_bit_for_bit(tmp_path, method, entry):
    for lost, shapes, same, left, any_kept in run_workers(save_load_and_flush, 2, method, entry, tmp_path):
        assert lost == left == [0.0] * 3
        assert shapes == {"part": SHAPE, "every_second": (DENSE,), "dense": (DENSE,)}
        assert all(same) and any_kept
