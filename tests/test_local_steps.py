"""Local steps: models with the same bits after each round, equal to the loop written out over the simulation."""

import copy
import functools
import itertools
import math
import pickle
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from given import broken
from memory_traffic import copied_and_made
from processes import error_of, run_workers
from torch.nn.parallel import DistributedDataParallel
from training import batch, loss_of, make_model, make_optimizer, make_state

import regtopk_torch as rt
from regtopk_torch.local_steps import _cut, _Round

STEPS, DENSITY = 12, 0.05
NESTEROV = functools.partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)


def make_inner(model):
    """Two parameter groups, and a state of its own for every parameter."""
    parameters = list(model.parameters())
    return torch.optim.AdamW([{"params": parameters[:3], "lr": 0.01}, {"params": parameters[3:], "lr": 0.003}])


def local_step(rank, model, inner, step, scaler=None):
    inner.zero_grad()
    for part in range(2):  # gradient accumulation
        loss = loss_of(model, batch(rank, 2 * step + part))
        (loss if scaler is None else scaler.scale(loss)).backward()
    if scaler is None:
        inner.step()
    else:
        scaler.step(inner)
        scaler.update()


def weights_of(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def train(rank, every, outer, *, fragments=1, delay=0, scaled=False, stop=None, directory=None):
    """Models and common weights after each step; with a stop, after which all that goes on is what was saved."""
    model = make_model()
    inner = make_inner(model)
    make = functools.partial(rt.LocalSteps, every=every, outer=outer, fragments=fragments, delay=delay)
    local = make(model, inner, make_state("topk", DENSITY))
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0) if scaled else None
    seen = []
    for step in range(STEPS):
        if step == stop:
            if directory is None:
                saved = pickle.loads(pickle.dumps([model.state_dict(), inner.state_dict(), local.state_dict()]))
            else:
                rt.save(local, None, directory)
            model = make_model()
            inner = make_inner(model)
            local = make(model, inner, make_state("topk", DENSITY))
            if directory is None:
                for part, of in zip((model, inner, local), saved, strict=True):
                    part.load_state_dict(of)
            else:
                rt.load(local, None, directory)
        local_step(rank, model, inner, step, scaler)
        begun = step + 1 - delay
        assert local.step() == (begun > 0 and begun % (every // fragments) == 0)
        seen.append((weights_of(model), [weights.detach().clone() for weights in local.common.values()]))
    return seen


def simulate(workers, every, outer, fragments=1, delay=0):
    """The same, written out: (models, common weights) after each step."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    models = [make_model() for _ in range(workers)]
    inners = [make_inner(model) for model in models]
    common = [weights.requires_grad_() for weights in weights_of(models[0])]
    optimizer = None if outer == "sgd" else outer(common)
    runs = [range(*run) for run in itertools.pairwise(_cut([weights.numel() for weights in common], fragments))]
    exchanges = [rt.LocalExchange(workers, DENSITY, method="topk") for _ in runs]
    own = [list(model.parameters()) for model in models]
    begun, seen = {}, []
    for step in range(1, STEPS + 1):
        for rank in range(workers):
            local_step(rank, models[rank], inners[rank], step - 1)
        with torch.no_grad():
            for fragment, run in enumerate(runs):
                if (step - (fragment + 1) * every // fragments) % every == 0:
                    averages = exchanges[fragment].step([[common[i] - own[rank][i] for i in run] for rank in range(workers)])
                    begun[step + delay] = run, averages, [[own[rank][i].clone() for i in run] for rank in range(workers)]
            if step in begun:
                run, averages, starts = begun[step]
                for i, average in zip(run, averages, strict=True):
                    if optimizer is None:
                        common[i].sub_(average)
                    else:
                        common[i].grad = average
                if optimizer is not None:
                    optimizer.step()
                    optimizer.zero_grad()
                for rank in range(workers):
                    for i, start in zip(run, starts[rank], strict=True):
                        own[rank][i].copy_(common[i] if delay == 0 else own[rank][i] - start + common[i])
        seen.append(([weights_of(model) for model in models], [weights.detach().clone() for weights in common]))
    torch.set_num_threads(threads)
    return seen


WAYS = [
    (2, 1, "sgd", 1, 0),
    (3, 4, "sgd", 1, 0),
    (2, 3, NESTEROV, 1, 0),
    (2, 4, "sgd", 2, 0),
    (2, 6, NESTEROV, 3, 1),
    (2, 4, "sgd", 1, 3),
]


@pytest.mark.parametrize(("workers", "every", "outer", "fragments", "delay"), WAYS)
def test_local_steps_equal_the_loop_over_the_simulation_bit_for_bit(workers, every, outer, fragments, delay):
    expected = simulate(workers, every, outer, fragments, delay)
    results = run_workers(functools.partial(train, fragments=fragments, delay=delay), workers, every, outer)
    for step in range(STEPS):
        for rank in range(workers):
            models, common = results[rank][step]
            assert all(map(torch.equal, models, expected[step][0][rank])), (step, rank)
            assert all(map(torch.equal, common, expected[step][1])), (step, rank)
        equal = [torch.equal(one, other) for one, other in zip(results[0][step][0], results[1][step][0], strict=True)]
        due = delay == 0 and (step + 1) % (every // fragments) == 0
        run = slice(*list(itertools.pairwise(_cut([weights.numel() for weights in common], fragments)))[(step + 1) // (every // fragments) % fragments - 1])
        assert all(equal[run]) == due and all(equal) == (due and fragments == 1)


def test_a_parameter_without_entries_is_no_obstacle(lone):
    model = nn.Linear(3, 2)
    model.empty = nn.Parameter(torch.zeros(0, 4))
    local = rt.LocalSteps(model, torch.optim.SGD(model.parameters(), lr=0.1), rt.TopKState(1.0))
    assert local.step() and local.common["empty"].shape == (0, 4)


@pytest.mark.parametrize("parts", range(1, 10))
def test_fragments_are_whole_parameters_and_about_equal(parts):
    for sizes in ([1, 20, 4, 2304, 24, 576, 24, 576, 24], [5] * 9, [0, 0, 0, 1, 0, 0, 0, 0, 9]):
        ends = _cut(sizes, parts)
        assert ends[0] == 0 and ends[-1] == 9 and len(ends) == parts + 1 and all(one < other for one, other in itertools.pairwise(ends))
        for part, end in enumerate(ends[1:-1], 1):
            target = sum(sizes) * part / parts
            off = [abs(sum(sizes[:e]) - target) for e in (end - 1, end, end + 1)]
            assert ends[part - 1] == end - 1 or off[1] <= off[0]
            assert end == 9 - (parts - part) or off[1] <= off[2]
    assert _cut([5] * 9, 3) == [0, 3, 6, 9]


def test_a_grad_scaler_of_a_power_of_two_changes_no_bit():
    assert all(
        all(map(torch.equal, scaled[0], plain[0]))
        for scaled, plain in zip(run_workers(functools.partial(train, scaled=True), 2, 3, "sgd")[0], run_workers(train, 2, 3, "sgd")[0], strict=True)
    )


@pytest.mark.parametrize("way", ["state_dict", "save"])
@pytest.mark.parametrize(
    ("stop", "every", "fragments", "delay", "outer"),
    [(6, 3, 1, 0, NESTEROV), (7, 3, 1, 0, "sgd"), (6, 6, 2, 2, NESTEROV), (7, 6, 2, 2, "sgd"), (8, 6, 2, 2, "sgd")],
    ids=["after a round", "between rounds", "a round has begun", "a round is on its way", "a round was applied"],
)
def test_a_run_that_stops_and_goes_on_has_the_bits_of_one_that_never_stopped(tmp_path, stop, every, fragments, delay, outer, way):
    run = functools.partial(train, fragments=fragments, delay=delay)
    stopping = functools.partial(run, stop=stop, directory=tmp_path if way == "save" else None)
    for stopped, never in zip(run_workers(stopping, 2, every, outer), run_workers(run, 2, every, outer), strict=True):
        for one, other in zip(stopped, never, strict=True):
            assert all(all(map(torch.equal, these, those)) for these, those in zip(one, other, strict=True))


@pytest.mark.parametrize("delay", [0, 1])
def test_a_round_makes_no_memory_and_gathers_nothing(lone, delay):
    model = make_model()
    local = rt.LocalSteps(model, make_inner(model), rt.TopKState(0.01), 2, delay=delay)

    def steps():
        applied.extend(local.step() for _ in range(4))

    applied = []
    steps()
    copied, made = copied_and_made(steps)
    assert applied.count(True) == 4 - delay
    assert copied < math.inf and made < 4 * 500, "a small part of one of the parameters"


class Weights(nn.Module):
    """What a worker's own steps do is what a test says."""

    def __init__(self, values):
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values))
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))


