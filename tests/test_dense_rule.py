"""Buckets, and parameters, that send all their entries: the bits of the reference, nothing lost, and the bytes of a ring."""

import gc
import warnings

import pytest
import torch
import torch.distributed as dist
from given import ENTRIES, Given, finite, held, integers, missing, register, seed_of, unit_sgd
from processes import error_of, run_workers
from test_shared_support import SIZES, fail_once, steps_of, train_with_void_steps
from torch.nn.parallel import DistributedDataParallel
from training import make_state

import regtopk_torch as rt
from regtopk_torch import reference

MU = {"topk": None, "regtopk": 2.0}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def everything(name, numel):
    return True


def crossing(step):
    """Densities of which some take more bytes than all entries would, and some less."""
    return (0.99, 0.05, 0.97, 0.8, 0.02)[step % 5]


def kept_by(exchange, rank):
    return torch.cat([residual for _, residual in sorted(exchange.residuals(rank).items())])


def assert_equal_steps(exchange, twin, dtype, workers, before=lambda step: None, after=lambda step: None):
    for step, gradients in enumerate(steps_of(dtype, workers)):
        before(step)
        averages, expected = torch.cat(exchange.step(gradients)), twin.step([torch.cat(worker) for worker in gradients])
        assert torch.equal(averages.nan_to_num(7), expected.nan_to_num(7)), step
        for rank, worker in enumerate(twin.workers):
            assert torch.equal(kept_by(exchange, rank), worker.settled()), (step, rank)
        after(step)
    assert exchange.stats(0)["void_steps"] == 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", MU)
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_steps_of_a_dense_bucket_equal_the_reference(method, dtype, workers):
    exchange = rt.LocalExchange(workers, 0.02, method=method, mu=2.0, dense=everything)
    twin = reference.Exchange([reference.Worker(0.02, MU[method]) for _ in range(workers)], SIZES, dense=True)
    assert_equal_steps(exchange, twin, dtype, workers)
    stats = exchange.stats(0)
    assert stats["dense_buckets"] == stats["steps"] and stats["density"] == 1
    assert stats["dense"] == [{"parameters": ["0", "1", "2"], "entries": sum(SIZES), "why": "the rule"}]
    assert stats["bytes_sent"] == stats["steps"] * reference.dense_bytes(sum(SIZES), dtype, workers, 3)
    # No more than a ring's bytes and a head to each.
    assert stats["bytes_sent"] - stats["bytes_dense"] <= stats["steps"] * (workers - 1) * (64 + 16 + 8 + 16 + 2 * 3 * dtype.itemsize)


@pytest.mark.parametrize("options", [{"decay": 0.9}, {"wire_dtype": torch.bfloat16}, {"wire_dtype": "2bit"}, {"chunk": 64}, {"support": "leader"}, {"index_code": "elias-fano"}], ids=str)
def test_what_is_said_of_chosen_entries_does_not_touch_a_dense_bucket(options):
    exchange = rt.LocalExchange(2, 0.02, method="topk", dense=everything, **options)
    twin = reference.Exchange([reference.Worker(0.02, decay=options.get("decay", 1.0)) for _ in range(2)], SIZES, dense=True)
    assert_equal_steps(exchange, twin, torch.float32, 2)


def bytes_sent(workers, density, dtype, **options):
    exchange = rt.LocalExchange(workers, density, method="topk", **options)
    exchange.step([[torch.ones(size, dtype=dtype) for size in SIZES]] * workers)
    return exchange.stats(0)["bytes_sent"]


