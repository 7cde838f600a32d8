"""Any two parts of the exchange together: the bits of the reference, or a sentence that says why not.

An adaptive density follows the bytes of what it is together with: test_adaptive.py has it.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_dense_rule import crossing, everything, kept_by
from test_shared_support import SIZES, steps_of

import regtopk_torch as rt
from regtopk_torch import reference

# What each part may be given. The reference takes those of WORKER for each worker, and knows no index codes, which change no value.
PARTS = {
    "density": [0.3, crossing],
    "decay": [0.9],
    "dense": [everything],
    "wire_dtype": [torch.bfloat16, torch.float16, "sign", "2bit"],
    "index_code": ["elias-fano"],
    "support": ["leader"],
    "chunk": [64, 1024],
    "momentum": [{"momentum": 0.9}, {"momentum": 0.5, "nesterov": True}, {"momentum": 0.5, "mask_momentum": True}],
    "clip_norm": [2.0],
}
WORKER = ("decay", "wire_dtype", "chunk", "momentum", "nesterov", "mask_momentum", "clip_norm")
EXCLUDED = [{"support": "leader", "wire_dtype": "sign"}, {"support": "leader", "wire_dtype": "2bit"}]


@st.composite
def two_parts(draw):
    first, second = draw(st.lists(st.sampled_from(sorted(PARTS)), min_size=2, max_size=2, unique=True))
    options = {}
    for part in (first, second):
        value = draw(st.sampled_from(PARTS[part]))
        options |= value if isinstance(value, dict) else {part: value}
    return options


def twin_of(options, mu, workers):
    known = {name: options[name] for name in WORKER if name in options}
    return reference.Exchange([reference.Worker(0.02, mu, **known) for _ in range(workers)], SIZES, leader="support" in options, dense="dense" in options)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(two_parts(), st.sampled_from([None, 2.0]), st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]), st.integers(1, 3))
def test_steps_equal_the_reference(options, mu, dtype, workers):
    method = {"method": "topk"} if mu is None else {"method": "regtopk", "mu": mu}
    density, rest = options.get("density", 0.02), {name: value for name, value in options.items() if name != "density"}
    if options in EXCLUDED:
        with pytest.raises(ValueError, match="LocalExchange: expected values of 16 bits or more with support='leader', got"):
            rt.LocalExchange(workers, density, **method, **rest)
        return
    exchange = rt.LocalExchange(workers, density, **method, **rest)
    twin = twin_of(options, mu, workers)
    for step, gradients in enumerate(steps_of(dtype, workers)):
        for worker in twin.workers:
            worker.density = density(step) if callable(density) else density
        averages, expected = torch.cat(exchange.step(gradients)), twin.step([torch.cat(worker) for worker in gradients])
        assert torch.equal(averages.nan_to_num(7), expected.nan_to_num(7)), step
        for rank, worker in enumerate(twin.workers):
            assert torch.equal(kept_by(exchange, rank), worker.settled()), (step, rank)
    assert exchange.stats(0)["void_steps"] > 0
