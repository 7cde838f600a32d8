"""Compress and aggregate against the plain PyTorch reference: the same bits, whatever the input."""

import math
import os

import pytest
import torch
from buckets import DTYPES, KINDS, gradient, same_bits
from cases import in_turn, of_one
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run_alone

import regtopk_torch  # noqa: F401  (registers the operators)
from regtopk_torch import _C, reference

OPERATORS = torch.ops.regtopk


class KernelWorker:
    """One worker on the operators, with the state that the exchange would keep."""

    def __init__(self, numel, dtype, k, mu, distortion, decay=1.0, **chunks):
        self.options = {"k": k, "mu": 1.0 if mu is None else mu, "distortion": distortion, "decay": decay, **chunks}
        self.regularised = mu is not None
        self.dtype = dtype
        self.residual = torch.zeros(numel, dtype=reference.accumulate_dtype(dtype))
        self.sent = self.feedback = None

    def compress(self, values, step):
        payload = torch.empty(_C.payload_bytes(values.numel(), self.options["k"], self.dtype), dtype=torch.uint8)
        OPERATORS.compress_(values, self.residual, payload, self.sent, self.feedback, **self.options, step=step)
        self.sent = payload
        return payload

    def put_back(self):
        OPERATORS.put_back_(self.residual, self.sent, dtype=self.dtype)
        self.sent = self.feedback = None


def compare(steps, density, mu, distortion, decay=1.0, chunk=None, **options):
    """Exchange `steps` (gradients of all workers, step by step) on both and compare everything at every step."""
    numel, dtype = steps[0][0].numel(), steps[0][0].dtype
    k = sum(reference.entries_to_send(density, min(chunk or numel, numel - begin)) for begin in range(0, numel, chunk or numel))
    chunks = {} if chunk is None else {"chunk": chunk, "chunk_k": reference.entries_to_send(density, chunk), **options}
    workers = [KernelWorker(numel, dtype, k, mu, distortion, decay, **chunks) for _ in steps[0]]
    oracle = reference.Exchange([reference.Worker(density, mu, distortion, decay, chunk=chunk) for _ in steps[0]])
    for step, gradients in enumerate(steps):
        before = [values.clone() for values in gradients]
        if oracle.workers[0].in_vain:
            for worker in workers:
                worker.put_back()
        given_in_all = [w.residual * decay + g.to(w.residual.dtype) for w, g in zip(workers, gradients, strict=True)]
        payloads = torch.stack([w.compress(g, step) for w, g in zip(workers, gradients, strict=True)])
        expected = oracle.step(gradients)
        assert all(map(same_bits, gradients, before)), "compress must only read the gradient"

        for worker, wanted, given, payload in zip(workers, oracle.workers, given_in_all, payloads, strict=True):
            assert torch.equal(payload, reference.encode(wanted.sent, numel, step=step))
            assert same_bits(worker.residual, wanted.residual)
            # Sent + kept = given, exactly, wherever what was given is finite.
            index, value = OPERATORS.decode(payload, numel=numel, k=k, dtype=dtype)
            restored = worker.residual.clone()
            restored[index] += value.to(restored.dtype)
            finite = given.isfinite()
            assert torch.equal(restored[finite], given[finite])

        average = torch.empty(numel, dtype=dtype)
        feedback = torch.empty(len(workers), k, dtype=workers[0].residual.dtype) if mu is not None else None
        OPERATORS.aggregate_(average, payloads, feedback, k=k, distortion=distortion, step=step)
        assert same_bits(average, expected)
        for rank, (worker, wanted) in enumerate(zip(workers, oracle.workers, strict=True)):
            if mu is not None:
                assert same_bits(feedback[rank], wanted.feedback)
                worker.feedback = feedback[rank]


