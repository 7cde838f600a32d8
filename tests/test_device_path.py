"""The exchange of CPU gradients by the operators of CUDA, over the emulated kernels: the results of the CPU operators bit for bit.

These are tests of other files, run once more with processes in which cuda/operators.cpp has taken the place of the CPU operators.
"""

import sys
from functools import partial
from pathlib import Path

import processes
import pytest
import test_adaptive
import test_after_an_error
import test_checkpoint
import test_dense_rule
import test_idle_residuals
import test_levels
import test_levels_of_averages
import test_mixed_precision
import test_modes
import test_new_parameters
import test_shared_scaler
import test_shared_support
import test_void_steps
import torch
from given import Given, broken, finite, held, integers, missing, register, seed_of, unit_sgd
from torch.nn.parallel import DistributedDataParallel
from training import batch, loss_of, make_model, make_optimizer, make_state

import regtopk_torch as rt

sys.path.append(str(Path(__file__).resolve().parents[1]))  # tests are not installed
from tests.simt.host import build_operators, emulate_on_cpu  # noqa: E402

SUBJECTS = {  # by either entry
    "idle": lambda entry: test_idle_residuals.test_under_find_unused_parameters_a_parameter_that_nobody_used_waits_likewise(3, entry, alone=50),
    "a new scale": test_void_steps.test_a_new_scale_begins_a_step_though_no_bucket_comes_back,
    "an overflow under one scaler": lambda entry: test_shared_scaler.test_an_overflow_in_one_model_returns_what_the_other_sent_under_the_same_scaler("regtopk", 0, False, entry),
    "an overflow in a dense bucket": test_shared_scaler.test_an_overflow_in_a_paused_states_dense_bucket_returns_what_the_other_state_sent,
    "an overflow of the sum": test_shared_scaler.test_under_a_scaler_what_overflowed_in_the_sum_alone_is_applied_later,
    "an optimizer that applied its step": lambda entry: test_shared_scaler.test_of_two_optimizers_the_one_that_applied_its_step_gets_nothing_twice("regtopk", 0, 1, entry),
    "put back": test_after_an_error.test_what_other_buckets_sent_before_one_failed_returns,
    "rebuild": lambda entry: test_new_parameters.test_a_frozen_parameter_keeps_its_own_entries_and_no_others_memory(entry, entries=1_000_000),
    "checkpoint": lambda entry: test_checkpoint.test_saved_loaded_and_gone_on_equals_never_stopped_bit_for_bit("regtopk", entry),
    "void steps of a leader": lambda entry: test_shared_support.test_nothing_is_lost_and_replicas_stay_equal_where_steps_are_void("regtopk", entry),
    "void steps of dense parameters": lambda entry: test_dense_rule.test_under_ddp_nothing_is_lost_and_replicas_stay_equal_where_steps_are_void(method="regtopk", entry=entry, density=0.05, dense=test_dense_rule.two_of_four),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def emulated():
    processes.preparation = partial(emulate_on_cpu, build_operators())
    yield
    processes.preparation = None


def dispatched(rank):
    import regtopk_torch  # noqa: F401

    names = (
        "compress_", "aggregate_", "measure_", "correct_", "mask_", "judge_", "settle_", "put_back_", "to_wire_", "from_wire_", "take_", "average_slice_", "spread_", "feedback_", "split_",
        "mean_", "join_", "mark_unfilled_",
    )  # fmt: skip
    return ["simt/operators.cpp" in line for name in names for line in torch._C._dispatch_dump(f"regtopk::{name}").splitlines() if line.startswith("CPU:")]


def test_the_processes_take_the_path_of_the_device():
    assert processes.run_workers(dispatched, 2) == [[True] * 18] * 2


# Where what the operators get or find out differs from mode to mode; the others differ in what DDP does around them.
SHORT = (
    "plain, three ranks", "no_sync, unused", "join, unused, gradients zeroed in place", "used now and then, four ranks", "used now and then, skipped",
    "static graph, unused", "used with a gradient of zero, looked for", "frozen", "two dtypes", "one parameter", "300 parameters", "narrow",
    "narrow, used now and then", "chunks, used now and then", "momentum, used now and then, three ranks", "leader, three ranks", "leader, used now and then, four ranks", "leader, join, three ranks",
    "leader, narrow, channels_last", "chunks of a leader", "dense where small, used now and then, three ranks", "dense where less, two dtypes",
    "dense where small of a leader, used now and then, skipped", "adaptive, used now and then, four ranks", "adaptive, used now and then, skipped",
    "adaptive, leader, narrow, two dtypes",
)  # fmt: skip


assert set(SHORT) <= set(test_modes.MODES)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in SHORT else [pytest.mark.long]) for name in test_modes.MODES])
def test_a_mode_equals_the_simulation_on_the_cpu(name):
    test_modes.test_a_mode_equals_the_simulation_keeps_replicas_equal_and_loses_nothing(name, "regtopk")


