"""Autocast, low-precision parameters and GradScaler: residuals keep the unit of the unscaled gradient, and outlive overflows."""

import contextlib
import copy
import math
import warnings

import pytest
import torch
from books import (
    Books, add_gradients, booked_hook, check_against_simulation, check_equal, check_mass, digest, nothing_applied, residuals_of,
)  # fmt: skip
from buckets import same_bits
from processes import run_workers
from torch.nn.parallel import DistributedDataParallel
from training import BUCKET_CAP_MB, batch, loss_of, make_model, make_optimizer, make_state

import regtopk_torch as rt

STEPS = 9
PARAMETERS = 9  # of make_model
SCALES = [1.0, 2.0**16, 2.0**16, 2.0**15, 2.0**-20, 2.0**64, 2.0**-64, 4.0]


@pytest.mark.parametrize("distortion", ["previous", "current"])
@pytest.mark.parametrize("method", ["topk", "regtopk"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_run_under_changing_scales_equals_the_unscaled_run_bit_for_bit(dtype, method, distortion):
    options = {"density": 0.6, "method": method, "mu": 1.0, "distortion": distortion}  # much is sent twice running
    scaled, plain = rt.LocalExchange(3, **options), rt.LocalExchange(3, **options)
    generator = torch.Generator().manual_seed(3)
    for step, scale in enumerate(SCALES):
        gradients = [[torch.randn(200, generator=generator).to(dtype), torch.randn(100, generator=generator).to(dtype)] for _ in range(3)]
        layout = [[0, 1]] if step < 3 else [[1], [0]] if step < 6 else [[1, 0]]
        expected = plain.step(gradients, layout)
        averages = scaled.step([[g * scale for g in worker] for worker in gradients], layout, scale=scale)
        assert all(same_bits(a / scale, e) for a, e in zip(averages, expected, strict=True))
        for rank in range(3):
            check_equal(scaled.residuals(rank), plain.residuals(rank))
            assert scaled.residual_norm(rank) == pytest.approx(plain.residual_norm(rank), rel=1e-12)
        if step in (1, 4):  # a state dict has no scale in it, whether a new exchange loads it or one that has a scale
            saved = scaled.state_dict()
            if step == 1:
                scaled = rt.LocalExchange(3, **options)
            scaled.load_state_dict(saved)
            plain.load_state_dict(plain.state_dict())


def test_a_void_step_returns_in_the_unit_in_which_it_was_sent():
    exchange = rt.LocalExchange(1, 0.5, method="topk")
    exchange.step([torch.tensor([1.0, 2.0, 3.0, 4.0]) * 16], scale=16)
    exchange.step([torch.tensor([1.0, math.inf, 8.0, 16.0]) * 16], scale=16)
    # The next step's scale is known when the void one's entries return.
    average = exchange.step([torch.tensor([0.25, 0.0, 0.0, 0.0]) * 8], scale=8)
    assert average.tolist() == [0, 0, 8 * 8, 16 * 8]
    assert exchange.residuals(0)[0].tolist() == [1 + 1 + 0.25, 2, 0, 0]


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan, 2.0**65, 2.0**-65])
def test_a_scale_that_would_cost_bits_is_an_error(scale):
    with pytest.raises(ValueError, match=r"LocalExchange: expected a gradient scale between 2\^-64 and 2\^64, got "):
        rt.LocalExchange(1).step([torch.ones(3)], scale=scale)


def test_a_grad_scaler_of_another_type_is_an_error():
    for state in (rt.TopKState, rt.RegTopKState):
        with pytest.raises(TypeError, match=f"{state.__name__}: expected grad_scaler to be a torch.amp.GradScaler, got float"):
            state(0.1, grad_scaler=65536.0)


def train_with_scaler(rank, method, entry, dtype, overflows, growth):
    """GradScaler on the CPU; `overflows` maps a step to (rank, index of the parameter whose gradient overflows)."""
    module = make_model()
    ddp = DistributedDataParallel(module, bucket_cap_mb=BUCKET_CAP_MB / 4)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_factor=growth, backoff_factor=1 / growth, growth_interval=2)
    state = make_state(method, 0.05, grad_scaler=scaler)
    books = Books(module, scaler)
    if entry == "attach":
        rt.attach(ddp, state)
    else:
        ddp.register_comm_hook((state, books), booked_hook)
    optimizer = make_optimizer(module)
    inject = set()
    for index, parameter in enumerate(module.parameters()):
        # Before DDP's own hook sees the gradient.
        parameter.register_hook(lambda g, index=index: torch.full_like(g, math.inf) if index in inject else None)
    applied, digests, skipped, scales = nothing_applied(module), [], [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        autocast = contextlib.nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype)
        with autocast:
            loss = loss_of(ddp, batch(rank, step))
        bad_rank, bad_parameter = overflows.get(step, (None, None))
        inject.update({bad_parameter} if rank == bad_rank else ())
        scaler.scale(loss).backward()
        inject.clear()
        before, scale = digest(module), scaler.get_scale()
        scaler.unscale_(optimizer)
        if all(parameter.grad.isfinite().all() for parameter in module.parameters()):
            add_gradients(applied, module)
        scaler.step(optimizer)
        scaler.update()
        digests.append(digest(module))
        skipped.append(digests[-1] == before)
        scales.append(scale)
    return books.steps, digests, skipped, scales, applied, residuals_of(state, module), state.stats()


