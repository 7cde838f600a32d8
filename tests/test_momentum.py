"""Momentum correction, factor masking and local clipping: the bits of the reference, and of SGD where it is SGD."""

import copy
import math
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from books import Books, booked_hook, check_against_simulation
from buckets import DTYPES, same_bits
from cases import in_turn, of_one
from given import ENTRIES, Given, integers, register, seed_of
from processes import error_of, run_workers
from test_modes import STEPS, WithBranch, now_and_then
from torch.nn.parallel import DistributedDataParallel
from training import BUCKET_CAP_MB, batch, loss_of, make_model

import regtopk_torch as rt
from regtopk_torch import _C, reference

WORKERS = 3
FORMS = {
    "plain": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "masked": {"momentum": 0.9, "mask_momentum": True},
    "masked, clipped": {"momentum": 0.6, "mask_momentum": True, "nesterov": True, "clip_norm": 3.0},
    "clipped": {"clip_norm": 3.0},
}
PARTS = {
    "topk": {"method": "topk"},
    "regtopk, decay": {"decay": 0.9},
    "leader": {"method": "topk", "support": "leader", "wire_dtype": torch.bfloat16},
    "chunks, 2bit": {"chunk": 4096, "wire_dtype": "2bit", "index_code": "elias-fano"},
}


def kept(exchange, rank, name):
    """The residuals, or velocities, of one worker; None where it has none."""
    entries = exchange.state_dict()["workers"][rank]["parameters"]
    parts = [entries[index][name].flatten() for index in sorted(entries, key=int) if name in entries[index]]
    return torch.cat(parts) if parts else None


def hard_gradients(step, sizes, dtype, generator):
    """Per worker, per parameter; the second parameter is zero for some steps on some workers or on all, step 4 is not finite."""
    workers = []
    for rank in range(WORKERS):
        gradients = [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]
        if step in (2, 3, 6) or (step + rank) % 4 == 0:
            gradients[1].mul_(0.0)  # of both signs
        workers.append(gradients)
    if step == 4:
        workers[1][0][[5, 4095, -1]] = torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype)
    return workers


@pytest.mark.parametrize("parts, form, dtype", in_turn(of_one(PARTS), of_one(FORMS), of_one(DTYPES)))
def test_steps_with_void_skipped_and_idle_equal_the_reference_and_go_on_after_a_load(parts, form, dtype):
    sizes = [65_536 + 1_001 if form == "masked, clipped" else 5_001, 500, 1]  # two tiles
    options = {"density": 0.05, "mu": 1.0, **PARTS[parts], **FORMS[form]}
    known = {name: options[name] for name in ("density", "decay", "chunk", "wire_dtype") if name in options} | FORMS[form]
    mu = None if options.get("method") == "topk" else 1.0
    exchange = rt.LocalExchange(WORKERS, **options)
    twin = reference.Exchange([reference.Worker(mu=mu, **known) for _ in range(WORKERS)], sizes, leader="support" in options)
    generator = torch.Generator().manual_seed(0)
    for step in range(10):
        gradients = hard_gradients(step, sizes, dtype, generator)
        before = copy.deepcopy(gradients)
        averages, expected = torch.cat(exchange.step(gradients)), twin.step([torch.cat(worker) for worker in gradients])
        assert same_bits(averages, expected), step
        assert all(same_bits(*pair) for worker in zip(gradients, before, strict=True) for pair in zip(*worker, strict=True)), "gradients are only read"
        # Looking at it settles a step, which otherwise the next one does: here after each, there not after void, skipped and idle ones.
        looks = parts in ("topk", "chunks, 2bit") or step in (2, 5, 8, 9)
        if looks:
            exchange.state_dict()  # what is saved and then said to be skipped is not what goes on
        if step == 7:
            exchange.skipped()
            for worker in twin.workers:
                worker.in_vain = True
        if not looks:
            continue
        saved = exchange.state_dict()
        for rank, worker in enumerate(twin.workers):
            assert same_bits(kept(exchange, rank, "residual"), worker.settled()), (step, rank)
            if worker.momentum:
                assert same_bits(kept(exchange, rank, "velocity"), worker.masked()), (step, rank)
            else:
                assert kept(exchange, rank, "velocity") is None
        if step % 2:
            exchange = rt.LocalExchange(WORKERS, **options)
            exchange.load_state_dict(copy.deepcopy(saved))