@pytest.mark.parametrize("entry", ["register_comm_hook", "attach"])
@pytest.mark.parametrize("subject", SUBJECTS)
def test_what_holds_on_the_cpu_holds_on_the_path_of_the_device(subject, entry):
    SUBJECTS[subject](entry)


def test_a_void_step_returns_all_that_it_sent():
    test_void_steps.test_a_void_step_returns_all_that_it_sent_and_no_more(
        "regtopk", test_void_steps.with_branch, test_void_steps.SKIPPING, 3, 6, test_void_steps.BRANCH_COMES_AND_GOES
    )


def test_an_overflow_in_any_bucket_is_one_of_all():
    test_mixed_precision.test_an_overflow_in_any_bucket_on_one_rank_skips_the_step_on_all_and_returns_every_bucket(0, "regtopk")


def test_what_is_saved_with_a_leader_or_dense_buckets_goes_on_bit_for_bit():
    test_shared_support.test_a_resumed_run_equals_an_undisturbed_one("regtopk")
    test_dense_rule.test_a_resumed_run_equals_an_undisturbed_one("regtopk", "auto", 5, 2)


def test_averages_of_a_leader_and_of_dense_tensors():
    test_shared_support.test_a_rank_that_contributes_nothing_may_lead()
    test_dense_rule.test_averages_are_dense_by_name_and_an_aborted_one_returns()


@pytest.mark.parametrize("leader", [False, True])
def test_an_adaptive_density_has_the_bits_of_the_simulation_on_the_cpu(leader):
    method, options = ("regtopk", {"support": "leader", "dense_steps": 2}) if leader else ("topk", {})
    test_adaptive.test_under_ddp_the_bits_are_those_of_the_simulation(method, options, "attach")


def test_averages_of_an_adaptive_density():
    test_adaptive.test_averages_of_lists_have_it_too()
    test_adaptive.test_what_all_ranks_do_is_no_error()


def take_steps(rank, folder, first, last):
    """Go on with the job of the folder, or begin it; (parameters, what was measured) after step `last` - 1."""
    model = make_model()
    ddp, optimizer = DistributedDataParallel(model, bucket_cap_mb=100, static_graph=True), make_optimizer(model)
    state = make_state("regtopk", test_adaptive.RULE)
    register(ddp, state, "attach")
    if first:
        for part, saved in zip((model, optimizer), torch.load(folder / f"{rank}.pt", weights_only=True), strict=True):
            part.load_state_dict(saved)
        rt.load(state, ddp, folder)
    for step in range(first, last):
        optimizer.zero_grad()
        ((1 + step % 3) * loss_of(ddp, batch(rank, step))).backward()
        optimizer.step()
    rt.save(state, ddp, folder)
    torch.save((model.state_dict(), optimizer.state_dict()), folder / f"{rank}.pt")
    return [parameter.detach().clone() for parameter in model.parameters()], state.state_dict(ddp)["density_state"]