def train_with_scaler_by_both_entries(rank, *arguments):
    return [train_with_scaler(rank, arguments[0], entry, *arguments[1:]) for entry in ("register_comm_hook", "attach")]


@pytest.mark.parametrize("method", ["topk", "regtopk"])
@pytest.mark.parametrize("parameter", range(PARAMETERS))
def test_an_overflow_in_any_bucket_on_one_rank_skips_the_step_on_all_and_returns_every_bucket(parameter, method):
    overflows = {3: (1, parameter), 4: (0, parameter), 7: (0, PARAMETERS - 1 - parameter)}
    check_scaled_run(run_workers(train_with_scaler_by_both_entries, 2, method, None, overflows, 2.0), method, overflows)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("method", ["topk", "regtopk"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_with_a_scaler_trains_and_loses_nothing(dtype, method, world_size):
    overflows = {5: (world_size - 1, 4)}
    check_scaled_run(run_workers(train_with_scaler_by_both_entries, world_size, method, dtype, overflows, 2.0), method, overflows)


def test_a_scale_that_is_no_power_of_two_costs_only_rounding():
    check_scaled_run(run_workers(train_with_scaler_by_both_entries, 2, "regtopk", None, {4: (0, 2)}, 1.7), "regtopk", {4: (0, 2)})


def check_scaled_run(results, method, overflows):
    by_hook, attached = zip(*results, strict=True)
    for _, digests, skipped, scales, _, _, stats in (*by_hook, *attached):
        assert skipped == [step in overflows for step in range(STEPS)]
        assert digests == by_hook[0][1]
        assert scales == by_hook[0][3] and len(set(scales)) > 2
        assert stats["void_steps"] == len(overflows) and stats["steps"] == STEPS
    books = [result[0] for result in by_hook]
    assert len(books[0][-1]["layouts"]) >= 4, "expected several buckets"
    exchange = check_against_simulation(books, method)
    for rank, (one, other) in enumerate(results):
        for run in (one, other):
            assert all(residual.isfinite().all() for residual in run[5].values())
            check_equal(run[5], exchange.residuals(rank))
    check_mass(books, [result[5] for result in by_hook], by_hook[0][4])


def train_low_precision(rank, method, dtype, autocast):
    """Parameters of `dtype`, or fp32 ones under autocast without a scaler."""
    module = make_model(dtype)
    ddp = DistributedDataParallel(module, bucket_cap_mb=BUCKET_CAP_MB * dtype.itemsize / 4)
    state = make_state(method, 0.05)
    books = Books(module)
    ddp.register_comm_hook((state, books), booked_hook)
    optimizer = make_optimizer(module)
    applied, digests = nothing_applied(module), []
    for step in range(STEPS):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16) if autocast else contextlib.nullcontext():
            loss = loss_of(ddp, batch(rank, step, dtype))
        loss.backward()
        add_gradients(applied, module)
        optimizer.step()
        digests.append(digest(module))
    return books.steps, digests, applied, residuals_of(state, module)


@pytest.mark.parametrize("method", ["topk", "regtopk"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "autocast"], ids=str)
def test_low_precision_without_a_scaler_trains_and_loses_only_the_averages_rounding(dtype, method):
    autocast = dtype == "autocast"
    dtype = torch.float32 if autocast else dtype
    results = run_workers(train_low_precision, 2, method, dtype, autocast)
    assert results[0][1] == results[1][1] and len(set(results[0][1])) == STEPS
    books = [result[0] for result in results]
    exchange = check_against_simulation(books, method)
    for rank, result in enumerate(results):
        check_equal(result[3], exchange.residuals(rank))
    # What rounding to the wire cuts off stays in the residual; the average itself is rounded to the gradient's dtype, once
    # per step, and that is the only loss.
    check_mass(books, [result[3] for result in results], results[0][2], rounding=max(1e-5, 2 * torch.finfo(dtype).eps))


def break_the_model(rank, method):
    """NaN appears in a parameter on all ranks before step 3; before step 6 the user puts the model of step 3 back."""
    module = make_model()
    ddp = DistributedDataParallel(module, bucket_cap_mb=BUCKET_CAP_MB)
    state = make_state(method, 0.05)
    books = Books(module)
    ddp.register_comm_hook((state, books), booked_hook)
    optimizer = make_optimizer(module)
    applied, seen = nothing_applied(module), []
    for step in range(STEPS):
        if step == 3:
            good = copy.deepcopy(module.state_dict())
            with torch.no_grad():
                module.layers[2].bias[0] = math.nan
        elif step == 6:
            module.load_state_dict(good)
            optimizer = make_optimizer(module)
        optimizer.zero_grad()
        loss_of(ddp, batch(rank, step)).backward()
        seen.append(not all(parameter.grad.isfinite().all() for parameter in module.parameters()))
        if not seen[-1]:
            add_gradients(applied, module)
        optimizer.step()
    return books.steps, seen, applied, residuals_of(state, module), digest(module), state.stats()


@pytest.mark.parametrize("method", ["topk", "regtopk"])
def test_nan_in_the_model_is_seen_and_leaves_the_residual_when_the_model_is_mended(method):
    results = run_workers(break_the_model, 2, method)
    for _, seen, _, residuals, parameters, stats in results:
        assert seen == [False] * 3 + [True] * 3 + [False] * 3
        assert stats["void_steps"] == 3
        assert all(residual.isfinite().all() for residual in residuals.values())
        assert parameters == results[0][4]
    books = [result[0] for result in results]
    exchange = check_against_simulation(books, method)
    for rank, result in enumerate(results):
        check_equal(result[3], exchange.residuals(rank))
    check_mass(books, [result[3] for result in results], results[0][2])


def train_with_other_scalers(rank, entry, scales):
    scaler = None if scales[rank] is None else torch.amp.GradScaler("cpu", init_scale=scales[rank])
    ddp = DistributedDataParallel(make_model())
    state = make_state("regtopk", 0.1, grad_scaler=scaler)
    if entry == "attach":
        rt.attach(ddp, state)
    else:
        ddp.register_comm_hook(state, rt.sparse_hook)
    loss = loss_of(ddp, batch(rank, 0))
    try:
        (loss if scaler is None else scaler.scale(loss)).backward()
    except Exception as error:
        return str(error), state.residual_norm()


@pytest.mark.parametrize("entry", ["register_comm_hook", "attach"])
@pytest.mark.parametrize(("scales", "got"), [((1024.0, 1024.0, 2048.0), "1024 on rank 0 and 2048 on rank 2"), ((4.0, None, 4.0), "4 on rank 0 and 1 on rank 1")])
def test_ranks_with_other_scalers_get_an_error_that_names_both_scales(entry, scales, got):
    for rank, (message, norm) in enumerate(run_workers(train_with_other_scalers, 3, entry, scales)):
        assert f"rank {rank}: sparse_hook: expected the same gradient scale on every rank, got {got}; give every rank's state" in message
        assert norm > 0, "what the failed exchange took returns to the residual"


def collapse_the_scale(rank):
    module = make_model()
    with torch.no_grad():
        module.scale.fill_(math.nan)
    ddp = DistributedDataParallel(module)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**-62)
    state = make_state("topk", 0.1, grad_scaler=scaler)
    rt.attach(ddp, state)
    optimizer = make_optimizer(module)
    for step in range(10):
        optimizer.zero_grad()
        try:
            scaler.scale(loss_of(ddp, batch(rank, step))).backward()
        except ValueError as error:
            return step, str(error)
        scaler.step(optimizer)
        scaler.update()


