"""DDP's modes: equal to the one-process simulation bit for bit, replicas identical after every step, no gradient mass lost.

Mass: what all ranks gave to the exchange equals N times what appeared in `.grad`, and so reached the optimizer, plus what
all ranks keep. It is counted in `.grad` because DDP throws a result away for a parameter that no rank used.
"""

import contextlib
import dataclasses
import datetime
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.utils.checkpoint
from books import (
    Books, add_gradients, booked_hook, check_against_simulation, check_equal, check_mass, digest, nothing_applied, residuals_of,
)  # fmt: skip
from processes import run_workers
from torch.nn.parallel import DistributedDataParallel
from training import BUCKET_CAP_MB, WIDTH, batch, loss_of, make_model, make_optimizer, make_state

import regtopk_torch as rt

STEPS = 9


class WithBranch(nn.Module):
    """A model whose branch some ranks take in some steps: `takers(step)` is a set of ranks."""

    def __init__(self, rank, takers):
        super().__init__()
        torch.manual_seed(1)
        self.model, self.branch = make_model(), nn.Linear(WIDTH, WIDTH)
        self.rank, self.takers, self.step = rank, takers, 0

    def forward(self, x):
        return self.model(self.branch(x) if self.rank in self.takers(self.step) else x)


class WithDeadBranch(WithBranch):
    """The branch is always used, and its gradient is zero for a rank that does not take it."""

    def forward(self, x):
        taken = float(self.rank in self.takers(self.step))
        return self.model(x + taken * self.branch(x))


class Cast(nn.Module):
    def forward(self, x):
        return x.double()


class Images(nn.Module):
    """Two convolutions around a batch norm, channels last."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 1, 3, padding=1))
        self.to(memory_format=torch.channels_last)

    def forward(self, x):
        return self.layers(x.reshape(-1, 1, 4, 6)).flatten(1)


class OneParameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, WIDTH))

    def forward(self, x):
        return x * self.weight


class ManyParameters(nn.Module):
    """300 parameters of 1 to 24 entries."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ParameterList(torch.full((1 + 7 * i % WIDTH,), 0.01 * i % 1) for i in range(300))

    def forward(self, x):
        return x * sum(nn.functional.pad(part, (0, WIDTH - len(part))) for part in self.parts)


class Checkpointed(nn.Module):
    """Activation checkpointing; the re-entrant form runs its hooks in a backward pass of its own."""

    def __init__(self, reentrant):
        super().__init__()
        self.model, self.reentrant = make_model(), reentrant

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.model, x.requires_grad_(), use_reentrant=self.reentrant)


def frozen():
    model = make_model()
    model.layers[0].weight.requires_grad_(False)
    return model


def two_dtypes():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), Cast(), nn.Linear(WIDTH, WIDTH).double())


def always(step):
    return {0, 1, 2, 3}


def now_and_then(step):
    return [{0, 1, 2, 3}, set(), {1}, set(), set()][step % 5]


def all_or_nobody(step):
    return {0, 1, 2, 3} if step % 3 == 0 else set()


@dataclasses.dataclass
class Mode:
    model: Callable = lambda rank: make_model()
    options: dict = dataclasses.field(default_factory=dict)
    world_size: int = 2
    wrap: Callable = lambda module, **options: DistributedDataParallel(module, **options)
    no_sync: bool = False
    join: bool = False
    set_to_none: bool = True
    new_group_at: int = -1
    group: tuple = ()  # of these ranks; the others do nothing
    state: dict = dataclasses.field(default_factory=dict)  # options of the state


