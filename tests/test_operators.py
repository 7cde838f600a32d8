"""The operators as torch sees them: schemas, fake kernels, and an error for every broken contract."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import regtopk_torch  # noqa: F401  (registers the operators)
from regtopk_torch import _C

OPERATORS = torch.ops.regtopk
NUMEL, K = 1000, 20


def compress_arguments():
    payload = torch.empty(_C.payload_bytes(NUMEL, K, torch.float32), dtype=torch.uint8)
    return [torch.randn(NUMEL), torch.zeros(NUMEL), payload, None, None]


def compressed(step=0):
    arguments = compress_arguments()
    OPERATORS.compress_(*arguments, k=K, step=step)
    return arguments[2]


def test_opcheck_finds_nothing():
    payload, sent = compressed(), compressed()
    feedback = torch.rand(K)
    torch.library.opcheck(OPERATORS.compress_.default, (*compress_arguments()[:3], sent, feedback), {"k": K, "mu": 5.0})
    torch.library.opcheck(OPERATORS.compress_.default, tuple(compress_arguments()), {"k": K})
    torch.library.opcheck(OPERATORS.aggregate_.default, (torch.empty(NUMEL), torch.stack([payload, sent]), torch.empty(2, K)), {"k": K})
    torch.library.opcheck(OPERATORS.aggregate_.default, (torch.empty(NUMEL), payload[None], None), {"k": K})
    for payloads in (payload[None], torch.stack([payload, sent])):
        torch.library.opcheck(OPERATORS.measure_.default, (torch.randn(NUMEL), payloads, torch.empty(1, dtype=torch.float64)), {"k": K})
    torch.library.opcheck(OPERATORS.put_back_.default, (torch.zeros(NUMEL), payload), {"dtype": torch.float32})
    index, value = OPERATORS.decode(payload, numel=NUMEL, k=K, dtype=torch.float32)
    torch.library.opcheck(OPERATORS.encode.default, (index, value), {"numel": NUMEL})
    torch.library.opcheck(OPERATORS.decode.default, (payload,), {"numel": NUMEL, "k": K, "dtype": torch.float32})


def test_fake_tensors_pass_through():
    with FakeTensorMode():
        OPERATORS.compress_(*compress_arguments(), k=K)
        payload = OPERATORS.encode(torch.arange(K), torch.randn(K), numel=NUMEL)
    assert payload.shape == (_C.payload_bytes(NUMEL, K, torch.float32),)


NAMES = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("regtopk::"))
GIVEN = {"Tensor": lambda: torch.empty(1), "int": lambda: 1, "float": lambda: 1.0, "bool": lambda: False, "str": lambda: "previous", "List[int]": lambda: [1]}


@pytest.mark.parametrize("name", NAMES)
def test_a_fake_takes_all_that_its_operator_takes(name):
    operator = getattr(OPERATORS, name.removeprefix("regtopk::")).default
    with FakeTensorMode():
        values = {}
        for argument in operator._schema.arguments:
            kind = str(argument.type)
            kind = kind[len("Optional[") : -1] if kind.startswith("Optional[") else kind
            values[argument.name] = torch.float32 if "dtype" in argument.name else GIVEN[kind]()
        operator(**values)


@pytest.mark.parametrize(
    "position, value, message",
    [
        (0, torch.zeros(NUMEL, dtype=torch.int64), "expected gradients of dtype float64, float32, bfloat16 or float16, got Long"),
        (0, torch.zeros(NUMEL, dtype=torch.complex64), "got ComplexFloat"),
        (0, torch.zeros(NUMEL, dtype=torch.bool), "got Bool"),
        (0, torch.zeros(10, 100), r"expected gradient contiguous with shape \[1000\], got shape \[10, 100\]"),
        (0, torch.zeros(2 * NUMEL)[::2], r"and strides \[2\]"),
        (0, torch.zeros(0), r"expected 1 <= k <= min\(0 gradient entries, 2\^32 - 1\), got k=20"),
        (1, torch.zeros(NUMEL, dtype=torch.float64), "expected residual of dtype Float, got Double"),
        (1, torch.zeros(5), r"expected residual contiguous with shape \[1000\], got shape \[5\]"),
        (2, torch.zeros(5, dtype=torch.uint8), r"expected payload contiguous with shape \[\d+\], got shape \[5\]"),
        (3, torch.zeros(5, dtype=torch.uint8), "expected sent of at least 64 bytes, got 5"),
        (3, torch.zeros(640, dtype=torch.uint8), "expected a sent that holds 1 to 1000 entries, got 0"),
        (4, torch.zeros(K), "expected feedback together with the payload it belongs to, got feedback alone"),
    ],
)
def test_compress_names_the_argument_that_breaks_its_contract(position, value, message):
    arguments = compress_arguments()
    arguments[position] = value
    with pytest.raises((ValueError, TypeError), match=f"^compress_: .*{message}"):
        OPERATORS.compress_(*arguments, k=K)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"k": 0}, "expected 1 <= k <= .*, got k=0"),
        ({"k": NUMEL + 1}, "expected 1 <= k <= .*, got k=1001"),
        ({"k": K, "mu": 0.0}, "expected a finite mu > 0, got mu=0"),
        ({"k": K, "mu": float("nan")}, "expected a finite mu > 0, got mu=nan"),
        ({"k": K, "distortion": "past"}, "expected distortion 'previous' or 'current', got 'past'"),
    ],
)
def test_compress_names_the_option_that_is_out_of_range(options, message):
    with pytest.raises(ValueError, match=f"^compress_: {message}"):
        OPERATORS.compress_(*compress_arguments(), **options)


def test_sent_must_not_be_the_payload_itself():
    arguments = compress_arguments()
    OPERATORS.compress_(*arguments, k=K)
    arguments[3] = arguments[2]
    with pytest.raises(ValueError, match="compress_: expected payload and sent in different memory, got the same"):
        OPERATORS.compress_(*arguments, k=K)


def test_feedback_must_fit_the_payload_sent():
    arguments = compress_arguments()
    arguments[3], arguments[4] = compressed(), torch.zeros(K + 1)
    with pytest.raises(ValueError, match=r"compress_: expected feedback contiguous with shape \[20\], got shape \[21\]"):
        OPERATORS.compress_(*arguments, k=K)


@pytest.mark.parametrize(
    "payloads, feedback, options, message",
    [
        (lambda p: p[None].float(), None, {}, "expected payloads of dtype Byte, got Float"),
        (lambda p: p, None, {}, r"expected payloads contiguous with shape \[workers, \d+\], got shape"),
        (lambda p: p[None, :-1], None, {}, "expected payloads contiguous"),
        (lambda p: p[None], torch.empty(1, K, dtype=torch.float64), {}, "expected feedback of dtype Float, got Double"),
        (lambda p: p[None], torch.empty(1, K + 1), {}, r"expected feedback contiguous with shape \[workers fed back, 20\], got shape \[1, 21\]"),
        (lambda p: p[None], torch.empty(1, K), {"rank": 1}, "expected feedback for ranks below 1, got ranks 1 to 1"),
        (lambda p: p[None], torch.empty(1, K), {"rank": -1}, "expected feedback for ranks below 1, got ranks -1 to -1"),
    ],
)
def test_aggregate_names_the_argument_that_breaks_its_contract(payloads, feedback, options, message):
    with pytest.raises((ValueError, TypeError), match=f"^aggregate_: {message}"):
        OPERATORS.aggregate_(torch.empty(NUMEL), payloads(compressed()), feedback, k=K, **options)


def damaged(payload, at, value):
    payload = payload.clone()
    payload[at] = value
    return payload


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda p: OPERATORS.decode(p, numel=NUMEL, k=K + 1, dtype=torch.float32), ValueError, "decode: expected k=21 in the payload, got 20"),
        (lambda p: OPERATORS.decode(p[:9], numel=NUMEL, k=K, dtype=torch.float32), ValueError, "decode: expected payload of at least 64 bytes, got 9"),
        (lambda p: OPERATORS.decode(p[:-1], numel=NUMEL, k=K, dtype=torch.float32), ValueError, r"decode: expected payload of \d+ bytes for 20 of 1000 entries, got "),
        (lambda p: OPERATORS.decode(p, numel=19, k=K, dtype=torch.float32), ValueError, "decode: expected a payload that holds 1 to 19 entries, got 20"),
        (lambda p: OPERATORS.decode(damaged(p, 0, 1), numel=NUMEL, k=K, dtype=torch.float32), ValueError, r"decode: expected magic \d+ in payload, got \d+"),
        (lambda p: OPERATORS.decode(p, numel=NUMEL, k=K, dtype=torch.int8), TypeError, "decode: expected gradients of dtype .*, got Char"),
        (lambda p: OPERATORS.put_back_(torch.zeros(NUMEL).double(), p, dtype=torch.float32), TypeError, "put_back_: expected residual of dtype Float, got Double"),
        (lambda p: OPERATORS.put_back_(torch.zeros(NUMEL), p[:-1], dtype=torch.float32), ValueError, "put_back_: expected payload of .* bytes"),
        (lambda p: OPERATORS.encode(torch.arange(0), torch.empty(0), numel=5), ValueError, "encode: expected 1 to 5 entries, got 0"),
        (lambda p: OPERATORS.encode(torch.arange(6), torch.empty(6), numel=5), ValueError, "encode: expected 1 to 5 entries, got 6"),
        (lambda p: OPERATORS.encode(torch.arange(2), torch.empty(3), numel=5), ValueError, r"encode: expected indices contiguous with shape \[3\], got shape \[2\]"),
        (lambda p: OPERATORS.encode(torch.arange(3).int(), torch.empty(3), numel=5), TypeError, "encode: expected indices of dtype Long, got Int"),
    ],
)  # fmt: skip
def test_encode_decode_and_put_back_name_what_breaks_their_contract(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call(compressed())


@pytest.mark.skipif(
    "without_cuda.cpp" not in torch._C._dispatch_dump("regtopk::compress_"), reason="this build has CUDA kernels; a build without them says so"
)
def test_cuda_tensors_get_one_clear_sentence():
    # The kernel that CUDA tensors reach in a build without CUDA kernels, called past the device dispatch.
    to_cuda = OPERATORS.compress_.default._op_dk
    with pytest.raises(NotImplementedError) as caught:
        to_cuda(torch._C.DispatchKey.CUDA, *compress_arguments(), k=K)
    assert str(caught.value) == "compress_: expected CPU tensors, got CUDA tensors; this build of regtopk_torch has no CUDA kernels"
