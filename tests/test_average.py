"""`state.average`: any list of tensors, on gloo processes; its twin is the simulation."""

import copy
import datetime
import gc
import math
import pickle
import os
import re
import threading
import time

import numpy
import pytest
import torch
import torch.distributed as dist
from memory_traffic import copied_and_made
from processes import error_of, run_workers
from torch.nn.parallel import DistributedDataParallel
from training import batch, loss_of, make_model, make_state

import regtopk_torch as rt
from regtopk_torch import groups

STEPS = 5
NAMES = ["weight", "bias", "transposed", "half", "scalar", "empty"]
DENSITY = 0.1


def make_tensors(rank, step):
    """Three dtypes, a tensor whose memory is in another order, one without dimensions and one without entries."""
    generator = torch.Generator().manual_seed(100 * rank + step)

    def random(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    weight, bias, transposed = random(40, 3), random(50, dtype=torch.float64), random(8, 30).t()
    return [weight, bias, transposed, random(64, dtype=torch.bfloat16), random(), torch.empty(0, 4)]


BUCKETS = [[0, 2, 4, 5], [1], [3]]  # by dtype


def in_one_buffer(tensors):
    """The same as views, those of a dtype one after the other in one buffer."""
    views = []
    for tensor in tensors:
        same = [each for each in tensors if each.dtype == tensor.dtype]
        buffer = next((view._base for view in views if view.dtype == tensor.dtype), None)
        if buffer is None:
            buffer = torch.cat([each.flatten() for each in same])
        place = sum(each.numel() for each in same[: [each is tensor for each in same].index(True)])
        views.append(buffer[place : place + tensor.numel()].view(tensor.shape))
    return views


def residuals_of(state):
    return {name: entry.get("residual") for name, entry in state.state_dict(None)["parameters"].items()}


def simulate(workers, method, steps, tensors_of=make_tensors, **options):
    exchange = rt.LocalExchange(workers, DENSITY, method=method, mu=1.0, **options)
    averages = []
    for step in steps:
        tensors = [[tensor.contiguous() for tensor in tensors_of(rank, step)] for rank in range(workers)]
        averages.append(exchange.step(tensors, BUCKETS))
    return exchange, averages


def average_steps(rank, method, names, options, how):
    """Average STEPS times, one after the other or two at a time; return averages, residuals and statistics."""
    state = make_state(method, DENSITY, **options)
    results, pending = [], []
    for step in range(STEPS):
        tensors = make_tensors(rank, step)
        given = [tensor.clone() for tensor in tensors]
        if how == "async":
            pending.append(state.average(tensors, names, async_op=True))
            for tensor in tensors:
                tensor.fill_(math.nan)  # they have been read
            continue
        if how == "one buffer":
            tensors = in_one_buffer(tensors)
        out = {"out": [torch.full_like(tensor, math.nan) for tensor in tensors], "in place": tensors, "one buffer": tensors}.get(how)
        averages = state.average(tensors, names, out=out)
        assert out is not None or all(map(torch.equal, tensors, given)), "they are only read"
        assert [average.stride() for average in averages] == [tensor.stride() for tensor in tensors]
        assert out is None or all(average is taking for average, taking in zip(averages, out, strict=True))
        results.append([average.clone() for average in averages])
    for work in pending:
        results.append(work.wait())
        assert work.is_completed() and all(map(torch.equal, work.wait(), results[-1]))
    return results, residuals_of(state), state.stats()


@pytest.mark.parametrize("how", ["in turn", "async", "out", "in place", "one buffer"])
@pytest.mark.parametrize("names", [NAMES, None], ids=["names", "places"])
@pytest.mark.parametrize(
    ("method", "options", "workers"), [("topk", {}, 3), ("regtopk", {}, 2), ("regtopk", {"decay": 0.9, "dense_steps": 2}, 2)]
)
def test_an_average_equals_the_simulation_bit_for_bit(method, options, workers, names, how):
    exchange, expected = simulate(workers, method, range(STEPS), **options)
    for rank, (averages, residuals, stats) in enumerate(run_workers(average_steps, workers, method, names, options, how)):
        for step in range(STEPS):
            assert all(map(torch.equal, averages[step], expected[step])), step
            assert [average.dtype for average in averages[step]] == [tensor.dtype for tensor in make_tensors(0, 0)]
        assert list(residuals) == (names or [str(place) for place in range(len(NAMES))])
        for place, residual in enumerate(residuals.values()):
            kept = exchange.residuals(rank).get(place)
            assert torch.equal(residual.flatten(), kept) if residual is not None else place == NAMES.index("empty") or kept is not None
        twin = exchange.stats(rank)
        assert {name: stats[name] for name in ("steps", "entries", "sent_entries", "bytes_sent")} == {
            name: twin[name] for name in ("steps", "entries", "sent_entries", "bytes_sent")
        }


@pytest.fixture
def alone():
    """A state in a group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    state = rt.TopKState(0.25)
    yield state
    state.close()
    dist.destroy_process_group()


# What is returned


def test_averages_are_tensors_of_their_own(alone):
    first = alone.average([torch.arange(8.0), torch.arange(4.0)])
    kept = [average.clone() for average in first]
    first[1].add_(1)  # no other average changes
    second = alone.average([torch.ones(8), torch.ones(4)])
    assert torch.equal(first[0], kept[0]) and torch.equal(first[1], kept[1] + 1), "a later call must not write to them"
    part = first[1]
    del first
    alone.average([torch.ones(8), torch.ones(4)])
    assert torch.equal(part, kept[1] + 1), "though only one of them lives"
    assert second[0]._version == 0 and not second[0]._is_view()
    parameter = torch.ones(8, requires_grad=True)
    (second[0] * parameter).sum().backward()
    second[1].zero_()  # autograd has kept the other one
    with pytest.raises(AssertionError):
        assert torch.equal(parameter.grad, torch.zeros(8))


def test_memory_that_was_let_go_of_is_used_again(alone):
    places = set()
    for _ in range(5):
        averages = alone.average([torch.ones(1000), torch.ones(24)])
        places.add(averages[0].data_ptr())
        del averages
        time.sleep(0.01)  # the thread that has completed them lets go of them after the caller has them
    assert len(places) <= 2


def test_what_lies_in_one_buffer_is_neither_copied_nor_given_memory(alone):
    state = rt.TopKState(0.01)  # so that payloads, which are copied, are small

    def second_time(tensors, out):
        state.average(tensors, out=out)
        return copied_and_made(lambda: state.average(tensors, out=out))

    tensors = [torch.ones(300, 20), torch.ones(()), torch.ones(7000)]
    copied, made = second_time(tensors, tensors)
    assert copied >= 7000 and made < 7000
    buffer = in_one_buffer(tensors)
    for given, out in ((buffer, buffer), (buffer, in_one_buffer(tensors))):
        copied, made = second_time(given, out)
        assert copied < 7000 and made < 7000
    kept = state.average(tensors)
    assert copied_and_made(lambda: state.average(tensors))[1] >= 4 * 13001 and kept, "what is kept needs other memory"
    state.close()


@pytest.mark.parametrize("way", ["sparse", "dense", "two tensors"])
def test_out_may_overlap_what_is_given(alone, way):
    buffer, other = torch.arange(24.0), torch.arange(24.0, 28.0)
    given = torch.cat([buffer[:16], other]) if way == "two tensors" else buffer[:16].clone()
    if way == "dense":
        alone.pause()
    tensors, out = [buffer[:16]], [buffer[8:]]
    if way == "two tensors":
        tensors, out = [buffer[:16], other], [buffer[4:20], buffer[20:]]
    averages = alone.average(tensors, out=out)
    expected = given if way == "dense" else torch.where(given >= given[-len(given) // 4], given, 0)
    assert torch.equal(torch.cat(averages), expected) and all(map(torch.equal, averages, out))
    assert [average.data_ptr() for average in averages] == [taking.data_ptr() for taking in out]


def test_what_is_written_to_out_is_seen_by_autograd(alone):
    for out in ([torch.ones(8), torch.ones(4)], in_one_buffer([torch.ones(8), torch.ones(4)])):
        parameter = torch.ones(4, requires_grad=True)
        product = (out[1] * parameter).sum()
        alone.average([torch.ones(8), torch.ones(4)], out=out)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_any_mode_of_autograd_will_do(alone, mode):
    twin = rt.LocalExchange(1, 0.25, method="topk")
    for step, each in enumerate([mode, torch.enable_grad, mode]):
        with each():
            tensors = [torch.randn(20, generator=torch.Generator().manual_seed(step)), torch.ones(4, requires_grad=True)]
            averages = alone.average(tensors)
        expected = twin.step([[tensor.detach().clone() for tensor in tensors]])
        assert all(map(torch.equal, averages, expected))
        assert not any(average.requires_grad or average.is_inference() for average in averages)
        averages[0].add_(1)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_out_takes_the_averages_in_any_mode_of_autograd(alone, mode):
    twin = rt.LocalExchange(1, 0.25, method="topk")
    for step, arranged in enumerate([list, in_one_buffer, list, in_one_buffer]):
        with mode():
            tensors = [torch.randn(20, generator=torch.Generator().manual_seed(step)), torch.ones(4)]
            expected = twin.step([[tensor.detach().clone() for tensor in tensors]])
            out = arranged([torch.zeros(20), torch.zeros(4)])
            if step == 1:
                alone.average(tensors, out=out)
        if step != 1:
            alone.average(tensors, out=out)
        assert all(map(torch.equal, out, expected))


def test_what_is_not_contiguous_or_negated_or_part_of_another_is_read_as_it_is(alone):
    base = torch.complex(torch.arange(12.0), torch.arange(12.0) + 1)
    for tensor in (base.conj().imag, base.real[::2], torch.arange(24.0).view(4, 6)[1:3], torch.ones(1, 3).expand(5, 3)):
        alone.reset()
        averages = alone.average([tensor])
        kept = residuals_of(alone)["0"]
        assert torch.equal(averages[0] + kept, tensor) and averages[0].shape == tensor.shape


# Void steps, and what is decided afterwards


def decide(rank, method, decisions):
    """Average once for each decision: True, False, None for no call, or "nan"; return averages and residuals after each."""
    state = make_state(method, DENSITY)
    seen = []
    for step, decision in enumerate(decisions):
        tensors = make_tensors(rank, step)
        if decision == "nan" and rank == 1:
            tensors[0][0, 0] = math.nan
        averages = state.average(tensors, NAMES)
        if decision is True:
            state.commit()
        elif decision is False:
            state.abort()
        if decision in (True, False):
            for call in (state.commit, state.abort):
                with pytest.raises(RuntimeError, match="expected an average that is neither committed nor aborted"):
                    call()
        seen.append((averages, residuals_of(state)))
    return seen, state.stats()["void_steps"]


@pytest.mark.parametrize("method", ["topk", "regtopk"])
def test_an_aborted_average_returns_all_that_was_sent_in_it(method):
    decisions = [True, False, None, False, True]
    results = run_workers(decide, 2, method, decisions)
    exchange = rt.LocalExchange(2, DENSITY, method=method, mu=1.0)
    for step, decision in enumerate(decisions):
        tensors = [[tensor.contiguous() for tensor in make_tensors(rank, step)] for rank in range(2)]
        before = [exchange.residuals(rank) for rank in range(2)]
        expected = exchange.step(tensors, BUCKETS)
        if decision is False:
            exchange.skipped()
        for rank, (seen, void_steps) in enumerate(results):
            averages, residuals = seen[step]
            assert void_steps == decisions.count(False)
            assert all(map(torch.equal, averages, expected))
            for place, kept in exchange.residuals(rank).items():
                assert torch.equal(residuals[NAMES[place]].flatten(), kept)
                if decision is False and step > 0:  # bf16 values in a fp32 residual: exact but for one rounding each
                    torch.testing.assert_close(kept, before[rank][place] + tensors[rank][place].flatten().to(kept.dtype), rtol=1e-5, atol=1e-5)


def test_a_tensor_that_is_not_finite_voids_the_average_on_every_rank():
    results = run_workers(decide, 2, "topk", [None, "nan", None])
    exchange = rt.LocalExchange(2, DENSITY, method="topk")
    for step in range(3):
        tensors = [[tensor.contiguous() for tensor in make_tensors(rank, step)] for rank in range(2)]
        if step == 1:
            tensors[1][0][0, 0] = math.nan
        expected = exchange.step(tensors, BUCKETS)
        for rank, (seen, void_steps) in enumerate(results):
            averages, residuals = seen[step]
            assert void_steps == 1
            assert all(torch.equal(average.nan_to_num(7), want.nan_to_num(7)) for average, want in zip(averages, expected, strict=True))
            assert all(torch.equal(residuals[NAMES[place]].flatten(), kept) for place, kept in exchange.residuals(rank).items())
        assert expected[0].isfinite().all() == (step != 1)


def test_a_work_says_whether_its_step_is_void(alone):
    for value, is_void in ((1.0, False), (math.inf, True), (2.0, False)):
        work = alone.average([torch.full((8,), value)], async_op=True)
        assert work.is_void() is is_void
    alone.abort()
    assert work.is_void()


def test_an_average_of_nothing_is_a_step_of_its_own(alone):
    """What an average before it has delivered is neither judged nor taken back by it."""
    x = torch.arange(1.0, 9.0)
    [first] = alone.average([x], ["x"])
    alone.commit()
    work = alone.average([torch.empty(0)], ["nothing"], async_op=True)
    assert not work.is_void() and [part.shape for part in work.wait()] == [(0,)]
    alone.abort()
    [second] = alone.average([torch.full((8,), 2.0**-10)], ["x"])
    assert first.nonzero().flatten().tolist() == [6, 7] and second.nonzero().flatten().tolist() == [4, 5] and alone.stats()["steps"] == 3
    alone.average([torch.full((8,), math.inf)], ["x"])
    assert not alone.average([torch.empty(0)], ["nothing"], async_op=True).is_void()


def test_there_is_nothing_to_decide_before_an_average(alone):
    for call in (alone.commit, alone.abort):
        with pytest.raises(RuntimeError, match=f"{call.__name__}: expected an average"):
            call()


# Bad input


ONES = [torch.ones(3), torch.ones(2, 2)]


@pytest.mark.parametrize(
    ("tensors", "names", "kind", "words"),
    [
        ([], None, ValueError, "expected at least one tensor"),
        (torch.ones(3), None, TypeError, "expected a list of tensors, got Tensor"),
        ([torch.ones(3), 1.0], None, TypeError, "got float at place 1"),
        ([torch.ones(3).to_sparse()], None, TypeError, "expected dense tensors, got one of layout torch.sparse_coo at place 0"),
        ([torch.ones(3, dtype=torch.int64)], None, TypeError, "got torch.int64 at place 0"),
        ([torch.ones(3, dtype=torch.complex64)], None, TypeError, "got torch.complex64 at place 0"),
        ([torch.ones(3), torch.ones(3, device="meta")], None, ValueError, "expected all tensors on cpu, got one on meta at place 1"),
        (ONES, ["a"], ValueError, "expected 2 distinct names, got 1"),
        (ONES, ["a", "a"], ValueError, "expected 2 distinct names, got 1 distinct ones of 2"),
        (ONES, "ab", TypeError, "expected names to be a list of strings"),
        (ONES, [0, 1], TypeError, "expected names to be a list of strings"),
        ([torch.ones(3), torch.ones(4)], None, ValueError, r"expected '1' of shape \[2, 2\] and dtype torch.float32, as before, got \[4\]"),
        ([torch.ones(3), torch.ones(2, 2, dtype=torch.float64)], None, ValueError, "dtype torch.float32, as before, got .* torch.float64"),
        (ONES[:1], None, ValueError, "expected the same names in the same order as before"),
        ([*ONES, torch.ones(1)], None, ValueError, "3 names, 2 of which are known and '2' is not"),
        (ONES, ["0", "one"], ValueError, "2 names, 1 of which are known and 'one' is not"),
        ([torch.ones(2, 2), torch.ones(3)], ["1", "0"], ValueError, "expected the same names in the same order as before"),
    ],
)
def test_bad_input_is_one_clear_error_and_changes_nothing(alone, tensors, names, kind, words):
    alone.average(ONES)
    before = alone.state_dict(None)
    with pytest.raises(kind, match=words) as caught:
        alone.average(tensors, names)
    assert str(caught.value).startswith("rank 0: average: expected ")
    after = alone.state_dict(None)
    assert str(before) == str(after)
    alone.average(ONES)


@pytest.mark.parametrize(
    ("out", "kind", "words"),
    [
        (torch.ones(2), TypeError, "expected out to be a list of tensors, got Tensor"),
        ([torch.ones(3), 1.0], TypeError, "expected out to be a list of tensors, got list"),
        ([torch.ones(3)], ValueError, "expected 2 distinct tensors in out, got 1 of 1"),
        ([torch.ones(3)] * 2, ValueError, "expected 2 distinct tensors in out, got 1 of 2"),
        ([torch.ones(3), torch.ones(4)], ValueError, r"expected out at place 1 of shape, dtype, device and layout \(\(2, 2\), torch.float32, "),
        ([torch.ones(3), torch.ones(2, 2, dtype=torch.float64)], ValueError, "expected out at place 1 .* got .*torch.float64"),
        ([torch.ones(3), torch.ones(2, 2, device="meta")], ValueError, "expected out at place 1 .* got .*meta"),
        ([(memory := torch.ones(8))[1:4], memory[:4].view(2, 2)], ValueError, "expected tensors in out whose .* at place 0 that shares some"),
        ([(square := torch.ones(4, 4))[:3, 1], square[:2, 1:3]], ValueError, "expected tensors in out whose .* that shares some"),
        ([square.view(16)[4:7], square[:2, ::2]], ValueError, "expected tensors in out whose .* that shares some"),
        ([torch.from_numpy(shared := numpy.ones(8, "f"))[:3], torch.from_numpy(shared)[2:6].view(2, 2)], ValueError, "that shares some"),
        ([torch.ones(3), torch.ones(3).as_strided((2, 2), (1, 1))], ValueError, "expected tensors in out whose .* at place 1 that shares some"),
        ([torch.ones(3), torch.ones(2, 1).expand(2, 2)], ValueError, r"expected tensors in out whose entries .* got one of strides \[1, 0\] at place 1"),
    ],
)
def test_an_out_that_does_not_fit_is_one_clear_error_and_changes_nothing(alone, out, kind, words):
    alone.average(ONES)
    before = str(alone.state_dict(None))
    with pytest.raises(kind, match=words) as caught:
        alone.average(ONES, out=out)
    assert str(caught.value).startswith("rank 0: average: expected ")
    assert str(alone.state_dict(None)) == before
    alone.average(ONES, out=[torch.ones(3), torch.ones(2, 2)])


def test_averages_are_taken_between_each_other(alone):
    side_by_side = torch.zeros(4, 4)
    rt.TopKState(1.0).average(ONES, out=[side_by_side[:3, 0], side_by_side[:2, 1:3]])
    assert torch.equal(side_by_side != 0, torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]).bool())


@pytest.mark.parametrize("swapped", [True, False])
def test_an_average_is_not_written_to_what_is_still_to_be_read(alone, swapped):
    one, other = torch.randn(200_000).bfloat16(), torch.randn(200_000).half()
    given = [one.clone(), other.clone()]
    out = [other.view(torch.bfloat16), one.view(torch.half)] if swapped else [one, other]
    assert all(map(torch.equal, rt.TopKState(1.0).average([one, other], out=out), given))


def ask_meanwhile(rank):
    """What stats() says of dense tensors while lists of new names are averaged, and after one that failed."""
    state, said, stop = rt.TopKState(1.0, dense="auto"), set(), threading.Event()

    def ask():
        while not stop.is_set():
            try:
                said.update(name for bucket in state.stats()["dense"] for name in bucket["parameters"])
            except Exception as error:
                said.add(repr(error))

    thread = threading.Thread(target=ask)
    thread.start()
    for step in range(100):
        state.average([torch.ones(500)], [f"part {step}"])
    stop.set()
    thread.join()
    return {name.split()[0] for name in said}


def test_stats_of_another_thread_name_what_is_being_averaged():
    for kinds in run_workers(ask_meanwhile, 2, seconds=60):
        assert kinds == {"part"}


def threads_of_process():
    return len(os.listdir("/proc/self/task"))


def keep_what_has_come(rank):
    """Threads of this process with averages that have come and whose states are gone."""
    before, kept = threads_of_process(), []
    for _ in range(10):
        kept.append(make_state("topk", 0.1).average([torch.ones(100)], async_op=True))
        kept[-1].wait()
    gc.collect()
    return threads_of_process() - before


def test_an_average_that_has_come_keeps_no_state():
    assert max(run_workers(keep_what_has_come, 2, seconds=60)) <= 1


def let_go_of_the_state(rank):
    """The averages of a state that nobody holds any more, and of one that lives."""
    tensors = [torch.arange(2000.0) * (rank + 1), torch.ones(7)]
    work = make_state("topk", 0.1).average(tensors, async_op=True)
    gc.collect()
    return work.wait(), make_state("topk", 0.1).average(tensors)


def test_an_average_comes_though_its_state_is_gone():
    for found, expected in run_workers(let_go_of_the_state, 2, seconds=60):
        assert all(map(torch.equal, found, expected)) and any(average.any() for average in found)


def test_lists_of_other_names_take_turns(alone):
    twins = [rt.LocalExchange(1, 0.25, method="topk") for _ in range(2)]
    for step in range(6):
        tensors = [torch.randn(9, generator=torch.Generator().manual_seed(step))]
        expected = twins[step % 2].step([tensors])
        assert torch.equal(alone.average(tensors, [f"fragment {step % 2}"])[0], expected[0])
    assert list(residuals_of(alone)) == ["fragment 0", "fragment 1"]


def test_a_state_serves_a_hook_or_averages(alone):
    ddp = DistributedDataParallel(make_model())
    ddp.register_comm_hook(alone, rt.sparse_hook)
    alone.average(ONES)
    with pytest.raises(ValueError, match="expected a state that sparse_hook alone uses, got one that average has used"):
        loss_of(ddp, batch(0, 0)).backward()
    with pytest.raises(ValueError, match="expected None in place of a module"):
        alone.state_dict(ddp)
    with pytest.raises(ValueError, match="flush: expected a state of a model's gradients"):
        alone.flush(ddp)
    other = rt.TopKState(0.25)
    ddp = DistributedDataParallel(make_model())
    ddp.register_comm_hook(other, rt.sparse_hook)
    loss_of(ddp, batch(0, 0)).backward()
    with pytest.raises(ValueError, match="expected a state that average alone uses, got one that sparse_hook has used"):
        other.average(ONES)
    with pytest.raises(ValueError, match="expected the module whose gradients were exchanged"):
        other.state_dict(None)
    other.close()


TIMEOUT, SHORT = datetime.timedelta(seconds=60), datetime.timedelta(seconds=4)
WITHIN = 30.0  # seconds: long before the timeout, on a machine that does other things as well


def disagree(rank, case, after):
    """Rank 1 does something else, after some averages that agree; return what each rank's call says."""
    odd = rank == 1
    group = dist.new_group(timeout=SHORT if case == "skip" else TIMEOUT)
    state = rt.TopKState(0.5 if odd and case == "density" else 0.25, process_group=group)
    tensors, names = [torch.ones(6), torch.ones(2, 3)], ["a", "b"]
    for _ in range(after):
        state.average(tensors, names)
    if odd and after and case != "abort":
        state._begin_averaging()  # it has forgotten what it averaged
    if odd and case == "shape":
        tensors = [torch.ones(6), torch.ones(3, 2)]
    elif odd and case == "nothing":
        tensors = [torch.ones(0), torch.ones(0, 3)]
    elif odd and case == "dtype":
        tensors = [torch.ones(6), torch.ones(2, 3, dtype=torch.bfloat16)]
    elif odd and case == "name":
        names = ["a", "c"]
    elif odd and case == "number":
        tensors, names = tensors[:1], names[:1]
    elif odd and case == "bad":
        tensors = [torch.ones(6), "b"]
    elif odd and case == "abort":
        state.abort()
    if odd and case == "skip":
        dist.barrier()
        return None, "", 0.0
    result = error_of(state.average, tensors, names)
    if case == "skip":
        dist.barrier()
    return result


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("density", "expected the same density on every rank, got 0.25 on rank 0 and 0.5 on rank 1"),
        ("shape", r"expected the same tensor 1 on every rank, got b of shape \[2, 3\] and dtype Float on rank 0 and b of shape \[3, 2\]"),
        ("nothing", r"expected the same tensor 0 on every rank, got a of shape \[0\] and dtype Float on rank 1 and a of shape \[6\]"),
        ("dtype", "expected the same tensor 1 on every rank, got b of shape .* and dtype BFloat16 on rank 1 and b of shape .* and dtype Float on rank 0"),
        ("name", "expected the same tensor 1 on every rank, got b of shape .* on rank 0 and c of shape .* on rank 1"),
        ("number", "expected the same number of tensors on every rank, got 1 on rank 1 and 2 on rank 0"),
    ],
)
def test_ranks_that_give_other_things_are_an_error_on_every_rank(case, words):
    for rank, (kind, message, seconds) in enumerate(run_workers(disagree, 2, case, 0)):
        assert kind is ValueError and seconds < WITHIN
        assert message.startswith(f"rank {rank}: average: ")
        assert re.search(words, message), message


