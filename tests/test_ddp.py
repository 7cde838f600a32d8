"""DDP on gloo processes: equal to the one-process simulation, to DDP without a hook, and to itself by either entry."""

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from processes import run_workers
from torch.nn.parallel import DistributedDataParallel
from training import BUCKET_CAP_MB, batch, loss_of, make_model, make_optimizer, make_state, train_ddp, train_locally

import regtopk_torch as rt

STEPS = 30


def train_both_entries(rank, method, density, dtype, options):
    return [train_ddp(rank, method, density, STEPS, entry, dtype, **options) for entry in ("register_comm_hook", "attach")]


def equal(left, right):
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("view", [False, True], ids=["copied", "bucket view"])
@pytest.mark.parametrize("method", ["topk", "regtopk"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_thirty_steps_equal_the_one_process_simulation_bit_for_bit(world_size, method, view):
    check_against_simulation(world_size, method, 0.02, torch.float32, {"gradient_as_bucket_view": view})


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes_equal_the_simulation_bit_for_bit(dtype):
    check_against_simulation(2, "regtopk", 0.02, dtype, {"bucket_cap_mb": BUCKET_CAP_MB * dtype.itemsize / 4})


def test_one_bucket_equals_the_simulation_bit_for_bit():
    layouts = check_against_simulation(2, "regtopk", 0.01, torch.float32, {"bucket_cap_mb": 100})
    assert [len(layout) for layout in layouts] == [1] * STEPS


def check_against_simulation(world_size, method, density, dtype, options):
    results = run_workers(train_both_entries, world_size, method, density, dtype, options)
    (parameters, _, _, layouts), _ = results[0]
    if options.get("bucket_cap_mb", 0) < 1:
        assert len({len(layout) for layout in layouts}) > 1, "expected the run to pass through DDP's bucket rebuild"
    simulated, exchange = train_locally(world_size, method, density, layouts, dtype)
    assert equal(parameters, simulated)
    for rank, entries in enumerate(results):
        for parameters, residuals, stats, _ in entries:
            assert equal(parameters, simulated)
            local = exchange.residuals(rank)
            assert equal([r.flatten() for r in residuals.values()], [local[index] for index in range(len(local))])
            expected = exchange.stats(rank)
            for name in ("steps", "entries", "sent_entries", "repeated", "displaced", "rebuilds", "history_dropped", "bytes_sent"):
                assert stats[name] == expected[name], name
    assert results[0][0][2]["repeated"] > 0
    return layouts


def channels_last_gradients(rank):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)).to(memory_format=torch.channels_last)
    ddp = DistributedDataParallel(model)
    rt.attach(ddp, make_state("topk", 0.01))
    # Every gradient entry is 1 or -1: all tie, and the order in memory decides what is sent.
    generator = torch.Generator().manual_seed(rank)
    given = [torch.randn(p.shape, generator=generator).sign().contiguous(memory_format=memory_format_of(p)) for p in model.parameters()]
    used = ddp(torch.ones(1, 3, 8, 8)).sum()
    (0 * used + sum((p * g).sum() for p, g in zip(model.parameters(), given, strict=True))).backward()
    return given, [p.grad.clone() for p in model.parameters()]


def memory_format_of(parameter):
    return torch.channels_last if parameter.dim() == 4 else torch.contiguous_format


def test_a_channels_last_bucket_equals_the_simulation():
    results = run_workers(channels_last_gradients, 2)
    # DDP's first bucket holds the parameters in the model's order.
    averages = rt.LocalExchange(2, 0.01, method="topk").step([given for given, _ in results])
    assert equal(averages, results[0][1]) and equal(averages, results[1][1])
    assert sum(int(average.count_nonzero()) for average in averages) > 0


def train_without_hook(rank, steps):
    model = make_model()
    ddp, optimizer = DistributedDataParallel(model), make_optimizer(model)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(ddp, batch(rank, step)).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("method", ["topk", "regtopk"])