@pytest.mark.parametrize("options", [{}, {"support": "leader"}, {"wire_dtype": torch.bfloat16, "index_code": "elias-fano"}, {"decay": 0.9}], ids=str)
@pytest.mark.parametrize("method", MU)
@pytest.mark.parametrize("workers", [2, 3, 8])
def test_auto_sends_what_is_less_and_equals_the_reference_where_the_density_crosses(workers, method, options):
    exchange = rt.LocalExchange(workers, crossing, method=method, mu=2.0, dense="auto", **options)
    given = {name: options[name] for name in ("decay", "wire_dtype") if name in options}
    twin = reference.Exchange([reference.Worker(1.0, MU[method], **given) for _ in range(workers)], SIZES, leader="support" in options)
    seen, sent = set(), 0

    def before(step):
        chosen = bytes_sent(workers, crossing(step), torch.float32, **options)
        twin.dense = chosen >= reference.dense_bytes(sum(SIZES), torch.float32, workers, len(SIZES))
        for worker in twin.workers:
            worker.density = crossing(step)
        seen.add(twin.dense)

    def after(step):
        nonlocal sent
        dense = reference.dense_bytes(sum(SIZES), torch.float32, workers, len(SIZES))
        chosen = bytes_sent(workers, crossing(step), torch.float32, **options)
        now, sent = exchange.stats(0)["bytes_sent"] - sent, exchange.stats(0)["bytes_sent"]
        assert now == pytest.approx(min(dense, chosen), rel=1e-9)
        why = [f"auto: {int(dense)} bytes a step against {int(chosen)}"] if twin.dense else []
        assert [bucket["why"] for bucket in exchange.stats(0)["dense"]] == why

    assert_equal_steps(exchange, twin, torch.float32, workers, before, after)
    assert seen == ({False} if workers < 8 and "wire_dtype" in options else {False, True})


def test_of_one_worker_auto_chooses_and_under_an_adaptive_density_the_mean_decides():
    exchange = rt.LocalExchange(1, 0.99, dense="auto")
    exchange.step([torch.randn(1000)])
    assert exchange.stats()["dense_buckets"] == 0
    for mean, dense in ((0.3, 0), (0.5, 6)):
        exchange = rt.LocalExchange(4, rt.AdaptiveDensity(mean, power=2), dense="auto")
        generator = torch.Generator().manual_seed(0)
        for step in range(6):
            exchange.step([10.0**step * torch.randn(1000, generator=generator) for _ in range(4)])
        assert exchange.stats(0)["dense_buckets"] == dense


@pytest.mark.parametrize("method", MU)
def test_of_a_mixed_bucket_the_rest_choose_among_themselves(method):
    asked = []

    def rule(name, numel):
        asked.append((name, numel))
        return name in ("0", "2")

    exchange = rt.LocalExchange(2, 0.02, method=method, mu=2.0, dense=rule)
    dense, chosen = (reference.Exchange([reference.Worker(0.02, MU[method]) for _ in range(2)], sizes, dense=is_dense) for sizes, is_dense in (([3000, 7000], True), ([50], False)))
    for gradients in steps_of(torch.float32, 2, faults=False):
        averages = exchange.step(gradients)
        assert torch.equal(torch.cat([averages[0], averages[2]]), dense.step([torch.cat([worker[0], worker[2]]) for worker in gradients]))
        assert torch.equal(averages[1], chosen.step([worker[1] for worker in gradients]))
        for rank in range(2):
            assert torch.equal(exchange.residuals(rank)[1], chosen.workers[rank].settled())
            assert not exchange.residuals(rank)[0].any() and not exchange.residuals(rank)[2].any()
    assert asked == [("0", 3000), ("1", 50), ("2", 7000)], "once each"


def test_changing_loss_scales_change_no_bit_of_what_is_held_back():
    plain, scaled = (rt.LocalExchange(2, 0.05, method="topk", decay=0.9, dense=lambda name, numel: name == "0") for _ in range(2))
    for step, gradients in enumerate(steps_of(torch.bfloat16, 2)):
        scale = 2.0 ** (step * 5 % 7)
        averages = scaled.step([[gradient * scale for gradient in worker] for worker in gradients], scale=scale)
        for average, expected in zip(averages, plain.step(gradients), strict=True):
            assert torch.equal((average / scale).nan_to_num(7), expected.nan_to_num(7))
        for rank in range(2):
            assert torch.equal(kept_by(plain, rank), kept_by(scaled, rank))
    assert plain.residuals(0)[0].any(), "a bf16 value leaves something back"


def lose_nothing(rank, method, entry, density, dense):
    """Returns (what is missing, the parameters, residuals, statistics)."""
    state = make_state(method, density, dense=dense)
    lost, parameters, ddp = train_with_void_steps(rank, state, entry, (300, 40, 300, 20), 13, 1.5e-3, lambda step: step % 2)
    return lost, parameters, held(state, ddp), state.stats()


def two_of_three(name, numel):
    return name != "parts.1"