def give_odd_names(rank, names, sizes):
    state = rt.TopKState(0.5)
    return error_of(state.average, [torch.ones(size) for size in sizes[rank]], names[rank])


@pytest.mark.parametrize(
    "names, sizes", [((["a\nx=1"],) * 2, ((4,), (64,))), ((["k\nq=1", "a"], ["k\nq=1", "b"]), ((5, 5),) * 2), ((["a\0b"], ["a\0c"]), ((5,),) * 2), ((["a\nb"], ["a\\nb"]), ((5,),) * 2)]
)
def test_names_with_odd_characters_are_compared_like_others(names, sizes):
    for kind, message, seconds in run_workers(give_odd_names, 2, names, sizes):
        assert kind is ValueError and seconds < WITHIN and "expected the same tensor " in message and " on rank 1" in message, message


@pytest.mark.parametrize("case", ["shape", "dtype", "name", "number", "bad", "abort"])
def test_ranks_that_give_other_things_later_are_an_error_within_seconds(case):
    for rank, (kind, message, seconds) in enumerate(run_workers(disagree, 2, case, 2)):
        assert kind is not None and seconds < WITHIN, message
        assert f"rank {rank}: average: expected " in message
        if case == "bad":
            assert "got str at place 1" in message
        elif case == "abort":
            assert "1 call, abort() on rank 1" in message
        else:
            assert "agreement on a bucket and its options" in message or "closed" in message.lower(), message


