"""A support that a leader chooses for all: the bits of the reference, nothing lost, and bytes that do not grow with the workers."""

import re
import time

import late
import pytest
import torch
from given import ENTRIES, Given, broken, finite, held, integers, missing, register, seed_of, unit_sgd
from processes import run_workers
from torch.nn.parallel import DistributedDataParallel
from training import make_state

import regtopk_torch as rt
from regtopk_torch import _C, reference

SIZES = [3000, 50, 7000]
STEPS = 14


def steps_of(dtype, workers, *, faults=True):
    """The gradients of each step, [worker][parameter]: some idle, some not finite on one worker, the leader or another."""
    generator = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        gradients = [[(torch.randn(size, generator=generator) * 10).to(dtype) for size in SIZES] for _ in range(workers)]
        for rank, worker in enumerate(gradients):
            if step in (4, 5, 6) or (step == 7 and rank != step % workers) or (step == 9 and rank != 0):
                worker[1].zero_()  # idle; then the leader's alone comes back, and the others wait; then zero on some alone
            elif step == 7:
                worker[1] *= 20
            if faults and (step, rank) == (8, 8 % workers):
                worker[0][17] = torch.inf  # of the leader
            if faults and (step, rank) == (11, (11 + 1) % workers):
                worker[2][6999] = torch.nan  # of a follower, which keeps it
        yield gradients


def check_equals_reference(method, dtype, workers=3, **options):
    mu = 2.0 if method == "regtopk" else None
    twin_options = {name: options[name] for name in ("decay", "wire_dtype") if name in options}
    density = options.pop("density", 0.02)
    exchange = rt.LocalExchange(workers, density, method=method, mu=mu or 1.0, support="leader", **options)
    distortion = {"distortion": options["distortion"]} if "distortion" in options else {}
    twin = reference.Exchange([reference.Worker(0.02, mu, **twin_options, **distortion) for _ in range(workers)], SIZES, leader=True)
    voids = 0
    for step, gradients in enumerate(steps_of(dtype, workers)):
        for worker in twin.workers:
            worker.density = density(step) if callable(density) else density
        averages = torch.cat(exchange.step(gradients))
        expected = twin.step([torch.cat(worker) for worker in gradients])
        voids += not expected.isfinite().all()
        assert torch.equal(averages.nan_to_num(7), expected.nan_to_num(7)), step
        for rank, worker in enumerate(twin.workers):
            kept = torch.cat([residual for _, residual in sorted(exchange.residuals(rank).items())])
            assert torch.equal(kept, worker.settled()), (step, rank)
    assert voids == 2 and exchange.stats(0)["void_steps"] == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", ["topk", "regtopk"])
@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_steps_of_a_local_exchange_equal_the_reference(method, dtype, workers):
    check_equals_reference(method, dtype, workers)