def two_of_four(name, numel):
    assert name == f"parts.{(300, 40, 300, 20).index(numel)}" or name == "parts.2"
    return name in ("parts.1", "parts.2")


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("method", MU)
@pytest.mark.parametrize("density, dense", [(0.05, two_of_four), (crossing, "auto"), (0.05, everything)], ids=["rule", "auto", "all"])
def test_under_ddp_nothing_is_lost_and_replicas_stay_equal_where_steps_are_void(method, entry, density, dense):
    results = run_workers(lose_nothing, 2, method, entry, density, dense)
    for lost, parameters, residuals, stats in results:
        assert not any(lost) and stats["void_steps"] == 3
        assert all(map(torch.equal, parameters, results[0][1]))
        assert stats["dense_buckets"] > 0
        if dense != "auto":
            named = ["parts.1", "parts.2"] if dense is two_of_four else list(residuals)
            assert sorted(name for bucket in stats["dense"] for name in bucket["parameters"]) == named
            assert [name for name, residual in residuals.items() if not residual.any()] == named
            assert sum(bucket["entries"] for bucket in stats["dense"]) == sum(residuals[name].numel() for name in named)


def fail_with(rank, dense):
    return fail_once(rank, "average_slice_", dense=dense)


@pytest.mark.parametrize("dense", [everything, two_of_three], ids=["all", "rule"])
def test_what_a_step_sent_that_failed_on_one_rank_returns(dense):
    results = run_workers(fail_with, 3, dense)
    for rank, (errors, lost, parameters) in enumerate(results):
        (error,) = errors
        assert ("something of this machine" if rank == 1 else f"rank {rank}: sparse_hook: expected averages of step 2 of rank 1, got none") in error, error
        assert max(lost) < 1e-4, "three ranks: averages round"
        assert all(map(torch.equal, parameters, results[0][2]))


def average_by_name(rank):
    state = rt.TopKState(0.1, dense=lambda name, numel: name.startswith("bias"))
    names = ["weight", "bias", "other"]
    given = [integers(200, 30, 50, seed=seed_of(rank, step)) for step in range(4)]
    results = [state.average(given[0], names)]
    results.append(state.average(given[1], names, async_op=True).wait())
    state.abort()  # what was sent returns, with the dense too
    results.append(state.average(given[2], names, out=[torch.empty(size) for size in (200, 30, 50)]))
    results.append(state.average(None if rank == 1 else given[3], names))
    state.average([torch.zeros(5)])  # places are names, too
    return given, results, {name: entry["residual"] for name, entry in state.state_dict(None)["parameters"].items()}


def test_averages_are_dense_by_name_and_an_aborted_one_returns():
    (given_0, results, held_0), (given_1, results_1, held_1) = run_workers(average_by_name, 2)
    for ours, theirs in zip(results, results_1, strict=True):
        assert all(map(torch.equal, ours, theirs))
    bias = [[step[1] for step in given] for given in (given_0, given_1)]
    assert torch.equal(results[0][1], (bias[0][0] + bias[1][0]) / 2) and torch.equal(results[1][1], (bias[0][1] + bias[1][1]) / 2)
    assert torch.equal(results[2][1], (bias[0][1] + bias[0][2] + bias[1][1] + bias[1][2]) / 2)
    assert torch.equal(results[3][1], bias[0][3]), "of the one that contributes"
    assert not held_0["bias"].any() and not held_1["bias"].any()
    for place, name in ((0, "weight"), (2, "other")):
        applied = 2 * (results[0][place] + results[2][place]) + results[3][place]
        given = sum(step[place] for step in given_0) + sum(step[place] for step in given_1[:3])
        assert torch.equal(applied + held_0[name] + held_1[name], given), name


def save_and_go_on(rank, method, dense, saved_at):
    """Twice the same steps, the second time with a new state in the middle. Returns both ends, and what was saved."""
    ends = []
    for interrupted in (False, True):
        module = Given(300, 40)
        ddp = DistributedDataParallel(module, bucket_cap_mb=100)
        state = make_state(method, crossing, dense=dense)
        register(ddp, state, "register_comm_hook")
        optimizer = unit_sgd(module)
        for step in range(10):
            if interrupted and step == saved_at:
                saved = state.state_dict(ddp)
                ddp = DistributedDataParallel(module, bucket_cap_mb=100)
                state = make_state(method, crossing, dense=dense)
                state.load_state_dict(saved, ddp)
                register(ddp, state, "attach")
            optimizer.zero_grad()
            ddp(integers(300, 40, seed=seed_of(rank, step))).backward()
            optimizer.step()
        ends.append(([part.detach().clone() for part in module.parts], held(state, ddp)))
    return ends, sum("sent_index" in entry for entry in saved["parameters"].values())