def take_other_turns(rank, case, async_op, second):
    """Lists that took turns before; then rank 1 takes another one than rank 0, and both go on as before. The errors, and what is held."""
    state = rt.TopKState(0.1)
    lists = {"a": [torch.full((500,), 1.0 + rank)], "b": [torch.full((3000,), 1.0 + rank), torch.ones(7, dtype=second)]}

    def average(which):
        work = state.average(lists[which], [which + str(place) for place in range(len(lists[which]))], async_op=async_op)
        return work.wait() if async_op else work

    for _ in range(2):
        average("a"), average("b")
    if rank == 1 and case == "an error before":
        error_of(state.average, [torch.ones(3)], ["a0"])  # of another shape: this rank leaves the list out
    result = error_of(average, "b" if rank == 1 else "a")
    after = [error_of(average, which) for which in "ab"]
    return result, after, sum(part.double().sum().item() for part in residuals_of(state).values() if part is not None)


@pytest.mark.parametrize("async_op", [False, True])
@pytest.mark.parametrize("second, dtype", [(torch.float32, "Float"), (torch.float64, "Double")])
@pytest.mark.parametrize("case", ["another turn", "an error before"])
def test_lists_of_unequal_size_that_meet_are_an_error_on_every_rank_and_both_go_on(case, second, dtype, async_op):
    results = run_workers(take_other_turns, 2, case, async_op, second)
    for rank, ((kind, message, seconds), after, held_back) in enumerate(results):
        assert kind is ValueError and seconds < WITHIN
        assert message.startswith(f"rank {rank}: average: expected the same tensors on every rank, got a0 of shape [500]")
        assert "b0 of shape [3000] and dtype Float, b1 of shape [7] and dtype " + dtype + " on rank 1; average the same lists in the same order" in message
        assert [each[0] for each in after] == [None, None] and held_back > 0


