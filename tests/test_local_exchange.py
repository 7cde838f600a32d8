"""The simulation in one process: what it is given wrong is an error in words, and it can be reset."""

import numpy as np
import pytest
import torch
from buckets import same_bits

import regtopk_torch as rt

SPARSE = torch.eye(3).to_sparse()


@pytest.mark.parametrize("method", ["topk", "regtopk"])
def test_reset_drops_residuals_and_history_of_all_workers_and_begins_anew(method):
    generator = torch.Generator().manual_seed(0)
    steps = [[torch.randn(30, generator=generator) for _ in range(2)] for _ in range(4)]
    exchange, fresh = rt.LocalExchange(2, 0.1, method=method, mu=1.0), rt.LocalExchange(2, 0.1, method=method, mu=1.0)
    for gradients in steps:
        exchange.step(gradients)
    counted = exchange.stats()["steps"]
    exchange.reset()
    assert all(not residual.any() for rank in range(2) for residual in exchange.residuals(rank).values())
    for gradients in steps:
        assert same_bits(exchange.step(gradients), fresh.step(gradients))
    assert counted == 4 and exchange.stats()["steps"] == 8, "the sums go on"
    exchange.reset()
    assert exchange.step([torch.ones(7)] * 2).shape == (7,), "another model"


@pytest.mark.parametrize(
    ("gradients", "kind"),
    [
        ([None, None], TypeError),
        ([[torch.zeros(3), None], [torch.zeros(3), None]], TypeError),
        ([{"weight": torch.zeros(3)}] * 2, TypeError),
        ([np.zeros(3, dtype=np.float32)] * 2, TypeError),
        ([[np.zeros(3, dtype=np.float32)]] * 2, TypeError),
        ([torch.zeros(3), [torch.zeros(3)]], (TypeError, ValueError)),
        ([torch.zeros(3), None], TypeError),
        (None, TypeError),
        (3, TypeError),
        ([SPARSE] * 2, (TypeError, ValueError)),
        ([[SPARSE]] * 2, (TypeError, ValueError)),
    ],
    ids=["None", "None within", "dict", "array", "array within", "tensor and list", "tensor and None", "nothing", "number", "sparse", "sparse within"],
)  # fmt: skip
def test_what_is_no_dense_tensor_is_an_error_that_says_what_was_expected(gradients, kind):
    exchange = rt.LocalExchange(2, 0.5)
    with pytest.raises(kind, match="^LocalExchange: expected .*, got "):
        exchange.step(gradients)
    assert exchange.step([torch.ones(2)] * 2).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("buckets", [[[0, 0], [1]], [[0, 1], [1]], [[0], [1], [0]]], ids=["within one", "in two", "apart"])
def test_a_parameter_in_two_places_of_the_buckets_is_an_error_that_names_it(buckets):
    exchange = rt.LocalExchange(2, 0.5)
    with pytest.raises(ValueError, match="^LocalExchange: expected .* parameter .*, got "):
        exchange.step([[torch.ones(3), torch.ones(3)]] * 2, buckets)
    assert exchange.step([torch.ones(2)] * 2).tolist() == [1.0, 0.0]


def test_a_parameter_of_another_size_is_an_error_that_names_what_this_class_has():
    exchange = rt.LocalExchange(2, 0.5)
    exchange.step([torch.ones(2)] * 2)
    with pytest.raises(ValueError, match="LocalExchange: expected a parameter of 2 entries, as in the last step, got 3; .*reset"):
        exchange.step([torch.zeros(3)] * 2)
    exchange.reset()
    exchange.step([torch.zeros(3)] * 2)


def test_an_error_in_one_bucket_costs_nothing_of_another():
    exchange = rt.LocalExchange(1, 0.5, method="topk")
    given = torch.arange(1.0, 11.0)
    exchange.step([[given, torch.ones(4)]], buckets=[[0], [1]])
    kept = exchange.residuals(0)[0]
    with pytest.raises(TypeError, match="LocalExchange: expected gradients of dtype"):
        exchange.step([[given, torch.ones(4, dtype=torch.int64)]], buckets=[[0], [1]])
    assert torch.equal(exchange.residuals(0)[0], kept)
