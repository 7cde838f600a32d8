"""Two levels: the mean inside a host, sparse between hosts. Hosts are simulated by processes of one machine; the twin is a LocalExchange
for each place on a host, whose workers are the hosts, fed with the means of their parts."""

import functools
import hashlib
import math
import os
import re

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from given import Given, broken, held, integers, missing, register, seed_of, unit_sgd
from hosts import Twin
from processes import error_of, run_workers
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parallel import DistributedDataParallel

import regtopk_torch as rt
from regtopk_torch import _C

STEPS, OVERFLOW, IDLE = 8, 3, (4, 5)  # IDLE: steps in which nobody uses `spare`
DENSITY = 0.05


class Model(nn.Module):
    """A scalar and a parameter of 3 entries among larger ones: on a host of 4 some parts of them are empty."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(12, 33), nn.Tanh(), nn.Linear(33, 12))
        self.scale, self.spare = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(3))
        self.to(dtype)

    def forward(self, x, step):
        return self.scale * self.layers(x) + (0.0 if step in IDLE else 1.0) * self.spare.square().sum()


def loss_of(model, rank, step, dtype=torch.float32):
    x = torch.randn(4, 12, generator=torch.Generator().manual_seed(100 * rank + step)).to(dtype)
    return (model(x, step) - x.roll(1, 1)).float().square().mean()


def overflow(module, rank, now, gradient):
    """In one step, on rank 1, one entry is infinite: of one part of one parameter."""
    gradient = gradient.clone()
    if rank == 1 and now() == OVERFLOW:
        gradient.view(-1)[5] = math.inf
    return gradient


def digest(tensors):
    return hashlib.sha256(b"".join(tensor.float().cpu().numpy().tobytes() for tensor in tensors)).hexdigest()


def train(rank, levels, method, entry, cap, scaled, options, folder=None):
    """Return (parameters, whole residuals, stats, layouts, one digest of the parameters for each step)."""
    steps, layouts, digests, now = iter(range(STEPS)), [], [], 0
    dtype = options.get("dtype", torch.float32)
    model = Model(dtype)
    indices = {parameter: index for index, parameter in enumerate(model.parameters())}

    def begin():
        ddp = DistributedDataParallel(model, bucket_cap_mb=cap)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3) if scaled else None
        kind = rt.TopKState if method == "topk" else functools.partial(rt.RegTopKState, mu=1.0)
        state = kind(levels=levels, grad_scaler=scaler, **parts_of(options))

        def hook(of, bucket):
            layout = [indices[parameter] for parameter in bucket.parameters()]
            if not layouts or layout[0] in {index for known in layouts[-1] for index in known}:
                layouts.append([])
            layouts[-1].append(layout)
            return rt.sparse_hook(of, bucket)

        if entry == "attach":
            rt.attach(ddp, state)
        else:
            ddp.register_comm_hook(state, hook)
        return ddp, state, scaler

    model.layers[0].weight.register_hook(lambda gradient: overflow(model, rank, lambda: now, gradient))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ddp, state, scaler = begin()
    for now in steps:
        if folder is not None and now == 5:
            rt.save(state, ddp, folder)
            state.close()
            ddp, state, scaler = begin()
            rt.load(state, ddp, folder)
        optimizer.zero_grad()
        loss = loss_of(ddp, rank, now, dtype)
        (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is not None:
            scaler.step(optimizer)
            scaler.update()
        elif all(parameter.grad.isfinite().all() for parameter in model.parameters()):
            optimizer.step()
        digests.append(digest([parameter.detach() for parameter in model.parameters()]))
    residuals = [entry.get("residual") for entry in state.state_dict(ddp)["parameters"].values()]
    state.check()  # the counts of a device come late
    return [p.detach().clone() for p in model.parameters()], residuals, state.stats(), layouts, digests


def parts_of(options):
    return {"density": DENSITY, **{name: value for name, value in options.items() if name != "dtype"}}


def train_locally(hosts, ranks, method, layouts, scaled, options):
    """Return (parameters, Twin, digests) of the same job."""
    dtype = options.get("dtype", torch.float32)
    model, twin = Model(dtype), Twin(hosts, ranks, method=method, mu=1.0, **parts_of(options))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3, enabled=scaled)
    digests = []
    for step, layout in enumerate(layouts):
        gradients = []
        for rank in range(hosts * ranks):
            model.zero_grad()
            scaler.scale(loss_of(model, rank, step, dtype)).backward()
            gradients.append([parameter.grad.clone() for parameter in model.parameters()])
            gradients[-1][2] = overflow(model, rank, lambda step=step: step, gradients[-1][2])
        averages = twin.step(gradients, layout, scaler.get_scale())
        for parameter, average in zip(model.parameters(), averages, strict=True):
            parameter.grad = average
        if scaled or all(average.isfinite().all() for average in averages):
            scaler.step(optimizer)
        scaler.update() if scaled else None
        digests.append(digest([parameter.detach() for parameter in model.parameters()]))
    return [p.detach().clone() for p in model.parameters()], twin, digests


SEVERAL, EACH = 0.0007, 1e-6  # MiB: several buckets, which DDP rebuilds; one for each parameter


NARROW = {"dtype": torch.bfloat16, "decay": 0.9, "wire_dtype": "2bit"}
WARM = {"density": rt.WarmupDensity(0.5, 0.05, 4), "wire_dtype": torch.bfloat16, "index_code": "elias-fano"}


@pytest.mark.parametrize(
    "hosts, ranks, method, cap, scaled, options",
    [(2, 2, "regtopk", SEVERAL, True, NARROW), (2, 4, "topk", EACH, False, WARM)],
    ids=["2x2", "2x4"],
)
def test_steps_equal_the_simulation_of_the_means_bit_for_bit(hosts, ranks, method, cap, scaled, options):
    outcomes = run_workers(train, hosts * ranks, ranks, method, "hook", cap, scaled, options)
    parameters, _, _, layouts, digests = outcomes[0]
    assert len({tuple(each[4]) for each in outcomes}) == 1, "replicas differ"
    assert layouts[0] != layouts[-1] and len(layouts[-1]) > 1
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    expected, twin, expected_digests = train_locally(hosts, ranks, method, layouts, scaled, options)
    torch.set_num_threads(threads)
    assert digests == expected_digests
    assert digests[OVERFLOW] == digests[OVERFLOW - 1] and len(set(digests)) == STEPS - 1
    assert all(torch.equal(*pair) for pair in zip(parameters, expected, strict=True))
    for rank, (_, residuals, stats, _, _) in enumerate(outcomes):
        assert stats["void_steps"] == 1 and stats["workers"] == hosts * ranks
        twin.check_residuals(rank, residuals)


def both_entries_and_a_resumed_run(rank, folder):
    os.environ |= {"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": str(rank % 2)}
    return [train(rank, "host", "regtopk", *run)[:2] for run in (("hook", 1024, False, {}), ("attach", 1024, False, {}), ("attach", 1024, False, {}, folder))]


def test_both_ways_in_and_a_resumed_run_have_the_same_bits(tmp_path):
    for runs in run_workers(both_entries_and_a_resumed_run, 4, str(tmp_path)):
        for parameters, residuals in runs[1:]:
            assert all(torch.equal(*pair) for pair in zip(parameters + residuals, runs[0][0] + runs[0][1], strict=True))


class Odd(nn.Module):
    """Sparse gradients, channels last, a frozen parameter, one that nobody uses and one that rank 0 alone uses."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(9, 5, sparse=True)
        self.convolution = nn.Conv2d(3, 7, 3).to(memory_format=torch.channels_last)
        self.frozen, self.unused, self.some = nn.Linear(5, 5), nn.Linear(3, 3), nn.Linear(5, 5)
        self.frozen.requires_grad_(False)

    def forward(self, rank):
        generator = torch.Generator().manual_seed(rank)
        rows = self.frozen(self.table(torch.randint(9, (4,), generator=generator)))
        images = torch.randn(2, 3, 6, 6, generator=generator).to(memory_format=torch.channels_last)
        return (self.some(rows) if rank == 0 else rows).square().sum() + self.convolution(images).square().sum()


