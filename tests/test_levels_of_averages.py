"""Averages of tensors, and local steps, with two levels: the bits of the simulation of hosts, and what does not go with them is told."""

import math

import pytest
import torch
import torch.nn as nn
from hosts import Twin
from processes import error_of, run_workers

import regtopk_torch as rt

SHAPES = [(40, 7), (), (3,), (513,)]
STEPS, VOID, ABORTED = 9, 3, 5
OPTIONS = {
    "regtopk": {"density": 0.05, "decay": 0.9, "wire_dtype": "2bit"},
    "topk": {"density": 0.1, "chunk": 64, "wire_dtype": "sign", "index_code": "elias-fano"},
}


def tensors_of(rank, step):
    generator = torch.Generator().manual_seed(100 * rank + step)
    tensors = [torch.randn(shape, generator=generator) for shape in SHAPES]
    if step == VOID and rank == 1:
        tensors[3][0] = math.inf
    return tensors


def state_of(method, levels=2):
    return (rt.TopKState if method == "topk" else rt.RegTopKState)(levels=levels, **OPTIONS[method])


def average(rank, method, way, stop):
    """What each step gave, what is held back in the end, and what was counted."""
    state, seen = state_of(method), []
    for step in range(STEPS):
        if step == stop:
            saved = state.state_dict(None)
            state.close()
            state = state_of(method)
            state.load_state_dict(saved, None)
        tensors = tensors_of(rank, step)
        seen.append([each.clone() for each in state.average(tensors, out=tensors if way == "in place" else None)])
        if step == ABORTED:
            state.abort()
    return seen, [entry["residual"] for entry in state.state_dict(None)["parameters"].values()], state.stats()


@pytest.mark.parametrize(("method", "way", "stop"), [("regtopk", "new", None), ("topk", "in place", 7)])
def test_averages_equal_the_simulation_of_the_means_bit_for_bit(method, way, stop):
    hosts, ranks = 2, 2
    outcomes = run_workers(average, hosts * ranks, method, way, stop)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    twin = Twin(hosts, ranks, method=method, mu=5.0, **OPTIONS[method])
    for step in range(STEPS):
        expected = twin.step([tensors_of(rank, step) for rank in range(hosts * ranks)], [list(range(len(SHAPES)))])
        if step == ABORTED:
            for exchange in twin.places:
                exchange.skipped()
        for seen, _, _ in outcomes:
            assert all(torch.equal(got.nan_to_num(7), wanted.nan_to_num(7)) for got, wanted in zip(seen[step], expected, strict=True)), step
        assert all(each.isfinite().all() for each in expected) == (step != VOID)
    torch.set_num_threads(threads)
    for rank, (_, residuals, stats) in enumerate(outcomes):
        twin.check_residuals(rank, residuals)
        assert stats["workers"] == hosts * ranks and stats["bytes_local"] > 0 < stats["bytes_sent"]


def train_locally(rank, levels, density, stop, directory):
    """Weights after each step, and void rounds; with a stop, after which all that goes on is what was saved."""

    def begin():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 33), nn.Tanh(), nn.Linear(33, 12)).double()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        return model, optimizer, rt.LocalSteps(model, optimizer, rt.TopKState(density, levels=levels), every=2, buffers="average")

    model, optimizer, local = begin()
    seen = []
    for step in range(8):
        if step == stop:
            rt.save(local, None, directory)
            model, optimizer, local = begin()
            rt.load(local, None, directory)
        x = torch.randn(4, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(100 * rank + step))
        optimizer.zero_grad()
        (model(x) - x.roll(1, 1)).square().mean().backward()
        optimizer.step()
        local.step()
        seen.append([parameter.detach().clone() for parameter in model.parameters()])
    return seen


def several_runs(rank, directory):
    return [train_locally(rank, *run) for run in ((None, 1.0, None, None), (2, 1.0, None, None), (2, 0.1, None, None), (2, 0.1, 5, directory))]


def test_local_steps_of_hosts_end_in_the_same_bits_and_go_on_where_they_stopped(tmp_path):
    results = run_workers(several_runs, 4, str(tmp_path))
    for flat, dense, sparse, resumed in results:
        torch.testing.assert_close(flat[-1], dense[-1], rtol=0, atol=1e-13)
        assert all(torch.equal(*pair) for step in range(8) for pair in zip(sparse[step], resumed[step], strict=True))
        assert all(torch.equal(*pair) for pair in zip(sparse[-1], results[0][2][-1], strict=True))
    one, other = results[0][2][4], results[1][2][4]  # between two rounds each is its own
    assert not torch.equal(one[0], other[0]) and not torch.equal(results[0][2][-1][0], results[0][1][-1][0])


def refuse(rank):
    state = rt.TopKState(0.2, levels=2)
    tensors = [torch.ones(30)]
    state.average(tensors)
    absent = error_of(state.average, None if rank == 3 else tensors)
    return absent, error_of(rt.TopKState(0.2, levels=2).regroup, torch.distributed.group.WORLD)


def test_a_rank_that_contributes_nothing_and_another_group_are_refused_in_sentences():
    for rank, (absent, regroup) in enumerate(run_workers(refuse, 4)):
        assert absent[0] is not None and absent[2] < 20 and "expected tensors of every rank with levels" in absent[1], (rank, absent)
        assert regroup[0] is ValueError and "regroup: expected a state without levels, got levels=2" in regroup[1]