def test_a_scaler_that_halves_for_ever_ends_in_an_error_that_says_where_to_look():
    for step, message in run_workers(collapse_the_scale, 2):
        assert step == 3
        assert "expected a gradient scale between 2^-64 and 2^64, got " in message and "look for NaN in the model's parameters" in message


def train_with_a_disabled_scaler(rank):
    module = make_model()
    ddp = DistributedDataParallel(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scaler = torch.amp.GradScaler("cpu", enabled=False)
    state = make_state("topk", 0.1, grad_scaler=scaler)
    rt.attach(ddp, state)
    scaler.scale(loss_of(ddp, batch(rank, 0))).backward()
    before = {name: entry["residual"] for name, entry in state.state_dict(ddp)["parameters"].items()}
    state.flush(ddp)
    return before, {name: parameter.grad for name, parameter in module.named_parameters()}


def test_a_disabled_scaler_scales_by_one():
    (before_0, flushed), (before_1, _) = run_workers(train_with_a_disabled_scaler, 2)
    assert all(torch.equal(flushed[name], (before_0[name] + before_1[name]) / 2) for name in flushed)


def flush_under_a_scaler(rank):
    module = make_model()
    ddp = DistributedDataParallel(module)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    state = make_state("regtopk", 0.1, grad_scaler=scaler)
    rt.attach(ddp, state)
    scaler.scale(loss_of(ddp, batch(rank, 0))).backward()
    sent = [parameter.grad / 1024 for parameter in module.parameters()]
    state.flush(ddp)
    alone = make_model()
    loss_of(alone, batch(rank, 0)).backward()
    return sent, [p.grad for p in module.parameters()], [p.grad for p in alone.parameters()]


def test_flush_hands_out_unscaled_gradients():
    results = run_workers(flush_under_a_scaler, 2)
    for sent, flushed, first, second in zip(*results[0], results[1][2], strict=True):
        # Scaled and unscaled backward passes round alike, but for denormal numbers.
        torch.testing.assert_close(sent + flushed, (first + second) / 2, rtol=1e-6, atol=1e-7)