@pytest.mark.parametrize("form", ["plain", "nesterov"])
@pytest.mark.parametrize("dense_steps", [0, 3])
def test_at_density_1_it_is_sgd_with_momentum_to_the_last_bit(form, dense_steps):
    # Integers and halves: nothing rounds. The buckets change, and with them the memory that the velocity lies in.
    options = FORMS[form] | {"momentum": 0.5}
    exchange = rt.LocalExchange(2, 1.0, dense_steps=dense_steps, **options)
    parameters = [nn.Parameter(torch.zeros(size)) for size in (70, 5)]
    ours = [torch.zeros(70), torch.zeros(5)]
    optimizer = torch.optim.SGD(parameters, lr=1.0, momentum=0.5, nesterov=form == "nesterov")
    for step in range(10):
        gradients = [integers(70, 5, seed=seed_of(rank, step)) for rank in range(2)]
        for parameter, *of_ranks in zip(parameters, *gradients, strict=True):
            parameter.grad = sum(of_ranks) / 2
        optimizer.step()
        for weight, average in zip(ours, exchange.step(gradients, [[0, 1]] if step % 4 < 2 else [[1], [0]]), strict=True):
            weight -= average
        assert all(map(torch.equal, ours, parameters)), step
    assert exchange.stats(0)["dense_buckets"] == (4 if dense_steps else 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nesterov", [False, True])
def test_at_density_1_with_masking_it_is_sgd_without_momentum_to_the_last_bit(dtype, nesterov):
    masked = rt.LocalExchange(3, 1.0, momentum=0.5, mask_momentum=True, nesterov=nesterov)
    plain = rt.LocalExchange(3, 1.0)
    for step in range(5):
        gradients = [torch.randn(70_000, generator=torch.Generator().manual_seed(seed_of(rank, step))).to(dtype) for rank in range(3)]
        ahead = [(wide + wide * 0.5).to(dtype) for wide in (g.to(reference.accumulate_dtype(dtype)) for g in gradients)]
        assert same_bits(masked.step(gradients), plain.step(ahead if nesterov else gradients))
    assert not any(kept(masked, rank, "velocity").any() for rank in range(3))


def train(rank, entry, options, paused):
    """Weights after each of 10 steps of SGD without momentum on gradients of integers."""
    model = Given(70, 5, 300)
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.0005)
    state = rt.TopKState(1.0, **options)
    register(ddp, state, entry)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    weights = []
    for step in range(10):
        if step in paused:
            state.pause() if step == paused[0] else state.resume()
        optimizer.zero_grad()
        ddp(integers(70, 5, 300, seed=seed_of(rank, step))).backward()
        optimizer.step()
        weights.append([parameter.detach().clone() for parameter in model.parameters()])
    return weights


def warned(rank, own, optimizer_type, of_optimizer, entry):
    """What is warned of in three steps."""
    model = Given(40, 24)
    ddp, state = DistributedDataParallel(model), rt.TopKState(0.5, momentum=own)
    if entry is not None:
        register(ddp, state, entry)
    optimizer = optimizer_type(model.parameters(), lr=1.0, **of_optimizer)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for step in range(3):
            ddp(integers(40, 24, seed=step)).backward()
            optimizer.step()
    return [str(each.message) for each in found if "momentum" in str(each.message)]


SGD, ADAM = torch.optim.SGD, torch.optim.AdamW