@pytest.mark.parametrize("density, dtype, kind", in_turn(of_one([1e-9, 0.01, 0.3, 1.0]), of_one(DTYPES), of_one(KINDS)))
def test_hard_gradients_give_the_bits_of_the_reference(kind, dtype, density):
    # Two tiles, the last one partial; another kind in between, so that histories meet changed values.
    kinds = [kind, "normal", kind, kind]
    steps = [[gradient(name, 70_001, dtype, 10 * step + rank) for rank in range(2)] for step, name in enumerate(kinds)]
    compare(steps, density, 1.0, "previous")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_gradient_gives_the_bits_of_the_reference(data):
    numel = data.draw(st.one_of(st.integers(1, 40), st.integers(1, 20_000)))
    k = data.draw(st.one_of(st.just(1), st.just(numel), st.integers(1, numel)))
    dtype = data.draw(st.sampled_from(DTYPES))
    workers = data.draw(st.integers(1, 4))
    mu = data.draw(st.sampled_from([None, 0.01, 0.5, 1.0, 5.0, 200.0]))
    distortion = data.draw(st.sampled_from(["previous", "current"]))
    decay = data.draw(st.sampled_from([1.0, 0.95, 0.3, 1e-30]))
    kinds = data.draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=4))
    seed = data.draw(st.integers(0, 2**32))
    steps = [[gradient(kind, numel, dtype, seed + 7 * step + rank) for rank in range(workers)] for step, kind in enumerate(kinds)]
    compare(steps, k / numel, mu, distortion, decay)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=60),
    fraction=st.floats(0.01, 1.0),
)
def test_any_bit_pattern_gives_the_bits_of_the_reference(bits, fraction):
    values = torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)
    compare([[values, values.flip(0)], [values.flip(0), values]], fraction, 1.0, "previous")


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_the_number_of_threads_does_not_change_a_byte(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        compare([[gradient("few values", 400_000, torch.float32, step + r) for r in range(2)] for step in range(3)], 0.01, 1.0, "previous")
    finally:
        torch.set_num_threads(before)


def print_started_threads():
    for wanted in (1, 2, 3):
        torch.set_num_threads(wanted)
        gradient, residual, payload = (torch.empty(numel) for numel in (400_000, 400_000, _C.payload_bytes(400_000, 400, torch.float32)))
        before = len(os.listdir("/proc/self/task"))
        OPERATORS.compress_(gradient, residual, payload.view(torch.uint8)[: payload.numel()], None, None, k=400)
        print(len(os.listdir("/proc/self/task")) - before)


def test_the_operators_use_as_many_threads_as_torch_is_told_to():
    assert run_alone(print_started_threads) == (0, "0\n1\n1\n", "")


def test_a_step_worked_by_hand():
    # Worker 0 and 1 cancel in entry 0, agree in entry 1; worker 0 alone holds entry 3.
    exchange = regtopk_torch.LocalExchange(2, 0.5, method="regtopk", mu=1.0)
    first = [torch.tensor([8.0, 4.0, 1.0, 0.0]), torch.tensor([-8.0, 4.0, 2.0, 0.0])]
    # k = 2: both send entries 0 and 1. Z = [0, 8, 0, 0].
    assert exchange.step(first).tolist() == [0.0, 4.0, 0.0, 0.0]
    assert exchange.residuals(0)[0].tolist() == [0.0, 0.0, 1.0, 0.0]
    assert exchange.residuals(1)[0].tolist() == [0.0, 0.0, 2.0, 0.0]
    # rho of entry 0 is 0 / 8, so its score is 0 whatever its size; rho of entry 1 is 8 / 4 = 2, factor tanh(2) = 0.964.
    # Worker 0: scores 0, 0.964, 2, 0.5, so entries 1 and 2. Worker 1: scores 0, 0.964, 4, 0.5, likewise.
    second = [torch.tensor([9.0, 1.0, 1.0, 0.5]), torch.tensor([-9.0, 1.0, 2.0, 0.5])]
    assert exchange.step(second).tolist() == [0.0, 1.0, 3.0, 0.0]
    assert exchange.residuals(0)[0].tolist() == [9.0, 0.0, 0.0, 0.5]
    stats = exchange.stats()
    assert (stats["repeated"], stats["displaced"]) == (2, 2)  # entry 1 twice running, entry 0 displaced, on both
    # Top-k sends entry 0 again and again.
    plain = regtopk_torch.LocalExchange(2, 0.5, method="topk")
    assert plain.step(first).tolist() == [0.0, 4.0, 0.0, 0.0]
    assert plain.step(second).tolist() == [0.0, 0.0, 3.0, 0.0]


def test_ties_go_to_the_smallest_index():
    exchange = regtopk_torch.LocalExchange(1, 0.4, method="topk")
    assert exchange.step([torch.tensor([1.0, -2.0, 2.0, 2.0, -2.0])]).tolist() == [0.0, -2.0, 2.0, 0.0, 0.0]


@pytest.mark.parametrize("distortion", ["previous", "current"])
def test_the_two_distortions_differ_as_the_paper_and_its_scripts_do(distortion):
    exchange = regtopk_torch.LocalExchange(2, 0.5, method="regtopk", mu=1.0, distortion=distortion)
    # Both send entry 0: v = 4 and -2, Z = 2.
    exchange.step([torch.tensor([4.0, 0.0]), torch.tensor([-2.0, 0.0])])
    # "previous": rho = |2| / |4| = 0.5, 8 tanh(0.5) = 3.70 < 4, so worker 0 sends entry 1;
    #             rho = |2| / |-2| = 1, 8 tanh(1) = 6.09 > 4, so worker 1 sends entry 0.
    # "current":  rho = |8 + (2 - 4)| / |8| = 0.75, 8 tanh(0.75) = 5.08 > 4, so worker 0 sends entry 0;
    #             rho = |-8 + (2 + 2)| / |-8| = 0.5, 3.70 < 4, so worker 1 sends entry 1.
    average = exchange.step([torch.tensor([8.0, 4.0]), torch.tensor([-8.0, 4.0])])
    assert average.tolist() == ([-4.0, 2.0] if distortion == "previous" else [4.0, 2.0])


def test_our_tanh_is_tanh():
    x = torch.cat([torch.linspace(0, 25, 200_001, dtype=torch.float64), torch.logspace(-300, 1, 1001, dtype=torch.float64)])
    error = (reference.tanh_of_nonnegative(x) - torch.tanh(x)).abs() / torch.tanh(x).clamp(min=1e-320)
    assert error.max() < 1e-15  # a few units in the last place of fp64
    assert reference.tanh_of_nonnegative(torch.tensor([math.inf, 0.0], dtype=torch.float64)).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_value_and_its_neighbours_round_as_torch_does_but_saturate(dtype):
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float()
    finite = every[every.isfinite()]
    step = (finite.view(torch.int32)[:, None] + torch.tensor([-4097, -4096, -1, 0, 1, 4095, 4096, 4097, 32767, 32768], dtype=torch.int32)).view(torch.float32)
    values = step.flatten()[step.flatten().isfinite()]
    # The kernels round what they send: density 1, the residual holds the fp32 value and the gradient is 0.
    residual = values.clone()
    payload = torch.empty(_C.payload_bytes(values.numel(), values.numel(), dtype), dtype=torch.uint8)
    OPERATORS.compress_(torch.zeros(values.numel(), dtype=dtype), residual, payload, None, None, k=values.numel())
    _, sent = OPERATORS.decode(payload, numel=values.numel(), k=values.numel(), dtype=dtype)
    expected = values.to(dtype)
    expected = torch.where(expected.isinf(), expected.sign() * torch.finfo(dtype).max, expected)
    # 0 + residual: -0 becomes +0 before it is rounded.
    assert torch.equal(sent, expected)
    assert torch.equal(residual, values - expected.float())


@pytest.mark.parametrize("density, numel, k", [(0.001, 100, 1), (0.5, 3, 2), (0.5, 1, 1), (1.0, 7, 7), (0.001, 11_181_642, 11_182), (1e-12, 5, 1)])
def test_k_is_the_rounded_share_and_at_least_one(density, numel, k):
    assert reference.entries_to_send(density, numel) == k
