"""Loading into a group of another size, or other buckets: the update that the residuals stand for stays the same.

What a group of N ranks has yet to apply is sum over ranks of residual / N.
"""

from fractions import Fraction

import pytest
import torch
from processes import run_workers
from torch.nn.parallel import DistributedDataParallel
from training import batch, loss_of, make_model, make_optimizer, make_state

import regtopk_torch as rt
from regtopk_torch import checkpoint

SIZES = range(1, 10)
ROUNDING = {torch.float32: 2.0**-24, torch.float64: 0.0}  # of a redistributed residual; sums are in fp64, with a rounding of
SUMMATION = 2.0**-50


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("saved_size", SIZES)
def test_every_new_rank_takes_one_ranks_worth_and_every_old_rank_is_handed_out_whole(saved_size, size):
    handed_out = [Fraction(0)] * saved_size
    for rank in range(size):
        shares = checkpoint.shares(rank, size, saved_size)
        weights = [Fraction(weight).limit_denominator(saved_size) for _, weight in shares]
        assert all(weight > 0 for weight in weights) and sum(weights) == 1
        for (saved, _), weight in zip(shares, weights, strict=True):
            handed_out[saved] += weight
    assert handed_out == [Fraction(size, saved_size)] * saved_size


def test_a_multiple_of_the_ranks_takes_copies():
    assert [checkpoint.shares(rank, 4, 2) for rank in range(4)] == [[(0, 1.0)], [(0, 1.0)], [(1, 1.0)], [(1, 1.0)]]
    assert [checkpoint.shares(rank, 2, 4) for rank in range(2)] == [[(0, 0.5), (1, 0.5)], [(2, 0.5), (3, 0.5)]]
    assert [checkpoint.shares(rank, 3, 2) for rank in range(3)] == [[(0, 1.0)], [(0, 0.5), (1, 0.5)], [(1, 1.0)]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_is_conserved_is_the_sum_over_ranks_by_the_number_of_ranks(dtype):
    parameter = torch.empty(1000, dtype=dtype)
    named_keys = [("weight", parameter, 7)]
    header, measured = {"method": "topk", "distortion": "previous"}, [float(number) for number in range(7)]
    normal = torch.randn(len(SIZES), 1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)
    for saved_size in SIZES:
        dicts = [
            {"format": "regtopk_torch", "version": 1, **header, "world_size": saved_size, "rank": rank, "step": 4,
             "density_state": measured, "parameters": {"weight": {"shape": [1000], "residual": normal[rank], "velocity": normal[rank].flip(0)}}}
            for rank in range(saved_size)
        ]  # fmt: skip
        saved = normal[:saved_size].double()
        for size in SIZES:
            loaded = [
                checkpoint.from_state_dicts(
                    lambda rank: ("", dicts[rank]), saved_size, named_keys, {**header, "world_size": size, "rank": rank}
                )
                for rank in range(size)
            ]
            assert all(progress == (4, measured) and dropped == 0 for _, progress, dropped in loaded)
            now = torch.stack([pieces[7].residual for pieces, _, _ in loaded])
            assert now.dtype == dtype and torch.equal(now.flip(1), torch.stack([pieces[7].velocity for pieces, _, _ in loaded]))
            now = now.double()
            bound = ROUNDING[dtype] * now.abs().mean(0) + SUMMATION * saved.abs().mean(0)
            assert ((now.mean(0) - saved.mean(0)).abs() <= bound).all()
            if size % saved_size == 0:
                assert torch.equal(now, saved.repeat_interleave(size // saved_size, 0))


def make(method, dtype, bucket_cap_mb=100):
    model = make_model(dtype)
    ddp = DistributedDataParallel(model, bucket_cap_mb=bucket_cap_mb)
    state = make_state(method, 0.02)
    ddp.register_comm_hook(state, rt.sparse_hook)
    return model, ddp, state


def train(rank, ddp, steps, dtype):
    optimizer = make_optimizer(ddp)
    for step in steps:
        optimizer.zero_grad()
        loss_of(ddp, batch(rank, step, dtype)).backward()
        optimizer.step()


def residuals(state, ddp):
    return {name: entry["residual"] for name, entry in state.state_dict(ddp)["parameters"].items()}


def sent_entries(state, ddp):
    return sum(len(entry.get("sent_index", ())) for entry in state.state_dict(ddp)["parameters"].values())


def one_life(rank, directory, method, dtype, steps, leave):
    """Load if there is something, train, save; return what the checkpoint held and what the group goes on from."""
    model, ddp, state = make(method, dtype)
    loaded = dropped = None
    if steps.start > 0:
        rt.load(state, ddp, directory)
        loaded, dropped = residuals(state, ddp), state.stats()["history_dropped"]
        assert sent_entries(state, ddp) == 0, "what a rank sent last has no counterpart in a group of another size"
    if leave is None:
        state.flush(ddp)
        return loaded, dropped, None, 0, [p.grad.clone() for p in model.parameters()], None
    train(rank, ddp, steps, dtype)
    rt.save(state, ddp, directory)
    kept, history = residuals(state, ddp), sent_entries(state, ddp)
    assert state.state_dict(ddp)["step"] == steps.stop - 1
    state.flush(ddp)
    return loaded, dropped, kept, history, [p.grad.clone() for p in model.parameters()], [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("method, dtype", [("topk", torch.float64), ("regtopk", torch.float32)], ids=str)
def test_what_is_yet_to_be_applied_survives_four_then_two_then_three_ranks(tmp_path, method, dtype):
    lives = [run_workers(one_life, 4, tmp_path, method, dtype, range(5), "save")]
    lives.append(run_workers(one_life, 2, tmp_path, method, dtype, range(5, 8), "save"))
    lives.append(run_workers(one_life, 3, tmp_path, method, dtype, range(8, 9), None))
    for before, after in zip(lives, lives[1:], strict=False):
        kept = [result[2] for result in before]
        for name in kept[0]:
            whole = sum(k[name].double() for k in kept) / len(before)
            now = [result[0][name] for result in after]
            bound = ROUNDING[dtype] * sum(residual.double().abs() for residual in now) / len(after)
            bound += SUMMATION * sum(k[name].double().abs() for k in kept) / len(before)
            difference = (sum(residual.double() for residual in now) / len(after) - whole).abs()
            assert whole.any() and (difference <= bound).all()
        assert sum(result[1] for result in after) == sum(result[3] for result in before) > 0
    # The same in the user's terms: what flush hands out, a sum of at most three terms in the residual's dtype.
    for applied_before, applied_after in zip(lives[1][0][4], lives[2][0][4], strict=True):
        tolerance = 8 * (ROUNDING[dtype] or SUMMATION) * applied_before.abs().max().item()
        torch.testing.assert_close(applied_after, applied_before, rtol=0, atol=tolerance)
    for life in lives[:2]:
        for result in life:
            assert all(map(torch.equal, result[5], life[0][5])), "expected identical replicas"


def lists_of_dicts(rank, state_dicts):
    model, ddp, state = make("regtopk", torch.float32)
    state.load_state_dict(state_dicts, ddp)
    good = residuals(state, ddp)
    messages = []
    other_step = [{**d, "step": 7} if i % 2 else d for i, d in enumerate(state_dicts)]
    for wrong in (state_dicts[::-1], other_step, [{}] * 4):
        try:
            state.load_state_dict(wrong, ddp)
        except (TypeError, ValueError) as error:
            messages.append(str(error))
    try:
        state.load_state_dict(state_dicts[0], ddp)
    except ValueError as error:
        messages.append(str(error))
    return messages, all(torch.equal(good[name], residual) for name, residual in residuals(state, ddp).items()), good


def make_dicts(rank):
    model, ddp, state = make("regtopk", torch.float32)
    train(rank, ddp, range(2), torch.float32)
    return state.state_dict(ddp)


def test_a_list_of_state_dicts_is_redistributed_and_a_wrong_one_changes_nothing():
    saved = run_workers(make_dicts, 4)
    for rank, (messages, unchanged, loaded) in enumerate(run_workers(lists_of_dicts, 2, saved)):
        who = "RegTopKState.load_state_dict: "
        first = 2 * rank
        assert unchanged
        assert messages == [
            f"{who}rank {first}: expected a state dict of rank {first}, got rank {3 - first}",
            f"{who}rank {first + 1}: expected state dicts of one step, got steps [1, 7]",
            f"{who}rank {first}: expected a state dict of regtopk_torch, got a dict with the keys []",
            f"{who[:-2]}: expected a state dict of world_size 2, got world_size 4; "
            "load the list of all its ranks' state dicts to redistribute them",
        ]
        for name, residual in loaded.items():
            halves = [saved[first + i]["parameters"][name]["residual"].double() / 2 for i in (0, 1)]
            assert torch.equal(residual, sum(halves).float())


def other_buckets(rank, directory, bucket_cap_mb):
    """Save in one bucket, load into several; return both residuals, k per step and the layout's parameters after training."""
    model, ddp, state = make("regtopk", torch.float32)
    train(rank, ddp, range(4), torch.float32)
    rt.save(state, ddp, directory)
    before, history = residuals(state, ddp), sent_entries(state, ddp)
    model, ddp, state = make("regtopk", torch.float32, bucket_cap_mb)
    rt.load(state, ddp, directory)
    after = residuals(state, ddp)
    train(rank, ddp, range(4, 8), torch.float32)
    return before, after, history, state.stats(), [p.detach().clone() for p in model.parameters()]


def test_another_bucket_cap_gets_the_same_residuals_and_history(tmp_path):
    results = run_workers(other_buckets, 2, tmp_path, 0.008)
    for before, after, history, statistics, parameters in results:
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
        assert history > 0 and statistics["history_dropped"] == 0
        assert statistics["rebuilds"] >= 1, "expected other buckets than those of the checkpoint"
        assert all(map(torch.equal, parameters, results[0][4]))