def test_density_one_equals_ddp_without_a_hook(method):
    plain = run_workers(train_without_hook, 3, STEPS)[0]
    (sparse, residuals, _, _), _ = run_workers(train_both_entries, 3, method, 1.0, torch.float32, {})[0]
    for ours, theirs in zip(sparse, plain, strict=True):
        # (a + b + c) / 3 against a / 3 + b / 3 + c / 3 in another order: rounding errors of 1e-7, amplified by 30 steps.
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert all(not residual.any() for residual in residuals.values())


def pause_in_the_middle(rank):
    model, plain = make_model(), make_model()
    ddp, reference = DistributedDataParallel(model), DistributedDataParallel(plain)
    state = make_state("regtopk", 0.05)
    ddp.register_comm_hook(state, rt.sparse_hook)
    gradients_equal, norms = [], []
    for step in range(9):
        if step in (0, 6):
            state.pause()
        elif step == 3:
            state.resume()
        plain.load_state_dict(model.state_dict())
        for trained in (ddp, reference):
            trained.zero_grad()
            loss_of(trained, batch(rank, step)).backward()
        gradients_equal.append(equal([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()]))
        norms.append(state.residual_norm())
        make_optimizer(model).step()
    return gradients_equal, norms, state.stats()


def test_pausing_is_dense_and_keeps_the_residual():
    for gradients_equal, norms, stats in run_workers(pause_in_the_middle, 2):
        assert gradients_equal == [True] * 3 + [False] * 3 + [True] * 3
        assert norms[:3] == [0.0] * 3
        assert norms[3] > 0 and norms[5] == norms[6] == norms[8]
        assert stats["dense_buckets"] == 6 and stats["history_dropped"] > 0


def flush_at_the_end(rank):
    model = make_model()
    ddp, optimizer = DistributedDataParallel(model), make_optimizer(model)
    state = make_state("regtopk", 0.02)
    ddp.register_comm_hook(state, rt.sparse_hook)
    for step in range(5):
        optimizer.zero_grad()
        loss_of(ddp, batch(rank, step)).backward()
        optimizer.step()
    held = {name: entry["residual"] for name, entry in state.state_dict(ddp)["parameters"].items()}
    state.flush(ddp)
    return held, {name: p.grad for name, p in model.named_parameters()}, state.residual_norm()


def test_flush_hands_out_the_average_residual_and_leaves_none():
    (held_0, flushed_0, norm, ), (held_1, flushed_1, _) = run_workers(flush_at_the_end, 2)
    assert norm == 0
    for name, flushed in flushed_0.items():
        assert torch.equal(flushed, (held_0[name] + held_1[name]) / 2)
        assert torch.equal(flushed, flushed_1[name])
    assert any(residual.any() for residual in held_0.values())


def one_worker_group(rank):
    groups = [dist.new_group([member]) for member in range(2)]
    model = make_model()
    ddp = DistributedDataParallel(model, process_group=groups[rank])
    state = make_state("topk", 0.02, process_group=groups[rank])
    rt.attach(ddp, state)
    loss_of(ddp, batch(rank, 0)).backward()
    sent = torch.cat([p.grad.flatten() for p in model.parameters()])
    given = torch.cat([p.grad.flatten() for p in _gradients_alone(rank)])
    residual = torch.cat([e["residual"].flatten() for e in state.state_dict(ddp)["parameters"].values()])
    return torch.equal(sent + residual, given), int((sent != 0).sum()), state.stats()


def _gradients_alone(rank):
    model = make_model()
    loss_of(model, batch(rank, 0)).backward()
    return list(model.parameters())


def test_a_group_of_one_worker_trains():
    for conserved, sent, stats in run_workers(one_worker_group, 2):
        assert conserved
        assert stats["workers"] == 1 and stats["bytes_sent"] == 0
        assert 0 < sent <= stats["sent_entries"]


class WithEmbedding(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, 8, sparse=True)
        self.linear = nn.Linear(8, 8)

    def forward(self, tokens):
        return self.linear(self.embedding(tokens))


def train_embedding(rank, entry):
    model = WithEmbedding()
    ddp = DistributedDataParallel(model)
    state = make_state("regtopk", 1.0) if entry else None
    if entry == "attach":
        rt.attach(ddp, state)
    elif entry:
        ddp.register_comm_hook(state, rt.sparse_hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(6):
        generator = torch.Generator().manual_seed(100 * rank + step)
        tokens = torch.randint(50, (4,), generator=generator)
        optimizer.zero_grad()
        ddp(tokens).square().mean().backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()], state.stats() if state else None