def begin_with_other_lists(rank, kind, after):
    """After `after` turns of two lists, which are forgotten then, each rank first takes another list, which is refused; then all take the same."""
    state = rt.TopKState(0.1)
    lists = {"a": [torch.full((500,), 1.0 + rank)], "b": [torch.full((3000,), 1.0 + rank)], "c": [torch.ones(9)]}
    lists["mixed"] = [torch.ones(4), torch.ones(5, dtype=torch.float64)]

    def average(which):
        return state.average(lists[which], [which + str(place) for place in range(len(lists[which]))])

    for _ in range(after):
        average("a"), average("b")
    state.pause()
    state.resume()
    refused = error_of(average, "a" if rank == 0 else kind)
    return refused, [error_of(average, which)[1] for which in "abccabbaca"], sum(part.double().sum().item() for part in residuals_of(state).values() if part is not None)


@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize("kind", ["b", "mixed"])
def test_ranks_that_were_refused_other_lists_go_on_alike(kind, after):
    for (refused, _, seconds), later, held_back in run_workers(begin_with_other_lists, 2, kind, after):
        assert refused is ValueError and seconds < WITHIN and later == [""] * 10 and held_back > 0


def come_late(rank):
    """Rank 1 comes late, rank 2 never; what the others hear."""
    state = rt.TopKState(0.1, process_group=dist.new_group(timeout=datetime.timedelta(seconds=10)))
    state.average([torch.ones(5)])
    if rank == 1:
        time.sleep(9)
    if rank == 2:
        dist.barrier()
        return None
    result = error_of(state.average, [torch.ones(5)])
    dist.barrier()
    return result