@pytest.mark.parametrize(
    "options",
    [
        {"wire_dtype": torch.bfloat16}, {"wire_dtype": torch.float16, "index_code": "elias-fano"}, {"index_code": "elias-fano"},
        {"decay": 0.9}, {"density": 0.3}, {"density": 0.0001}, {"density": rt.WarmupDensity(0.25, 0.01, 6)},
        {"density": rt.WarmupDensity(0.25, 0.01, 6), "wire_dtype": torch.bfloat16, "index_code": "elias-fano", "decay": 0.9},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("method", ["topk", "regtopk"])
def test_with_other_parts_it_equals_the_reference(method, options):
    check_equals_reference(method, torch.float32, **options)


def test_with_the_distortion_as_printed_it_equals_the_reference():
    check_equals_reference("regtopk", torch.float32, distortion="current")


@pytest.mark.parametrize("method", ["topk", "regtopk"])
def test_an_idle_entry_that_the_leader_had_to_choose_is_sent_as_zero_and_keeps_its_residual(method):
    sizes, mu = [3, 50], 2.0 if method == "regtopk" else None
    exchange = rt.LocalExchange(3, 0.5, method=method, mu=mu or 1.0, support="leader")
    twin = reference.Exchange([reference.Worker(0.5, mu) for _ in range(3)], sizes, leader=True)
    generator, before = torch.Generator().manual_seed(3), []
    for step in range(9):
        gradients = [[torch.randn(size, generator=generator) * (size == 3 or step < 3) for size in sizes] for _ in range(3)]
        averages, expected = torch.cat(exchange.step(gradients)), twin.step([torch.cat(worker) for worker in gradients])
        assert torch.equal(averages, expected)
        waiting = [exchange.residuals(rank)[1] for rank in range(3)]
        for rank, worker in enumerate(twin.workers):
            kept = torch.cat([residual for _, residual in sorted(exchange.residuals(rank).items())])
            assert torch.equal(kept, worker.settled())
        if step > 4:
            assert all(map(torch.equal, waiting, before)) and (twin.workers[0].sent.index >= 3).sum() > 20
        before = waiting


def sent_per_step(workers, numel, density, **options):
    exchange = rt.LocalExchange(workers, density, method="topk", support="leader", **options)
    generator = torch.Generator().manual_seed(0)
    for _ in range(workers):
        exchange.step([torch.randn(numel, generator=generator) for _ in range(workers)])
    per_worker = {exchange.stats(rank)["bytes_sent"] / workers for rank in range(workers)}
    assert len(per_worker) == 1
    return per_worker.pop()


@pytest.mark.parametrize("workers", [2, 4, 8])
def test_what_a_worker_sends_does_not_grow_with_their_number(workers):
    numel, k = 300_000, 3000
    places = k * 2 + 5 * 4
    assert sent_per_step(workers, numel, 0.01) <= places + 2 * k * 4
    assert sent_per_step(workers, numel, 0.01, wire_dtype=torch.bfloat16) <= places + k * (2 + 4)
    assert sent_per_step(workers, numel, 0.01, index_code="elias-fano") <= k * 8.7 / 8 + 2 * k * 4


# Operators: bytes are checked before anything is written.

NUMEL, K = 200_000, 1000
FORM = {"dtype": torch.float32, "wire_dtype": torch.bfloat16, "elias_fano": True}
ops = torch.ops.regtopk


def followers(workers=3):
    """(messages, residuals, payloads, spans, idle) of workers of which rank 0 leads, in the wire's form."""
    spans, idle = torch.tensor([0, 70_000, NUMEL]), torch.zeros(2, dtype=torch.uint8)
    verdict, counters = torch.full((4096,), -1), torch.zeros(3, dtype=torch.int64)
    messages, residuals, payloads = [], [], []
    for rank in range(workers):
        gradient = torch.randn(NUMEL, generator=torch.Generator().manual_seed(rank))
        payload = torch.empty(_C.payload_bytes(NUMEL, K, torch.float32, 2), dtype=torch.uint8)
        message = torch.zeros(_C.wire_bytes(NUMEL, K, torch.float32, 2, torch.bfloat16, True), dtype=torch.uint8)
        residual = torch.zeros(NUMEL)
        ops.compress_(gradient, residual, payload, None, None, spans, idle, verdict, None, counters, k=K, step=3, plan=77, choose=rank == 0)
        if rank > 0:
            ops.take_(residual, payload, messages[0], spans, idle, k=K, step=3, plan=77, **FORM)
        ops.to_wire_(residual, payload, message, k=K, spans=2, **FORM)
        messages.append(message), residuals.append(residual), payloads.append(payload)
    return messages, residuals, payloads, spans, idle


def rows_of(messages, entries):
    """What rank 0 receives: of each message the head and the first entries."""
    values_at = len(messages[0]) - (2 * K + 15) // 16 * 16
    return torch.stack([torch.cat([message[:88], message[values_at : values_at + 2 * entries]]) for message in messages])


def test_followers_send_what_they_hold_where_the_leader_chose():
    messages, residuals, payloads, *_ = followers()
    index = ops.decode(payloads[0], numel=NUMEL, k=K, dtype=torch.float32)[0]
    values = []
    for rank, (payload, residual) in enumerate(zip(payloads, residuals, strict=True)):
        own, value = ops.decode(payload, numel=NUMEL, k=K, dtype=torch.float32)
        gradient = torch.randn(NUMEL, generator=torch.Generator().manual_seed(rank))
        assert torch.equal(own, index) and torch.equal(value, gradient[index].bfloat16().float())
        residual[index] += value
        assert torch.equal(residual, gradient)
        values.append(value)
    out = torch.empty(16 + 500 * 4, dtype=torch.uint8)
    ops.average_slice_(rows_of(messages, 500), out, numel=NUMEL, k=K, spans=2, step=3, plan=77, **FORM)
    expected = (values[0] + values[1] + values[2]) / torch.tensor(3.0)
    assert torch.equal(out[16:].view(torch.float32), expected[:500])


@pytest.mark.parametrize(
    "name, at, value",
    [("magic", 0, 1), ("value type", 6, 1), ("support", 7, 0), ("step 3", 8, 4), ("numel", 16, 1), ("k 1000", 24, 1), ("plan 77", 32, 1), ("flags", 56, 4),
     ("spans", 60, 1), ("every rank to have made the same calls", 72, 1), ("the same gradient scale", 71, 1)],
)  # fmt: skip
def test_a_damaged_head_is_an_error_that_names_rank_and_field(name, at, value):
    messages, *_ = followers()
    rows, out = rows_of(messages, 500), torch.zeros(16 + 500 * 4, dtype=torch.uint8)
    rows[1, at] = value
    with pytest.raises(ValueError, match=f"average_slice_: expected {name}.* rank 1"):
        ops.average_slice_(rows, out, numel=NUMEL, k=K, spans=2, step=3, plan=77, **FORM)
    assert not out.any()


def test_a_damaged_support_is_an_error_that_names_the_leader_and_changes_nothing():
    (lead, *_), _, (_, payload, _), spans, idle = followers()
    residual, before = torch.ones(NUMEL), payload.clone()
    for at, value in [(0, 1), (8, 4), (24, 1), (32, 1), (slice(88, 1100), 255), (slice(1100, 1300), 0)]:
        damaged = lead.clone()
        damaged[at] = value
        with pytest.raises(ValueError, match="take_: expected .* in the payload of rank 2, got "):
            ops.take_(residual, payload, damaged, spans, idle, k=K, leader=2, step=3, plan=77, **FORM)
    assert torch.equal(payload, before) and (residual == 1).all()


def test_averages_that_are_none_are_an_error_that_names_their_rank_and_changes_nothing():
    messages, _, payloads, spans, idle = followers()
    averages = torch.zeros(3, 16 + 336 * 4, dtype=torch.uint8)
    averages[[0, 2], 0] = 4
    bucket, verdict = torch.ones(NUMEL), torch.full((4096,), -1)
    with pytest.raises(ValueError, match="spread_: expected averages of step 3 of rank 1, got none"):
        ops.spread_(bucket, payloads[0], rows_of(messages, 336), averages, spans, idle, verdict, k=K, step=3, round=3)
    assert (bucket == 1).all() and (verdict == -1).all()


# Between processes


def train_with_void_steps(rank, state, entry, sizes, steps, bucket_cap_mb, faulty):
    """Steps of which each fourth is void, on account of rank `faulty(step)`. Returns (what is missing, the parameters, the model)."""
    module = Given(*sizes)
    ddp = DistributedDataParallel(module, bucket_cap_mb=bucket_cap_mb)
    register(ddp, state, entry)
    optimizer = unit_sgd(module)
    given = [torch.zeros(size, dtype=torch.float64) for size in sizes]
    for step in range(steps):
        gradients = integers(*sizes, seed=seed_of(rank, step))
        if step % 4 == 3 and rank == faulty(step):
            gradients[step % 3][7] = torch.nan
        optimizer.zero_grad()
        ddp(gradients).backward()
        for total, gradient in zip(given, gradients, strict=True):
            total += finite(gradient)
        if all(parameter.grad.isfinite().all() for parameter in module.parameters()):
            optimizer.step()
    return missing(state, ddp, given), [part.detach().clone() for part in module.parts], ddp


def lose_nothing(rank, method, entry):
    """Returns (what is missing, the parameters, void steps)."""
    state = make_state(method, 0.05, support="leader")
    lost, parameters, _ = train_with_void_steps(rank, state, entry, (300, 40, 300), 12, 1e-3, lambda step: step % 3)
    state.check()  # the counts of a device come late
    return lost, parameters, state.stats()["void_steps"]


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("method", ["topk", "regtopk"])
def test_nothing_is_lost_and_replicas_stay_equal_where_steps_are_void(method, entry):
    results = run_workers(lose_nothing, 4, method, entry)
    for lost, parameters, void in results:
        assert not any(lost) and void == 3
        assert all(map(torch.equal, parameters, results[0][1]))


def fail_once(rank, operator, **options):
    """On rank 1 an operator fails in the third step. Returns (errors, what is missing, parameters)."""
    sizes = (300, 40, 300)
    module = Given(*sizes)
    ddp = DistributedDataParallel(module, bucket_cap_mb=1e-3)
    state = rt.TopKState(0.1, **(options or {"support": "leader"}))
    register(ddp, state, "register_comm_hook")
    optimizer = unit_sgd(module)
    given, errors = [torch.zeros(size, dtype=torch.float64) for size in sizes], []

    for step in range(6):
        gradients = integers(*sizes, seed=seed_of(rank, step))
        for total, gradient in zip(given, gradients, strict=True):
            total += gradient
        optimizer.zero_grad()
        try:
            with broken(operator, rank == 1 and step == 2, state=state):
                ddp(gradients).backward()
        except Exception as error:
            errors.append(str(error))
            optimizer.zero_grad()
            ddp = DistributedDataParallel(module, bucket_cap_mb=1e-3)
            register(ddp, state, "register_comm_hook")
        else:
            optimizer.step()
    return errors, missing(state, ddp, given), [part.detach().clone() for part in module.parts]


@pytest.mark.parametrize(
    "operator, words", [("take_", "expected magic .* in the payload of rank 1, got 0"), ("average_slice_", "expected averages of step 2 of rank 1, got none")]
)
def test_an_error_of_one_rank_is_an_error_on_every_rank_and_the_next_step_goes_on(operator, words):
    results = run_workers(fail_once, 3, operator)
    for rank, (errors, lost, parameters) in enumerate(results):
        (error,) = errors
        assert re.search("something of this machine" if rank == 1 else f"^rank {rank}: sparse_hook: {words}", error), error
        assert max(lost) < 1e-4, "three ranks: averages round"
        assert all(map(torch.equal, parameters, results[0][2]))


def lead_in_other_steps(rank, loaded):
    """Ranks go back to other steps, or one alone does: each takes another for the leader. Returns (error, seconds)."""
    state, saved = rt.TopKState(0.2, support="leader"), {}
    for step in range(4):
        state.average([torch.ones(50)])
        saved[step] = state.state_dict(None)
    if loaded[rank] is not None:
        state.load_state_dict(saved[loaded[rank]], None)
    started = time.monotonic()
    try:
        state.average([torch.ones(50)])
    except Exception as error:
        return str(error), time.monotonic() - started


@pytest.mark.parametrize("loaded", [(None, 0), (0, 1)])
def test_ranks_that_are_in_other_steps_are_an_error_within_seconds(loaded):
    found = run_workers(lead_in_other_steps, 2, loaded)
    for error, seconds in found:
        assert seconds < 15, "the limit is 30"
        assert "rank 0 in the exchange" in error and "and rank 1 in the exchange" in error or "rank 1 in the exchange" in error and "and rank 0 in the exchange" in error, error
        assert "that rank 0 leads" in error and "that rank 1 leads" in error, error


def average_without_some(rank):
    """One rank after the other contributes nothing, the leader's among them. Returns (given, applied by all, kept)."""
    state = rt.TopKState(0.2, support="leader")
    given, applied = torch.zeros(50), torch.zeros(50)
    for step in range(10):
        absentee = step % 4 if step > 1 else None  # of rank 3 there is none
        (tensor,) = integers(50, seed=seed_of(rank, step))
        given += 0 if rank == absentee else tensor
        (average,) = state.average(None if rank == absentee else [tensor])
        applied += average * (2 if absentee in (0, 1, 2) else 3)
    (piece,) = state._pieces().values()
    return given, applied, piece.residual


def test_a_rank_that_contributes_nothing_may_lead():
    given, applied, kept = zip(*run_workers(average_without_some, 3), strict=True)
    assert all(torch.equal(one, applied[0]) for one in applied)
    torch.testing.assert_close(sum(given), applied[0] + sum(kept), rtol=0, atol=1e-3)
    assert applied[0].any() and kept[0].any()


def train_both(rank, path, way):
    with late.served_late(path, way):
        ours = train(rank)
    theirs = train(rank)
    return ours, theirs


def train(rank):
    module = Given(*[300] * 6)
    ddp = DistributedDataParallel(module, bucket_cap_mb=1e-3)
    state = make_state("regtopk", 0.05, support="leader")
    register(ddp, state, "attach")
    optimizer = unit_sgd(module)
    for step in range(5):
        optimizer.zero_grad()
        ddp(integers(*[300] * 6, seed=seed_of(rank, step))).backward()
        optimizer.step()
    return [part.detach().clone() for part in module.parts], held(state, ddp)


@pytest.mark.parametrize("way", ["late", "reversed"])
def test_a_late_backend_gives_the_bits_of_gloo(way):
    for ours, theirs in run_workers(train_both, 2, late.build(), way):
        assert all(map(torch.equal, ours[0], theirs[0]))
        assert ours[1].keys() == theirs[1].keys() and all(torch.equal(ours[1][name], theirs[1][name]) for name in ours[1])


def save_and_go_on(rank, method):
    """Twice the same steps, the second time with a new state in the middle. Returns both ends."""
    ends = []
    for interrupted in (False, True):
        module = Given(300, 40)
        ddp = DistributedDataParallel(module, bucket_cap_mb=100)
        state = make_state(method, 0.05, support="leader")
        register(ddp, state, "register_comm_hook")
        optimizer = unit_sgd(module)
        for step in range(8):
            if interrupted and step == 4:
                saved = state.state_dict(ddp)
                ddp = DistributedDataParallel(module, bucket_cap_mb=100)
                state = make_state(method, 0.05, support="leader")
                state.load_state_dict(saved, ddp)
                register(ddp, state, "attach")
            optimizer.zero_grad()
            ddp(integers(300, 40, seed=seed_of(rank, step))).backward()
            optimizer.step()
        ends.append([part.detach().clone() for part in module.parts])
    return ends


@pytest.mark.parametrize("method", ["topk", "regtopk"])
def test_a_resumed_run_equals_an_undisturbed_one(method):
    for undisturbed, resumed in run_workers(save_and_go_on, 3, method):
        assert all(map(torch.equal, undisturbed, resumed))
