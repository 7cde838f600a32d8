"""Chunks of a bucket that select by themselves: the bits of the reference, on every way in, and what they refuse."""

import copy

import pytest
import torch
from buckets import DTYPES, KINDS, gradient, same_bits
from cases import in_turn, of_one
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import error_of, run_workers
from test_selection import compare
from torch.nn.parallel import DistributedDataParallel

import regtopk_torch as rt
from regtopk_torch import _C, reference

VARIANTS = _C.available_cpu_variants()
PUBLISHED = {"density": 64 / 4096, "chunk": 4096, "decay": 0.95, "wire_dtype": "2bit", "index_code": "elias-fano"}


@pytest.fixture(params=VARIANTS)
def variant(request):
    before = _C.cpu_variant()
    _C.set_cpu_variant(request.param)
    yield request.param
    _C.set_cpu_variant(before)


@pytest.mark.parametrize("chunk, density, kind", in_turn(of_one([64, 4096, 65536]), of_one([1e-9, 1 / 64, 0.3]), of_one(KINDS)))
def test_hard_gradients_give_the_bits_of_the_reference(variant, kind, density, chunk):
    # Two tiles, the last chunk partial; another kind in between, so that histories meet changed values.
    numel = 65_536 + 4_096 + 1_001
    steps = [[gradient(name, numel, torch.float32, 10 * step + rank) for rank in range(2)] for step, name in enumerate([kind, "normal", kind])]
    compare(steps, density, 1.0, "previous", 0.95, chunk)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_gradient_gives_the_bits_of_the_reference(data):
    _C.set_cpu_variant(data.draw(st.sampled_from(VARIANTS)))
    try:
        numel = data.draw(st.one_of(st.integers(1, 200), st.integers(1, 20_000)))
        chunk = data.draw(st.sampled_from([64, 128, 1024, 4096, 65536]))
        density = data.draw(st.sampled_from([1e-6, 1 / 64, 0.05, 0.5, 0.97, 1.0]))
        dtype = data.draw(st.sampled_from(DTYPES))
        mu = data.draw(st.sampled_from([None, 0.01, 1.0, 200.0]))
        distortion = data.draw(st.sampled_from(["previous", "current"]))
        kinds = data.draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=4))
        seed = data.draw(st.integers(0, 2**32))
        steps = [[gradient(kind, numel, dtype, seed + 7 * step + rank) for rank in range(2)] for step, kind in enumerate(kinds)]
        compare(steps, density, mu, distortion, data.draw(st.sampled_from([1.0, 0.95])), chunk)
    finally:
        _C.set_cpu_variant(VARIANTS[-1])


@pytest.mark.parametrize("density", [1 / 64, 0.1, 0.3])
def test_where_all_that_was_sent_falls_behind_the_next_best_are_found(variant, density):
    # The largest entries of every chunk cancel between two ranks, so that they score 0 in the next step.
    size = torch.randn(70_001, generator=torch.Generator().manual_seed(0)).abs()
    opposed = torch.where(size > size.quantile(1 - density), 100 * size, 0.01 * size)
    noise = [torch.randn(70_001, generator=torch.Generator().manual_seed(rank)) * 1e-3 for rank in (1, 2)]
    compare([[opposed + noise[0], noise[1] - opposed]] * 4, density, 1.0, "previous", 1.0, 4096)