def gradients_of_an_odd_model(rank):
    found = []
    for levels in (None, 2):
        model = Odd()
        ddp = DistributedDataParallel(model, find_unused_parameters=True, bucket_cap_mb=EACH)
        if levels:
            register(ddp, rt.TopKState(1.0, levels=levels), "register_comm_hook")
        steps = []
        for step in range(3):
            ddp.zero_grad()
            ddp(rank if step else 0).backward()
            steps.append([p.grad.to_dense().clone() for p in model.parameters() if p.grad is not None])
        found.append(steps)
    return found


def test_at_density_1_it_is_ddp_with_sparse_unused_frozen_and_strided_parameters():
    for plain, levels in run_workers(gradients_of_an_odd_model, 4):
        torch.testing.assert_close(levels, plain)
        assert len(plain[0]) == 5 and all(gradient.any() for gradient in plain[0])


ENTRIES, BYTES_DENSITY = 40000, 0.01


def count_bytes(rank, levels):
    model = nn.Linear(ENTRIES, 1, bias=False)
    ddp, state = DistributedDataParallel(model), rt.TopKState(BYTES_DENSITY, levels=levels)
    ddp.register_comm_hook(state, rt.sparse_hook)
    for step in range(2):
        ddp(torch.randn(1, ENTRIES, generator=torch.Generator().manual_seed(8 * step + rank))).sum().backward()
    return state.stats()