def test_who_came_late_is_not_named_with_who_did_not_come():
    first, second, _ = run_workers(come_late, 3)
    for kind, message, _ in (first, second):
        assert kind is dist.DistBackendError and "; rank 2 has not come to it" in message, message


def fail_long_ago(rank):
    """Rank 0 has an error of its own and corrects itself; later rank 1 has one. What rank 0 hears."""
    state = rt.TopKState(0.1, process_group=dist.new_group(timeout=TIMEOUT))
    state.average([torch.ones(50)])
    if rank == 0:
        error_of(state.average, ["no tensor"])
    for _ in range(2):
        state.average([torch.ones(50)])
    result = error_of(state.average, [torch.ones(50 if rank == 0 else 7)])
    dist.barrier()
    return result


def test_an_error_of_another_rank_is_heard_whatever_this_one_did_before():
    (kind, message, seconds), _ = run_workers(fail_long_ago, 2)
    assert kind is dist.DistBackendError and "rank 1 failed: rank 1: average: expected '0' of shape [50]" in message and seconds < WITHIN


def leave_out_where_gloo_is_first(rank):
    """As "skip", but gloo's own limit passes a moment before that of the exchange."""
    options = groups._options
    groups._options = lambda limit, threads: options(limit * 0.93, threads=threads)
    return disagree(rank, "skip", 1)


