"""A parameter whose gradient is zero on every worker: it gets zero, and nothing that was sent for it is lost."""

import math

import pytest
import torch
from buckets import DTYPES, same_bits

import regtopk_torch as rt
from regtopk_torch import reference

SIZES = [300, 1, 57, 40, 700, 2]
WORKERS = 3


def gradients_of(step, dtype, generator):
    """Per worker, per parameter; some parameters are zero on some workers or on all."""
    workers = []
    for rank in range(WORKERS):
        gradients = [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in SIZES]
        for index, gradient in enumerate(gradients):
            if (step + index) % 3 == 0 or (step + index + rank) % 4 == 0:
                gradient.mul_(0.0)  # of both signs
        workers.append(gradients)
    return workers


@pytest.mark.parametrize("distortion", ["previous", "current"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", ["topk", "regtopk"])
@pytest.mark.parametrize("density", [0.02, 0.5])
def test_steps_with_idle_parameters_equal_the_reference(method, dtype, distortion, density):
    exchange = rt.LocalExchange(WORKERS, density, method=method, mu=1.0, distortion=distortion)
    mu = 1.0 if method == "regtopk" else None
    expected = reference.Exchange([reference.Worker(density, mu, distortion) for _ in range(WORKERS)], SIZES)
    generator = torch.Generator().manual_seed(7)
    for step in range(12):
        gradients = gradients_of(step, dtype, generator)
        averages = exchange.step(gradients)
        assert same_bits(torch.cat(averages), expected.step([torch.cat(worker) for worker in gradients]))
        for rank, worker in enumerate(expected.workers):
            residuals = exchange.residuals(rank)
            assert same_bits(torch.cat([residuals[index] for index in range(len(SIZES))]), worker.settled())
    assert exchange.stats()["history_dropped"] > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_idle_parameter_gets_zero_and_keeps_every_bit_of_its_residual(dtype):
    exchange = rt.LocalExchange(2, 0.5, method="topk")
    first = [[torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([5.0, 6.0])], [torch.tensor([8.0, 7.0, 6.0, 5.0]), torch.tensor([4.0, 3.0])]]
    exchange.step([[g.to(dtype) for g in worker] for worker in first])
    before = [exchange.residuals(rank)[0].clone() for rank in range(2)]
    assert all(residual.any() for residual in before)
    for idle in (0.0, -0.0):
        second = [[torch.full((4,), idle, dtype=dtype), torch.tensor([0.5, 0.25], dtype=dtype)] for _ in range(2)]
        averages = exchange.step(second)
        assert same_bits(averages[0], torch.zeros(4, dtype=dtype)) and averages[1].any()
        assert all(same_bits(exchange.residuals(rank)[0], before[rank]) for rank in range(2))
    # One entry on one worker is enough: what that worker holds competes at once, what the other holds in the next step.
    third = [[torch.tensor([0.0, 0.0, 0.0, rank / 8], dtype=dtype), torch.zeros(2, dtype=dtype)] for rank in range(2)]
    averages = exchange.step(third)
    assert averages[0][3] > 2 and not averages[0][:3].any() and same_bits(exchange.residuals(0)[0], before[0])
    assert exchange.step(third)[0][:3].any()


def test_when_everything_is_idle_nothing_moves():
    exchange = rt.LocalExchange(2, 0.25, mu=1.0)
    exchange.step([torch.arange(1.0, 9.0), torch.arange(8.0, 0.0, -1)])
    before = [exchange.residuals(rank)[0] for rank in range(2)]
    for _ in range(3):
        assert torch.equal(exchange.step([torch.zeros(8)] * 2), torch.zeros(8))
    assert all(torch.equal(exchange.residuals(rank)[0], before[rank]) for rank in range(2))


def test_a_void_step_with_an_idle_parameter_returns_each_entry_once():
    exchange = rt.LocalExchange(2, 0.5, method="topk")
    exchange.step([[torch.arange(1.0, 5.0), torch.arange(1.0, 5.0)]] * 2)
    before = exchange.residuals(0)
    averages = exchange.step([[torch.zeros(4), torch.tensor([1.0, math.nan, 0.5, 0.25])]] * 2, [[0], [1]])
    assert torch.equal(averages[0], torch.zeros(4)) and averages[1].isnan().any()
    after = exchange.residuals(0)
    assert torch.equal(after[0], before[0])
    assert torch.equal(after[1], before[1] + torch.tensor([1.0, 0.0, 0.5, 0.25]))
    # The bucket whose history went away altogether is an ordinary one in the steps that follow.
    applied = sum(exchange.step([[torch.ones(4), torch.ones(4)]] * 2, [[0], [1]])[0] for _ in range(3))
    assert exchange.stats()["void_steps"] == 1
    assert torch.equal(applied + exchange.residuals(0)[0], before[0] + 3)
