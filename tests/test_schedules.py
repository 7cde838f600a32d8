"""A density that changes from step to step, a residual that decays, and first steps without compression."""

import copy
import gc
import pickle
import re
import time

import pytest
import torch
from buckets import DTYPES, same_bits
from given import ENTRIES, Given, register
from processes import run_workers
from test_idle_parameters import SIZES, WORKERS, gradients_of
from torch.nn.parallel import DistributedDataParallel
from training import BUCKET_CAP_MB, batch, local_gradients, loss_of, make_model, make_optimizer, make_state

import regtopk_torch as rt
from regtopk_torch import reference

METHODS = {"topk": None, "regtopk": 1.0}  # mu
UP_AND_DOWN = (0.5, 0.02, 0.02, 0.9, 0.001, 0.1)  # offsets and bitmap, more and fewer entries than in the step before
STEPS, DENSE = 9, 2


def up_and_down(step):
    return UP_AND_DOWN[step % len(UP_AND_DOWN)]


@pytest.mark.parametrize("decay", [1.0, 0.9])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_steps_of_a_changing_density_and_a_decaying_residual_equal_the_reference(method, dtype, decay):
    exchange = rt.LocalExchange(WORKERS, up_and_down, method=method, mu=1.0, decay=decay)
    expected = reference.Exchange([reference.Worker(0.1, METHODS[method], decay=decay) for _ in range(WORKERS)], SIZES)
    generator = torch.Generator().manual_seed(7)
    sent = 0
    for step in range(12):
        gradients = gradients_of(step, dtype, generator)
        for worker in expected.workers:
            worker.density = up_and_down(step)
        sent += WORKERS * reference.entries_to_send(up_and_down(step), sum(SIZES))
        assert same_bits(torch.cat(exchange.step(gradients)), expected.step([torch.cat(worker) for worker in gradients]))
        for rank, worker in enumerate(expected.workers):
            residuals = exchange.residuals(rank)
            assert same_bits(torch.cat([residuals[index] for index in range(len(SIZES))]), worker.settled())
    assert exchange.stats()["sent_entries"] == sent


def test_what_decays_is_what_is_held_back_and_an_idle_residual_does_not():
    exchange = rt.LocalExchange(2, 0.25, method="topk", decay=0.5)
    exchange.step([[torch.tensor([1.0, 2.0, 3.0, 16.0]), torch.tensor([1.0, 2.0, 3.0, 16.0])]] * 2)
    exchange.step([[torch.tensor([0.0, 0.0, 0.0, 8.0]), torch.zeros(4)]] * 2)
    exchange.step([[torch.tensor([0.0, 0.0, 0.0, 8.0]), torch.zeros(4)]] * 2)
    first, second = exchange.residuals(0).values()
    assert second.tolist() == [0.5, 1.0, 1.5, 0.0]  # decayed once; idle from then on
    assert first.tolist() == [0.25, 0.0, 0.0, 0.0]  # 3, halved, went with the second step, and 2, halved twice, with the third


def options_of(method):
    return {"density": rt.WarmupDensity(0.5, 0.02, 6), "decay": 0.9, "dense_steps": DENSE, "method": method}


def train(rank, method, entry):
    """Train under DDP; the parameters after every step, residuals and statistics."""
    options = options_of(method)
    del options["method"]
    model = make_model()
    ddp = DistributedDataParallel(model, bucket_cap_mb=BUCKET_CAP_MB, static_graph=True)
    state = make_state(method, options.pop("density"), **options)
    register(ddp, state, entry)
    optimizer, parameters = make_optimizer(model), []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(ddp, batch(rank, step)).backward()
        optimizer.step()
        parameters.append([parameter.detach().clone() for parameter in model.parameters()])
    return parameters, state.stats(), state.residual_norm()


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("method", METHODS)
def test_a_warm_up_with_decay_and_dense_steps_keeps_replicas_equal_and_sends_what_it_says(method, entry):
    one, other = run_workers(train, 2, method, entry)
    for parameters in zip(one[0], other[0], strict=True):
        assert all(map(same_bits, *parameters))
    assert one[1]["dense_buckets"] > 0 and one[1]["steps"] == STEPS and one[2] > 0
    density = options_of(method)["density"]
    entries = sum(parameter.numel() for parameter in make_model().parameters())
    wanted = DENSE * entries + sum(density(step) * entries for step in range(DENSE, STEPS))
    assert one[1]["sent_entries"] == pytest.approx(wanted, rel=0.02)
    assert one[1]["entries"] == STEPS * entries