def test_a_rank_that_leaves_an_average_out_is_named_though_gloo_says_first_that_time_is_over():
    (kind, message, _), _ = run_workers(leave_out_where_gloo_is_first, 2)
    assert kind is dist.DistBackendError and "Timed out" in message and "; rank 1 has not come to it" in message


def test_a_rank_that_leaves_an_average_out_is_named_after_the_timeout():
    (kind, message, seconds), _ = run_workers(disagree, 2, "skip", 1)
    assert kind is dist.DistBackendError and 0.9 * SHORT.total_seconds() < seconds < SHORT.total_seconds() + WITHIN
    assert "rank 1 has not come to it" in message


# Ranks that contribute nothing

ABSENT = [(), (1,), (1, 2), (), (0, 1, 2), (2,), ()]  # by step


def correct_oneself(rank):
    """The errors of a first average in which rank 1 has another shape, and of the next, in which it has the others'."""
    state = rt.TopKState(0.2, process_group=dist.new_group(timeout=TIMEOUT))
    return [error_of(state.average, [torch.ones(size)]) for size in (100 + rank, 100)]


def test_other_ranks_are_told_of_an_error_in_words_alone():
    for rank, errors in enumerate(run_workers(correct_oneself, 2)):  # error_of refuses a trace
        assert all(message.startswith(f"rank {rank}: average: expected") for _, message, _ in errors), errors


def integers(rank, step):
    """So small that no sum is rounded: what was sent is what was given less what is kept."""
    generator = torch.Generator().manual_seed(100 * rank + step)
    return [torch.randint(-50, 50, size, generator=generator).to(dtype) for size, dtype in (((70,), torch.float32), ((9, 4), torch.float64))]


def come_and_go(rank, method, density):
    state = make_state(method, density)
    seen = []
    for step, absent in enumerate(ABSENT):
        before = residuals_of(state)
        averages = state.average(None if rank in absent else integers(rank, step))
        seen.append((before, averages, residuals_of(state)))
    return seen, state.stats()