UNUSED = {"find_unused_parameters": True}
NARROW = {"wire_dtype": torch.bfloat16, "index_code": "elias-fano"}
DENSE = {"dense": lambda name, numel: numel < 100}
CHUNKS = {"chunk": 256, "wire_dtype": "2bit", "index_code": "elias-fano"}
LEADER = {"support": "leader"}
MOMENTUM = {"momentum": 0.9, "mask_momentum": True, "clip_norm": 1.0}
ADAPTIVE = {"density": rt.AdaptiveDensity(0.05, power=2)}
COMPILED = {"bucket_cap_mb": 1}  # dynamo splits the graph by DDP's buckets and takes no less
MODES = {
    "plain": Mode(),
    "plain, three ranks": Mode(world_size=3),
    "bucket view": Mode(options={"gradient_as_bucket_view": True}),
    "bucket view, gradients zeroed in place": Mode(options={"gradient_as_bucket_view": True}, set_to_none=False),
    "static graph": Mode(options={"static_graph": True}),
    "static graph, unused": Mode(lambda rank: WithBranch(rank, lambda step: set()), {"static_graph": True}),
    "batched grad copy": Mode(options={"batched_grad_copy": True}),
    "batched grad copy, bucket view": Mode(options={"batched_grad_copy": True, "gradient_as_bucket_view": True}),
    "no_sync": Mode(no_sync=True),
    "no_sync, bucket view": Mode(options={"gradient_as_bucket_view": True}, no_sync=True),
    "no_sync, unused": Mode(lambda rank: WithBranch(rank, now_and_then), UNUSED, no_sync=True),
    "join": Mode(join=True),
    "join, three ranks": Mode(join=True, world_size=3),
    "join, unused": Mode(lambda rank: WithBranch(rank, now_and_then), UNUSED, join=True),
    "join, unused, gradients zeroed in place": Mode(lambda rank: WithBranch(rank, now_and_then), UNUSED, join=True, set_to_none=False),
    "used by one rank": Mode(lambda rank: WithBranch(rank, lambda step: {0}), UNUSED),
    "used now and then": Mode(lambda rank: WithBranch(rank, now_and_then), UNUSED),
    "used now and then, four ranks": Mode(lambda rank: WithBranch(rank, now_and_then), UNUSED, world_size=4),
    "used now and then, one bucket": Mode(lambda rank: WithBranch(rank, now_and_then), UNUSED | {"bucket_cap_mb": 100}),
    "used now and then, bucket view": Mode(lambda rank: WithBranch(rank, now_and_then), UNUSED | {"gradient_as_bucket_view": True}),
    "used now and then, gradients zeroed in place": Mode(lambda rank: WithBranch(rank, now_and_then), UNUSED, set_to_none=False),
    "used now and then, bucket view, zeroed in place": Mode(
        lambda rank: WithBranch(rank, now_and_then), UNUSED | {"gradient_as_bucket_view": True}, set_to_none=False
    ),
    "used now and then, batched grad copy": Mode(lambda rank: WithBranch(rank, now_and_then), UNUSED | {"batched_grad_copy": True}),
    "used now and then, skipped": Mode(lambda rank: WithBranch(rank, all_or_nobody), UNUSED | {"skip_all_reduce_unused_params": True}),
    "always used, looked for": Mode(lambda rank: WithBranch(rank, always), UNUSED),
    "used with a gradient of zero": Mode(lambda rank: WithDeadBranch(rank, now_and_then)),
    "used with a gradient of zero, looked for": Mode(lambda rank: WithDeadBranch(rank, now_and_then), UNUSED),
    "frozen": Mode(lambda rank: frozen()),
    "channels_last and buffers": Mode(lambda rank: Images()),
    "channels_last and buffers of each rank": Mode(lambda rank: Images(), {"forward_sync_buffers": False}),
    "two dtypes": Mode(lambda rank: two_dtypes()),
    "one parameter": Mode(lambda rank: OneParameter()),
    "300 parameters": Mode(lambda rank: ManyParameters()),
    "activation checkpointing": Mode(lambda rank: Checkpointed(False)),
    "re-entrant activation checkpointing": Mode(lambda rank: Checkpointed(True), {"static_graph": True}),
    "narrow": Mode(state=NARROW),
    "chunks, used now and then": Mode(lambda rank: WithBranch(rank, now_and_then), UNUSED, state=CHUNKS),
    "chunks of a leader": Mode(state={"chunk": 64, "support": "leader"}),
    "dense where small, used now and then, three ranks": Mode(lambda rank: WithBranch(rank, now_and_then), UNUSED, world_size=3, state=DENSE),
    "dense where less, two dtypes": Mode(lambda rank: two_dtypes(), world_size=3, state={"density": rt.WarmupDensity(0.9, 0.05, 6), "dense": "auto"}),
    "dense where small of a leader, used now and then, skipped": Mode(
        lambda rank: WithBranch(rank, all_or_nobody), UNUSED | {"skip_all_reduce_unused_params": True}, state=DENSE | LEADER
    ),
    "narrow, used now and then": Mode(lambda rank: WithBranch(rank, now_and_then), UNUSED, state=NARROW | {"wire_dtype": "2bit"}),
    "signs, no_sync, used now and then": Mode(lambda rank: WithBranch(rank, now_and_then), UNUSED, no_sync=True, state=NARROW | {"wire_dtype": "sign"}),
    "momentum, used now and then, three ranks": Mode(lambda rank: WithBranch(rank, now_and_then), UNUSED, world_size=3, state=MOMENTUM),
    "momentum of a leader, bucket view, zeroed in place": Mode(options={"gradient_as_bucket_view": True}, set_to_none=False, state=MOMENTUM | LEADER),
    "leader": Mode(state=LEADER),
    "leader, three ranks": Mode(world_size=3, state=LEADER),
    "leader, used now and then, four ranks": Mode(lambda rank: WithBranch(rank, now_and_then), UNUSED, world_size=4, state=LEADER),
    "leader, used now and then, skipped": Mode(
        lambda rank: WithBranch(rank, all_or_nobody), UNUSED | {"skip_all_reduce_unused_params": True}, state=LEADER
    ),
    "leader, join, three ranks": Mode(join=True, world_size=3, state=LEADER),
    "leader, narrow, channels_last": Mode(lambda rank: Images(), state=LEADER | NARROW),
    "leader, two dtypes": Mode(lambda rank: two_dtypes(), state=LEADER),
    "adaptive, no_sync": Mode(no_sync=True, state=ADAPTIVE),
    "adaptive, used now and then, four ranks": Mode(lambda rank: WithBranch(rank, now_and_then), UNUSED, world_size=4, state=ADAPTIVE),
    "adaptive, used now and then, skipped": Mode(
        lambda rank: WithBranch(rank, all_or_nobody), UNUSED | {"skip_all_reduce_unused_params": True}, state=ADAPTIVE
    ),
    "adaptive, join, three ranks": Mode(join=True, world_size=3, state=ADAPTIVE),
    "adaptive, leader, narrow, two dtypes": Mode(lambda rank: two_dtypes(), state=ADAPTIVE | LEADER | NARROW),
    "another process group": Mode(new_group_at=5),
    "subgroup": Mode(world_size=3, group=(0, 2)),
    "compiled inside": Mode(
        options=COMPILED, wrap=lambda module, **options: DistributedDataParallel(torch.compile(module, backend="eager"), **options)
    ),
    "compiled outside": Mode(
        options=COMPILED, wrap=lambda module, **options: torch.compile(DistributedDataParallel(module, **options), backend="eager")
    ),
}