@pytest.mark.parametrize(
    "own, optimizer_type, of_optimizer, expected",
    [(0.5, SGD, {"momentum": 0.9}, "momentum=0.9"), (0.5, SGD, {}, None), (0.0, SGD, {"momentum": 0.9}, None),
     (0.5, ADAM, {}, "beta1=0.9"), (0.5, ADAM, {"betas": (0.0, 0.99)}, None), (0.0, ADAM, {}, None)],
)  # fmt: skip
@pytest.mark.parametrize("entry", [*ENTRIES, None])
def test_a_momentum_that_is_given_twice_is_warned_of_once(own, optimizer_type, of_optimizer, expected, entry):
    (found,) = run_workers(warned, 1, own, optimizer_type, of_optimizer, entry)
    expected = [] if entry is None or expected is None else [f"TopKState: expected an optimizer without momentum beside momentum=0.5, got one with {expected};"]
    assert [each[: each.index(";") + 1] for each in found] == expected


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(
    "options, momentum, nesterov",
    [({}, 0.5, False), ({"nesterov": True}, 0.5, True), ({"mask_momentum": True}, 0.0, False)],
    ids=["momentum", "nesterov", "masked"],
)
def test_under_ddp_at_density_1_it_is_sgd(entry, options, momentum, nesterov):
    paused = () if options.get("mask_momentum") else (4, 6)  # a paused step sends the velocity, and masks nothing
    results = run_workers(train, 2, entry, {"momentum": 0.5, **options}, paused)
    parameters = [nn.Parameter(torch.zeros(size)) for size in (70, 5, 300)]
    optimizer = torch.optim.SGD(parameters, lr=1.0, momentum=momentum, nesterov=nesterov)
    for step in range(10):
        for parameter, *of_ranks in zip(parameters, *(integers(70, 5, 300, seed=seed_of(rank, step)) for rank in range(2)), strict=True):
            parameter.grad = sum(of_ranks) / 2
        optimizer.step()
        assert all(torch.equal(*pair) for result in results for pair in zip(result[step], parameters, strict=True)), step


def ways_in(rank, options):
    """The averages of four steps through the hook, attach and average, and what the state holds in the end."""
    results = []
    for way in ("hook", "attach", "average", "average, out"):
        state = rt.RegTopKState(0.1, mu=1.0, **options)
        torch.manual_seed(0)
        model = nn.Linear(150, 60, bias=False)
        averages = []
        if not way.startswith("average"):
            ddp = DistributedDataParallel(model, bucket_cap_mb=100)
            register(ddp, state, way)
        for step in range(4):
            given = torch.randn(8, 150, generator=torch.Generator().manual_seed(10 * rank + step))
            if way.startswith("average"):
                (weights,) = torch.autograd.grad(model(given).square().mean(), [model.weight])
                before, out = weights.clone(), torch.empty_like(weights)
                averages += state.average([weights], out=[out] if "out" in way else None)
                assert torch.equal(weights, before), "only read"
            else:
                ddp.zero_grad()
                ddp(given).square().mean().backward()
                averages.append(model.weight.grad.clone())
        (entry,) = state.state_dict(None if way.startswith("average") else model)["parameters"].values()
        results.append((averages, entry["residual"], entry["velocity"]))
        state.close()
    return results


def test_every_way_in_gives_the_bits_of_the_simulation():
    options = FORMS["masked, clipped"] | {"clip_norm": 0.05}
    outcomes = run_workers(ways_in, 2, options)
    exchange = rt.LocalExchange(2, 0.1, mu=1.0, **options)
    torch.manual_seed(0)
    model = nn.Linear(150, 60, bias=False)
    for step in range(4):
        inputs = [torch.randn(8, 150, generator=torch.Generator().manual_seed(10 * rank + step)) for rank in range(2)]
        expected = exchange.step([torch.autograd.grad(model(each).square().mean(), [model.weight])[0] for each in inputs])
        assert all(torch.equal(averages[step], expected) for outcome in outcomes for averages, _, _ in outcome)
    for rank, outcome in enumerate(outcomes):
        for _, residual, momentum in outcome:
            assert torch.equal(residual.flatten(), kept(exchange, rank, "residual"))
            assert torch.equal(momentum.flatten(), kept(exchange, rank, "velocity"))


