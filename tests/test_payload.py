"""The payload: its bytes, its size, and what decoding says about bytes that are not one."""

import struct

import pytest
import torch
from buckets import DTYPES, gradient, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

import regtopk_torch  # noqa: F401  (registers the operators)
from regtopk_torch import _C, reference

OPERATORS = torch.ops.regtopk
HEADER = "<IHBBQQQqQQII"
FIELDS = ("magic", "version", "value type", "support", "step", "numel", "k", "plan", "repeated", "displaced", "flags", "spans")


def random_entries(numel, k, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    index = torch.randperm(numel, generator=generator)[:k].sort().values
    return index, gradient("normal", k, dtype, seed)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(numel=st.integers(1, 200_000), share=st.floats(0, 1), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**32))
def test_what_is_encoded_is_decoded(numel, share, dtype, seed):
    k = max(1, round(share * numel))
    index, value = random_entries(numel, k, dtype, seed)
    payload = OPERATORS.encode(index, value, numel=numel, step=3, plan=-5)
    assert payload.numel() == _C.payload_bytes(numel, k, dtype)
    assert torch.equal(payload, reference.encode(reference.Message(index, value, False, 0, 0), numel, step=3, plan=-5))
    decoded_index, decoded_value = OPERATORS.decode(payload, numel=numel, k=k, dtype=dtype)
    assert torch.equal(decoded_index, index)
    assert same_bits(decoded_value, value)


@pytest.mark.parametrize("dtype, bytes_per_entry", [(torch.float32, 6.1), (torch.bfloat16, 4.1)])
def test_an_entry_takes_as_many_bytes_as_the_format_promises(dtype, bytes_per_entry):
    numel = 25_600_000
    assert _C.payload_bytes(numel, numel // 1000, dtype) / (numel // 1000) == pytest.approx(bytes_per_entry, abs=0.05)


@pytest.mark.parametrize("numel, k, is_bitmap", [(1600, 100, False), (1600, 101, True), (1, 1, True), (17, 1, False), (16, 1, False), (15, 1, True)])
def test_the_bitmap_is_used_above_one_sixteenth(numel, k, is_bitmap):
    index, value = random_entries(numel, k, torch.float32, 0)
    header = struct.unpack_from(HEADER, bytes(OPERATORS.encode(index, value, numel=numel)))
    assert header[FIELDS.index("support")] == is_bitmap


def aggregate(payloads, numel, k, dtype=torch.float32, **options):
    average = torch.full((numel,), 7.0, dtype=dtype)
    try:
        OPERATORS.aggregate_(average, payloads, None, k=k, **options)
    finally:
        untouched = bool((average == 7.0).all())
        aggregate.left_untouched = untouched
    return average


def two_payloads(numel, k):
    return torch.stack([OPERATORS.encode(*random_entries(numel, k, torch.float32, seed), numel=numel, step=4, plan=9) for seed in (1, 2)])


@pytest.mark.parametrize("field, value", [("magic", 1), ("version", 2), ("value type", 3), ("support", 1), ("step", 5), ("numel", 999), ("k", 51), ("plan", 8), ("repeated", 51), ("flags", 6), ("spans", 1)])
def test_a_wrong_header_field_is_named_with_its_rank(field, value):
    payloads = two_payloads(1000, 50)
    assert bool((aggregate(payloads, 1000, 50, step=4, plan=9) != 7.0).any())
    header = list(struct.unpack_from(HEADER, bytes(payloads[1])))
    header[FIELDS.index(field)] = value
    payloads[1, :64] = torch.tensor(list(struct.pack(HEADER, *header)), dtype=torch.uint8)
    with pytest.raises(ValueError, match=rf"^aggregate_: expected {field} .* in the payload of rank 1, got {value}"):
        aggregate(payloads, 1000, 50, step=4, plan=9)
    assert aggregate.left_untouched


@pytest.mark.parametrize("numel, k", [(1000, 50), (150_000, 500), (1000, 500), (150_000, 30_000)])
def test_a_damaged_support_is_an_error_and_never_a_wrong_write(numel, k):
    payloads = two_payloads(numel, k)
    good = aggregate(payloads, numel, k, step=4, plan=9)
    values_at = payloads.shape[1] - -(-k * 4 // 16) * 16
    generator = torch.Generator().manual_seed(0)
    errors = 0
    for _ in range(300):
        damaged = payloads.clone()
        position = 64 + int(torch.randint(values_at - 64, (1,), generator=generator))
        damaged[1, position] ^= 1 << int(torch.randint(8, (1,), generator=generator))
        try:
            average = aggregate(damaged, numel, k, step=4, plan=9)
        except ValueError as error:
            errors += 1
            assert "in the payload of rank 1" in str(error)
            assert aggregate.left_untouched
        else:
            # Another valid support (an offset moved between its neighbours) or padding.
            assert average.isfinite().all()
            assert average.shape == good.shape
    assert errors > 20


def test_encode_wants_ascending_indices_in_range():
    value = torch.ones(3)
    for wrong in ([0, 2, 2], [2, 1, 3], [-1, 0, 1], [1, 2, 10]):
        with pytest.raises(ValueError, match=r"encode: expected strictly ascending indices in \[0, 10\), got others"):
            OPERATORS.encode(torch.tensor(wrong), value, numel=10)


def test_payload_bytes_wants_a_possible_k():
    with pytest.raises(ValueError, match=r"payload_bytes: expected 1 <= k <= min\(numel, 2\^32 - 1\), got k=0 and numel=5"):
        _C.payload_bytes(5, 0, torch.float32)
    # Arithmetic beyond 2^31 entries: u32 starts, u16 offsets, fp32 values.
    numel, k = 2**33, 2**23
    tiles = numel // 65536
    assert _C.payload_bytes(numel, k, torch.float32) == 64 + 4 * tiles + 6 * k
    with pytest.raises(ValueError, match=f"got k={2**32}"):
        _C.payload_bytes(numel, 2**32, torch.float32)
