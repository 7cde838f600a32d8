"""Every instruction set the machine has computes the bytes that the reference states.

The variant is set in the process, through the extension; the last tests set it through REGTOPK_CPU in processes of their own.
"""

import math
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
import torch
from hypothesis import strategies

from regtopk_torch import _C, reference

ROOT = Path(__file__).resolve().parent.parent
ops = torch.ops.regtopk
VARIANTS = _C.available_cpu_variants()
VECTOR_VARIANTS = [name for name in VARIANTS if name != "scalar"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PLAN, WORKERS = 17, 2
LARGEST_KEY, INFINITY_KEY = 0x7FFFFFFF, 0x7F800000

# Brackets as (low, high) score keys. Each is wrong for most inputs, in its own way.
BRACKETS = {
    "sampled": None,
    "all below it": (INFINITY_KEY, LARGEST_KEY),
    "all inside it": (0, LARGEST_KEY),
    "all above it": (0, 0),
    "one key, 1.0": (0x3F800000, 0x3F800000),
    "high below low": (0x40000000, 0x3F000000),
}


@pytest.fixture(autouse=True)
def as_it_was():
    threads, variant = torch.get_num_threads(), _C.cpu_variant()
    yield
    torch.set_num_threads(threads)
    _C.set_cpu_variant(variant)


def normal(numel, generator):
    return torch.randn(numel, generator=generator)


def repeated_in_99_percent(numel, generator):
    return torch.where(torch.rand(numel, generator=generator) < 0.99, 0.75, normal(numel, generator))


def in_one_binade(numel, generator):
    return (1 + torch.rand(numel, generator=generator)) * torch.where(torch.rand(numel, generator=generator) < 0.5, -1, 1)


def layers_of_different_scale(numel, generator):
    scale = torch.tensor([1.0, 1e-6, 1e3])[torch.arange(numel) * 3 // numel]
    return normal(numel, generator) * scale


def rows_of_eight(numel, generator):
    rows = torch.rand(-(-numel // 8), generator=generator) < 0.01
    return torch.where(rows.repeat_interleave(8)[:numel], 4.0, 0.1) * normal(numel, generator)


def with_non_finite(numel, generator):
    values = normal(numel, generator)
    values[torch.rand(numel, generator=generator) < 0.01] = math.inf
    values[torch.rand(numel, generator=generator) < 0.01] = -math.inf
    values[torch.rand(numel, generator=generator) < 0.01] = math.nan
    return values


GRADIENTS = {
    "normal": normal,
    "all equal": lambda numel, generator: torch.full((numel,), -0.5),
    "all zero": lambda numel, generator: torch.zeros(numel),
    "repeated in 99 %": repeated_in_99_percent,
    "one binade": in_one_binade,
    "different scales": layers_of_different_scale,
    "rows of eight": rows_of_eight,
    "sorted up": lambda numel, generator: torch.arange(numel) / numel,
    "sorted down": lambda numel, generator: torch.arange(numel, 0, -1) / numel,
    "few values": lambda numel, generator: (4 * normal(numel, generator)).round() / 4,
    "subnormal": lambda numel, generator: normal(numel, generator) * 1e-39,
    "overflows the wire": lambda numel, generator: normal(numel, generator) * 2e38,
    "not finite": with_non_finite,
}


def make_gradients(kind, numel, dtype, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [[GRADIENTS[kind](numel, generator).to(dtype) for _ in range(WORKERS)] for _ in range(steps)]


def run_kernels(gradients, k, *, mu=None, distortion="previous", bracket=None):
    """Exchange between WORKERS workers by the operators; returns everything they wrote, by step."""
    numel, dtype = gradients[0][0].numel(), gradients[0][0].dtype
    residuals = [torch.zeros(numel) for _ in range(WORKERS)]
    sent, feedback = [None] * WORKERS, [None] * WORKERS
    options = {"k": k, "distortion": distortion}
    result = []
    for step, step_gradients in enumerate(gradients):
        payloads = torch.empty(WORKERS, _C.payload_bytes(numel, k, dtype), dtype=torch.uint8)
        for rank, gradient in enumerate(step_gradients):
            ops.compress_(
                gradient, residuals[rank], payloads[rank], sent[rank], feedback[rank], mu=mu or 1.0, step=step, plan=PLAN,
                bracket=bracket, **options
            )  # fmt: skip
        averages = [torch.empty(numel, dtype=dtype) for _ in range(WORKERS)]
        for rank in range(WORKERS):
            feedback[rank] = None if mu is None else torch.empty(1, k)
            ops.aggregate_(averages[rank], payloads, feedback[rank], rank=rank, step=step, plan=PLAN, **options)
        sent = list(payloads.clone())
        feedback = [None if row is None else row[0] for row in feedback]
        result.append([payloads, *(bits(residual) for residual in residuals), *(bits(average) for average in averages)])
        if not averages[0].isfinite().all():  # a void step
            for rank in range(WORKERS):
                residuals[rank] = residuals[rank].clone()
                ops.put_back_(residuals[rank], sent[rank], dtype=dtype)
            sent, feedback = [None] * WORKERS, [None] * WORKERS
    return result


def run_reference(gradients, k, *, mu=None, distortion="previous"):
    numel = gradients[0][0].numel()
    exchange = reference.Exchange([reference.Worker(k / numel, mu, distortion) for _ in range(WORKERS)])
    result = []
    for step, step_gradients in enumerate(gradients):
        average = exchange.step(step_gradients)
        payloads = torch.stack([reference.encode(worker.sent, numel, step=step, plan=PLAN) for worker in exchange.workers])
        result.append([payloads, *(bits(worker.residual) for worker in exchange.workers), *[bits(average)] * WORKERS])
    return result


def bits(tensor):
    return tensor.clone().view(torch.int16 if tensor.element_size() == 2 else torch.int32)


def assert_same(got, wanted):
    names = ["payloads", *(f"residual of rank {rank}" for rank in range(WORKERS)), *(f"average at rank {rank}" for rank in range(WORKERS))]
    for step, (got_step, wanted_step) in enumerate(zip(got, wanted, strict=True)):
        for name, one, other in zip(names, got_step, wanted_step, strict=True):
            assert torch.equal(one, other), f"{name} in step {step}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", GRADIENTS)
def test_payload_residual_and_average_are_those_of_the_reference(kind, dtype):
    for numel, ks in ((1, [1]), (31, [1, 15, 31]), (5000, [1, 5, 500, 5000]), (70_001, [1, 70, 40_000])):
        gradients = make_gradients(kind, numel, dtype, steps=3)
        for k in ks:
            wanted = run_reference(gradients, k, mu=1.0)
            for variant in VARIANTS:
                _C.set_cpu_variant(variant)
                assert_same(run_kernels(gradients, k, mu=1.0), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", GRADIENTS)
def test_a_wrong_bracket_changes_no_bit(kind, dtype):
    # Beyond 2 k + 65,536 entries a range drops all but its k best; one thread makes the range as long as possible.
    torch.set_num_threads(1)
    numel, k = 100_000, 700
    gradients = make_gradients(kind, numel, dtype, steps=3)
    _C.set_cpu_variant("scalar")
    wanted = run_kernels(gradients, k, mu=0.5)
    for variant in VECTOR_VARIANTS:
        _C.set_cpu_variant(variant)
        for bracket in BRACKETS.values():
            assert_same(run_kernels(gradients, k, mu=0.5, bracket=bracket), wanted)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_number_of_threads_changes_no_bit(variant):
    _C.set_cpu_variant(variant)
    for kind in ("normal", "all equal", "few values", "sorted up"):
        gradients = make_gradients(kind, 200_000, torch.float32, steps=2)
        torch.set_num_threads(1)
        wanted = run_kernels(gradients, 2000, mu=1.0)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert_same(run_kernels(gradients, 2000, mu=1.0), wanted)


@pytest.mark.parametrize("variant", VECTOR_VARIANTS)
@hypothesis.settings(max_examples=50, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(data=strategies.data())
def test_any_bucket_gives_the_bytes_of_the_plain_path_and_of_the_reference(variant, data):
    numel = data.draw(strategies.one_of(strategies.integers(1, 300), strategies.integers(1, 300_000)), "numel")
    k = data.draw(strategies.one_of(strategies.sampled_from([1, max(1, numel // 1000), max(1, numel // 10), numel]), strategies.integers(1, numel)), "k")
    kind = data.draw(strategies.sampled_from(sorted(GRADIENTS)), "gradient")
    dtype = data.draw(strategies.sampled_from(DTYPES), "dtype")
    method = {
        "mu": data.draw(strategies.sampled_from([None, 0.01, 1.0, 5.0]), "mu"),
        "distortion": data.draw(strategies.sampled_from(["previous", "current"]), "distortion"),
    }
    bracket = data.draw(strategies.sampled_from(sorted(BRACKETS)), "bracket")
    threads = data.draw(strategies.integers(1, 3), "threads")
    gradients = make_gradients(kind, numel, dtype, steps=3, seed=data.draw(strategies.integers(0, 2**32), "seed"))

    torch.set_num_threads(threads)
    _C.set_cpu_variant("scalar")
    plain = run_kernels(gradients, k, **method)
    _C.set_cpu_variant(variant)
    got = run_kernels(gradients, k, bracket=BRACKETS[bracket], **method)
    assert_same(got, plain)
    assert_same(got, run_reference(gradients, k, **method))


@pytest.mark.parametrize("variant", VARIANTS)
def test_unaligned_buckets_give_the_same_bytes(variant):
    _C.set_cpu_variant(variant)
    for dtype in DTYPES:
        numel, k = 1_500_003, 1500  # large enough for the writes around the caches
        gradient = torch.randn(numel + 1, generator=torch.Generator().manual_seed(3)).to(dtype)
        results = []
        for first in (0, 1):
            shifted = torch.empty(numel + 1, dtype=dtype)[first : first + numel].copy_(gradient[:numel])
            residual = torch.zeros(numel + 1)[first : first + numel]
            payload = torch.empty(1, _C.payload_bytes(numel, k, dtype), dtype=torch.uint8)
            ops.compress_(shifted, residual, payload[0], None, None, k=k)
            ops.aggregate_(shifted, payload, None, k=k)
            results.append([payload, bits(residual), bits(shifted)])
        for one, other in zip(*results, strict=True):
            assert torch.equal(one, other)


OF_THE_ENVIRONMENT = """
import os, sys, torch
for value in sys.argv[1:]:
    if child := os.fork():
        os.waitpid(child, 0)
    else:
        os.environ["REGTOPK_CPU"] = value
        from regtopk_torch import _C
        print(value, _C.cpu_variant())
        break
"""


def test_the_environment_chooses_the_instruction_set_and_an_unknown_one_is_an_error_at_import():
    result = subprocess.run([sys.executable, "-c", OF_THE_ENVIRONMENT, *VARIANTS, "sse9"], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.stdout.split() == [word for name in VARIANTS for word in (name, name)]
    assert "ValueError: REGTOPK_CPU: expected avx512, avx2 or scalar, got 'sse9'; unset it to use the widest one here" in result.stderr


def test_the_widest_instruction_set_is_the_default():
    assert _C.cpu_variant() == VARIANTS[-1]


def test_an_unsupported_instruction_set_is_an_error():
    missing = [name for name in ("avx2", "avx512") if name not in VARIANTS]
    for name in missing or ["neon"]:
        with pytest.raises(ValueError, match=f"REGTOPK_CPU: expected .*, got '{name}'; unset it"):
            _C.set_cpu_variant(name)
