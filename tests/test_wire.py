"""The wire form of payloads: nothing is lost to narrower values, bytes are the reference's, and what is damaged is told."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import regtopk_torch as rt
from regtopk_torch import _C, options, reference

CODES = {torch.bits1x8: "sign", torch.bits2x4: "2bit"}
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FORMS = [(dtype, wire) for dtype in FLOATS for wire in [*FLOATS, *CODES] if wire == dtype or wire.itemsize < dtype.itemsize]
ops = torch.ops.regtopk


def compressed(gradient, k):
    """(payload, residual) of a first step."""
    numel = gradient.numel()
    payload = torch.empty(_C.payload_bytes(numel, k, gradient.dtype), dtype=torch.uint8)
    residual = torch.zeros(numel, dtype=reference.accumulate_dtype(gradient.dtype))
    ops.compress_(gradient, residual, payload, None, None, k=k, step=3, plan=77)
    return payload, residual


def heavy_tailed(numel, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(numel, generator=generator) * torch.exp(3 * torch.randn(numel, generator=generator))).to(dtype)


def expected_wire(message, gradient, numel, wire_dtype, elias_fano):
    if wire_dtype not in CODES:
        narrow, coded = reference.replace(message, value=message.value.to(wire_dtype)), None
    else:
        _, *coded = reference.few_bits(reference.CODE_BITS[CODES[wire_dtype]], message.index, gradient[message.index])
        narrow = message
    return reference.encode(narrow, numel, step=3, plan=77, elias_fano=elias_fano, coded=coded)


@pytest.mark.parametrize("dtype, wire_dtype", FORMS)
@pytest.mark.parametrize("elias_fano", [False, True])
def test_the_wire_form_is_the_references_and_reads_back_as_the_payload(dtype, wire_dtype, elias_fano):
    for numel in (1, 7, 100, 4097, 65536, 65537, 300_000):
        for density in (1e-5, 1e-3, 0.01, 0.1, 0.2, 0.9, 1.0):
            gradient, k = heavy_tailed(numel, dtype), reference.entries_to_send(density, numel)
            if wire_dtype in CODES and k > 20_000:
                continue  # one by one in the reference
            worker = reference.Worker(density, wire_dtype=CODES.get(wire_dtype, wire_dtype))
            message = worker.compress(gradient)
            payload, residual = compressed(gradient, k)
            wire = torch.full((_C.wire_bytes(numel, k, dtype, 0, wire_dtype, elias_fano),), 0xEE, dtype=torch.uint8)
            ops.to_wire_(residual, payload, wire, dtype=dtype, wire_dtype=wire_dtype, elias_fano=elias_fano, k=k)
            assert torch.equal(wire, expected_wire(message, gradient, numel, wire_dtype, elias_fano))
            assert torch.equal(payload, reference.encode(message, numel, step=3, plan=77))
            assert torch.equal(residual, worker.residual)
            again = torch.full((2, len(payload)), 0xEE, dtype=torch.uint8)
            ops.from_wire_(torch.stack([wire, wire]), again, dtype=dtype, wire_dtype=wire_dtype, elias_fano=elias_fano, numel=numel, k=k)
            assert torch.equal(again, torch.stack([payload, payload]))


@pytest.mark.parametrize("dtype, wire_dtype", [form for form in FORMS if form[0] != form[1] and form[1] not in CODES])
def test_sent_and_kept_is_what_was_given(dtype, wire_dtype):
    gradient = heavy_tailed(100_000, dtype)
    gradient[:4] = torch.tensor([torch.inf, -torch.inf, torch.nan, 1e6 if wire_dtype == torch.float16 else torch.finfo(dtype).max], dtype=torch.float64)
    payload, residual = compressed(gradient, 5000)
    wire = torch.empty(_C.wire_bytes(100_000, 5000, dtype, 0, wire_dtype), dtype=torch.uint8)
    ops.to_wire_(residual, payload, wire, dtype=dtype, wire_dtype=wire_dtype, k=5000)
    index, value = ops.decode(payload, numel=100_000, k=5000, dtype=dtype)
    assert torch.equal(value.nan_to_num(0), value.to(wire_dtype).to(dtype).nan_to_num(0))  # what the wire holds
    assert value[3].isfinite() and value[3] > 0 and not value[:3].isfinite().any()
    total = residual.clone()
    total[index] += value
    assert torch.equal(total[3:], gradient[3:]) and torch.equal(residual[:3], torch.zeros(3, dtype=residual.dtype))


@pytest.mark.parametrize("wire_dtype", CODES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", ["normal", "heavy-tailed", "one giant", "with zeros", "tiny", "equal", "fp16's end"])
def test_a_bit_and_two_lose_nothing(dtype, kind, wire_dtype):
    numel, k = 200_000, 30_000
    gradient = torch.randn(numel, generator=torch.Generator().manual_seed(5)).to(dtype)
    if kind == "heavy-tailed":
        gradient = heavy_tailed(numel, dtype).nan_to_num(posinf=6e4, neginf=-6e4)
    elif kind == "one giant":
        gradient[7] = 6e4
        gradient = torch.where(torch.arange(numel) == 7, gradient, gradient * 1e-3)
    elif kind == "with zeros":
        gradient[: numel - 3000] = 0
    elif kind == "tiny":
        gradient = (gradient.double() * torch.finfo(dtype).smallest_normal * 4).to(dtype)
    elif kind == "equal":
        gradient = torch.where(gradient < 0, -0.3, 0.3).to(dtype)
    elif kind == "fp16's end":
        gradient = (gradient * 20_000).clamp(-65504, 65504)
    payload, residual = compressed(gradient, k)
    wire = torch.empty(_C.wire_bytes(numel, k, dtype, 0, wire_dtype), dtype=torch.uint8)
    ops.to_wire_(residual, payload, wire, dtype=dtype, wire_dtype=wire_dtype, k=k)
    index, value = ops.decode(payload, numel=numel, k=k, dtype=dtype)
    total = residual.double()
    total[index] += value.double()  # in fp64 the sum of two fp32 of a kind is exact
    assert torch.equal(total, gradient.double())
    assert value.abs().unique().numel() <= 2 * 4 + 1
    if kind == "with zeros":
        assert not value[gradient[index] == 0].any() and value.any()
    elif (kind, dtype) != ("tiny", torch.float64):  # levels have fp32's range; what is sent is of the order of what was given
        # Of the sign a level is no larger than 7/4 of the smallest, whatever the largest is.
        least = {("heavy-tailed", torch.bits2x4): 0.05, ("heavy-tailed", torch.bits1x8): 0.02, ("one giant", torch.bits1x8): 1e-4}.get((kind, wire_dtype), 0.5)
        assert least < value.double().abs().sum() / gradient[index].double().abs().sum() <= 1.0 + 1e-6


@pytest.mark.parametrize("giant", [0.0, 1000.0])
def test_beside_a_zero_of_its_tile_the_sign_sends_one_side_at_a_time_and_none_waits_for_ever(giant):
    given = torch.zeros(400)
    given[:100], given[100:200], given[399] = 1.0, -1.0, giant
    exchange = rt.LocalExchange(1, 1.0, wire_dtype="sign")
    total = exchange.step([[given]])[0].double()
    assert (total >= 0).all() or (total <= 0).all()
    assert total[total != 0].abs().unique().tolist() == [1.0]
    sides = [slice(100), slice(100, 200)]
    last = [0, 0]  # step in which a side was sent
    for step in range(1, 400):
        (average,) = exchange.step([[given]])
        total += average
        last = [step if average[side].any() else before for side, before in zip(sides, last, strict=True)]
        assert step - min(last) < 25
    lost = total + exchange.residuals(0)[0] - 400.0 * given.double()
    assert not lost[:399].any() and abs(lost[399]) <= 1e-6 * 400 * giant  # r + g of 16,384 and more is rounded
    assert not total[200:399].any()
    assert exchange.residuals(0)[0][:200].abs().max() < 40
    exchange = rt.LocalExchange(1, 1.0, wire_dtype="sign")
    assert torch.equal(exchange.step([[given[:200]]])[0], given[:200])  # no zero: both at once


def applied_share(wire_dtype, density, tail):
    """Of what 60 steps gave, in the direction of what was given; `tail` the exponent's deviation of a lognormal factor."""
    generator = torch.Generator().manual_seed(0)
    steady = torch.randn(20_000, generator=generator) * torch.exp(tail * torch.randn(20_000, generator=generator))
    exchange, applied, given = rt.LocalExchange(1, density, wire_dtype=wire_dtype), torch.zeros(20_000), torch.zeros(20_000)
    for _ in range(60):
        gradient = steady + torch.randn(20_000, generator=generator)
        given += gradient
        applied += exchange.step([[gradient]])[0]
    return float((applied * given.sign()).sum() / given.abs().sum())