@pytest.mark.parametrize("density", [0.05, 0.5])  # offsets, and a bitmap
@pytest.mark.parametrize("method", ["topk", "regtopk"])
def test_the_average_is_over_the_ranks_that_contribute_and_the_others_keep_what_they_have(method, density):
    results = run_workers(come_and_go, 3, method, density)
    for step, absent in enumerate(ABSENT):
        sums = [torch.zeros(70), torch.zeros(9, 4, dtype=torch.float64)]
        for rank, (seen, stats) in enumerate(results):
            before, _, after = seen[step]
            assert stats["void_steps"] == 0
            for place, given in enumerate(integers(rank, step)):
                if rank in absent:
                    assert torch.equal(before[str(place)], after[str(place)])
                else:
                    sums[place] += before.get(str(place), 0) + given - after[str(place)]
        for seen, _ in results:
            expected = [total / max(1, 3 - len(absent)) for total in sums]
            assert all(map(torch.equal, seen[step][1], expected)), step
        assert absent == (0, 1, 2) or all(total.any() for total in sums)


def contribute_nothing(rank, case):
    state = rt.TopKState(0.25, process_group=dist.new_group(timeout=TIMEOUT))
    if case == "dense":
        state.pause()
    if case != "first":
        state.average(ONES)
    return error_of(state.average, None if rank == 1 else ONES, ["a", "b"] if rank == 1 and case == "names" else None)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("first", "expected tensors, or None where this rank has averaged tensors of these names before, got None"),
        ("names", "expected tensors, or None where this rank has averaged tensors of these names before, got None"),
        ("dense", "expected tensors of every rank in a dense step, got none"),
    ],
)
def test_a_rank_that_cannot_contribute_nothing_is_an_error_on_every_rank(case, words):
    for rank, (kind, message, seconds) in enumerate(run_workers(contribute_nothing, 2, case)):
        assert kind is not None and words in message and f"rank {rank}: average: " in message and seconds < WITHIN


# Checkpoints


def run_and_stop(rank, method, stop, directory, way):
    """STEPS averages, with a stop in which a new state takes over what the old one kept."""
    state = make_state(method, DENSITY)
    seen = []
    for step in range(STEPS):
        if step == stop:
            before = residuals_of(state)
            if way == "state_dict":
                saved = pickle.loads(pickle.dumps(state.state_dict(None)))
                state.close()
                state = make_state(method, DENSITY)
                state.load_state_dict(saved, None)
            elif way == "save":
                rt.save(state, None, directory)
                state.close()
                state = make_state(method, DENSITY)
                rt.load(state, None, directory)
            else:
                old, state = state, copy.deepcopy(state) if way == "copy" else pickle.loads(pickle.dumps(state))
                old.close()
            after = residuals_of(state)
            assert list(after) == NAMES and all(torch.equal(before[name], after[name]) for name in NAMES[:-1])
        seen.append(state.average(make_tensors(rank, step), NAMES))
    return seen, residuals_of(state)


@pytest.mark.parametrize("method", ["topk", "regtopk"])
@pytest.mark.parametrize("way", ["state_dict", "save", "copy", "pickle"])
def test_a_run_that_stops_and_goes_on_has_the_bits_of_one_that_never_stopped(tmp_path, method, way):
    exchange, expected = simulate(2, method, range(STEPS))
    for rank, (seen, residuals) in enumerate(run_workers(run_and_stop, 2, method, 3, tmp_path / "checkpoint", way)):
        for averages, want in zip(seen, expected, strict=True):
            assert all(map(torch.equal, averages, want))
        assert all(torch.equal(residuals[NAMES[place]].flatten(), kept) for place, kept in exchange.residuals(rank).items())


def save_in(rank, directory):
    state = make_state("topk", DENSITY)
    for step in range(2):
        state.average(make_tensors(rank, step), NAMES)
    rt.save(state, None, directory)
    return residuals_of(state)


def load_in(rank, directory):
    state = make_state("topk", DENSITY)
    rt.load(state, None, directory)
    kept = residuals_of(state)
    state.average(make_tensors(rank, 2), NAMES)
    return kept


def test_another_number_of_ranks_keeps_the_average_that_the_residuals_stand_for(tmp_path):
    saved = run_workers(save_in, 2, tmp_path / "checkpoint")
    loaded = run_workers(load_in, 3, tmp_path / "checkpoint")
    for name in NAMES[:-1]:
        before = sum(residuals[name].double() for residuals in saved) / 2
        after = sum(residuals[name].double() for residuals in loaded) / 3
        torch.testing.assert_close(before, after, rtol=1e-6, atol=1e-6)


def test_a_checkpoint_of_other_tensors_is_refused_and_changes_nothing(alone):
    alone.average(ONES, ["a", "b"])
    saved = alone.state_dict(None)
    changes = [
        (lambda d: d["parameters"]["a"].update(shape=[4]), "expected residual of dtype|expected 'a' of shape"),
        (lambda d: d["parameters"]["a"].update(dtype="torch.int8"), "got others under 'a'"),
        (lambda d: d["parameters"]["a"].pop("dtype"), "got others under 'a'"),
        (lambda d: d["parameters"].pop("a"), "expected the names"),
        (lambda d: d.update(parameters=[1]), "expected a state dict of averaged tensors"),
    ]
    for change, words in changes:
        damaged = copy.deepcopy(saved)
        change(damaged)
        with pytest.raises(ValueError, match=words):
            alone.load_state_dict(damaged, None)
        assert str(alone.state_dict(None)) == str(saved)
    fresh = rt.TopKState(0.25)
    fresh.load_state_dict(saved, None)
    with pytest.raises(ValueError, match=r"expected 'a' of shape \[3\]"):
        fresh.average([torch.ones(4), torch.ones(2, 2)], ["a", "b"])
    with pytest.raises(ValueError, match="1 of which are known"):
        fresh.average(ONES, ["a", "c"])
    fresh.close()