def move(model, by):
    with torch.no_grad():
        model.values.sub_(torch.tensor(by))


def go_through_a_void_round(rank, outer):
    model = Weights([0.0, 0.0, 0.0, 0.0])
    state = rt.TopKState(0.25)
    local = rt.LocalSteps(model, torch.optim.SGD(model.parameters(), lr=1.0), state, 1, outer)
    seen = []

    def step(by):
        move(model, by)
        equal = local.step()
        seen.append((equal, weights_of(model)[0].tolist(), state.state_dict(None)["parameters"]["values"]["residual"].tolist()))

    step([4.0, 1.0, 0.0, 0.0])
    step([1.0, 2.0, 8.0, math.nan if rank == 1 else 1.0])  # void
    if rank == 1:
        with torch.no_grad():
            model.values[3] = 0.0  # as its owner found it before
    saved = pickle.loads(pickle.dumps([model.state_dict(), local.state_dict()]))
    model = Weights([0.0, 0.0, 0.0, 0.0])
    local = rt.LocalSteps(model, torch.optim.SGD(model.parameters(), lr=1.0), state, 1, outer)
    model.load_state_dict(saved[0])
    local.load_state_dict(saved[1])
    assert local.void_rounds == 1
    step([0.0, 0.0, 1.0, 0.0])
    return seen


