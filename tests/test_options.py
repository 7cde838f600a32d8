"""Options out of range: what was expected, what came, what to do."""

import importlib
import inspect
import sys

import pytest
import torch
import torch.distributed as dist
from processes import run_alone, run_workers

import regtopk_torch as rt
from regtopk_torch import _C
from regtopk_torch.options import COMMON, Common

WRONG_OPTIONS = [
    ({"density": 10}, ValueError, "expected 0 < density <= 1, got density=10; pass a fraction, 0.001 keeps one entry in 1000"),
    ({"density": 0}, ValueError, "expected 0 < density <= 1, got density=0; pass a fraction"),
    ({"density": float("nan")}, ValueError, "expected 0 < density <= 1, got density=nan"),
    ({"density": "0.1"}, TypeError, "expected density to be a number, got '0.1'"),
    ({"density": True}, TypeError, "expected density to be a number, got True"),
    ({"mu": 0}, ValueError, "expected a finite mu > 0, got mu=0; TopKState is the limit mu -> 0"),
    ({"mu": -1.0}, ValueError, "expected a finite mu > 0, got mu=-1.0"),
    ({"mu": float("inf")}, ValueError, "expected a finite mu > 0, got mu=inf"),
    ({"mu": float("nan")}, ValueError, "expected a finite mu > 0, got mu=nan"),
    *(
        ({"chunk": chunk}, ValueError, f"expected chunk to be None or a power of two from 64 to 65536, got {chunk!r}")
        for chunk in (0, 32, 100, 131072, 4096.0, True, "4096")
    ),
    ({"momentum": "0.9"}, TypeError, "expected momentum to be a number, got '0.9'"),
    *(({"momentum": m}, ValueError, f"expected 0 <= momentum < 1, got momentum={m}; 0 gives gradients as they are") for m in (1, -0.1, float("nan"))),
    *(({"momentum": 0.9, name: 1}, TypeError, f"expected {name} to be True or False, got 1") for name in ("nesterov", "mask_momentum")),
    *(({name: True}, ValueError, f"expected momentum > 0 with {name}=True, got momentum=0.0; pass momentum=0.9") for name in ("nesterov", "mask_momentum")),
    ({"clip_norm": "1"}, TypeError, "expected clip_norm to be a number, got '1'"),
    *(({"clip_norm": c}, ValueError, f"expected clip_norm to be None or a finite number > 0, got clip_norm={c}") for c in (0, -1.0, float("inf"), float("nan"))),
    ({"distortion": "next"}, ValueError, "expected distortion 'previous' or 'current', got 'next'"),
]


@pytest.mark.parametrize("name", ["method", "who", "names_of", "densty"])
def test_an_option_that_there_is_not_is_named(name):
    for who, construct in (("TopKState", rt.TopKState), ("RegTopKState", rt.RegTopKState)):
        with pytest.raises(TypeError, match=f"^{who}: expected options of decay, .*, got '{name}'"):
            construct(**{name: "topk"})
    with pytest.raises(TypeError, match=r"; did you mean 'grad_scaler'\?$"):
        rt.TopKState(0.1, grad_scalar=None)


@pytest.mark.parametrize("options, error, message", WRONG_OPTIONS, ids=str)
def test_every_option_out_of_range_is_named(options, error, message):
    for who, construct in (("RegTopKState", rt.RegTopKState), ("LocalExchange", lambda **o: rt.LocalExchange(2, **o))):
        with pytest.raises(error) as caught:
            construct(**options)
        assert str(caught.value).startswith(f"{who}: {message}")
    if "density" in options:
        with pytest.raises(error) as caught:
            rt.TopKState(**options)
        assert str(caught.value).startswith(f"TopKState: {message}")


@pytest.mark.parametrize("constructor", [rt.TopKState, rt.RegTopKState, rt.LocalExchange])
def test_every_option_is_in_the_signature_and_in_the_docstring_and_known_to_type_checkers(constructor):
    parameters = inspect.signature(constructor).parameters
    assert Common.__annotations__.keys() == COMMON.keys()
    assert {name: parameters[name].default for name in COMMON} == COMMON
    for name in parameters:
        assert name in constructor.__doc__ or name == "levels" and constructor is rt.LocalExchange, name


def test_a_state_needs_a_process_group_when_it_is_used():
    with pytest.raises(RuntimeError) as caught:
        rt.RegTopKState().ranks  # noqa: B018
    assert str(caught.value) == (
        "RegTopKState: expected an initialised default process group, got none; call torch.distributed.init_process_group first"
    )


def construct_for_a_foreign_group(rank):
    group = dist.new_group([0])
    try:
        result = rt.RegTopKState(process_group=group).ranks
    except ValueError as error:
        result = str(error)
    dist.barrier()  # no rank leaves while the other still connects
    return result