def test_reset_begins_with_other_tensors(alone):
    alone.average(ONES)
    alone.reset()
    assert residuals_of(alone) == {}
    assert torch.equal(alone.average([torch.arange(4.0)])[0], torch.tensor([0.0, 0.0, 0.0, 3.0]))


def pause_and_go_on(rank):
    state = make_state("topk", DENSITY)
    averages = [state.average(make_tensors(rank, 0))]
    state.pause()
    averages.append(state.average(make_tensors(rank, 1)))
    state.resume()
    return [*averages, state.average(make_tensors(rank, 2))], residuals_of(state)


def test_a_paused_state_averages_densely_and_keeps_its_residuals():
    results = run_workers(pause_and_go_on, 2)
    dense = [(one / 2 + other / 2) for one, other in zip(make_tensors(0, 1), make_tensors(1, 1), strict=True)]
    exchange, expected = simulate(2, "topk", [0, 2])
    for rank, (averages, residuals) in enumerate(results):
        assert all(map(torch.equal, averages[1], dense))
        assert all(map(torch.equal, averages[0], expected[0]))
        assert all(torch.equal(a, b) for a, b in zip(averages[1], results[0][0][1], strict=True))


def go_on_in_other_groups(rank, method):
    """Two ranks, then rank 0 alone, then both in the other order; return what was given, averaged and kept in each."""
    store = dist.group.WORLD.get_group_store()

    def bare(name, place, size):
        return dist.ProcessGroup(dist.PrefixStore(name, store), place, size)

    state, seen = make_state(method, DENSITY), []

    def average(step):
        kept = residuals_of(state)["weight"] if state._forms else torch.zeros(400)
        given = torch.randn(400, generator=torch.Generator().manual_seed(10 * rank + step))
        (averaged,) = state.average([given], ["weight"])
        seen.append((kept, given, averaged, residuals_of(state)["weight"], state.state_dict(None)["step"]))

    for step in range(3):
        average(step)
    if rank == 0:
        state.regroup(bare("alone", 0, 1), step=3)
        for step in range(3, 5):
            average(step)
        assert state.ranks == [0] and state.stats()["steps"] == 2
    state.regroup(bare("again", 1 - rank, 2), step=5)
    for step in range(5, 7):
        average(step)
    dist.barrier()
    return seen


@pytest.mark.parametrize("method", ["topk", "regtopk"])
def test_what_is_held_back_goes_along_into_another_group(method):
    zero, one = run_workers(go_on_in_other_groups, 2, method)
    for seen in (zero, one):
        for (_, _, _, kept, _), (next_kept, *_) in zip(seen, seen[1:], strict=False):
            assert torch.equal(kept, next_kept), "no entry is lost or changed between two averages, whatever the group"
    for kept, given, averaged, left, _ in zero[3:5]:
        assert torch.equal(averaged + left, kept + given) and averaged.count_nonzero() == 40
    for (kept0, given0, averaged, left0, step), (kept1, given1, averaged1, left1, step1) in zip(zero[5:], one[3:], strict=True):
        assert torch.equal(averaged, averaged1) and step == step1
        torch.testing.assert_close(2 * averaged + left0 + left1, kept0 + given0 + kept1 + given1)
    assert [seen[-1] for seen in zero] == [0, 1, 2, 3, 4, 5, 6]


def wait_in_a_bare_group(rank):
    store = dist.HashStore()
    store.set_timeout(datetime.timedelta(seconds=2))
    return error_of(rt.TopKState(process_group=dist.ProcessGroup(store, 0, 2)).average, [torch.zeros(3)])


def test_the_timeout_of_a_bare_group_is_its_stores():
    ((kind, message, seconds),) = run_workers(wait_in_a_bare_group, 1)
    assert kind is dist.DistBackendError and "expected all 2 ranks to use their state within 2 s, got none of rank 1" in message
    assert seconds < 20


def model_state_in_another_group(rank):
    ddp, state = DistributedDataParallel(make_model()), make_state("topk", DENSITY)
    rt.attach(ddp, state)
    loss_of(ddp, batch(rank, 0)).backward()
    return error_of(state.regroup, dist.group.WORLD)


def test_a_state_of_a_models_gradients_stays_in_its_group():
    for kind, message, _ in run_workers(model_state_in_another_group, 2):
        assert kind is ValueError and re.search("expected a state that average alone uses, got one that sparse_hook has used", message), message


def lose_the_other(rank):
    state = make_state("regtopk", DENSITY)
    state.average([torch.randn(400, generator=torch.Generator().manual_seed(rank))])
    if rank == 1:
        state.close()
        dist.barrier()
        return None
    kept, given = residuals_of(state)["0"], torch.arange(400.0)
    kind, _, seconds = error_of(state.average, [given])
    state.abort()
    in_vain = residuals_of(state)["0"]
    state.regroup(dist.ProcessGroup(dist.HashStore(), 0, 1), step=1)
    (averaged,) = state.average([torch.zeros(400)])
    dist.barrier()
    return kind, seconds, torch.equal(in_vain, kept + given), torch.equal(averaged + residuals_of(state)["0"], in_vain)


def test_what_was_sent_to_a_rank_that_is_gone_returns_once_and_goes_along():
    (kind, seconds, returned, went_along), _ = run_workers(lose_the_other, 2)
    assert kind is dist.DistBackendError and seconds < 30
    assert returned and went_along