def test_a_checkpoint_of_an_adaptive_density_goes_on_from_one_device_to_the_other(tmp_path, monkeypatch):
    device, results = processes.preparation, []
    for name, parts in {"cpu": [(None, 0, 8)], "there": [(None, 0, 4), (device, 4, 8)], "back": [(device, 0, 4), (None, 4, 8)]}.items():
        (tmp_path / name).mkdir()
        for library, first, last in parts:
            monkeypatch.setattr(processes, "preparation", library)
            result = processes.run_workers(take_steps, 2, tmp_path / name, first, last)
        results.append(result)
    (expected, measured), *_ = results[0]
    assert measured[1] == 7 and measured[4] > 0, "seven norms, and that of the last step"
    for parameters, also in (of_rank for result in results for of_rank in result):
        assert all(map(torch.equal, parameters, expected)) and also == measured


def fail_once(rank, operator, options):
    """On rank 1 an operator fails in the third step. Returns (errors, whether the others' gradients were NaN, what is missing, parameters)."""
    sizes = (300, 40, 300)
    module, state = Given(*sizes), rt.TopKState(0.1, **options)
    ddp = DistributedDataParallel(module, bucket_cap_mb=1e-3)
    register(ddp, state, "register_comm_hook")
    optimizer = unit_sgd(module)
    given, errors, void = [torch.zeros(size, dtype=torch.float64) for size in sizes], [], []

    for step in range(6):
        gradients = integers(*sizes, seed=seed_of(rank, step))
        for total, gradient in zip(given, gradients, strict=True):
            total += finite(gradient)
        optimizer.zero_grad()
        try:
            with broken(operator, rank == 1 and step == 2, state=state):
                ddp(gradients).backward()
        except Exception as error:
            errors.append(str(error))
        if step == 2:  # nobody waits for the device: the others have no error, here, but averages that say it
            void = [parameter.grad is None or bool(parameter.grad.isnan().all()) for parameter in module.parameters()]
            ddp = DistributedDataParallel(module, bucket_cap_mb=1e-3)
            register(ddp, state, "register_comm_hook")
        else:
            optimizer.step()
    return errors, void, missing(state, ddp, given), [part.detach().clone() for part in module.parts]


def everything(name, numel):
    return True


@pytest.mark.parametrize("operator, options", [("take_", {"support": "leader"}), ("average_slice_", {"support": "leader"}), ("average_slice_", {"dense": everything})], ids=["take_", "average_slice_", "average_slice_, dense"])
def test_what_a_step_sent_returns_on_all_ranks_where_one_could_not_go_on(operator, options):
    results = processes.run_workers(fail_once, 3, operator, options)
    for rank, (errors, void, lost, parameters) in enumerate(results):
        assert errors == [] if rank != 1 else "something of this machine" in errors[0] and len(errors) == 1
        assert rank == 1 or all(void)
        assert max(lost) < 1e-4, "three ranks: averages round"
        assert all(map(torch.equal, parameters, results[0][3]))


# Two levels: two hosts of two ranks.


@pytest.mark.parametrize(("method", "cap", "scaled", "options"), [("regtopk", test_levels.SEVERAL, True, test_levels.NARROW), ("topk", test_levels.EACH, False, test_levels.WARM)], ids=["several buckets, scaled", "a bucket for each parameter"])
def test_steps_of_hosts_equal_the_simulation_on_the_cpu(method, cap, scaled, options):
    test_levels.test_steps_equal_the_simulation_of_the_means_bit_for_bit(2, 2, method, cap, scaled, options)


def test_both_ways_in_and_a_resumed_run_of_hosts_have_the_same_bits(tmp_path):
    test_levels.test_both_ways_in_and_a_resumed_run_have_the_same_bits(tmp_path)


def test_averages_of_hosts_equal_the_simulation_on_the_cpu():
    test_levels_of_averages.test_averages_equal_the_simulation_of_the_means_bit_for_bit("topk", "in place", 7)


def average_from(rank, begin, end, folder):
    """Averages of the steps from `begin` on, which go on from what is in the folder, or leave it there."""
    state, path = test_levels_of_averages.state_of("regtopk"), folder / f"{rank}.pt"
    if begin > 0:
        state.load_state_dict(torch.load(path, weights_only=True), None)
    averages = [state.average(test_levels_of_averages.tensors_of(rank, step)) for step in range(begin, end)]
    torch.save(state.state_dict(None), path)
    return averages