@pytest.mark.parametrize("ranks", [2, 4])
def test_between_hosts_a_rank_sends_its_share_of_what_a_host_alone_would(ranks):
    flat = rt.LocalExchange(2, BYTES_DENSITY, method="topk")
    for _ in range(2):
        flat.step([torch.randn(ENTRIES) for _ in range(2)])
    head = 2 * (64 + 16 + 8 + 4 + 32)  # of each step's message: its head, a tile's beginning, and what aligns the parts
    for stats in run_workers(count_bytes, 2 * ranks, ranks):
        assert 0 <= ranks * stats["bytes_sent"] - flat.stats(0)["bytes_sent"] <= ranks * head
        assert stats["sent_entries"] * ranks == flat.stats(0)["sent_entries"]
        # A reduce-scatter and an all-gather of fp32 in the host, and a head to each.
        bucket = 4 * ENTRIES
        assert 0 <= stats["bytes_local"] - 2 * 2 * (ranks - 1) / ranks * bucket <= 2 * 2 * (ranks - 1) * 96
    assert flat.stats(0)["bytes_local"] == 0


def step_of(ddp, rank):
    ddp(torch.randn(2, 6, generator=torch.Generator().manual_seed(rank))).square().sum().backward()
    return [parameter.grad.clone() for parameter in ddp.parameters()]