def train_in_one_bucket(rank, method, entry):
    options = options_of(method)
    del options["method"]
    model = make_model()
    ddp = DistributedDataParallel(model, bucket_cap_mb=100, static_graph=True)
    register(ddp, make_state(method, options.pop("density"), **options), entry)
    optimizer = make_optimizer(model)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(ddp, batch(rank, step)).backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("method", METHODS)
def test_under_ddp_the_bits_are_those_of_the_simulation(method, entry):
    one, other = run_workers(train_in_one_bucket, 2, method, entry)
    model = make_model()
    # k is that of the whole model, and no two scores tie: the order of the parameters in the bucket does not matter.
    exchange, optimizer = rt.LocalExchange(2, mu=1.0, **options_of(method)), make_optimizer(model)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for step in range(STEPS):
        averages = exchange.step([local_gradients(model, rank, step) for rank in range(2)])
        for parameter, average in zip(model.parameters(), averages, strict=True):
            parameter.grad = average
        optimizer.step()
    torch.set_num_threads(threads)
    assert all(map(same_bits, one, other)) and all(map(same_bits, one, [p.detach() for p in model.parameters()]))


def test_first_steps_are_the_mean_of_all_gradients_and_hold_nothing_back():
    exchange = rt.LocalExchange(4, 0.01, dense_steps=2)
    generator = torch.Generator().manual_seed(0)
    for step in range(4):
        gradients = [torch.randn(1000, generator=generator) for _ in range(4)]
        average = exchange.step(gradients)
        if step < 2:
            assert torch.allclose(average, sum(gradients) / 4, atol=1e-6) and exchange.residual_norm() == 0
        else:
            assert int(average.count_nonzero()) <= 40 and exchange.residual_norm() > 0
    assert exchange.stats(0)["dense_buckets"] == 2


def test_a_run_that_is_resumed_in_the_middle_of_a_warm_up_goes_on_with_its_density():
    def make():
        return rt.LocalExchange(2, rt.WarmupDensity(0.5, 0.01, 8), mu=1.0, decay=0.9, dense_steps=1)

    generator = torch.Generator().manual_seed(1)
    steps = [[torch.randn(500, generator=generator) for _ in range(2)] for _ in range(10)]
    undisturbed, first, second = make(), make(), make()
    expected = [undisturbed.step(gradients) for gradients in steps]
    for gradients in steps[:5]:
        first.step(gradients)
    second.load_state_dict(first.state_dict())
    assert all(same_bits(second.step(gradients), wanted) for gradients, wanted in zip(steps[5:], expected[5:], strict=True))