def test_a_void_round_keeps_what_every_worker_has_and_gives_nothing_twice():
    zero, one = run_workers(go_through_a_void_round, 2, "sgd")
    for first, _, last in (zero, one):
        assert first == (True, [-4.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0])
        assert last[:2] == (True, [-4.0, 0.0, -9.0, 0.0]), "the 8 of the void round and the 1 of this one"
    assert zero[1] == (False, [-5.0, -2.0, -8.0, -1.0], [1.0, 3.0, 8.0, 1.0])
    assert one[1][0] is False and math.isnan(one[1][1][3]) and one[1][2] == [1.0, 3.0, 8.0, 0.0]
    assert zero[2][2] == [1.0, 3.0, 0.0, 1.0] and one[2][2] == [1.0, 3.0, 0.0, 0.0]


def go_through_a_void_round_later(rank, directory, stop):
    model = Weights([0.0, 0.0, 0.0, 0.0])
    inner = torch.optim.SGD(model.parameters(), lr=1.0)
    local = rt.LocalSteps(model, inner, rt.TopKState(0.25), 2, delay=1)
    moves = [[4.0, 1.0, 0.0, 0.0], [0.0] * 4, [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 8.0, math.nan if rank == 1 else 1.0], [0.0, 0.0, 0.5, 0.0], [0.0] * 4, [0.0] * 4]
    seen = []
    for step, by in enumerate(moves, 1):
        move(model, by)
        applied = local.step()
        if step == 5 and rank == 1:
            with torch.no_grad():
                model.values[3] = 0.0
        seen.append((applied, weights_of(model)[0].tolist()))
        if step == stop:
            rt.save(local, None, directory)
            model = Weights([0.0, 0.0, 0.0, 0.0])
            inner = torch.optim.SGD(model.parameters(), lr=1.0)
            local = rt.LocalSteps(model, inner, rt.TopKState(0.25), 2, delay=1)
            rt.load(local, None, directory)
    return seen, local.void_rounds, local.state_dict()["state"]["parameters"]["values"]["residual"].tolist()


@pytest.mark.parametrize("stop", [None, 4, 5])
def test_a_round_that_is_found_to_be_void_later_keeps_what_was_done_meanwhile(tmp_path, stop):
    for rank, (seen, void_rounds, residual) in enumerate(run_workers(go_through_a_void_round_later, 2, tmp_path, stop)):
        assert [applied for applied, _ in seen] == [False, False, True, False, False, False, True] and void_rounds == 1
        own = 0.0 if rank else -1.0
        assert seen[2][1] == [-4.0, 0.0, -1.0, 0.0], "the average, and what was done since its round began"
        assert seen[4][1] == seen[5][1] == [-4.0, 0.0, -9.5, own]
        assert seen[6][1] == [-4.0, 0.0, -9.5, 0.0], "what was held back, and nothing twice"
        assert residual == [0.0, 1.0, 0.0, -own]