@pytest.mark.parametrize("threads", [1, 3])
def test_neither_threads_nor_a_forced_list_of_all_change_a_byte(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        steps = [[gradient("few values", 400_000, torch.float32, step + r) for r in range(2)] for step in range(3)]
        for options in ({}, {"bracket": [0, 0]}):
            compare(steps, 1 / 64, 1.0, "previous", 1.0, 4096, **options)
    finally:
        torch.set_num_threads(before)


def test_every_chunk_sends_its_own_largest_and_ties_go_to_the_smallest_index():
    exchange = rt.LocalExchange(1, 1 / 32, method="topk", chunk=64)
    values = torch.ones(150)
    values[[70, 100]] = torch.tensor([0.5, 3.0])  # 2 of the second chunk: the largest, then the first of the ones
    sent = exchange.step([values]).nonzero().flatten().tolist()
    assert sent == [0, 1, 64, 100, 128], "2 of each whole chunk, and 22 / 32 of the last, rounded"


SETTINGS = {"published": PUBLISHED, "bf16": PUBLISHED | {"wire_dtype": torch.bfloat16, "chunk": 1024}, "plain": {"density": 0.1, "chunk": 64}}


@pytest.mark.parametrize("method", ["topk", "regtopk"])
@pytest.mark.parametrize(
    ("options", "leader"),
    [
        pytest.param(options, leader, id=f"{name}-{'leader' if leader else 'own'}")
        for name, options in SETTINGS.items() for leader in (False, True) if not leader or options.get("wire_dtype") != "2bit"  # which it refuses
    ],
)  # fmt: skip
def test_steps_with_void_and_idle_equal_the_reference_and_go_on_after_a_load(method, options, leader):
    sizes, workers = [9000, 500, 1], 3
    mu = 1.0 if method == "regtopk" else None
    known = {name: value for name, value in options.items() if name != "index_code"}
    exchange = rt.LocalExchange(workers, method=method, mu=1.0, support="leader" if leader else "own", **options)
    twin = reference.Exchange([reference.Worker(mu=mu, **known) for _ in range(workers)], sizes, leader=leader)
    generator = torch.Generator().manual_seed(0)
    for step in range(9):
        gradients = [[torch.randn(size, generator=generator) * (size != 500 or step < 3 or step > 6) for size in sizes] for _ in range(workers)]
        if step == 4:
            gradients[1][0][[5, 4095, 8999]] = torch.tensor([float("nan"), float("inf"), -float("inf")])
        averages, expected = torch.cat(exchange.step(gradients)), twin.step([torch.cat(worker) for worker in gradients])
        assert same_bits(averages, expected), step
        for rank, worker in enumerate(twin.workers):
            kept = torch.cat([residual for _, residual in sorted(exchange.residuals(rank).items())])
            assert same_bits(kept, worker.settled()), (step, rank)
        saved = copy.deepcopy(exchange.state_dict())
        exchange = rt.LocalExchange(workers, method=method, mu=1.0, support="leader" if leader else "own", **options)
        exchange.load_state_dict(saved)
    if not leader:
        assert exchange.stats(0)["steps"] == 0, "the sums begin anew, and nothing else"


def ways_in(rank, method):
    """The same gradients through the hook, attach, and average; return their bits."""
    results = []
    for way in ("hook", "attach", "average"):
        state = rt.RegTopKState(mu=1.0, **PUBLISHED) if method == "regtopk" else rt.TopKState(**PUBLISHED)
        torch.manual_seed(0)
        model = torch.nn.Linear(150, 60, bias=False)  # 9,000 entries: a partial chunk
        averages = []
        if way != "average":
            ddp = DistributedDataParallel(model, bucket_cap_mb=100)
            ddp.register_comm_hook(state, rt.sparse_hook) if way == "hook" else rt.attach(ddp, state)
        for step in range(4):
            given = torch.randn(8, 150, generator=torch.Generator().manual_seed(10 * rank + step))
            if way == "average":
                (weights,) = torch.autograd.grad(model(given).square().mean(), [model.weight])
                averages += state.average([weights])
            else:
                ddp.zero_grad()
                ddp(given).square().mean().backward()
                averages.append(model.weight.grad.clone())
        results.append((averages, state.stats()["sent_entries"], state.stats()["bytes_sent"]))
        state.close()
    return results


@pytest.mark.parametrize("method", ["topk", "regtopk"])
def test_every_way_in_gives_the_bits_of_the_simulation(method):
    outcomes = run_workers(ways_in, 2, method)
    exchange = rt.LocalExchange(2, method=method, mu=1.0, **PUBLISHED)
    torch.manual_seed(0)
    model = torch.nn.Linear(150, 60, bias=False)
    for step in range(4):
        inputs = [torch.randn(8, 150, generator=torch.Generator().manual_seed(10 * rank + step)) for rank in range(2)]
        gradients = [torch.autograd.grad(model(each).square().mean(), [model.weight])[0] for each in inputs]
        expected = exchange.step(gradients)
        assert all(torch.equal(averages[step], expected) for outcome in outcomes for averages, _, _ in outcome)
    k = 64 + 64 + round(808 / 64)
    for outcome in outcomes:
        assert {sent for _, sent, _ in outcome} == {4 * k} and len({sent for _, _, sent in outcome}) == 1


def test_what_the_operator_is_given_wrong_is_an_error_in_words():
    gradient, residual = torch.zeros(1000), torch.zeros(1000)

    def compress(k, chunk, chunk_k):
        payload = torch.empty(_C.payload_bytes(1000, k, torch.float32), dtype=torch.uint8)
        torch.ops.regtopk.compress_(gradient, residual, payload, None, None, k=k, chunk=chunk, chunk_k=chunk_k)

    compress(31, 256, 8)
    for wrong in ((31, 100, 8), (31, 32, 1), (31, 131072, 8), (31, -64, 8)):
        kind, message, _ = error_of(compress, *wrong)
        assert kind is ValueError and "compress_: expected a chunk of a power of two entries from 64 to 65536, got " in message
    for wrong in ((24, 256, 8), (257, 256, 8), (31, 256, 0), (31, 256, 300), (31, 64, 3)):
        kind, message, _ = error_of(compress, *wrong)
        assert kind is ValueError and "compress_: expected k=" in message, wrong


def test_the_preset_of_sparse_loco_is_what_was_published():
    state = rt.presets.sparse_loco()
    assert repr(state) == "TopKState(density=0.015625, decay=0.95, wire_dtype='2bit', chunk=4096)"
    assert repr(rt.presets.sparse_loco(k=128, decay=0.9)) == "TopKState(density=0.03125, decay=0.9, wire_dtype='2bit', chunk=4096)"
    for k in (0, 8192):
        with pytest.raises(ValueError, match=f"sparse_loco: expected 1 <= k <= chunk=4096, got k={k}"):
            rt.presets.sparse_loco(k=k)
    assert rt.presets.sparse_loco(density=0.5).density == 0.5
    assert "2508.15706" in rt.presets.sparse_loco.__doc__ and "Deviations" in rt.presets.sparse_loco.__doc__