def only_parts_1(name, numel):
    return name == "parts.1"


@pytest.mark.parametrize("dense, saved_at, histories", [("auto", 5, 2), ("auto", 6, 0), (only_parts_1, 5, 1)])
@pytest.mark.parametrize("method", MU)
def test_a_resumed_run_equals_an_undisturbed_one(method, dense, saved_at, histories):
    for (undisturbed, resumed), saved in run_workers(save_and_go_on, 2, method, dense, saved_at):
        assert all(map(torch.equal, undisturbed[0], resumed[0])) and undisturbed[1].keys() == resumed[1].keys()
        assert all(torch.equal(undisturbed[1][name], resumed[1][name]) for name in undisturbed[1])
        assert saved == histories, "what went dense is no history and not saved"


def rules_that_differ(rank):
    ddp = DistributedDataParallel(Given(40, 40, 40))
    state = rt.TopKState(0.1, dense=lambda name, numel: name == f"parts.{rank}")
    register(ddp, state, "attach")
    return error_of(lambda: ddp(integers(40, 40, 40, seed=rank)).backward())


def test_rules_that_differ_are_an_error_on_every_rank():
    for rank, (kind, message, seconds) in enumerate(run_workers(rules_that_differ, 2)):
        assert kind is ValueError and seconds < 30
        expected = f"rank {rank}: sparse_hook: expected the same dense parameters of the bucket on every rank, got "
        assert message.startswith(expected) and " on rank 0" in message and " on rank 1" in message, message


def a_rule_that_fails(rank):
    ddp = DistributedDataParallel(Given(40, 40))
    state = rt.TopKState(0.1, dense=lambda name, numel: "yes" if rank == 1 else True)
    register(ddp, state, "register_comm_hook")
    return error_of(lambda: ddp(integers(40, 40, seed=rank)).backward())


def test_a_rule_that_returns_something_else_is_an_error_on_every_rank_within_seconds():
    (kind_0, message_0, seconds_0), (kind_1, message_1, _) = run_workers(a_rule_that_fails, 2)
    assert kind_1 is TypeError and message_1.startswith("TopKState: expected dense('parts."), message_1
    assert kind_0 is dist.DistBackendError and "to return True or False, got 'yes'" in message_0 and seconds_0 < 20, message_0


@pytest.mark.parametrize("dense", [None, True, "always", 1])
def test_a_rule_out_of_range_is_named(dense):
    for who, construct in (("TopKState", rt.TopKState), ("LocalExchange", lambda **options: rt.LocalExchange(2, **options))):
        with pytest.raises(ValueError, match=f"{who}: expected dense to be 'never', 'auto' or a function of a parameter's name and its number of entries, got {dense!r}"):
            construct(dense=dense)


def warned(rank, density):
    ddp = DistributedDataParallel(Given(3000))
    state = rt.TopKState(density)
    register(ddp, state, "attach")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(3):
            ddp(integers(3000, seed=seed_of(rank, step))).backward()
    return [str(warning.message) for warning in caught if "dense" in str(warning.message)]


def test_a_message_says_once_where_dense_would_send_less():
    (message,), nothing = run_workers(warned, 2, 0.99)
    assert message.startswith("rank 0: sparse_hook: a bucket of 3000 entries sends ") and "; dense='auto' sends those" in message, message
    assert nothing == [] and run_workers(warned, 2, 0.5) == [[], []]


