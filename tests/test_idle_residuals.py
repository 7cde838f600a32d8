"""The residual of a parameter that nobody uses waits outside the selection: it takes no other entry's place."""

import pytest
import torch
from buckets import same_bits
from given import ENTRIES, Given, held, register
from processes import run_workers
from torch.nn.parallel import DistributedDataParallel
from training import make_state

import regtopk_torch as rt

SIZE, BOTH, ALONE = 1000, 20, 300  # entries of each of two parameters, steps that use both and steps that use the first


def two_gradients(generator, step):
    first = torch.randn(SIZE, generator=generator)
    second = torch.randn(SIZE, generator=generator)
    return (first, second) if step < BOTH else (0.01 * first, torch.zeros(SIZE))


@pytest.mark.parametrize("method", ["topk", "regtopk"])
def test_an_idle_parameters_residual_leaves_the_message_to_the_others_and_comes_back_with_its_gradient(method):
    exchange = rt.LocalExchange(2, density=0.01, method=method)
    generator = torch.Generator().manual_seed(0)
    live = 0
    for step in range(BOTH + ALONE):
        averages = exchange.step([list(two_gradients(generator, step)) for _ in range(2)])
        if step == BOTH - 1:
            before = [exchange.residuals(rank)[1] for rank in range(2)]
        elif step >= BOTH:
            live += int(averages[0].count_nonzero())
            assert not averages[1].any()
    assert live >= 3000
    assert all(same_bits(exchange.residuals(rank)[1], before[rank]) for rank in range(2))
    # What waited is much larger than what came since: it is sent when the parameter is used again.
    (_, average) = exchange.step([[0.01 * gradient for gradient in torch.randn(2, SIZE, generator=generator)] for _ in range(2)])
    assert int(average.count_nonzero()) >= 10


def test_where_fewer_live_entries_are_left_than_are_sent_all_of_them_are_sent():
    exchange = rt.LocalExchange(2, density=0.25, method="topk")
    exchange.step([[torch.ones(4), torch.arange(1.0, 1001.0)] for _ in range(2)])
    before = exchange.residuals(0)
    for step in range(3):
        averages = exchange.step([[torch.full((4,), 0.25), torch.zeros(1000)] for _ in range(2)])
        if step:  # in the first one nobody knows yet that the parameter is idle
            assert not exchange.residuals(0)[0].any()
        assert same_bits(exchange.residuals(0)[1], before[1]) and not averages[1].any()
    assert averages[0].tolist() == [0.25] * 4


def test_a_rank_whose_own_gradient_is_zero_competes_while_another_uses_the_parameter():
    exchange = rt.LocalExchange(2, density=0.25, method="topk")
    exchange.step([torch.arange(1.0, 9.0), torch.arange(8.0, 0.0, -1.0)])
    for _ in range(3):
        exchange.step([torch.zeros(8)] * 2)
    before = exchange.residuals(1)[0]
    for _ in range(2):  # the first one tells rank 1 that somebody does
        exchange.step([torch.full((8,), 0.125), torch.zeros(8)])
    after = exchange.residuals(1)[0]
    assert int((after != before).sum()) >= 2 and not after[before != after].any()


class OneOrBoth(Given):
    def forward(self, gradients):
        return super().forward([gradient if gradient.any() else None for gradient in gradients])


def train_with_an_unused_parameter(rank, entry, world_size, alone):
    module = OneOrBoth(SIZE, SIZE)
    ddp = DistributedDataParallel(module, bucket_cap_mb=100, find_unused_parameters=True)
    state = make_state("topk", 0.01)
    register(ddp, state, entry)
    generator = torch.Generator().manual_seed(rank)
    live = 0
    for step in range(BOTH + alone):
        ddp.zero_grad()
        ddp(two_gradients(generator, step)).backward()
        if step == BOTH - 1:
            before = held(state, ddp)["parts.1"]
        elif step >= BOTH:
            live += int(module.parts[0].grad.count_nonzero())
    kept = same_bits(held(state, ddp)["parts.1"], before)
    ddp.zero_grad()
    ddp([0.01 * gradient for gradient in torch.randn(2, SIZE, generator=generator)]).backward()
    return live, kept and bool(before.any()), int(module.parts[1].grad.count_nonzero())


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("world_size", [1, 2])
def test_under_find_unused_parameters_a_parameter_that_nobody_used_waits_likewise(world_size, entry, alone=ALONE):
    for live, kept, back in run_workers(train_with_an_unused_parameter, world_size, entry, world_size, alone):
        assert live >= 10 * alone * world_size / 2 and kept and back >= 10
