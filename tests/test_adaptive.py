"""A density that follows the average's norm: its bits, its budget, and that every rank has the same."""

import copy
import math
import pickle
from functools import cache

import pytest
import torch
import torch.distributed as dist
from buckets import DTYPES, same_bits
from given import ENTRIES, register
from processes import error_of, run_workers
from test_idle_parameters import SIZES, WORKERS, gradients_of
from torch.nn.parallel import DistributedDataParallel
from training import BUCKET_CAP_MB, batch, local_gradients, loss_of, make_model, make_optimizer, make_state

import regtopk_torch as rt
from regtopk_torch import reference

METHODS = {"topk": None, "regtopk": 1.0}  # mu
RULE = rt.AdaptiveDensity(0.05, power=2, minimum=0.01, maximum=0.4)
STEPS = 9


def entries_of(exchange, step):
    """Entries that a worker sends in a step."""
    before = exchange.stats(0)["sent_entries"]
    step()
    return exchange.stats(0)["sent_entries"] - before


@cache
def bytes_sent(k, dtype, support):
    """What a worker puts on the network in a step of k entries."""
    exchange = rt.LocalExchange(WORKERS, k / sum(SIZES), method="topk", support=support)
    exchange.step([[torch.ones(size, dtype=dtype) for size in SIZES]] * WORKERS)
    assert exchange.stats(0)["sent_entries"] == k
    return exchange.stats(0)["bytes_sent"]