def disagree(rank):
    """The error of each disagreement on this rank."""
    errors = {}
    for case in ("levels", "number", "place", "reset"):
        torch.manual_seed(0)
        ddp = DistributedDataParallel(nn.Linear(6, 5))
        os.environ |= {"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "0" if case == "place" else str(rank % 2)}
        levels = {"levels": None if rank == 3 else 2, "number": 3}.get(case, "host")
        state = rt.TopKState(0.2, levels=levels)
        rt.attach(ddp, state)
        if case == "reset":
            for _ in range(2):  # DDP has rebuilt its buckets
                step_of(ddp, rank)
            if rank == 2:
                state.reset()
        errors[case] = error_of(step_of, ddp, rank)
        dist.barrier()
        if case == "reset":
            if rank != 2:
                state.reset()
            step_of(ddp, rank)  # goes on
    return errors


def test_ranks_that_differ_get_an_error_on_every_rank():
    for rank, errors in enumerate(run_workers(disagree, 4)):
        assert all(error[2] < 10 for error in errors.values())
        assert all(error[0] is ValueError for error in errors.values()), errors
        assert "expected the same levels on every rank, got 2 ranks to a host on " in errors["levels"][1] and "none on rank 3;" in errors["levels"][1]
        assert (
            errors["number"][1]
            == f"rank {rank}: sparse_hook: expected a multiple of 3 ranks with levels of 3 ranks to a host, got 4; give every host as many, or take levels=None"
        )
        assert (
            "expected the same numbering of a host's ranks on every rank, got " in errors["place"][1]
            and "LOCAL_RANK 0 at rank 1 on rank 1" in errors["place"][1]
        )
        # Those of its host, and those of its place on the other, hear of the call itself; the rest that these have an error.
        heard = "reset()" in errors["reset"][1]
        assert heard == (rank in (2, 3)), errors["reset"][1]
        assert ("counted from 0 among the ranks 2, 3" in errors["reset"][1]) == heard


def fail_once(rank):
    """On rank 1 compress fails in the third step. Returns (errors, what is missing, parameters)."""
    sizes = (300, 41, 1)
    module = Given(*sizes)
    state, optimizer = rt.TopKState(0.1, levels=2), unit_sgd(module)
    ddp = DistributedDataParallel(module)
    register(ddp, state, "attach")
    given, errors = [torch.zeros(size, dtype=torch.float64) for size in sizes], []

    for step in range(6):
        gradients = integers(*sizes, seed=seed_of(rank, step))
        for total, gradient in zip(given, gradients, strict=True):
            # What rank 1's host gave of the parts that rank 1 keeps is in nobody's keeping.
            lost = _C.part_of(len(gradient), 1, 2) if step == 2 and rank < 2 else (0, 0)
            total += gradient
            total[lost[0] : sum(lost)] -= gradient[lost[0] : sum(lost)]
        optimizer.zero_grad()
        try:
            with broken("compress_", rank == 1 and step == 2, state=state):
                ddp(gradients).backward()
        except Exception as error:
            errors.append(str(error))
            optimizer.zero_grad()
            ddp = DistributedDataParallel(module)
            register(ddp, state, "attach")
        else:
            optimizer.step()
    # A host's residual stands for the gradients of both its ranks.
    given = [total - residual.flatten() for total, residual in zip(given, held(state, ddp).values(), strict=True)]
    return errors, missing(state, ddp, given), [part.detach().clone() for part in module.parts]


def test_an_error_of_one_rank_is_an_error_on_every_rank_and_what_others_sent_returns():
    words = [
        "expected a part of this step in the payload of rank 1, got none, for which it has an error of its own; counted from 0 among the ranks 0, 1",
        "something of this machine",
        "expected a part of this step in the payload of rank 1, got none, for which it has an error of its own; counted from 0 among the ranks 2, 3",
        "in the payload of rank 0, got 0; counted from 0 among the ranks 1, 3",
    ]
    results = run_workers(fail_once, 4)
    for rank, (errors, lost, parameters) in enumerate(results):
        (error,) = errors
        assert words[rank] in error and (rank == 1 or re.match(rf"rank {rank}: \w+: expected ", error)), (rank, error)
        assert not any(lost)
        assert all(map(torch.equal, parameters, results[0][2]))


def watch_a_resumed_step(rank):
    """Of each step after a load: whether the history that compress was given is still there at the bucket's last operator, and a step later."""
    sizes, there, given = (300, 41), [], []
    module = Given(*sizes)
    state, optimizer = rt.RegTopKState(0.1, levels=2), unit_sgd(module)
    ddp = DistributedDataParallel(module)
    register(ddp, state, "attach")

    def compress(gradient, residual, payload, sent, feedback, *rest, **options):
        given.append([StorageWeakRef(tensor.untyped_storage()) for tensor in (sent, feedback) if tensor is not None])
        with torch._C._AutoDispatchBelowAutograd():
            torch.ops.regtopk.compress_(gradient, residual, payload, sent, feedback, *rest, **options)

    def join(*arguments, **options):
        there.append([[not memory.expired() for memory in step] for step in given])
        with torch._C._AutoDispatchBelowAutograd():
            torch.ops.regtopk.join_(*arguments, **options)

    for step in range(4):
        if step == 2:
            state.load_state_dict(state.state_dict(ddp), ddp)
            watch = torch.library.Library("regtopk", "IMPL")
            watch.impl("compress_", compress, "AutogradCPU")
            watch.impl("join_", join, "AutogradCPU")
        optimizer.zero_grad()
        ddp(integers(*sizes, seed=seed_of(rank, step))).backward()
        optimizer.step()
    watch._destroy()
    return there


def test_what_a_step_lets_go_of_is_there_until_the_next_one_begins():
    # On a stream compress may not have begun when the host is done with the bucket, and the memory's own stream would use it anew.
    for there in run_workers(watch_a_resumed_step, 2):
        first, second = there
        assert first == [[True, True]] and second == [[False, False], [True, True]]


def what_else(rank):
    """(gradients while paused, what flush hands out, residuals, errors)."""
    torch.manual_seed(0)
    ddp, state = DistributedDataParallel(nn.Linear(6, 5)), rt.TopKState(0.2, levels=2)
    ddp.register_comm_hook(state, rt.sparse_hook)
    step_of(ddp, rank)
    state.pause()
    ddp.zero_grad()
    paused = step_of(ddp, rank)
    state.resume()
    ddp.zero_grad()
    step_of(ddp, rank)
    saved = state.state_dict(ddp)
    residuals = [entry["residual"] for entry in saved["parameters"].values()]
    flat, others = rt.TopKState(0.2), rt.TopKState(0.2, levels=2)
    errors = [
        error_of(flat.load_state_dict, saved, ddp.module)[1],
        error_of(others.load_state_dict, [saved] * 2, ddp.module)[1],
        error_of(
            others.load_state_dict, {**saved, "parameters": {k: {**v, "residual": torch.ones(v["shape"])} for k, v in saved["parameters"].items()}}, ddp.module
        )[1],
        error_of(state.__getstate__)[1],
    ]
    state.flush(ddp)
    return paused, [parameter.grad for parameter in ddp.parameters()], residuals, errors, state.residual_norm()


def test_a_pause_is_dense_and_what_is_held_back_is_handed_out_or_refused_in_sentences():
    outcomes = run_workers(what_else, 4)
    torch.manual_seed(0)
    model = nn.Linear(6, 5)
    means = [torch.zeros_like(parameter) for parameter in model.parameters()]
    for rank in range(4):
        model.zero_grad()
        for mean, gradient in zip(means, step_of(model, rank), strict=True):
            mean += gradient / 4
    held = [sum(parts) / 2 for parts in zip(*(outcome[2] for outcome in outcomes), strict=True)]
    for rank, (paused, flushed, _, errors, norm) in enumerate(outcomes):
        torch.testing.assert_close(paused, means)
        torch.testing.assert_close(flushed, held)
        assert all(part.any() for part in held) and norm == 0
        for error, words in zip(
            errors,
            [
                "expected a state dict of levels of 1 ranks to a host, got one of 2; 1 is without levels",
                "expected the state dicts of 4 ranks with levels of 2 ranks to a host, got those of 2",
                f"expected what entries {rank % 2 * 15} to {rank % 2 * 15 + 15} of a parameter of shape [5, 6] hold back, got others",
                "expected a state without levels to copy, got one that holds back its rank's part",
            ],
            strict=True,
        ):
            assert words in error


@pytest.mark.parametrize(
    "options, words",
    [
        ({"levels": 0}, "expected levels to be None, 'host' or the number of ranks to a host, got 0"),
        ({"levels": "node"}, "expected levels to be None, 'host' or the number of ranks to a host, got 'node'"),
        ({"levels": "host"}, "expected LOCAL_WORLD_SIZE and LOCAL_RANK in the environment with levels='host', as torchrun sets them, got"),
        ({"levels": 2, "support": "leader"}, "expected levels=None with support='leader', got levels=2"),
        ({"levels": 2, "momentum": 0.9}, "expected levels=None with momentum=, got levels=2"),
        ({"levels": 2, "clip_norm": 1.0}, "expected levels=None with clip_norm=, got levels=2"),
        ({"levels": 2, "dense": "auto"}, "expected levels=None with dense=, got levels=2"),
        ({"levels": 2, "density": rt.AdaptiveDensity(0.1)}, "expected levels=None with an AdaptiveDensity, got levels=2"),
    ],
    ids=str,
)
def test_what_does_not_go_with_levels_is_said_in_a_sentence(options, words, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(ValueError) as caught:
        rt.TopKState(**options)
    assert str(caught.value).startswith(f"TopKState: {words}")
    if options["levels"] == 2:
        rt.TopKState(**{**options, "levels": 1})  # no two levels


def test_a_simulation_has_no_hosts():
    with pytest.raises(ValueError, match="LocalExchange: expected no levels of workers in one process, got levels=2; give it the means of the hosts"):
        rt.LocalExchange(4, levels=2)
