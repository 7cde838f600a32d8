"""The exchange on a device that does nothing at once (tests/late_device): what does not wait for a stream, or lets go of memory that one still
uses, reads NaN here.

These are tests of other files, run once more with processes whose tensors are on that device. What they compare with, the simulation, is on
the CPU.
"""

import gc
from functools import partial

import processes
import pytest
import test_adaptive
import test_average
import test_levels
import test_levels_of_averages
import test_local_steps
import test_modes
import test_what_is_held
import torch
from given import Given, integers, register, unit_sgd
from test_device_path import SHORT, SUBJECTS
from torch.nn.parallel import DistributedDataParallel

import regtopk_torch as rt
from tests import late_device

# Each with the streams of one kind behind all others; None: with all behind the host.
PACES = ("hook", "futures", "collectives", "all")


@pytest.fixture(scope="module")
def built():
    return late_device.build()


@pytest.fixture(autouse=True)
def late(built, request, monkeypatch):
    pace = request.node.callspec.params.get("pace", "all") if hasattr(request.node, "callspec") else "all"
    monkeypatch.setattr(processes, "preparation", partial(late_device.begin, *built, pace))


@pytest.mark.parametrize("name", SHORT)
def test_a_mode_equals_the_simulation(name):
    test_modes.test_a_mode_equals_the_simulation_keeps_replicas_equal_and_loses_nothing(name, "regtopk")


@pytest.mark.parametrize("entry", ["register_comm_hook", "attach"])
@pytest.mark.parametrize("subject", [subject for subject in SUBJECTS if subject != "rebuild"])  # which measures the process' memory
def test_what_holds_on_the_cpu_holds_here(subject, entry):
    SUBJECTS[subject](entry)


@pytest.mark.parametrize("pace", PACES)
def test_steps_of_hosts(pace):
    test_levels.test_steps_equal_the_simulation_of_the_means_bit_for_bit(2, 2, "regtopk", test_levels.SEVERAL, True, test_levels.NARROW)


def test_both_ways_in_and_a_resumed_run_of_hosts(tmp_path):
    test_levels.test_both_ways_in_and_a_resumed_run_have_the_same_bits(tmp_path)


def test_averages_of_hosts():
    test_levels_of_averages.test_averages_equal_the_simulation_of_the_means_bit_for_bit("topk", "in place", 7)


@pytest.mark.parametrize("pace", PACES)
@pytest.mark.parametrize("how", ["in turn", "async", "out", "in place", "one buffer"])
def test_averages(how, pace):
    test_average.test_an_average_equals_the_simulation_bit_for_bit("regtopk", {"decay": 0.9, "dense_steps": 2}, 2, test_average.NAMES, how)


def test_an_average_comes_though_its_state_is_gone():
    test_average.test_an_average_comes_though_its_state_is_gone()


@pytest.mark.parametrize("leader", [False, True])
def test_an_adaptive_density(leader):
    method, options = ("regtopk", {"support": "leader", "dense_steps": 2}) if leader else ("topk", {})
    test_adaptive.test_under_ddp_the_bits_are_those_of_the_simulation(method, options, "attach")


@pytest.mark.parametrize("pace", PACES)
@pytest.mark.parametrize(("workers", "every", "outer", "fragments", "delay"), [test_local_steps.WAYS[0], *test_local_steps.WAYS[4:]])
def test_steps_between_averages(workers, every, outer, fragments, delay, pace):
    test_local_steps.test_local_steps_equal_the_loop_over_the_simulation_bit_for_bit(workers, every, outer, fragments, delay)


def test_steps_between_averages_that_stop_and_go_on(tmp_path):
    test_local_steps.test_a_run_that_stops_and_goes_on_has_the_bits_of_one_that_never_stopped(tmp_path, 7, 6, 2, 2, "sgd", "save")


def test_flush():
    test_what_is_held.test_flush_of_a_part_hands_out_that_part_and_keeps_the_rest("attach")


def drop_states(rank, support):
    """Steps of states that are closed, or let go of, as soon as the host is through with their last step; the parameters after each."""
    module, results = Given(3000, 40, 500), []
    optimizer = unit_sgd(module)
    for round_ in range(6):
        ddp, state = DistributedDataParallel(module, bucket_cap_mb=1e-3), rt.RegTopKState(0.1, support=support)
        register(ddp, state, "attach" if round_ % 2 else "register_comm_hook")
        for step in range(2):
            optimizer.zero_grad()
            ddp(integers(3000, 40, 500, seed=100 * round_ + 10 * step + rank)).backward()
            optimizer.step()
        if round_ % 3:
            state.close()
        del ddp, state
        gc.collect()
        results.append([part.detach().clone() for part in module.parts])
    return results


@pytest.mark.parametrize("pace", PACES)
@pytest.mark.parametrize("support", ["own", "leader"])
def test_states_that_are_let_go_of_at_once(support, pace, monkeypatch):
    here = processes.run_workers(drop_states, 2, support)
    monkeypatch.setattr(processes, "preparation", None)
    expected = processes.run_workers(drop_states, 2, support)
    assert all(map(torch.equal, sum(here[0], []), sum(expected[0], [])))
    assert all(map(torch.equal, sum(here[0], []), sum(here[1], [])))


def let_go_of_averages(rank, leader):
    """What comes of averages of which nobody waits for the first, nor keeps their results; and of the next ones of that state and of another."""
    state = rt.TopKState(0.2, support="leader" if leader else "own")
    for step in range(4):
        state.average(integers(3000, 40, seed=10 * step + rank), async_op=True)
    last = state.average(integers(3000, 40, seed=100 + rank))
    other = rt.RegTopKState(0.2)
    for step in range(2):
        other.average(integers(3000, 40, seed=10 * step + rank), async_op=True)
    del state, other
    gc.collect()
    return last


@pytest.mark.parametrize("leader, pace", [*((leader, pace) for leader in (False, True) for pace in PACES), (False, "seconds")])
def test_averages_that_nobody_waits_for(leader, pace, monkeypatch):
    here = processes.run_workers(let_go_of_averages, 2, leader)
    monkeypatch.setattr(processes, "preparation", None)
    (expected, _) = processes.run_workers(let_go_of_averages, 2, leader)
    assert all(map(torch.equal, here[0], expected)) and all(map(torch.equal, *here))