@pytest.mark.parametrize("nesterov", [False, True])
def test_what_would_be_too_large_for_the_gradients_dtype_makes_the_step_void_and_leaves_the_velocity(nesterov):
    exchange = rt.LocalExchange(1, 1.0, momentum=0.5, nesterov=nesterov)
    gradient = torch.tensor([35_000.0 if nesterov else 40_000.0, 1.0], dtype=torch.float16)
    assert exchange.step([gradient]).isfinite().all()
    for _ in range(2):
        before = kept(exchange, 0, "velocity")
        average = exchange.step([gradient * 1.25])
        assert average.tolist()[0] == math.inf and average[1].isfinite()
        after = kept(exchange, 0, "velocity")
        assert after[0] == before[0] and after[1] == before[1] / 2 + 1.25
    assert exchange.stats()["void_steps"] == 2


def test_a_scale_that_changes_by_powers_of_two_changes_no_bit():
    options = {"momentum": 0.9, "mask_momentum": True, "clip_norm": 2.0}
    plain, scaled = (rt.LocalExchange(2, 0.1, **options) for _ in range(2))
    for step, scale in enumerate([1.0, 4.0, 4.0, 2.0**-3, 64.0, 64.0]):
        gradients = [torch.randn(1000, generator=torch.Generator().manual_seed(seed_of(rank, step))) for rank in range(2)]
        assert same_bits(scaled.step([scale * g for g in gradients], scale=scale) / scale, plain.step(gradients)), step
        assert all(same_bits(kept(scaled, rank, "velocity"), kept(plain, rank, "velocity")) for rank in range(2)), step