@pytest.mark.parametrize("leader", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_steps_equal_the_reference(method, dtype, leader):
    support = "leader" if leader else "own"
    exchange = rt.LocalExchange(WORKERS, RULE, method=method, mu=1.0, support=support)
    rule = reference.AdaptiveDensity(0.05, 2, 0.01, 0.4, lambda k: bytes_sent(k, dtype, support))
    workers = [reference.Worker(0.1, METHODS[method]) for _ in range(WORKERS)]
    expected = reference.Exchange(workers, SIZES, leader=leader, density=rule)
    generator = torch.Generator().manual_seed(7)
    sent = set()
    for step in range(24):
        gradients = [[gradient * 3.0 ** ((step * 7) % 5 - 2) for gradient in worker] for worker in gradients_of(step, dtype, generator)]
        if step == 9:
            gradients[1][0][3] = math.inf
        wanted = reference.entries_to_send(rule.density, sum(SIZES))
        averages = []
        assert entries_of(exchange, lambda: averages.extend(exchange.step(gradients))) == wanted
        sent.add(wanted)
        assert same_bits(torch.cat(averages), expected.step([torch.cat(worker) for worker in gradients]))
    assert len(sent) > 8 and exchange.stats(0)["void_steps"] == 1


def sizes_over_time(kind, generator):
    for step in range(1000):
        noise = float(torch.randn((), generator=generator))
        yield {
            "noise": math.exp(noise),
            "falling": math.exp(-step / 100 + 0.3 * noise),
            "rising": math.exp(step / 20),
            "bursts": 30.0 if step % 150 < 50 else 1.0,
            "steady": 1.0,
        }[kind]


@pytest.mark.parametrize("options", [{}, {"index_code": "elias-fano", "wire_dtype": torch.bfloat16}, {"wire_dtype": "2bit"}, {"support": "leader"}], ids=str)
@pytest.mark.parametrize("kind", ["noise", "falling", "rising", "bursts", "steady"])
def test_the_bytes_of_a_thousand_steps_are_those_of_the_mean_within_two_per_cent(kind, options):
    adaptive, fixed = (rt.LocalExchange(2, density, method="topk", **options) for density in (rt.AdaptiveDensity(0.05, power=2), 0.05))
    generator = torch.Generator().manual_seed(3)
    k = set()
    for size in sizes_over_time(kind, generator):
        gradients = [size * torch.randn(4000, generator=generator) for _ in range(2)]
        k.add(entries_of(adaptive, lambda: adaptive.step(gradients)))
        fixed.step(gradients)
    sent, wanted = (exchange.stats()["bytes_sent"] for exchange in (adaptive, fixed))
    assert abs(sent / wanted - 1) < 0.02
    # Steps that rise by the same factor are all alike.
    assert kind in ("steady", "rising") or max(k) > 2 * min(k)


def test_the_mean_holds_first_and_after_a_void_a_dense_and_a_skipped_step():
    exchange = rt.LocalExchange(2, rt.AdaptiveDensity(0.1), method="topk", dense_steps=1)
    generator = torch.Generator().manual_seed(1)

    def k_of(size):
        gradients = [size * torch.randn(1000, generator=generator) for _ in range(2)]
        return entries_of(exchange, lambda: exchange.step(gradients))

    assert [k_of(1.0) for _ in range(2)] == [1000, 100]
    assert k_of(1.0) != 100 or k_of(2.0) != 100  # by then there is a norm
    assert k_of(math.nan) != 100
    assert k_of(1.0) == 100
    assert k_of(8.0) != 100
    exchange.skipped()
    assert k_of(8.0) == 100


def test_the_bits_do_not_depend_on_the_number_of_threads():
    def states():
        exchange = rt.LocalExchange(2, rt.AdaptiveDensity(0.1), method="topk")
        generator = torch.Generator().manual_seed(1)
        for _ in range(4):
            exchange.step([torch.randn(300_000, generator=generator) for _ in range(2)])
        return exchange.state_dict()["workers"][0]["density_state"]

    threads = torch.get_num_threads()
    found = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        found.append(states())
    torch.set_num_threads(threads)
    assert found[0] == found[1] == found[2] and all(found[0])


def test_a_resumed_run_has_the_bits_of_an_undisturbed_one_and_a_reset_begins_anew():
    def make():
        return rt.LocalExchange(2, RULE, mu=1.0)

    generator = torch.Generator().manual_seed(1)
    steps = [[(1 + step % 4) * torch.randn(500, generator=generator) for _ in range(2)] for step in range(12)]
    undisturbed, first, second = make(), make(), make()
    expected = [undisturbed.step(gradients) for gradients in steps]
    for gradients in steps[:6]:
        first.step(gradients)
    second.load_state_dict(first.state_dict())
    assert all(same_bits(second.step(gradients), wanted) for gradients, wanted in zip(steps[6:], expected[6:], strict=True))
    second.reset()
    fresh = make()
    assert all(same_bits(second.step(gradients), fresh.step(gradients)) for gradients in steps)


@pytest.mark.parametrize("wrong", [[1.0], [math.nan] * 7, [1] * 7, "much"])
def test_a_damaged_state_is_an_error(wrong):
    exchange = rt.LocalExchange(1, RULE)
    state = exchange.state_dict()
    state["workers"][0]["density_state"] = wrong
    with pytest.raises(ValueError, match="expected density_state to be a list of 7 finite numbers"):
        exchange.load_state_dict(state)


def test_a_scale_is_not_part_of_the_norm():
    one, other = (rt.LocalExchange(2, RULE, mu=1.0) for _ in range(2))
    generator = torch.Generator().manual_seed(1)
    for step in range(8):
        gradients, scale = [torch.randn(500, generator=generator) for _ in range(2)], 2.0 ** (step // 2)
        averages = one.step(gradients), other.step([gradient * scale for gradient in gradients], scale=scale)
        assert same_bits(averages[0], averages[1] / scale)


def train(rank, method, entry, options, cap, directory):
    """Train under DDP, saving and loading in the middle where there is a directory; (parameters after every step, statistics)."""
    model, parameters = make_model(), []
    ddp = DistributedDataParallel(model, bucket_cap_mb=cap, static_graph=True)
    state = make_state(method, RULE, **options)
    register(ddp, state, entry)
    optimizer = make_optimizer(model)
    for step in range(STEPS):
        if directory is not None and step == STEPS // 2:
            rt.save(state, ddp, directory)
            state.reset()
            rt.load(state, ddp, directory)
        optimizer.zero_grad()
        loss_of(ddp, batch(rank, step)).backward()
        optimizer.step()
        parameters.append([parameter.detach().clone() for parameter in model.parameters()])
    return parameters, state.stats()


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("method, options", [("topk", {}), ("regtopk", {}), ("regtopk", {"support": "leader", "dense_steps": 2})], ids=str)
def test_under_ddp_the_bits_are_those_of_the_simulation(method, options, entry):
    (one, statistics), (other, _) = run_workers(train, 2, method, entry, options, 100, None)
    exchange, model = rt.LocalExchange(2, RULE, method=method, mu=1.0, **options), make_model()
    optimizer, threads = make_optimizer(model), torch.get_num_threads()
    torch.set_num_threads(1)
    for step in range(STEPS):
        averages = exchange.step([local_gradients(model, rank, step) for rank in range(2)])
        for parameter, average in zip(model.parameters(), averages, strict=True):
            parameter.grad = average
        optimizer.step()
        assert all(map(same_bits, one[step], other[step]))
        assert all(map(same_bits, one[step], [parameter.detach() for parameter in model.parameters()]))
    torch.set_num_threads(threads)
    simulated = exchange.stats(0)
    assert statistics["sent_entries"] == simulated["sent_entries"] and statistics["bytes_sent"] == simulated["bytes_sent"]
    # At the mean all the time it would be another number.
    entries = sum(parameter.numel() for parameter in model.parameters())
    dense = options.get("dense_steps", 0)
    assert statistics["sent_entries"] != dense * entries + (STEPS - dense) * reference.entries_to_send(RULE.mean, entries)


@pytest.mark.parametrize("entry", ENTRIES)
def test_several_buckets_keep_replicas_equal_and_a_saved_run_goes_on_as_it_was(entry, tmp_path):
    undisturbed = run_workers(train, 2, "regtopk", entry, {}, BUCKET_CAP_MB, None)
    resumed = run_workers(train, 2, "regtopk", entry, {}, BUCKET_CAP_MB, tmp_path)
    for parameters in zip(*(result[0] for result in [*undisturbed, *resumed]), strict=True):
        for tensors in zip(*parameters, strict=True):
            assert all(same_bits(tensors[0], tensor) for tensor in tensors)


def average_lists(rank):
    """What a state's average gives, step by step, of two dtypes."""
    state, results = rt.TopKState(RULE), []
    for step in range(6):
        generator = torch.Generator().manual_seed(10 * step + rank)
        tensors = [(1 + step) * torch.randn(400, generator=generator), torch.randn(200, generator=generator, dtype=torch.float64)]
        results.append(state.average(tensors))
    return results, state.state_dict(None)["density_state"]


def test_averages_of_lists_have_it_too():
    (one, measured), (other, also) = run_workers(average_lists, 2)
    assert all(same_bits(*pair) for step in zip(one, other, strict=True) for pair in zip(*step, strict=True))
    assert measured == also and measured[1] == 5
    kept = {int(step[0].count_nonzero()) for step in one}
    assert len(kept) > 2


def act(rank, entry, what):
    """After a few steps rank 1, or all, do `what`; return the first error, and the gradients of the last step."""
    ddp = DistributedDataParallel(make_model(), bucket_cap_mb=BUCKET_CAP_MB)
    state = make_state("topk", RULE)
    register(ddp, state, entry)
    for step in range(4):
        loss_of(ddp, batch(rank, step)).backward()
    if what == "all skip":
        state.skipped()
    elif rank == 1:
        getattr(state, what)()
    first = error_of(lambda: loss_of(ddp, batch(rank, 4)).backward())
    if what == "all skip":
        for step in range(5, 9):
            loss_of(ddp, batch(rank, step)).backward()
    return first, [parameter.grad.clone() for parameter in ddp.parameters()]


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("what", ["reset", "skipped"])
def test_what_one_rank_does_alone_is_an_error_on_both_within_seconds(entry, what):
    for kind, message, seconds in (first for first, _ in run_workers(act, 2, entry, what)):
        assert kind in (ValueError, dist.DistBackendError), message
        assert "rank 1" in message and what in message and seconds < 30


def test_what_all_ranks_do_is_no_error():
    (first, one), (_, other) = run_workers(act, 2, "attach", "all skip")
    assert first[0] is None and all(map(same_bits, one, other))


def differ(rank, entry):
    ddp = DistributedDataParallel(make_model(), bucket_cap_mb=BUCKET_CAP_MB)
    register(ddp, rt.TopKState([0.05, rt.AdaptiveDensity(0.05, power=2)][rank]), entry)
    return error_of(lambda: loss_of(ddp, batch(rank, 0)).backward())


@pytest.mark.parametrize("entry", ENTRIES)
def test_ranks_of_other_rules_are_told_so(entry):
    for kind, message, _ in run_workers(differ, 2, entry):
        assert kind is ValueError
        assert "the same density on every rank, got 0.05 on rank 0 and adaptive, mean 0.05, power 2, 0.0125 to 0.2 on rank 1" in message


def test_a_state_says_and_carries_its_rule():
    state = rt.TopKState(rt.AdaptiveDensity(0.001, power=1.5))
    for one in (state, copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert repr(one) == "TopKState(density=AdaptiveDensity(mean=0.001, power=1.5, minimum=None, maximum=None))"


def copied(rank, how):
    """Gradients of two more steps by a state and by a copy of it, each on its own copy of the model."""
    model = make_model()
    ddp = DistributedDataParallel(model, bucket_cap_mb=100, static_graph=True)
    state = rt.TopKState(RULE)
    register(ddp, state, "attach")
    for step in range(4):
        loss_of(ddp, batch(rank, step)).backward()
        model.zero_grad()
    twin_model, twin = copy.deepcopy((model, state)) if how == "deepcopy" else pickle.loads(pickle.dumps((model, state)))
    twin_ddp = DistributedDataParallel(twin_model, bucket_cap_mb=100, static_graph=True)
    register(twin_ddp, twin, "attach")
    results = []
    for each in (ddp, twin_ddp):
        for step in range(4, 6):
            loss_of(each, batch(rank, step)).backward()
        results.append([parameter.grad for parameter in each.parameters()])
    return [state._exchange.density_state(), twin._exchange.density_state()], results


def test_a_copy_goes_on_with_what_was_measured():
    for (measured, of_twin), _ in run_workers(copied, 2, "deepcopy"):
        assert measured[1] == 5 and measured[:4] == of_twin[:4]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"mean": 0.0}, "expected 0 < minimum <= mean <= maximum <= 1"),
        ({"mean": math.nan}, "expected mean to be a finite number, got nan"),
        ({"mean": "0.1"}, "expected mean to be a finite number, got '0.1'"),
        ({"mean": 0.1, "power": 0.3}, "expected power from 0 to 8, a multiple of 0.25, got 0.3"),
        ({"mean": 0.1, "power": 9}, "expected power from 0 to 8"),
        ({"mean": 0.1, "minimum": 0.2}, "got minimum=0.2, mean=0.1, maximum=0.4"),
        ({"mean": 0.1, "maximum": 1.5}, "maximum=1.5"),
        ({"mean": 0.1, "maximum": True}, "expected maximum to be a finite number, got True"),
    ],
)
def test_arguments_out_of_range_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        rt.AdaptiveDensity(**arguments)