def test_sparse_embedding_gradients_take_the_plain_all_reduce():
    plain, _ = run_workers(train_embedding, 2, None)[0]
    for entry in ("register_comm_hook", "attach"):
        parameters, stats = run_workers(train_embedding, 2, entry)[0]
        assert torch.equal(parameters[0], plain[0]), "the embedding goes through the same all-reduce"
        assert equal(parameters, plain), "two workers at density 1: halving is exact, so is the sum"
        assert stats["dense_buckets"] == 6


def train_two_models(rank):
    first, second = make_model(), make_model()
    models = [DistributedDataParallel(model, bucket_cap_mb=0.008) for model in (first, second)]
    states = [make_state("regtopk", 0.05), make_state("topk", 0.1)]
    models[0].register_comm_hook(states[0], rt.sparse_hook)
    rt.attach(models[1], states[1])
    for step in range(8):
        x = batch(rank, step)
        (loss_of(models[0], x) + models[1](models[0](x)).square().mean()).backward()
        for model in (first, second):
            make_optimizer(model).step()
            model.zero_grad()
    return [p.detach().clone() for p in [*first.parameters(), *second.parameters()]]


def test_two_models_in_one_backward_keep_their_replicas_equal():
    one, two = run_workers(train_two_models, 2)
    assert equal(one, two)


class ComplexModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(5, dtype=torch.complex64))

    def forward(self, x):
        return (self.weight * x).abs().sum()


def train_complex(rank, entry):
    ddp = DistributedDataParallel(ComplexModel())
    state = make_state("regtopk", 0.5)
    if entry == "attach":
        rt.attach(ddp, state)
    else:
        ddp.register_comm_hook(state, rt.sparse_hook)
    try:
        ddp(torch.ones(5)).backward()
    except TypeError as error:
        return str(error)


@pytest.mark.parametrize("entry", ["register_comm_hook", "attach"])
def test_complex_gradients_are_an_error(entry):
    for rank, message in enumerate(run_workers(train_complex, 2, entry)):
        assert message.startswith(
            f"rank {rank}: sparse_hook: expected gradients of dtype float64, float32, bfloat16 or float16, got ComplexFloat"
        )


def use_hook_wrongly(rank):
    messages = []

    def note(function, *arguments):
        try:
            function(*arguments)
        except (TypeError, ValueError, RuntimeError) as error:
            messages.append(f"{type(error).__name__}: {error}")

    state = make_state("topk", 0.1)
    ddp = DistributedDataParallel(make_model())
    note(rt.sparse_hook, state, (torch.zeros(3), dist.group.WORLD))
    note(rt.sparse_hook, None, None)
    note(rt.attach, make_model(), state)
    note(rt.attach, ddp, None)
    group = dist.new_group([rank], use_local_synchronization=True)
    note(rt.attach, ddp, make_state("topk", 0.1, process_group=group))
    rt.attach(ddp, state)
    note(rt.attach, ddp, state)
    state.close()
    note(loss_of(ddp, batch(rank, 0)).backward)
    return messages


def test_wrong_use_of_the_hook_says_what_was_expected():
    for rank, messages in enumerate(run_workers(use_hook_wrongly, 2)):
        expected = [
            "TypeError: sparse_hook: expected a torch.distributed.GradBucket, got tuple; compiled autograd's Python reducer is not supported",
            "TypeError: sparse_hook: expected a TopKState or RegTopKState, got NoneType",
            "TypeError: attach: expected a DistributedDataParallel, got Model",
            "TypeError: attach: expected a TopKState or RegTopKState, got NoneType",
            f"ValueError: attach: expected a state for the model's ranks [0, 1], got one for [{rank}]",
            "RuntimeError: register_comm_hook or register_builtin_comm_hook can only be called once.",
            "RuntimeError: sparse_hook: expected an open exchange, got one that was closed; construct a new state",
        ]
        assert len(messages) == len(expected)
        for message, start in zip(messages, expected, strict=True):
            assert message.startswith(start)