def test_a_gradient_is_clipped_to_its_share_of_the_norm_and_a_smaller_one_is_left_alone():
    gradients = [torch.randn(5000, generator=torch.Generator().manual_seed(rank)) for rank in range(4)]
    gradients[3] *= 1e-3
    exchange = rt.LocalExchange(4, 1e-9, method="topk", clip_norm=2.0)
    exchange.step(gradients)
    for rank, gradient in enumerate(gradients):
        given = exchange.residuals(rank)[0]
        sent = given == 0
        if rank == 3:
            assert sent.sum() == 1 and torch.equal(given[~sent], gradient[~sent])
        else:
            # 2 / sqrt(4), but for the entry that was sent; fp32
            torch.testing.assert_close(given[~sent], gradient[~sent] / gradient.double().norm().float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_number_of_threads_changes_no_bit(dtype):
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            exchange = rt.LocalExchange(1, 0.01, momentum=0.9, mask_momentum=True, clip_norm=1.0)
            gradients = [torch.randn(400_000, generator=torch.Generator().manual_seed(step), dtype=torch.float64).to(dtype) for step in range(3)]
            results.append(torch.cat([exchange.step([gradient]) for gradient in gradients] + [kept(exchange, 0, "velocity").to(dtype)]))
    finally:
        torch.set_num_threads(before)
    assert same_bits(results[1], results[0]) and same_bits(results[2], results[0])


def train_with_a_branch(rank, options):
    module = WithBranch(rank, now_and_then)
    ddp = DistributedDataParallel(module, bucket_cap_mb=BUCKET_CAP_MB, find_unused_parameters=True)
    state, books = rt.RegTopKState(0.05, mu=1.0, **options), Books(module)
    ddp.register_comm_hook((state, books), booked_hook)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    for module.step in range(STEPS):
        optimizer.zero_grad()
        loss_of(ddp, batch(rank, module.step)).backward()
        optimizer.step()
    pieces = state._pieces()
    held = {index: pieces[_C.parameter_key(parameter)] for parameter, index in books.indices.items() if _C.parameter_key(parameter) in pieces}
    return books.steps, {index: (piece.residual, piece.velocity) for index, piece in held.items()}, [p.detach() for p in module.parameters()]


@pytest.mark.parametrize("form", ["nesterov", "masked, clipped"])
def test_several_buckets_and_parameters_used_now_and_then_equal_the_simulation(form):
    options = FORMS[form] | ({"clip_norm": 0.01} if "clip_norm" in FORMS[form] else {})
    results = run_workers(train_with_a_branch, 2, options)
    exchange = rt.LocalExchange(2, 0.05, mu=1.0, **options)
    check_against_simulation([books for books, _, _ in results], "regtopk", exchange)
    for rank, (_, held, parameters) in enumerate(results):
        for index, (residual, velocity) in held.items():
            piece = exchange._pieces(rank)[index]
            assert same_bits(residual, piece.residual) and same_bits(velocity, piece.velocity)
        assert any(velocity.any() for _, velocity in held.values()) and all(map(torch.equal, parameters, results[0][2]))
    assert len(results[0][0][-1]["layouts"]) > 1


def step_on_one_parameter_in_a_void_step(rank):
    model = Given(4, 4)
    ddp = DistributedDataParallel(model, bucket_cap_mb=100)
    state = rt.TopKState(1.0, momentum=0.5, mask_momentum=True)
    rt.attach(ddp, state)
    first, second = (torch.optim.SGD([part], lr=1.0) for part in model.parts)
    velocities = []
    for step in range(3):
        gradients = [torch.arange(1.0, 5.0), torch.arange(5.0, 9.0)]
        if step == 1 and rank == 0:
            gradients[0][1] = math.nan
        ddp.zero_grad()
        ddp(gradients).backward()
        second.step()
        if step != 1:
            first.step()
        velocities.append([entry["velocity"] for entry in state.state_dict(ddp)["parameters"].values()])
    return velocities


def test_in_a_void_step_what_an_optimizer_has_applied_all_the_same_is_masked_and_nothing_else():
    for rank, velocities in enumerate(run_workers(step_on_one_parameter_in_a_void_step, 2)):
        left = [1.0, 0.0 if rank == 0 else 2.0, 3.0, 4.0]  # nothing is added where the gradient is not finite
        assert [m.tolist() for m in velocities[0]] == [[0.0] * 4] * 2 == [m.tolist() for m in velocities[2]]
        assert [m.tolist() for m in velocities[1]] == [left, [0.0] * 4]


def test_what_returns_of_an_idle_parameter_stays_in_its_velocity():
    exchange = rt.LocalExchange(1, 0.25, method="topk", momentum=0.5, mask_momentum=True)
    zero, one = torch.zeros(4), torch.ones(4)
    exchange.step([[zero, torch.tensor([8.0, 7.0, 6.0, 5.0])]])  # sends 8 and 7
    exchange.step([[one, zero]])  # sends 6 and 5, which return
    first, second = exchange.step([[zero, one]])
    assert not first.any() and second.tolist() == [0.0, 0.0, 6 + 6 / 2 + 1, 5 + 5 / 2 + 1]


def stop_and_go_on(rank, directory, options):
    """Weights after six steps: at a stretch, and with a save, a state dict or a copy after the third."""

    def begin():
        model = make_model()
        ddp = DistributedDataParallel(model, bucket_cap_mb=100)
        return model, ddp, torch.optim.SGD(model.parameters(), lr=0.05)

    def go(ddp, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            loss_of(ddp, batch(rank, step)).backward()
            optimizer.step()

    results = []
    for way in ("at a stretch", "save", "state dict", "copy"):
        model, ddp, optimizer = begin()
        state = rt.RegTopKState(0.05, mu=1.0, **options)
        rt.attach(ddp, state)
        go(ddp, optimizer, range(3))
        if way == "at a stretch":
            go(ddp, optimizer, range(3, 6))
        else:
            weights = copy.deepcopy(model.state_dict())
            if way == "save":
                rt.save(state, ddp, directory / "checkpoint")
            saved = state.state_dict(ddp)
            copied = copy.deepcopy((model, state))
            model, ddp, optimizer = begin()
            model.load_state_dict(weights)
            state = rt.RegTopKState(0.05, mu=1.0, **options)
            if way == "copy":
                model, state = copied
                ddp, optimizer = DistributedDataParallel(model, bucket_cap_mb=100), torch.optim.SGD(model.parameters(), lr=0.05)
            rt.attach(ddp, state)
            if way == "save":
                rt.load(state, ddp, directory / "checkpoint")
            elif way == "state dict":
                state.load_state_dict(saved, ddp)
            go(ddp, optimizer, range(3, 6))
        results.append([parameter.detach().clone() for parameter in model.parameters()])
        dist.barrier()
    return results


@pytest.mark.parametrize("form", ["nesterov", "masked"])
def test_saved_loaded_and_gone_on_equals_never_stopped_bit_for_bit(tmp_path, form):
    for never_stopped, *others in run_workers(stop_and_go_on, 2, tmp_path, FORMS[form]):
        assert len(others) == 3 and all(all(map(torch.equal, other, never_stopped)) for other in others)


def test_a_state_dict_without_velocity_is_one_of_zeros_and_a_wrong_one_changes_nothing():
    options = {"momentum": 0.5, "method": "topk"}
    exchange = rt.LocalExchange(1, 0.5, **options)
    exchange.step([torch.arange(1.0, 5.0)])
    saved = exchange.state_dict()
    for wrong in (torch.zeros(3), torch.zeros(4, dtype=torch.float64), torch.full((4,), math.nan), "none"):
        damaged = copy.deepcopy(saved)
        damaged["workers"][0]["parameters"]["0"]["velocity"] = wrong
        kind, message, _ = error_of(exchange.load_state_dict, damaged)
        assert kind is ValueError and "0: expected " in message and "velocity" in message
    assert kept(exchange, 0, "velocity").tolist() == [1.0, 2.0, 3.0, 4.0]
    del saved["workers"][0]["parameters"]["0"]["velocity"]
    exchange.load_state_dict(saved)
    exchange.step([torch.ones(4)])
    assert kept(exchange, 0, "velocity").tolist() == [1.0] * 4


def absent_and_regrouped(rank):
    state = rt.TopKState(0.5, momentum=0.5)
    given = torch.arange(1.0, 5.0)
    state.average([given])
    state.average([given] if rank == 0 else None)
    waited = state.state_dict(None)["parameters"]["0"]["velocity"]
    state.regroup(dist.new_group())
    return waited.tolist(), state.state_dict(None)["parameters"]["0"]["velocity"].tolist()


def test_the_velocity_of_a_rank_that_contributes_nothing_waits_and_goes_along_to_another_group():
    for rank, (waited, regrouped) in enumerate(run_workers(absent_and_regrouped, 2)):
        assert waited == regrouped == [(1.5 if rank == 0 else 1.0) * each for each in range(1, 5)]


def flushed_and_reset(rank):
    model = Given(4, 4)
    ddp = DistributedDataParallel(model)
    state = rt.TopKState(0.25, momentum=0.5)
    rt.attach(ddp, state)
    ddp([torch.arange(1.0, 5.0), torch.arange(1.0, 5.0)]).backward()
    model.parts[1].requires_grad_(False)
    with pytest.warns(UserWarning, match="kept the residuals"):
        state.flush(ddp)
    flushed = [entry["velocity"].tolist() for entry in state.state_dict(ddp)["parameters"].values()]
    state.reset()
    return flushed, [set(entry) for entry in state.state_dict(ddp)["parameters"].values()]


def test_a_flush_begins_the_velocity_of_what_it_hands_out_anew_and_a_reset_all_of_it():
    for flushed, reset in run_workers(flushed_and_reset, 2):
        assert flushed == [[0.0] * 4, [1.0, 2.0, 3.0, 4.0]]
        assert reset == [{"shape"}]


def exchange_a_sparse_gradient(rank):
    model = nn.Embedding(10, 4, sparse=True)
    ddp = DistributedDataParallel(model)
    state = rt.TopKState(0.5, momentum=0.5)
    rt.attach(ddp, state)
    message = error_of(ddp(torch.tensor([1, 2])).sum().backward)[1]
    dist.barrier()  # no rank leaves while the other still connects
    return message


def test_what_it_can_not_do_is_refused_in_a_sentence():
    for rank, message in enumerate(run_workers(exchange_a_sparse_gradient, 2)):
        expected = "expected dense gradients with momentum= or clip_norm=, got sparse ones; give the momentum to the optimizer"
        assert f"rank {rank}: sparse_hook: {expected}" in message


def test_without_the_options_nothing_is_kept_of_it():
    exchange = rt.LocalExchange(1, 0.5)
    exchange.step([torch.ones(4)])
    (piece,) = exchange._pieces(0).values()
    assert piece.velocity is None