def move_buffers(rank, buffers):
    model = Weights([0.0])
    local = rt.LocalSteps(model, torch.optim.SGD(model.parameters(), lr=1.0), rt.TopKState(1.0), 2, buffers=buffers)
    seen = []
    for _ in range(2):
        model.mean += torch.tensor([1.0 + rank, 2.0])
        model.count += 1 + rank
        local.step()
        seen.append((model.mean.tolist(), model.count.item()))
    return seen


def test_buffers_are_kept_or_averaged_as_asked():
    kept = run_workers(move_buffers, 2, "keep")
    assert kept == [[([1.0, 2.0], 1), ([2.0, 4.0], 2)], [([2.0, 2.0], 2), ([4.0, 4.0], 4)]]
    averaged = run_workers(move_buffers, 2, "average")
    assert averaged == [[([1.0, 2.0], 1), ([3.0, 4.0], 2)], [([2.0, 2.0], 2), ([3.0, 4.0], 4)]]


def differ(rank, case):
    """Rank 1 makes something else; return what the first step says, or the fourth, for which the other one waits."""
    model = make_model()
    odd = rank == 1
    if odd and case == "weights":
        with torch.no_grad():
            model.scale.add_(1)
    if odd and case == "shapes":
        model.more = nn.Parameter(torch.ones(3))
    if case == "unfrozen":
        model.more = nn.Parameter(torch.ones(3), requires_grad=False)
    outer = functools.partial(NESTEROV, lr=0.5 + rank) if case == "outer" else "sgd"
    options = {"every": 120 if odd and case == "every" else 6, "fragments": 3 if odd and case == "fragments" else 2, "delay": int(odd and case == "delay")}
    options["buffers"] = "average" if odd and case == "buffers" else "keep"
    local = rt.LocalSteps(model, make_inner(model), rt.TopKState(0.5), outer=outer, **options)
    for step in range(4):
        local_step(rank, model, make_inner(model), step)
        if odd and case == "replaced" and step == 2:
            model.layers[2] = nn.Linear(24, 24)
        if odd and case == "resized" and step == 2:
            model.scale.data = torch.ones(1)
        if odd and case == "unfrozen" and step == 2:
            model.more.requires_grad_()
        result = error_of(local.step)
        if result[0] is not None:
            return step, result
    return None


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("every", "same every on every rank, got 120 on rank 1 and 6 on rank 0"),
        ("fragments", "same fragments on every rank, got 2 on rank 0 and 3 on rank 1"),
        ("delay", "same delay on every rank, got 0 on rank 0 and 1 on rank 1"),
        ("weights", "same common weights (checksum) on every rank"),
        ("shapes", "same parameters on every rank, got "),
        ("outer", "same outer on every rank"),
        ("buffers", "same buffers on every rank, got average on rank 1 and keep on rank 0"),
    ],
)
def test_ranks_that_differ_are_an_error_on_every_rank_in_the_first_step(case, words):
    for rank, (step, (kind, message, seconds)) in enumerate(run_workers(differ, 2, case)):
        assert step == 0 and kind is ValueError and seconds < 10
        assert message.startswith(f"rank {rank}: LocalSteps: expected the ") and words in message, message


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("replaced", "expected layers.2.weight to be the parameter that was there at first"),
        ("resized", "expected scale to be the parameter that was there at first"),
        ("unfrozen", "expected more to require no gradient, as at first, got one that does"),
    ],
)
def test_a_model_that_changes_is_an_error_on_every_rank(case, words):
    for step, (kind, message, seconds) in run_workers(differ, 2, case):
        assert step == 2 and kind is not None and seconds < 10
        assert f"rank 1: LocalSteps: {words}" in message, message


@pytest.fixture
def lone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_state_serves_the_last_one_that_was_made_for_it(lone):
    model, state = make_model(), rt.TopKState(0.1)
    first, second = (rt.LocalSteps(model, make_inner(model), state) for _ in range(2))
    with pytest.raises(ValueError, match="rank 0: LocalSteps: expected a state of its own, got one for which other LocalSteps were made since; construct a state for each"):
        first.step()
    assert second.step()


def test_a_caller_in_inference_mode_leaves_nothing_of_it_behind(lone):
    model = Weights([1.0, 2.0])
    local = rt.LocalSteps(model, torch.optim.SGD(model.parameters(), lr=1.0), rt.TopKState(1.0), outer=NESTEROV)
    for inside in (True, False):
        with torch.inference_mode(inside):
            assert local.step()