def test_a_warm_up_goes_by_equal_factors_and_stays_at_its_end():
    density = rt.WarmupDensity(0.25, 0.001, 4)
    values = [density(step) for step in range(7)]
    assert values[0] == 0.25 and values[4:] == [0.001] * 3
    assert [one / other for one, other in zip(values[1:5], values[:4])] == pytest.approx([250**-0.25] * 4)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"density": lambda step: 0.0}, "expected a density with 0 < density <= 1 of its schedule, got 0 for step 0"),
        ({"density": lambda step: float("nan")}, "got nan for step 0"),
        ({"density": lambda step: 1.5}, "got 1.5 for step 0"),
        ({"density": lambda step: "much"}, r"expected density\(0\) to return a number, got 'much'"),
        ({"decay": 0.0}, "expected 0 < decay <= 1, got decay=0.0"),
        ({"decay": 1.5}, "expected 0 < decay <= 1, got decay=1.5"),
        ({"decay": "1"}, "expected decay to be a number, got '1'"),
        ({"dense_steps": -1}, "expected dense_steps to be a number of steps, 0 or more, got -1"),
        ({"dense_steps": 1.5}, "got 1.5"),
    ],
)
def test_an_option_out_of_range_says_what_was_expected(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        rt.LocalExchange(2, **options).step([torch.ones(4)] * 2)


@pytest.mark.parametrize("arguments", [(0.0, 0.1, 5), (0.5, 2.0, 5), (0.5, 0.1, 0), (0.5, 0.1, 1.5)])
def test_a_warm_up_out_of_range_is_an_error(arguments):
    with pytest.raises(ValueError, match="WarmupDensity: expected"):
        rt.WarmupDensity(*arguments)


def differ(rank, schedule, entry):
    """Train with a density that rank 1 changes otherwise from step 3 on; the error, the step it came in and the seconds it took."""

    def density(step):
        if step < 3:
            return 0.1
        if schedule == "both change":
            return (0.2, 0.3)[rank]
        if schedule == "one raises" and rank == 1:
            raise RuntimeError("no density today")
        return 0.2 if rank == 1 else 0.1

    ddp = DistributedDataParallel(make_model(), bucket_cap_mb=BUCKET_CAP_MB)
    register(ddp, rt.TopKState(density), entry)
    for step in range(6):
        started = time.monotonic()
        try:
            loss_of(ddp, batch(rank, step)).backward()
        except (ValueError, RuntimeError) as error:
            return type(error).__name__, str(error), step, time.monotonic() - started
    return "no error", "", 6, 0.0


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_density_that_ranks_change_otherwise_is_an_error_on_every_rank_before_anything_is_sent(entry):
    for rank, (kind, message, step, _) in enumerate(run_workers(differ, 2, "both change", entry)):
        assert kind == "ValueError" and step == 3
        assert f"rank {rank}: sparse_hook: expected the same density of step 3 on every rank, got 0.2 on rank 0 and 0.3 on rank 1" in message


@pytest.mark.parametrize("schedule", ["one changes", "one raises"])
@pytest.mark.parametrize("entry", ENTRIES)
def test_a_density_that_one_rank_alone_changes_is_an_error_within_seconds(entry, schedule):
    (kind_0, message_0, step_0, seconds_0), (kind_1, message_1, step_1, seconds_1) = run_workers(differ, 2, schedule, entry)
    assert (step_0, step_1) == (3, 3) and max(seconds_0, seconds_1) < 20
    if schedule == "one raises":
        assert kind_1 == "RuntimeError" and "no density today" in message_1
        assert kind_0 == "DistBackendError" and "no density today" in message_0
    else:
        assert kind_0 == kind_1 == "DistBackendError"
        assert re.search("agreement", message_0 + message_1), (message_0, message_1)


def test_a_state_says_and_carries_its_schedule():
    state = rt.RegTopKState(rt.WarmupDensity(0.25, 0.001, 4), decay=0.9, dense_steps=3)
    for one in (state, copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert repr(one) == (
            "RegTopKState(density=WarmupDensity(start=0.25, end=0.001, steps=4), mu=5.0, distortion='previous', decay=0.9, dense_steps=3)"
        )
    assert repr(rt.TopKState(0.01)) == "TopKState(density=0.01)"


def disagree_twice(rank, entry):
    """The messages of two steps, one after the other, in which the ranks' densities differ and have not changed in between."""
    module, state = Given(100), rt.TopKState(lambda step: 0.1 if step < 1 else (0.2, 0.3)[rank])
    messages = []
    for _ in range(3):
        ddp = DistributedDataParallel(module)  # one whose hook has raised takes no further step
        register(ddp, state, entry)
        try:
            ddp([torch.ones(100)]).backward()
        except ValueError as error:
            messages.append(str(error))
        del ddp
        gc.collect()
    return messages


@pytest.mark.parametrize("entry", ENTRIES)
def test_ranks_that_disagreed_are_asked_again(entry):
    for messages in run_workers(disagree_twice, 2, entry):
        assert [f"the same density of step {step} on every rank" in message for step, message in zip((1, 2), messages, strict=True)] == [True, True]