@pytest.mark.parametrize("device_first", [True, False])
def test_what_hosts_hold_back_moves_between_the_cpu_and_the_device(device_first, tmp_path):
    of_device, runs = processes.preparation, []
    for of_first, of_second in ((of_device, None) if device_first else (None, of_device), (None, None)):
        halves = []
        for library, steps in ((of_first, (0, 5)), (of_second, (5, 8))):
            processes.preparation = library
            halves.append(processes.run_workers(average_from, 4, *steps, tmp_path))
        runs.append([first + second for first, second in zip(*halves, strict=True)])
    processes.preparation = of_device
    for moved, stayed in zip(*runs, strict=True):
        assert len(moved) == 8 and all(torch.equal(one.nan_to_num(7), other.nan_to_num(7)) for step in zip(moved, stayed, strict=True) for one, other in zip(*step, strict=True))


def fail_on_a_host(rank, operator):
    """On rank 1 an operator fails in the third step, or split_ leaves the rows of the step before. Returns (errors, whether all gradients of that
    step were NaN, what is missing, parameters)."""
    sizes = (300, 41, 1)
    module = Given(*sizes)
    state, optimizer = rt.TopKState(0.1, levels=2), unit_sgd(module)
    ddp = DistributedDataParallel(module)
    register(ddp, state, "attach")
    given, errors, void = [torch.zeros(size, dtype=torch.float64) for size in sizes], [], False
    nothing = (lambda *arguments, **options: None) if operator == "split_" else None

    for step in range(6):
        gradients = integers(*sizes, seed=seed_of(rank, step))
        for total, gradient in zip(given, gradients, strict=True):
            total += gradient
            if step == 2 and rank < 2:  # what this host gave of the parts that rank 1 keeps is in nobody's keeping, or of all parts
                begin, entries = (0, len(gradient)) if operator == "split_" else rt._C.part_of(len(gradient), 1, 2)
                total[begin : begin + entries] -= gradient[begin : begin + entries]
        optimizer.zero_grad()
        try:
            with broken(operator, rank == 1 and step == 2, nothing, state=state):
                ddp(gradients).backward()
        except Exception as error:
            errors.append(str(error))
        if step == 2:
            void = [parameter.grad is None or bool(parameter.grad.isnan().all()) for parameter in module.parameters()]
            ddp = DistributedDataParallel(module)
            register(ddp, state, "attach")
        else:
            optimizer.step()
    given = [total - residual.flatten() for total, residual in zip(given, held(state, ddp).values(), strict=True)]  # a residual stands for both ranks
    return errors, void, missing(state, ddp, given), [part.detach().clone() for part in module.parts]


@pytest.mark.parametrize("operator", ["split_", "mean_", "compress_"])
def test_an_error_of_one_rank_of_a_host_is_nan_on_all_the_others_and_what_they_sent_returns(operator):
    results = processes.run_workers(fail_on_a_host, 4, operator)
    for rank, (errors, void, lost, parameters) in enumerate(results):
        assert errors == [] if rank != 1 or operator == "split_" else "something of this machine" in errors[0] and len(errors) == 1
        assert all(void) or (rank == 1 and errors)
        assert all(map(torch.equal, parameters, results[0][3])) and not any(lost)


def reset_alone(rank):
    """Gradients of a step, of one after rank 2 has reset its state alone, and of one after all have."""
    torch.manual_seed(0)
    ddp = DistributedDataParallel(torch.nn.Linear(6, 5))
    state, seen = rt.TopKState(0.2, levels=2), []
    rt.attach(ddp, state)
    test_levels.step_of(ddp, rank)  # DDP rebuilds its buckets
    for resets in (False, rank == 2, rank != 2):
        if resets:
            state.reset()
        ddp.zero_grad()
        seen.append(test_levels.step_of(ddp, rank))
    return seen


def test_what_one_rank_of_a_host_does_alone_is_nan_on_all_ranks():
    for before, alone, after in processes.run_workers(reset_alone, 4):
        assert all(gradient.isfinite().all() for gradient in before + after) and all(gradient.isnan().all() for gradient in alone)