def go_on_with_nan(rank):
    model = Weights([0.0] * 4)
    local = rt.LocalSteps(model, torch.optim.SGD(model.parameters(), lr=1.0), rt.TopKState(1.0))
    said = []
    for step in range(8):
        with torch.no_grad():
            model.values[1] = math.nan if rank == 1 and step < 6 else 1.0
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            local.step()
        said += [(step, str(each.message)) for each in caught if "LocalSteps" in str(each.message)]
    return said, local.void_rounds


def test_void_rounds_that_go_on_are_said_once_by_the_rank_whose_weights_are_not_finite_and_by_the_others():
    for rank, (said, void_rounds) in enumerate(run_workers(go_on_with_nan, 2)):
        ((step, message),) = said
        assert void_rounds == 6 and step == 2 and message.startswith(f"rank {rank}: LocalSteps: expected finite weights, got 3 rounds running that are void")
        assert ("values is not finite on this rank" if rank == 1 else "is on another rank, which says so") in message


def test_bad_arguments_are_refused(lone):
    model = make_model()
    inner, state = make_inner(model), rt.TopKState(0.1)
    stranger = torch.optim.SGD(make_model().parameters(), lr=1.0)
    for arguments, kind, words in [
        ((DistributedDataParallel(model), inner, state), TypeError, "that nothing averages already, got DistributedDataParallel; pass the model itself"),
        ((model, model.parameters(), state), TypeError, "expected a torch.optim.Optimizer"),
        ((model, inner, 0.1), TypeError, "expected a TopKState"),
        ((model, inner, rt.TopKState(0.1, grad_scaler=torch.amp.GradScaler("cpu"))), ValueError, "without grad_scaler"),
        ((model, inner, state, 0), ValueError, "expected every to be an integer of at least 1, got 0"),
        ((model, inner, state, True), ValueError, "got True"),
        ((model, inner, state, 1, "adam"), TypeError, "expected outer to be 'sgd' or what makes an optimizer, got 'adam'; pass for example functools.partial"),
        ((model, inner, state, 1, inner), TypeError, f"got {type(inner).__name__}; pass"),
        ((model, stranger, state), ValueError, "expected an optimizer of the model's parameters"),
    ]:
        with pytest.raises(kind, match=words):
            rt.LocalSteps(*arguments)
    for options, words in [
        ({"fragments": 0}, "expected fragments to be an integer of at least 1, got 0"),
        ({"fragments": 1.0}, "expected fragments to be an integer of at least 1, got 1.0"),
        ({"delay": -1}, "expected delay to be an integer of at least 0, got -1"),
        ({"every": 5, "fragments": 2}, "expected every to be a multiple of fragments, got every=5 and fragments=2"),
        ({"every": 6, "fragments": 2, "delay": 3}, "expected delay < every / fragments = 3, got 3"),
        ({"delay": 1}, "expected delay < every / fragments = 1, got 1"),
        ({"every": 10, "fragments": 10}, "expected at most one fragment for each of 9 parameters, got fragments=10"),
    ]:
        with pytest.raises(ValueError, match=words):
            rt.LocalSteps(model, inner, state, **options)
    with pytest.raises(ValueError, match="expected buffers 'keep' or 'average', got 'sum'"):
        rt.LocalSteps(model, inner, state, buffers="sum")