def train(rank, name, method, entry):
    """Return (books, digests of the parameters after each step, applied gradient by index, residual by index, stats)."""
    mode = MODES[name]
    group = dist.new_group(list(mode.group)) if mode.group else None
    if mode.group and rank not in mode.group:
        return None
    torch.manual_seed(0)
    module = mode.model(rank)
    ddp = mode.wrap(module, **{"bucket_cap_mb": BUCKET_CAP_MB, "process_group": group, **mode.options})
    plain = ddp if isinstance(ddp, DistributedDataParallel) else ddp._orig_mod
    state = make_state(method, process_group=group, **{"density": 0.05, **mode.state})
    books = Books(module)
    if entry == "attach":
        rt.attach(plain, state)
    else:
        plain.register_comm_hook((state, books), booked_hook)
    optimizer = make_optimizer(module)
    digests, applied = [], nothing_applied(module)
    with ddp.join() if mode.join else contextlib.nullcontext():
        for step in range(STEPS - 4 * rank if mode.join else STEPS):
            module.step = step
            if step == mode.new_group_at:
                plain._update_process_group(dist.new_group())
            optimizer.zero_grad(set_to_none=mode.set_to_none)
            if mode.no_sync:
                with plain.no_sync():
                    loss_of(ddp, batch(rank, step + 100)).backward()
                module.step = step + 1
            loss_of(ddp, batch(rank, step)).backward()
            add_gradients(applied, module)
            optimizer.step()
            digests.append(digest(module))
    residuals = residuals_of(state, plain.module)
    state.check()  # the counts of a device come late
    return books.steps, [*digests, digest(module)], applied, residuals, state.stats()


def train_by_both_entries(rank, name, method):
    return [train(rank, name, method, entry) for entry in ("register_comm_hook", "attach")]


# Top-k differs in the score alone.
BOTH_METHODS = ("plain", "used now and then")
CASES = [
    pytest.param(name, method, marks=[pytest.mark.long] if method == "topk" and name not in BOTH_METHODS else [])
    for name in MODES for method in ("topk", "regtopk")
]  # fmt: skip


@pytest.mark.parametrize("name, method", CASES)
def test_a_mode_equals_the_simulation_keeps_replicas_equal_and_loses_nothing(name, method):
    mode = MODES[name]
    results = [both for both in run_workers(train_by_both_entries, mode.world_size, name, method) if both[0]]
    by_hook, attached = zip(*results, strict=True)
    check_replicas(by_hook, mode)
    exchange = rt.LocalExchange(len(results), method=method, mu=1.0, **{"density": 0.05, **mode.state})
    check_against_simulation([result[0] for result in by_hook], method, exchange)
    for rank, (one, other) in enumerate(results):
        assert other[1] == one[1], "attach and register_comm_hook give the same bits"
        for kept in (one[3], other[3]):
            check_equal(kept, exchange.residuals(rank))
        for statistic in ("steps", "entries", "sent_entries", "repeated", "displaced", "rebuilds", "history_dropped", "bytes_sent"):
            assert one[4][statistic] == other[4][statistic] == exchange.stats(rank)[statistic], statistic
    # fp32: each of about 10 steps rounds once when it adds to the residual and once when it divides by N. Rank 0 takes part
    # in every step and has every average in `.grad`.
    if not mode.state.get("momentum"):  # what is in velocities the simulation alone counts
        check_mass([result[0] for result in by_hook], [result[3] for result in by_hook], by_hook[0][2])
    assert any(residual.any() for residual in by_hook[0][3].values()), "a run that keeps nothing tests nothing"