def test_a_group_without_this_rank_is_an_error():
    expected = "RegTopKState: expected a process group with this rank (1) in it, got one without; use the state on the group's ranks only"
    assert run_workers(construct_for_a_foreign_group, 2) == [[0], expected]


@pytest.mark.parametrize("option", [{"mu": 5.0}, {"distortion": "current"}])
def test_topk_takes_nothing_that_it_would_not_use(option):
    [(name, value)] = option.items()
    with pytest.raises(TypeError, match=f"TopKState: expected no {name}, got {name}={value!r}; RegTopKState takes it"):
        rt.TopKState(0.1, **option)


def test_local_exchange_names_what_does_not_fit():
    with pytest.raises(ValueError, match="LocalExchange: expected num_workers to be an integer of at least 1, got 0"):
        rt.LocalExchange(0)
    with pytest.raises(ValueError, match="LocalExchange: expected method 'topk' or 'regtopk', got 'dense'"):
        rt.LocalExchange(2, method="dense")
    exchange = rt.LocalExchange(2, 0.5)
    with pytest.raises(ValueError, match="LocalExchange: expected the gradients of 2 workers, got 1"):
        exchange.step([torch.zeros(3)])
    with pytest.raises(ValueError, match=r"LocalExchange: expected gradient 0 of shape \[3\] and dtype Float of every worker, got \[4\] and Float"):
        exchange.step([torch.zeros(3), torch.zeros(4)])
    with pytest.raises(ValueError, match="LocalExchange: expected 2 gradients of every worker, got 1"):
        exchange.step([[torch.zeros(3), torch.zeros(3)], [torch.zeros(3)]])
    with pytest.raises(IndexError, match="LocalExchange: expected parameters below 1 in the buckets, got 1"):
        exchange.step([[torch.zeros(3)], [torch.zeros(3)]], [[1]])
    with pytest.raises(ValueError, match="LocalExchange: expected buckets of at least one parameter, got an empty one"):
        exchange.step([[torch.zeros(3)], [torch.zeros(3)]], [[]])
    for rank in (-1, 2):
        with pytest.raises(IndexError, match=f"LocalExchange: expected a rank below 2, got {rank}"):
            exchange.stats(rank)
    with pytest.raises(ValueError, match="LocalExchange: expected at least 1 worker, got 0"):
        _C.LocalExchange(_C.Options(regularised=False, density=0.1, mu=1.0, distortion="previous"), 0)
    for dtype in (torch.int32, torch.complex64):
        with pytest.raises(TypeError, match="^LocalExchange: expected gradients of dtype float64, float32, bfloat16 or float16, got "):
            exchange.step([torch.zeros(3, dtype=dtype)] * 2)
    with pytest.raises(ValueError) as caught:
        exchange.step([torch.zeros(3, device="meta")] * 2)
    here = "the CPU or a CUDA device" if _C.has_cuda_kernels() else "the CPU"
    assert str(caught.value) == f"LocalExchange: expected gradients on {here}, got meta; this build has no kernels for it"
    # After all that the exchange still works, with what it held.
    assert exchange.step([torch.ones(2), torch.ones(2)]).tolist() == [1.0, 0.0]
    with pytest.raises(ValueError, match="LocalExchange: expected a parameter of 2 entries, as in the last step, got 3; call reset"):
        exchange.step([torch.zeros(3)] * 2)


def test_a_local_exchange_names_what_does_not_fit_in_a_state_dict():
    exchange = rt.LocalExchange(2, 0.5)
    exchange.step([torch.ones(3)] * 2)
    good = exchange.state_dict()
    who = "LocalExchange.load_state_dict"
    one = good["workers"][0]
    for wrong, error, message in (
        (3, ValueError, f"{who}: expected the state of 2 workers, got int"),
        ({"workers": [one]}, ValueError, f"{who}: expected the state of 2 workers, got 1"),
        ({"workers": [one, 3]}, TypeError, f"{who}: expected a state dict of worker 1, got int"),
        (
            {"workers": [one, {**one, "parameters": {"weight": one["parameters"]["0"]}}]}, ValueError,
            f"{who}: worker 1: expected the shape and the residual of a parameter by its index, got others under 'weight'",
        ),
    ):  # fmt: skip
        with pytest.raises(error) as caught:
            exchange.load_state_dict(wrong)
        assert str(caught.value) == message
    assert exchange.residuals(1)[0].tolist() == good["workers"][1]["parameters"]["0"]["residual"].tolist()


def import_without_extension():
    for name in [name for name in sys.modules if name.partition(".")[0] == "regtopk_torch"]:
        del sys.modules[name]
    sys.modules["regtopk_torch._C"] = None
    importlib.import_module("regtopk_torch")


def test_without_its_extension_the_package_says_how_to_build_it():
    status, _, errors = run_alone(import_without_extension)
    assert status == 1
    assert f"ImportError: regtopk_torch: expected its extension built for torch {torch.__version__}, got: " in errors
    assert "; run `make setup` or `pip install" in errors