def test_a_state_dict_of_something_else_is_refused_and_changes_nothing(lone, tmp_path):
    model = make_model()
    local = rt.LocalSteps(model, make_inner(model), rt.TopKState(0.1), 2, NESTEROV, delay=1)
    for step in range(2):
        local_step(0, model, make_inner(model), step)
        local.step()
    saved = copy.deepcopy(local.state_dict())
    changes = [
        (lambda d: d.pop("common"), TypeError, "expected a state dict of LocalSteps"),
        (lambda d: d["common"].pop("scale"), ValueError, "common: expected weights of the model's 9 parameters"),
        (lambda d: d["common"].update(scale=torch.ones(2)), ValueError, "common: expected scale of dtype"),
        (lambda d: d.update(origin=d["common"] | {"scale": torch.ones((), dtype=torch.float64)}), ValueError, "origin: expected scale of dtype"),
        (lambda d: d.update(origin={"scale": torch.ones(())}), ValueError, "origin: expected"),
        (lambda d: d["pending"]["average"].pop("scale"), ValueError, "expected the fragments and the delay of the round that is not applied yet"),
        (lambda d: d["pending"].update(due=4), ValueError, "expected the fragments and the delay of the round that is not applied yet"),
        (lambda d: d["pending"]["start"].update(scale=torch.ones(2)), ValueError, "start: expected scale of dtype"),
        (lambda d: d.update(outer=None), ValueError, "expected LocalSteps with an outer optimizer, got those of one without"),
        (lambda d: d["outer"]["param_groups"][0]["params"].pop(), ValueError, r"expected an optimizer of groups of \[9\] parameters, got \[8\]"),
        (lambda d: d.update(optimizer=d["outer"]), ValueError, r"expected an optimizer of groups of \[3, 6\] parameters, got \[9\]"),
        (lambda d: d.update(outer_kind="Adam"), ValueError, "expected the state of an optimizer of the kind SGD, got that of Adam"),
        (lambda d: d.update(optimizer_kind="Adam"), ValueError, "expected the state of an optimizer of the kind AdamW, got that of Adam"),
        (lambda d: d.update(model={"scale": torch.ones(())}), ValueError, "expected a model of the same parameters and buffers, got another"),
        (lambda d: d["state"].update(world_size=2), ValueError, "expected a state dict of world_size 1"),
    ]
    for change, kind, words in changes:
        damaged = copy.deepcopy(saved)
        change(damaged)
        with pytest.raises(kind, match=words):
            local.load_state_dict(damaged)
        assert str(local.state_dict()) == str(saved)
    rt.save(local, None, tmp_path)
    twin = make_model()
    for other, words in [
        (rt.LocalSteps(twin, make_inner(twin), rt.TopKState(0.1), 2, NESTEROV), "expected the fragments and the delay of the round"),
        (rt.LocalSteps(twin, make_optimizer(twin), rt.TopKState(0.1), 2, NESTEROV, delay=1), r"expected an optimizer of groups of \[9\] parameters"),
        (rt.LocalSteps(twin, make_inner(twin), rt.TopKState(0.1), 2, torch.optim.AdamW, delay=1), "expected the state of an optimizer of the kind AdamW, got that of SGD"),
        (rt.TopKState(0.1), "expected a state dict of regtopk_torch"),
    ]:
        with pytest.raises(rt.CheckpointError, match=words):
            rt.load(other, None, tmp_path)
    with pytest.raises(rt.CheckpointError, match="expected None in place of a module"):
        rt.save(local, model, tmp_path)


def make_local_steps():
    model = make_model()
    return rt.LocalSteps(model, make_inner(model), rt.TopKState(0.1))


def save_local_steps(rank, directory):
    rt.save(make_local_steps(), None, directory)


def test_local_steps_of_another_number_of_ranks_are_refused(tmp_path, lone):
    run_workers(save_local_steps, 2, tmp_path)
    with pytest.raises(rt.CheckpointError, match="expected LocalSteps of 1 ranks, as there are now, got those of 2"):
        rt.load(make_local_steps(), None, tmp_path)


def lose_rounds_of_two_dtypes(rank, dense):
    """What of the weights' ways since is in no book, after each round that came to nobody: neither held back nor still to be given."""
    torch.manual_seed(0)
    model = nn.ParameterDict({"a": nn.Parameter(torch.randn(300)), "b": nn.Parameter(torch.randn(200, dtype=torch.float32 if dense else torch.float64))})
    state = rt.TopKState(0.1, dense=(lambda name, numel: name == "b") if dense else "never")
    local = rt.LocalSteps(model, torch.optim.SGD(model.parameters(), 1.0), state, every=1)

    def train(step):
        with torch.no_grad():
            for name, weights in model.items():
                weights += torch.randn(weights.shape, generator=torch.Generator().manual_seed(10 * step + rank)).to(weights) / 8

    def books():
        saved = local.state_dict()
        held, origin, common = saved["state"]["parameters"], saved["origin"], saved["common"]
        return {name: held[name]["residual"].double() + origin.get(name, common[name]).double() - weights.detach().double() for name, weights in model.items()}

    for step in range(2):
        train(step)
        local.step()
    before, start = books(), {name: weights.detach().double().clone() for name, weights in model.items()}
    if rank == 1:
        local._state.close()
        dist.barrier()
        return [], []
    missing, errors = [], []
    for step in range(2, 5):
        train(step)
        errors.append(error_of(local.step)[1])
        now = books()
        missing.append(max((before[name] + start[name] - weights.detach().double() - now[name]).abs().max().item() for name, weights in model.items()))
    dist.barrier()
    return missing, errors