def test_the_sign_sends_what_two_bits_do_at_low_densities_and_falls_behind_where_the_limits_say_so():
    assert all(applied_share(wire_dtype, 0.1, 0) > 0.9 for wire_dtype in ("sign", "2bit"))
    assert applied_share("sign", 0.7, 0) < 0.9 < applied_share("2bit", 0.7, 0)
    assert applied_share("sign", 1.0, 0) < 0.1 and applied_share("2bit", 1.0, 0) > 0.9
    assert applied_share("sign", 0.1, 2) < applied_share("2bit", 0.1, 2) - 0.2


@pytest.mark.parametrize("wire_dtype", CODES)
def test_a_tile_that_is_not_finite_is_sent_as_nan_and_kept(wire_dtype):
    gradient = heavy_tailed(200_000, torch.float32)
    gradient[70_000] = torch.inf
    payload, residual = compressed(gradient, 5000)
    wire = torch.empty(_C.wire_bytes(200_000, 5000, torch.float32, 0, wire_dtype), dtype=torch.uint8)
    ops.to_wire_(residual, payload, wire, dtype=torch.float32, wire_dtype=wire_dtype, k=5000)
    index, value = ops.decode(payload, numel=200_000, k=5000, dtype=torch.float32)
    of_tile = index // 65536 == 1
    assert value[of_tile].isnan().all() and value[~of_tile].isfinite().all()
    second = torch.arange(65536, 131072)
    second = second[second != 70_000]
    assert torch.equal(residual[second], gradient[second])