def check_replicas(results, mode):
    digests = [result[1] for result in results]
    if mode.join:
        assert len({len(one) for one in digests}) > 1, "expected uneven inputs"
        assert len({one[-1] for one in digests}) == 1
        digests = [one[:-1] for one in digests]
    for step in zip(*digests, strict=not mode.join):
        assert len(set(step)) == 1
    assert len(set(digests[0])) > 5, "expected the parameters to move"


def train_two_models(rank, method):
    """Two models under DDP in one process, trained by one loss, with a state each."""
    modules = make_model(), make_model()
    models = [DistributedDataParallel(module, bucket_cap_mb=BUCKET_CAP_MB) for module in modules]
    states = [make_state(method, 0.05), make_state(method, 0.05)]
    books = [Books(module) for module in modules]
    for model, state, book in zip(models, states, books, strict=True):
        model.register_comm_hook((state, book), booked_hook)
    optimizers = [make_optimizer(module) for module in modules]
    digests, applied = [], [nothing_applied(module) for module in modules]
    for step in range(STEPS):
        x = batch(rank, step)
        (loss_of(models[0], x) + models[1](models[0](x)).square().mean()).backward()
        for module, totals in zip(modules, applied, strict=True):
            add_gradients(totals, module)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        digests.append([digest(module) for module in modules])
    return [
        (book.steps, [one[index] for one in digests], applied[index], residuals_of(state, module))
        for index, (book, state, module) in enumerate(zip(books, states, modules, strict=True))
    ]


@pytest.mark.parametrize("method", ["topk", "regtopk"])
def test_two_models_in_one_backward_keep_their_residuals_apart(method):
    for results in zip(*run_workers(train_two_models, 2, method), strict=True):
        check_replicas(results, Mode())
        exchange = check_against_simulation([result[0] for result in results], method)
        for rank, result in enumerate(results):
            check_equal(result[3], exchange.residuals(rank))
        check_mass([result[0] for result in results], [result[3] for result in results], results[0][2])


def shrink_the_group(rank, entry):
    """DDP goes on with ranks 0 and 1; the state was made for three."""
    group = dist.new_group(timeout=datetime.timedelta(seconds=4))
    ddp = DistributedDataParallel(make_model(), process_group=group)
    state = make_state("topk", 0.1, process_group=group)
    if entry == "attach":
        rt.attach(ddp, state)
    else:
        ddp.register_comm_hook(state, rt.sparse_hook)
    loss_of(ddp, batch(rank, 0)).backward()
    norm = state.residual_norm()
    pair = dist.new_group([0, 1])
    if rank == 2:
        return "left", norm, norm
    ddp._update_process_group(pair)
    try:
        for step in range(3):
            loss_of(ddp, batch(rank, step)).backward()
    except Exception as error:
        return str(error), norm, state.residual_norm()


@pytest.mark.parametrize("entry", ["register_comm_hook", "attach"])
def test_a_group_of_other_ranks_than_the_states_ends_in_an_error(entry):
    for message, before, after in run_workers(shrink_the_group, 3, entry)[:2]:
        assert "sparse_hook: expected" in message and "all 3 ranks" in message and "within 4 s" in message
        assert before > 0 and after > 0


def use_the_python_reducer(rank):
    torch._dynamo.config.optimize_ddp = "python_reducer"
    messages = []
    for compiled in (False, True):
        for entry in ("register_comm_hook", "attach"):
            ddp = DistributedDataParallel(make_model())
            state = make_state("topk", 0.1)
            if entry == "attach":
                rt.attach(ddp, state)
            else:
                ddp.register_comm_hook(state, rt.sparse_hook)
            try:
                if compiled:
                    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
                        loss_of(torch.compile(ddp, backend="eager"), batch(rank, 0)).backward()
                else:
                    loss_of(ddp, batch(rank, 0)).backward()
                messages.append("no error")
            except Exception as error:
                messages.append(f"{type(error).__name__}: {error}")
    return messages


def test_compiled_autograds_python_reducer_is_an_error_that_says_what_to_set():
    for messages in run_workers(use_the_python_reducer, 2):
        assert len(messages) == 4
        for message in messages:
            assert "expected a torch.distributed.GradBucket, got tuple" in message
            assert "set torch._dynamo.config.optimize_ddp" in message