def unfreeze(rank):
    """Beside one that goes on, a parameter comes back under a new model; in that step the dense part, of the new one alone, is void."""
    sizes = (300, 40)
    model = Given(*sizes)
    optimizer, given = unit_sgd(model), [torch.zeros(size, dtype=torch.float64) for size in sizes]
    model.parts[0].requires_grad_(False)
    state = rt.TopKState(0.1, dense=lambda name, numel: name == "parts.0")
    for step in range(3):
        if step < 2:
            model.parts[0].requires_grad_(step == 1)
            ddp = DistributedDataParallel(model)
            register(ddp, state, "attach")
        gradients = integers(*sizes, seed=seed_of(rank, step))
        if step == 0:
            gradients[0].zero_()
        if (step, rank) == (1, 0):
            gradients[1][3] = torch.nan
        optimizer.zero_grad()
        ddp(gradients).backward()
        for total, gradient in zip(given, gradients):
            total += finite(gradient)
        if step != 1:
            optimizer.step()
    return missing(state, ddp, given)


def fail_midway(rank):
    """In the first step the rule fails at a later bucket, on all ranks."""
    sizes = (300, 40, 300)
    model, asked = Given(*sizes), []

    def rule(name, numel):
        asked.append(name)
        if name == "parts.0" and asked.count(name) == 1:
            raise RuntimeError("not yet")
        return name == "parts.1"

    state = rt.TopKState(0.1, dense=rule)
    optimizer, given = unit_sgd(model), [torch.zeros(size, dtype=torch.float64) for size in sizes]
    failed = []
    for step in range(4):
        ddp = DistributedDataParallel(model, bucket_cap_mb=1e-3, find_unused_parameters=True)
        register(ddp, state, "register_comm_hook")
        gradients = integers(*sizes, seed=seed_of(rank, step))
        optimizer.zero_grad()
        try:
            ddp(gradients).backward()
        except RuntimeError as error:
            failed.append(str(error))
            gradients[0].zero_()  # of the bucket that failed nothing was taken
        else:
            optimizer.step()
        for total, gradient in zip(given, gradients):
            total += gradient
    return len(failed), "not yet" in failed[0], missing(state, ddp, given)


def differ_midway(rank):
    """Ranks differ in a later bucket: whether they hold all of what they gave of the buckets before."""
    sizes = (300, 40, 300)
    ddp = DistributedDataParallel(Given(*sizes), bucket_cap_mb=1e-3, find_unused_parameters=True)
    rt.attach(ddp, state := rt.TopKState(0.1, dense=lambda name, numel: name == "parts.0" and rank == 0))
    gradients = integers(*sizes, seed=seed_of(rank, 0))
    kind = error_of(lambda: ddp(gradients).backward())[0].__name__
    kept = held(state, ddp)
    return kind, [torch.equal(kept[f"parts.{i}"].double(), gradients[i].double()) for i in (1, 2)]


def more_than_once(rank):
    """What the rule was asked by a state that begins with other tensors, and by one whose collector's objects are frozen."""
    asked = []

    def few(name, numel):
        asked.append((name, numel))
        return numel < 100

    state = rt.TopKState(0.1, dense=few)
    state.average([torch.ones(10)])
    dense = [state.stats()["dense"]]
    state.reset()
    dense.append(state.stats()["dense"])
    state.average([torch.ones(1000)])
    dense.append(state.stats()["dense"])
    older = DistributedDataParallel(Given(300))
    ddp = DistributedDataParallel(torch.nn.Sequential(older.module))
    named = []
    rt.attach(ddp, state := rt.TopKState(0.1, dense=lambda name, numel: bool(named.append(name))))
    gc.freeze()
    try:
        ddp(integers(300, seed=rank)).backward()
    finally:
        gc.unfreeze()
    return asked, dense, named


def test_what_a_dense_part_of_new_parameters_sent_in_a_void_step_returns():
    assert run_workers(unfreeze, 2, seconds=60) == [[0, 0]] * 2


def test_what_other_buckets_sent_returns_where_the_rule_fails():
    assert run_workers(fail_midway, 2, seconds=60) == [(1, True, [0, 0, 0])] * 2


def test_what_other_buckets_sent_returns_where_ranks_differ_in_one():
    assert run_workers(differ_midway, 2, seconds=60) == [("ValueError", [True, True])] * 2


def test_the_rule_is_asked_of_other_tensors_and_hears_the_names_of_the_model_with_the_hook():
    for asked, dense, named in run_workers(more_than_once, 2, seconds=60):
        assert asked == [("0", 10), ("0", 1000)]
        assert [[bucket["parameters"] for bucket in buckets] for buckets in dense] == [[["0"]], [], []]
        assert named == ["0.parts.0"]