@pytest.mark.parametrize("dense", [False, True])
def test_what_rounds_of_several_buckets_were_given_is_held_back_or_given_later(dense):
    (missing, errors), _ = run_workers(lose_rounds_of_two_dtypes, 2, dense)
    assert len(errors) == 3 and all(errors) and max(missing) < 1e-6


def fail_in_a_round(rank, where):
    """The errors of steps, in one of which something of the script's own fails on rank 1."""
    model = nn.Linear(30, 1, bias=False)
    nn.init.zeros_(model.weight)
    local = rt.LocalSteps(model, torch.optim.SGD(model.parameters(), 1.0), rt.TopKState(0.5), every=1, outer=functools.partial(torch.optim.SGD, lr=0.5))
    errors = []
    for step in range(3):
        with torch.no_grad():
            model.weight += 1 + rank
        if rank == 1 and step == 1:
            with pytest.MonkeyPatch.context() as patch:
                interrupted = KeyboardInterrupt("enough")
                if where == "outer":
                    patch.setattr(local.outer, "step", lambda: (_ for _ in ()).throw(RuntimeError("of the outer optimizer's own")))
                else:
                    patch.setattr(_Round, "wait", lambda self: (_ for _ in ()).throw(interrupted))
                try:
                    local.step()
                except (KeyboardInterrupt, RuntimeError) as error:
                    errors.append(str(error))
        else:
            errors.append(error_of(local.step)[1])
    errors.append(error_of(local.state_dict)[1])
    dist.barrier()
    return errors


@pytest.mark.parametrize("where, own", [("outer", "of the outer optimizer's own"), ("wait", "enough")])
def test_a_round_that_one_rank_did_not_apply_is_an_error_of_the_next_one_on_every_rank(where, own):
    here, there = run_workers(fail_in_a_round, 2, where)
    assert there[1] == own and "rank 1: LocalSteps: expected the round before to be applied on this rank as on the others" in there[2]
    assert "expected the round before to be applied" in there[3] and here[3] == "", "half a round is not saved as if it were whole"
    assert here[:2] == ["", ""] and "rank 1 failed: rank 1: LocalSteps: expected the round before to be applied" in here[2]


def average_a_buffer_that_is_not_finite(rank):
    model = Weights([0.0])
    local = rt.LocalSteps(model, torch.optim.SGD(model.parameters(), lr=1.0), rt.TopKState(1.0), 1, buffers="average")
    model.mean += torch.tensor([torch.nan if rank == 1 else 1.0, 2.0 * rank])
    local.step()
    return model.mean.tolist()


def test_an_entry_of_a_buffer_that_is_not_finite_stays_its_workers_own():
    here, there = run_workers(average_a_buffer_that_is_not_finite, 2)
    assert here == [1.0, 1.0] and there[1] == 1.0 and math.isnan(there[0])


def lose_a_round(rank, by):
    """(common weights, own, error) where a round that is under way comes to nobody and training goes on from what was saved."""

    def make():
        model = nn.Linear(4, 1, bias=False)
        nn.init.zeros_(model.weight)
        return model, rt.LocalSteps(model, torch.optim.SGD(model.parameters(), 1.0), rt.TopKState(1.0), every=2, delay=1)

    def train(model):
        with torch.no_grad():
            model.weight += 1

    model, local = make()
    train(model)
    local.step()
    train(model)
    with broken("aggregate_"):
        local.step()  # begins the round
        error = error_of(local.step)[1] if by == "step" else ""
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            saved = local.state_dict()
    error += "".join(str(each.message) for each in said)
    other, resumed = make()
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(saved)
    train(other)
    for _ in range(4):
        resumed.step()
    return resumed.common["weight"].tolist(), other.weight.tolist(), error


@pytest.mark.parametrize("by", ["step", "state_dict"])
def test_what_a_lost_round_was_given_is_given_once(by):
    for common, own, error in run_workers(lose_a_round, 2, by):
        assert common == own == [[3.0] * 4]
        assert "something of this machine" in error and ("saved without them" in error) == (by == "state_dict")