@pytest.mark.parametrize("density, bits", [(1e-3, 12.1), (1e-2, 8.7)])
def test_an_index_takes_no_more_bits_than_promised(density, bits):
    numel = 10_000_000
    k = reference.entries_to_send(density, numel)
    of_values = 16 * k
    assert (8 * _C.wire_bytes(numel, k, torch.float32, 0, torch.bfloat16, True) - of_values) / k <= bits
    assert _C.wire_bytes(numel, k, torch.float32, 0, torch.bfloat16) / k <= 4.1
    assert _C.wire_bytes(numel, k, torch.float32, 0, torch.bits2x4) / k <= 2.4


def damaged(wire, at, value):
    result = wire.clone()
    result[at] = value
    return result


def test_damaged_bytes_are_an_error_that_names_rank_and_field():
    numel, k, form = 200_000, 1000, {"dtype": torch.float32, "wire_dtype": torch.bfloat16, "elias_fano": True}
    payload, residual = compressed(heavy_tailed(numel, torch.float32), k)
    wire = torch.empty(_C.wire_bytes(numel, k, torch.float32, 0, torch.bfloat16, True), dtype=torch.uint8)
    ops.to_wire_(residual, payload, wire, k=k, **form)
    high_at = 64 + -(-k * 7 // 64) * 8
    places = {
        "magic": (0, 1), "value type 2": (6, 1), "support 2": (7, 0), "numel": (16, 1), "k 1000": (24, 1), "spans": (60, 1),
        "index of entry 0 more than -1 and less than 200000": (high_at + (1000 + 1562) // 8, 0xFF),
        "entries in the index code 1000": (slice(high_at, len(wire) - 2000), 0),
    }  # fmt: skip
    for name, (at, value) in places.items():
        rows = torch.stack([wire, damaged(wire, at, value), wire])
        if name.startswith("index of entry 0"):
            rows[1, high_at : high_at + 300] = 0
        with pytest.raises(ValueError, match=f"from_wire_: expected {name}.* in the payload of rank 1, got "):
            ops.from_wire_(rows, torch.empty(3, len(payload), dtype=torch.uint8), numel=numel, k=k, **form)


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_whatever_the_bytes_reading_them_is_an_error_or_gives_a_valid_payload(data):
    numel = data.draw(st.integers(1, 200_000), label="numel")
    k = data.draw(st.integers(1, min(numel, 3000)), label="k")
    form = {"dtype": torch.float32, "wire_dtype": data.draw(st.sampled_from([torch.float32, torch.bfloat16, *CODES])), "elias_fano": data.draw(st.booleans())}
    payload, residual = compressed(heavy_tailed(numel, torch.float32), k)
    wire = torch.empty(_C.wire_bytes(numel, k, torch.float32, 0, form["wire_dtype"], form["elias_fano"]), dtype=torch.uint8)
    ops.to_wire_(residual, payload, wire, k=k, **form)
    for _ in range(data.draw(st.integers(1, 4), label="changes")):
        wire[data.draw(st.integers(64, len(wire) - 1), label="byte")] = data.draw(st.integers(0, 255), label="value")
    rows = torch.empty(1, len(payload), dtype=torch.uint8)
    try:
        ops.from_wire_(wire[None], rows, numel=numel, k=k, **form)
        ops.aggregate_(torch.empty(numel), rows, None, k=k, step=3, plan=77)
    except ValueError as error:
        assert "in the payload of rank 0, got" in str(error)
    else:
        index, _ = ops.decode(rows[0], numel=numel, k=k, dtype=torch.float32)
        assert (index.diff() > 0).all() and 0 <= index[0] and index[-1] < numel


@pytest.mark.parametrize("method", ["topk", "regtopk"])
@pytest.mark.parametrize("index_code", ["offsets", "elias-fano"])
@pytest.mark.parametrize("wire_dtype", [torch.bfloat16, torch.float16, "sign", "2bit"])
def test_steps_of_an_exchange_equal_the_reference(method, index_code, wire_dtype):
    sizes = [3000, 50, 7000]
    mu = 2.0 if method == "regtopk" else None
    exchange = rt.LocalExchange(3, 0.02, method=method, mu=mu or 1.0, wire_dtype=wire_dtype, index_code=index_code)
    twin = reference.Exchange([reference.Worker(0.02, mu, wire_dtype=wire_dtype) for _ in range(3)], sizes)
    generator = torch.Generator().manual_seed(1)
    for step in range(12):
        gradients = [[torch.randn(size, generator=generator) * 10 for size in sizes] for _ in range(3)]
        for worker in gradients:
            if step in (4, 5, 6):
                worker[1].zero_()  # idle
            if step == 8 and worker is gradients[1]:
                worker[0][17] = torch.inf  # void
        averages = exchange.step(gradients)
        expected = twin.step([torch.cat(worker) for worker in gradients])
        assert torch.equal(torch.cat(averages).nan_to_num(7), expected.nan_to_num(7))
        for rank, worker in enumerate(twin.workers):
            kept = torch.cat([residual for _, residual in sorted(exchange.residuals(rank).items())])
            assert torch.equal(kept, worker.settled())
    bytes_of = _C.wire_bytes(sum(sizes), 201, torch.float32, 3, options.CODES.get(wire_dtype, wire_dtype), index_code == "elias-fano")
    assert exchange.stats(0)["bytes_sent"] == 12 * 2 * bytes_of


def test_options_that_are_none_are_errors_in_words():
    for given, message in [
        ({"wire_dtype": torch.int8}, "expected wire_dtype to be None, torch.float32, torch.bfloat16, torch.float16, 'sign' or '2bit', got torch.int8"),
        ({"index_code": "huffman"}, "expected index_code 'elias-fano' or 'offsets', got 'huffman'"),
    ]:
        with pytest.raises(ValueError, match=message):
            rt.TopKState(**given)
    with pytest.raises(TypeError, match="RegTopKState: expected options of decay, .*, chunk.*, got 'wire'"):
        rt.RegTopKState(wire=torch.bfloat16)
