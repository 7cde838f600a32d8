"""Run the CUDA kernels in the host emulation and compare with reference.py: the same bytes, whatever the order of blocks.

With REGTOPK_KERNELS=cuda in the environment the same cases run on the GPU, from the library of tests/simt/host.py.
"""

import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import in_turn, of_one

sys.path.append(str(Path(__file__).resolve().parents[1]))  # tests are not installed
from regtopk_torch import reference  # noqa: E402
from tests.simt.host import PAYLOADS_VALID, Kernels, aligned, build_for_gpu, copied  # noqa: E402
from tests.simt.inputs import brackets_of, hard_inputs  # noqa: E402
from tests.simt.with_parts import HEAD_BYTES, Host, PartsOperators  # noqa: E402
from tests.simt.with_leader import FLAGS_AT, UNFILLED, ABSENT, Led  # noqa: E402
from tests.simt.with_spans import Operators, Pair, chosen_of, measured, ROUNDS, spans_of  # noqa: E402

DEVICE = os.environ.get("REGTOPK_KERNELS", "emulated")
ON_A_GPU = DEVICE == "cuda"
emulation_alone = pytest.mark.skipif(ON_A_GPU, reason="about the emulation, not about the kernels")
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


MODES = [(None, "previous"), (0.8, "previous"), (0.8, "current")]  # mu, distortion


@pytest.fixture(scope="module")
def kernels():
    # The reference's many small operations, on one thread: others would only wait for each other.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Kernels(DEVICE, build_for_gpu("%d%d" % torch.cuda.get_device_capability()) if ON_A_GPU else None)
    torch.set_num_threads(threads)


def same_bits(left, right):
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[left.element_size()]
    return left.dtype == right.dtype and torch.equal(left.view(integers), right.view(integers))


class Twin:
    """One worker, once by the kernels and once by the reference; every step asserts that they agree."""

    def __init__(self, kernels, numel, dtype, *, density, mu=None, distortion="previous", decay=1.0, chunk=None):
        self.kernels, self.numel, self.dtype, self.mu, self.distortion = kernels, numel, dtype, mu, distortion
        self.k, self.chunks = chosen_of(numel, density, chunk)
        self.decay, self.worker = decay, reference.Worker(density, mu, distortion, decay, chunk)
        self.residual = aligned(numel, reference.accumulate_dtype(dtype)).zero_()
        self.payload = self.feedback = None
        self.steps = 0

    def compress(self, gradient, *, sampling=None):
        message = self.worker.compress(gradient)
        expected = reference.encode(message, self.numel, step=self.steps, plan=77)
        gradient, payload = copied(gradient), aligned(expected.numel(), torch.uint8).fill_(0xEE)
        before = gradient.clone()
        self.kernels.compress(
            gradient, self.residual, payload, k=self.k, sent=self.payload, feedback=self.feedback, distortion=self.distortion,
            mu=self.mu or 1.0, decay=self.decay, step=self.steps, plan=77, sampling=sampling, **self.chunks,
        )  # fmt: skip
        assert torch.equal(payload, expected), f"payload differs from byte {int((payload != expected).nonzero()[0])} on"
        assert same_bits(self.residual, self.worker.residual)
        assert same_bits(gradient, before)
        self.payload, self.steps = payload, self.steps + 1
        return message


def exchange(kernels, twins, messages, *, step):
    """Aggregate by the kernels, with feedback for every rank; assert that reference agrees."""
    numel, dtype, k, distortion = twins[0].numel, twins[0].dtype, twins[0].k, twins[0].distortion
    total = reference.sum_in_rank_order(messages, numel)
    average = reference.to_wire(total / torch.tensor(float(len(twins)), dtype=total.dtype), dtype)
    bucket = aligned(numel, dtype).view(torch.uint8).fill_(0xEE).view(dtype)
    rows = aligned(len(twins) * k, total.dtype).view(len(twins), k)
    payloads = copied(torch.stack([twin.payload for twin in twins]))
    status = kernels.aggregate(bucket, payloads, k=k, feedback=rows, distortion=distortion, step=step, plan=77)
    assert status == PAYLOADS_VALID
    assert same_bits(bucket, average)
    for twin, row in zip(twins, rows, strict=True):
        twin.worker.receive(total, void=False)
        if twin.mu is not None:
            assert same_bits(row, twin.worker.feedback)
            twin.feedback = copied(row)
    return bucket


def gradients_of(numel, dtype, *, seed=0):
    """One gradient a step: the same in every step, with heavy tails, and noise; so that entries are sent twice running."""
    generator = torch.Generator().manual_seed(seed)
    steady = torch.randn(numel, generator=generator) * torch.exp(torch.randn(numel, generator=generator))
    while True:
        yield (steady + 0.3 * torch.randn(numel, generator=generator)).to(dtype)


HARD, BRACKETS = list(hard_inputs(64)), list(brackets_of(64))


@pytest.mark.parametrize("bracket", BRACKETS)
@pytest.mark.parametrize("name", HARD)
def test_hard_inputs_give_the_reference_bytes_whatever_the_bracket(kernels, name, bracket):
    numel = 20_003 if ON_A_GPU else 9_003  # three block tiles or two, the last partial, and no multiple of 4
    gradient = hard_inputs(numel)[name]
    for density in (1 / numel, 0.01, 0.3, 1.0):
        sampling = kernels.sampling(numel, 1).replace(**brackets_of(numel)[bracket])
        twin = Twin(kernels, numel, torch.float32, density=density, mu=1.0)
        for step in range(2):
            exchange(kernels, [twin], [twin.compress(gradient, sampling=sampling)], step=step)
            # Of one worker alone every rho is 1: take others, different for every entry, those of cancelled ones too.
            rho = torch.linspace(0, 3, twin.k)
            rho[::5] = torch.inf
            twin.worker.feedback, twin.feedback = rho, copied(rho)


@pytest.mark.parametrize(
    "numel, density, mu, distortion, dtype", in_turn([(1, 1.0), (7, 0.3), (9_001, 0.02), (70_001, 0.002), (70_001, 0.2)], MODES, of_one(FLOATS), all_of_them=ON_A_GPU)
)
def test_steps_of_three_workers_equal_the_reference(kernels, numel, density, mu, distortion, dtype):
    decay = 1.0 if mu is None else 0.9
    twins = [Twin(kernels, numel, dtype, density=density, mu=mu, distortion=distortion, decay=decay) for _ in range(3)]
    gradients = [gradients_of(numel, dtype, seed=rank) for rank in range(3)]
    for step in range(3):
        messages = [twin.compress(next(gradient)) for twin, gradient in zip(twins, gradients, strict=True)]
        exchange(kernels, twins, messages, step=step)
    if mu is not None and numel > 1000:
        assert messages[0].repeated + messages[0].displaced > 0  # or the merge of last step's entries is not seen


def test_a_bucket_of_many_block_tiles_is_counted_item_by_item(kernels):
    # 520 block tiles of 4,096, several to each item of finish; ties at the k-th score in all of them.
    numel = 520 * 4096 + 3
    gradient = (torch.randn(numel, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 50).round()
    with kernels.schedule(multiprocessors=1):
        twin = Twin(kernels, numel, torch.float64, density=0.001)
        message = twin.compress(gradient)
    smallest = message.value.abs().min()
    assert 0 < int((message.value.abs() == smallest).sum()) < int((gradient.abs() == smallest).sum())
    assert int(message.index[-1]) >= 512 * 4096


def test_a_payload_tile_with_many_entries_and_one_with_none_are_read_alike(kernels):
    numel = 3 * reference.TILE_ENTRIES + 11
    gradient = torch.randn(numel, generator=torch.Generator().manual_seed(1)) * 1e-3
    gradient[reference.TILE_ENTRIES : reference.TILE_ENTRIES + 9000] += 5.0
    twin = Twin(kernels, numel, torch.float32, density=0.04, mu=1.0)
    for step in range(2):
        exchange(kernels, [twin], [twin.compress(gradient)], step=step)


def test_entries_displaced_at_the_threshold_are_counted_by_index(kernels):
    # Equal magnitudes, and factors that hold back some of last step's: ties on both sides of the last one sent.
    numel = 9_000
    twin = Twin(kernels, numel, torch.float32, density=0.01, mu=1.0)
    worker_gradient = torch.ones(numel)
    twin.compress(worker_gradient)
    exchange(kernels, [twin], [twin.worker.sent], step=0)
    feedback = torch.linspace(0, 3, twin.k)
    twin.feedback = copied(feedback)
    twin.worker.feedback = feedback
    gradient = torch.ones(numel) - twin.worker.residual  # every accumulated value is 1 again
    message = twin.compress(gradient)
    assert message.displaced > 0


SCHEDULES = [
    dict(order="descending", resident_blocks=1, multiprocessors=3),
    dict(order="ascending", resident_blocks=3, multiprocessors=1),
    *[dict(order="shuffled", seed=seed, resident_blocks=4, multiprocessors=3) for seed in range(3)],
]


@pytest.mark.parametrize("bracket", ["sampled", "too high", "list of one"])
def test_the_order_of_blocks_and_threads_changes_no_byte(kernels, bracket):
    numel = 100_003
    sampling = kernels.sampling(numel, 100)
    if bracket != "sampled":
        sampling = sampling.replace(**brackets_of(numel)[bracket])
    for schedule in SCHEDULES:
        with kernels.schedule(**schedule):
            twin = Twin(kernels, numel, torch.float32, density=0.001, mu=1.0)
            gradient = gradients_of(numel, torch.float32)
            for step in range(2):  # equal to the reference, and so to each other
                exchange(kernels, [twin], [twin.compress(next(gradient), sampling=sampling)], step=step)


def finish_bytes(kernels, gradient, sampling):
    numel = gradient.numel()
    residual, k = aligned(numel, torch.float32).zero_(), numel // 1000
    payload = aligned(len(reference.encode(reference.Message(torch.arange(k), torch.zeros(k), False, 0, 0), numel)), torch.uint8)
    with kernels.traffic() as traffic:
        kernels.compress(gradient, residual, payload, k=k, sampling=sampling)
    return sum(traffic["finish_kernel"]) / numel


@emulation_alone
def test_a_miss_reads_the_residual_twice_more_and_a_held_bracket_never(kernels):
    # Without this, a forced miss that missed nothing would make the tests above pass for nothing.
    numel = 200_000
    gradient = copied(next(gradients_of(numel, torch.float32)))
    sampling = kernels.sampling(numel, numel // 1000)
    assert finish_bytes(kernels, gradient, sampling) < 1
    assert 8 <= finish_bytes(kernels, gradient, sampling.replace(rank_high=1, rank_low=1)) < 9
    # Equal values leave nothing to narrow, but do not fit the list: counted and packed from the residual.
    assert 8 <= finish_bytes(kernels, gradient.fill_(0.5), sampling) < 9
    # Nearly all are 0, and so is the low end of the bracket: one look at the residual fills the list with the few that are not.
    gradient.zero_()[:: numel // 240] = torch.linspace(1, 2, len(gradient[:: numel // 240]))
    assert 4 <= finish_bytes(kernels, gradient, sampling) < 5


@emulation_alone
@pytest.mark.parametrize("missed, most", [(False, 16.7), (True, 25.0)])
def test_a_step_moves_no_more_bytes_than_promised(kernels, missed, most):
    from tests.simt import traffic

    for mu, spans in ((None, 0), (1.0, 0), (1.0, 62)):
        counted = traffic.measure(kernels, 1_000_000, 1e-3, 8, torch.float32, mu=mu, missed=missed, spans=spans)
        assert ("settle_kernel" in counted) == (spans > 0)
        assert counted["accumulate_kernel"][0] >= 8 and counted["accumulate_kernel"][1] >= 4  # nothing went uncounted
        assert counted["aggregate_kernel"][1] >= 4
        assert traffic.limit(torch.float32) == 16
        # With spans, for each block tile: the header of the last payload and the ends of some spans.
        assert traffic.total(counted) <= most + (0.1 if spans else 0)


# Aggregate and put back.


@pytest.mark.parametrize("density", [0.01, 0.2])
def test_more_ranks_than_are_searched_together_are_added_in_order(kernels, density):
    numel, workers = 5_000, 70
    twins = [Twin(kernels, numel, torch.float32, density=density) for _ in range(workers)]
    messages = []
    for rank, twin in enumerate(twins):
        message = twin.worker.compress(next(gradients_of(numel, torch.float32, seed=rank % 3)) * 10.0 ** (rank % 9 - 4))
        twin.payload = reference.encode(message, numel, step=0, plan=77)
        messages.append(message)
    exchange(kernels, twins, messages, step=0)


def test_feedback_is_written_for_the_ranks_asked_for(kernels):
    numel, k = 10_000, 100
    messages = [reference.Worker(0.01).compress(next(gradients_of(numel, torch.float32, seed=rank))) for rank in range(4)]
    payloads = copied(torch.stack([reference.encode(message, numel) for message in messages]))
    rows = aligned(2 * k, torch.float32).view(2, k)
    assert kernels.aggregate(aligned(numel, torch.float32), payloads, k=k, feedback=rows, rank=1) == PAYLOADS_VALID
    total = reference.sum_in_rank_order(messages, numel)
    for row, message in zip(rows, messages[1:3], strict=True):
        assert same_bits(row, reference.feedback_of(total[message.index], message.value, "previous"))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("workers", "absent"), [(3, [1]), (4, [3]), (3, [0, 1, 2]), (70, range(0, 70, 3))], ids=lambda value: str(value))
def test_an_average_is_over_the_ranks_that_are_not_absent_on_both_devices(kernels, workers, absent, dtype):
    numel, density = 3_000, 0.01 if workers < 70 else 0.2
    k = reference.entries_to_send(density, numel)
    messages = [reference.Worker(density).compress(next(gradients_of(numel, dtype, seed=rank))) for rank in range(workers)]
    messages = [replace(message, value=message.value * 0) if rank in absent else message for rank, message in enumerate(messages)]
    payloads = copied(torch.stack([reference.encode(message, numel) for message in messages]))
    payloads[list(absent), FLAGS_AT] |= ABSENT
    total = reference.sum_in_rank_order(messages, numel)
    expected = reference.to_wire(total / torch.tensor(float(max(1, workers - len(absent))), dtype=total.dtype), dtype)
    for run in (kernels.aggregate, torch.ops.regtopk.aggregate_):
        bucket = aligned(numel, dtype)
        assert run(bucket, payloads, feedback=None, k=k) in (PAYLOADS_VALID, None)
        assert same_bits(bucket, expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_infinities_that_cancel_leave_the_one_nan_on_both_devices(kernels, dtype):
    numel, k = 100, 4
    wide = reference.accumulate_dtype(dtype)
    value = torch.tensor([1.0, torch.inf, -torch.inf, torch.nan], dtype=dtype)
    messages = [reference.Message(torch.arange(k), sign * value, True, 0, 0) for sign in (1, -1, 1)]
    payloads = copied(torch.stack([reference.encode(message, numel) for message in messages]))
    for run in (kernels.aggregate, torch.ops.regtopk.aggregate_):
        bucket, rows = aligned(numel, dtype), aligned(3 * k, wide).view(3, k)
        run(bucket, payloads, feedback=rows, k=k, distortion="current")
        # Z of 3 workers is v at the first entry and NaN elsewhere.
        assert same_bits(bucket[1:k], torch.full((k - 1,), torch.nan, dtype=dtype))
        assert rows[:, 0].tolist() == [0.0, 2.0, 0.0]
        assert same_bits(rows[:, 1:].contiguous(), torch.full((3, k - 1), torch.nan, dtype=wide))


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_dense_variant_writes_what_was_sent_and_zero_elsewhere(kernels, dtype):
    numel = 9_001
    twin = Twin(kernels, numel, dtype, density=0.02)
    message = twin.compress(next(gradients_of(numel, dtype)))
    bucket = aligned(numel, dtype)
    assert kernels.aggregate(bucket, twin.payload.view(1, -1), k=twin.k, plan=77) == PAYLOADS_VALID
    expected = torch.zeros(numel, dtype=dtype)
    expected[message.index] = message.value
    assert same_bits(bucket, expected)


@pytest.mark.parametrize("density", [0.01, 0.2])
@pytest.mark.parametrize("dtype", FLOATS)
def test_put_back_returns_the_finite_values_to_the_residual(kernels, dtype, density):
    numel = 70_001
    twin = Twin(kernels, numel, dtype, density=density)
    gradient = next(gradients_of(numel, dtype))
    gradient[123], gradient[45_678] = torch.inf, torch.nan
    assert twin.compress(gradient).non_finite
    kernels.put_back(twin.residual, twin.payload, dtype=dtype)
    twin.worker.put_back()
    assert same_bits(twin.residual, twin.worker.residual)


def rank_of(status):
    return status >> 8 & 0xFFFFFFFF


def payloads_of(numel, density, workers=2):
    messages = [reference.Worker(density).compress(next(gradients_of(numel, torch.float32, seed=rank))) for rank in range(workers)]
    return copied(torch.stack([reference.encode(message, numel, step=3, plan=5) for message in messages]))


HEADER, STEP, PLAN, TILE_STARTS, SUPPORT, DEED, SCALE, AVERAGES = range(1, 9)
CORRUPTIONS = {  # byte, its new value's difference, what is reported
    "magic": (0, HEADER), "version": (4, HEADER), "value type": (6, HEADER), "support": (7, HEADER), "step": (8, STEP),
    "numel": (16, HEADER), "k": (24, HEADER), "plan": (32, PLAN), "repeated": (47, HEADER), "flags": (57, HEADER),
    "reserved": (60, HEADER), "first tile start": (64, TILE_STARTS), "second tile start": (71, TILE_STARTS),
}  # fmt: skip


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_payload_with_a_wrong_header_gives_nan_everywhere_and_names_its_rank(kernels, name):
    numel, k = 70_000, 700
    payloads = payloads_of(numel, 0.01)
    byte, field = CORRUPTIONS[name]
    payloads[1, byte] += 113
    bucket, rows = aligned(numel, torch.float32), aligned(2 * k, torch.float32).view(2, k)
    status = kernels.aggregate(bucket, payloads, k=k, feedback=rows, step=3, plan=5)
    assert (rank_of(status), status & 0xFF) == (1, field)
    assert bucket.isnan().all() and rows.isnan().all()


@pytest.mark.parametrize("density", [0.01, 0.2])
def test_the_device_refuses_the_payloads_that_the_cpu_refuses(kernels, density):
    numel = 70_000
    k = reference.entries_to_send(density, numel)
    valid = payloads_of(numel, density)
    values_at = valid.shape[1] - (-(-4 * k // 8) * 8)
    generator = torch.Generator().manual_seed(9)
    refused = 0
    for trial in range(60):
        payloads = copied(valid)
        at = int(torch.randint(64, values_at if trial % 2 else 96, (1,), generator=generator))
        payloads[trial % 2, at] ^= 1 << int(torch.randint(8, (1,), generator=generator))
        bucket = aligned(numel, torch.float32)
        status = kernels.aggregate(bucket, payloads, k=k, step=3, plan=5)  # raises where an access leaves its buffer
        try:
            expected = torch.empty(numel)
            torch.ops.regtopk.aggregate_(expected, payloads, None, k=k, step=3, plan=5)
        except ValueError:
            refused += 1
            assert status != PAYLOADS_VALID and rank_of(status) == trial % 2
            assert bucket.isnan().all()
        else:
            assert status == PAYLOADS_VALID
            assert same_bits(bucket, expected)
    assert refused > 20


@pytest.mark.parametrize("byte", [0, 6, 16, 24])
def test_a_last_payload_of_another_bucket_makes_a_payload_that_everyone_refuses(kernels, byte):
    numel, k = 9_000, 90
    gradient, residual = copied(next(gradients_of(numel, torch.float32))), aligned(numel, torch.float32).zero_()
    sent = copied(payloads_of(numel, 0.01)[0])
    payload = aligned(sent.numel(), torch.uint8)
    kernels.compress(gradient, residual, payload, k=k, sent=sent, step=3, plan=5)
    bucket = aligned(numel, torch.float32)
    assert kernels.aggregate(bucket, payload.view(1, -1), k=k, step=3, plan=5) == PAYLOADS_VALID
    sent[byte] += 100
    kernels.compress(gradient, residual, payload, k=k, sent=sent, step=3, plan=5)
    assert kernels.aggregate(bucket, payload.view(1, -1), k=k, step=3, plan=5) == HEADER
    before = residual.clone()
    kernels.put_back(residual, sent, dtype=torch.float32)
    assert torch.equal(residual, before)


# Buckets with spans: the CPU operators say what is right.

@pytest.mark.parametrize("numel, density, mu, distortion, dtype", in_turn([(20_003, 0.01), (20_003, 0.3)], MODES, of_one(FLOATS), all_of_them=ON_A_GPU))
def test_steps_with_idle_spans_and_void_rounds_equal_those_of_the_cpu(kernels, numel, density, mu, distortion, dtype):
    decay = 0.9 if distortion == "previous" else 1.0
    pair = Pair(kernels, numel, dtype, density=density, mu=mu, distortion=distortion, decay=decay, seed=int(100 * density))
    pair.random_steps(10, kernels, brackets=BRACKETS)
    assert pair.seen["idle"] > 10 and pair.seen["void"] > 0 and pair.seen["valid"] > 1
    # More has returned than whole payloads: of idle spans alone too.
    assert all(repeated > 0 and dropped % pair.k > 0 for repeated, _, dropped in (counters.tolist() for counters in pair.cpu.counters))


@pytest.mark.parametrize("density", [0.002, 0.2])
def test_steps_over_several_payload_tiles_equal_those_of_the_cpu_in_any_order(kernels, density):
    for schedule in SCHEDULES[1:3]:
        with kernels.schedule(**schedule):
            pair = Pair(kernels, 140_001, torch.float32, density=density)
            pair.random_steps(4, kernels, brackets=())


def test_fewer_entries_than_k_outside_idle_spans_are_filled_up_with_zeros(kernels):
    numel = 20_003
    for brackets in (None, "too high", "list of one"):
        pair = Pair(kernels, numel, torch.float32, density=0.3, infinite=True)
        zero = torch.ones(pair.spans.numel() - 1, dtype=torch.bool)
        zero[-1] = False
        sampling = None if brackets is None else kernels.sampling(numel, pair.k).replace(**brackets_of(numel)[brackets])
        for _ in range(3):
            residual = [copied(kept) for kept in pair.there.residual]
            pair.step(zero=zero, sampling=sampling)
        last = int(pair.spans[-2])
        assert numel - last < pair.k
        assert same_bits(pair.there.residual[0][:last], residual[0][:last])


@pytest.mark.parametrize("bits", ["first", "last", "none"])
def test_a_span_is_zero_only_if_all_its_entries_are(kernels, bits):
    numel = 40_000
    pair = Pair(kernels, numel, torch.bfloat16, density=0.01)
    pair.spans = pair.cpu.spans = pair.there.spans = copied(torch.tensor([0, 3, 9_001, 33_333, numel]))
    bytes = kernels.payload_bytes(numel, pair.k, torch.bfloat16, 4)
    for side in (pair.cpu, pair.there):
        side.bytes, side.idle = bytes, aligned(4, torch.uint8).zero_()
    gradient = torch.zeros(numel, dtype=torch.bfloat16)
    if bits != "none":
        gradient[9_001 if bits == "first" else 33_332] = 1e-40  # subnormal
    for side in (pair.cpu, pair.there):
        side.step([copied(gradient)] * 2, round=0, sampling=None, applied=None, scale=1.0, **pair.options)
    pair.compare()
    assert pair.there.idle.tolist() == [1, 1, int(bits == "none"), 1]


@emulation_alone
def test_gradients_are_read_up_to_a_first_entry_that_is_not_zero(kernels):
    numel = 500_000
    pair = Pair(kernels, numel, torch.float32, density=0.001)
    with kernels.traffic() as dense:
        pair.step()
    assert dense["settle_kernel"][0] < 2 * 4 * numel / 50
    with kernels.traffic() as zero:
        pair.step(zero=torch.ones(pair.spans.numel() - 1, dtype=torch.bool))
    assert 2 * 4 * numel <= zero["settle_kernel"][0] < 2 * 4.2 * numel


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("numel", [1, 3, 4099])
def test_judge_finds_what_is_not_finite(kernels, numel, dtype):
    values, verdict = aligned(numel, dtype).fill_(1), aligned(ROUNDS, torch.int64).fill_(-1)
    kernels.judge(values, verdict, round=5)
    assert (verdict == -1).all()
    for at, (round, bad) in enumerate([(5, torch.inf), (ROUNDS + 6, torch.nan), (7, -torch.inf)]):
        values.fill_(torch.finfo(dtype).max)
        values[(numel - 1) * at // 2] = bad
        kernels.judge(values, verdict, round=round)
        assert verdict[round % ROUNDS] == round
    assert (verdict != -1).sum() == 3


KINDS = {  # of the CPU's messages
    "expected step": STEP, "expected plan": PLAN, "entries before tile": TILE_STARTS, "offset of entry": SUPPORT, "entries in tile": SUPPORT,
    "the same calls": DEED, "gradient scale": SCALE,
}  # fmt: skip


def test_the_device_names_the_finding_that_the_cpu_names(kernels):
    numel, workers = 70_001, 3
    pair = Pair(kernels, numel, torch.float32, density=0.01)
    pair.step()
    valid = copied(torch.stack([pair.there.sent[0]] * workers))
    count, generator, seen = pair.spans.numel() - 1, torch.Generator().manual_seed(4), set()
    bits_at, starts_at = 80, 80 + -(-count // 64) * 8
    places = [0, 8, 32, 60, 64, 71, 72, starts_at + 4, starts_at + 40]  # magic, step, plan, spans, scale, deed, tile starts, offsets
    for trial in range(60):
        payloads = copied(valid)
        for _ in range(1 + trial % 3):
            rank, place = (int(torch.randint(most, (), generator=generator)) for most in (workers, len(places)))
            payloads[rank, places[place]] += 1 + trial
        if trial == 0:
            payloads[1, bits_at] ^= 1  # a zero bit alone: valid
        idle, verdict = aligned(count, torch.uint8).fill_(7), aligned(ROUNDS, torch.int64).fill_(-1)
        of_cpu = {"idle": idle.clone(), "verdict": verdict.clone()}
        bucket, row = aligned(numel, torch.float32), aligned(pair.k, torch.float32).view(1, -1)
        options = {"k": pair.k, "spans": pair.spans, "idle": idle, "verdict": verdict, "step": 0, "plan": 77, "round": 9}
        status = kernels.aggregate(bucket, payloads, feedback=row, **options)
        try:
            torch.ops.regtopk.aggregate_(torch.empty(numel), payloads, None, **{**options, **of_cpu})
        except ValueError as error:
            text = str(error)
            field = next((field for kind, field in KINDS.items() if kind in text), HEADER)
            rank = int(re.findall(r"rank (\d+)", text.split(";")[0])[-1])
            assert (rank_of(status), status & 0xFF) == (rank, field), text
            seen.add(field)
            assert bucket.isnan().all() and row.isnan().all()
            assert (idle == 7).all()  # nothing is learnt from it
            assert verdict[9] == 9  # and what was sent returns
        else:
            assert status == PAYLOADS_VALID
            assert torch.equal(idle, of_cpu["idle"]) and torch.equal(verdict, of_cpu["verdict"])
    assert seen == {HEADER, STEP, PLAN, TILE_STARTS, SUPPORT, DEED, SCALE}


# The emulation itself.


@emulation_alone
def test_the_emulation_notices_what_a_device_would_not_forgive(kernels):
    assert "outside the buffers" in kernels.fault("store_outside")
    assert "read-only" in kernels.fault("store_to_read_only")
    assert "only part of a block" in kernels.fault("barrier_of_half_a_block")
    with kernels.schedule(resident_blocks=2):
        assert "waits for another" in kernels.fault("wait_for_nothing")
    assert kernels.fault("unwritten_shared_memory") != 0


@emulation_alone
@pytest.mark.parametrize("schedule", [dict(order="ascending"), *SCHEDULES])
def test_what_comes_before_an_item_is_summed_up_while_it_is_counted(kernels, schedule):
    # Several looks back, of 64 items each, and blocks that wait for others.
    with kernels.schedule(**schedule):
        assert [kernels.fault("sums_before", items, blocks) for items, blocks in ((1, 1), (64, 3), (65, 7), (300, 12))] == [0] * 4


@emulation_alone
def test_schedules_run_blocks_in_different_orders(kernels):
    seen = set()
    for schedule in SCHEDULES:
        with kernels.schedule(**schedule):
            seen.add(kernels.fault("last_block_wins"))
    assert len(seen) >= 3


# Chunks: by a warp up to 512 entries, by a block beyond.


@pytest.mark.parametrize(
    "chunk, numel, density, mu, distortion, dtype",
    in_turn([(64, 1003, 0.05), (512, 5003, 0.02), (512, 66_000, 0.1), (1024, 3, 0.1), (4096, 9_001, 64 / 4096)], MODES, of_one(FLOATS), all_of_them=ON_A_GPU),
)
def test_chunks_equal_the_reference(kernels, chunk, numel, density, mu, distortion, dtype):
    twins = [Twin(kernels, numel, dtype, density=density, mu=mu, distortion=distortion, decay=0.9, chunk=chunk) for _ in range(2)]
    gradients = [gradients_of(numel, dtype, seed=rank) for rank in range(2)]
    for step in range(3):
        messages = [twin.compress(next(gradient)) for twin, gradient in zip(twins, gradients, strict=True)]
        exchange(kernels, twins, messages, step=step)
    assert numel < 1000 or messages[0].repeated > 0


@pytest.mark.parametrize("chunk", [128, 2048])
@pytest.mark.parametrize("name", HARD)
def test_chunks_of_hard_inputs_equal_the_reference(kernels, name, chunk):
    numel = 5003 if ON_A_GPU else 2500  # the emulation's barriers are slow
    gradient = hard_inputs(numel)[name]
    for density in (0.001, 0.3, 1.0):
        twin = Twin(kernels, numel, torch.float32, density=density, mu=1.0, chunk=chunk)
        for step in range(2):
            exchange(kernels, [twin], [twin.compress(gradient)], step=step)
            rho = torch.linspace(0, 3, twin.k)
            rho[::5] = torch.inf
            twin.worker.feedback, twin.feedback = rho, copied(rho)


@pytest.mark.parametrize("chunk, density, dtype", [(64, 0.05, torch.float32), (4096, 0.02, torch.float64), (1024, 0.3, torch.bfloat16)])
def test_chunks_with_idle_spans_and_void_rounds_equal_those_of_the_cpu(kernels, chunk, density, dtype):
    for schedule in SCHEDULES[1:2]:
        with kernels.schedule(**schedule):
            pair = Pair(kernels, 20_003, dtype, density=density, chunk=chunk)
            pair.random_steps(8, kernels, brackets=())
    assert pair.seen["idle"] > 10 and pair.seen["void"] > 0 and pair.seen["valid"] > 1


def test_chunks_move_the_bytes_that_gradient_and_residual_have(kernels):
    numel = 70_000  # more than a payload tile
    gradient = torch.randn(numel, generator=torch.Generator().manual_seed(0))
    twin = Twin(kernels, numel, torch.float32, density=64 / 4096, chunk=4096)
    if kernels.device == "emulated":
        with kernels.traffic() as traffic:
            twin.compress(gradient)
        assert sum(map(sum, traffic.values())) / numel < 12 + 7 / 64  # and of each entry sent its place and value


CORRECTIONS = {
    "momentum": ({"momentum": 0.9}, False),
    "nesterov, masked": ({"momentum": 0.7, "nesterov": True}, True),
    "masked, clipped": ({"momentum": 0.9, "largest_norm": 20.0}, True),
    "clipped": ({"largest_norm": 20.0}, False),
}


@pytest.mark.parametrize("name, dtype", list(zip(CORRECTIONS, FLOATS, strict=True)))
def test_momentum_and_clipping_through_idle_and_void_steps_equal_those_of_the_cpu(kernels, name, dtype):
    with kernels.schedule("shuffled", seed=1, resident_blocks=3):
        pair = Pair(kernels, 9_003, dtype, density=0.02, correction=CORRECTIONS[name], seed=1)
        pair.random_steps(10, kernels, brackets=())
    assert all(pair.seen.values()), f"expected idle spans, void rounds and valid ones, got {pair.seen}"


@pytest.mark.parametrize("name, dtype", in_turn(of_one(CORRECTIONS), of_one(FLOATS), all_of_them=ON_A_GPU))
def test_what_is_given_of_several_tiles_equals_that_of_the_cpu(kernels, name, dtype):
    numel, spans = 140_001, spans_of(140_001)
    sides = [(run, copied(torch.zeros(numel, dtype=reference.accumulate_dtype(dtype)))) for run in (kernels, Operators())]
    for step, gradient in zip(range(2), gradients_of(numel, dtype)):
        for span in range(step, len(spans) - 1, 3):
            gradient[spans[span] : spans[span + 1]].mul_(0.0)  # of both signs
        given = []
        for run, velocity in sides:
            given.append(aligned(numel, dtype).fill_(3.0))
            run.correct(copied(gradient), given[-1], velocity if "momentum" in CORRECTIONS[name][0] else None, spans, **CORRECTIONS[name][0])
        assert same_bits(*given) and same_bits(sides[0][1], sides[1][1])
        assert not same_bits(given[0], gradient) or name == "momentum"


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_velocity_keeps_what_it_had_where_what_is_wanted_can_not_be_given(kernels, dtype):
    numel, largest = 1_003, torch.finfo(dtype).max
    for nesterov in (False, True):
        there, velocity = [], []
        for run in (kernels, Operators()):
            kept, given = copied(torch.full((numel,), 1.0, dtype=reference.accumulate_dtype(dtype))), []
            for value in (largest, largest, torch.inf, torch.nan, -1.0):
                gradient = copied(torch.full((numel,), 2.0, dtype=dtype))
                gradient[5::9] = value
                run.correct(gradient, gradient, kept, copied(torch.tensor([0, numel])), momentum=0.9, nesterov=nesterov)
                given.append(gradient.masked_fill(gradient.isnan(), torch.nan))
            there.append(torch.cat(given))
            velocity.append(kept)
        assert same_bits(*there) and same_bits(*velocity)
        assert velocity[0].isfinite().all() and not there[0].isfinite().all()


def test_momentum_moves_the_bytes_that_gradient_and_velocity_have(kernels):
    if ON_A_GPU:
        pytest.skip("a GPU does not count")
    numel = 1_000_003
    gradient, given = copied(next(gradients_of(numel, torch.float32))), aligned(numel, torch.float32)
    velocity, spans = aligned(numel, torch.float32).fill_(1.0), spans_of(numel)
    for momentum, largest_norm, bytes in ((0.9, 0.0, 16), (0.0, 1.0, 12), (0.9, 1.0, 20)):
        with kernels.traffic() as traffic:
            kernels.correct(gradient, given, velocity if momentum else None, spans, momentum=momentum, largest_norm=largest_norm)
        assert sum(map(sum, traffic.values())) / numel < bytes + 0.1


# What an adaptive density measures.


def averaged(numel, k, workers, dtype):
    """(an average, the payloads of which it is one): of entries that some workers send in common."""
    generator, messages = torch.Generator().manual_seed(numel + workers), []
    for rank in range(workers):
        index = torch.randperm(max(k, numel // 2 if rank % 2 else numel), generator=generator)[:k].sort().values
        messages.append(reference.Message(index, (torch.randn(k, generator=generator) * 10.0 ** (rank % 5 - 2)).to(dtype), False, 0, 0))
    payloads, bucket = copied(torch.stack([reference.encode(message, numel) for message in messages])), aligned(numel, dtype)
    torch.ops.regtopk.aggregate_(bucket, payloads, None, k=k)
    return bucket, payloads


MEASURED = [(1, 1, 1), (7, 1, 3), (300, 299, 2), (65_536, 40, 8), (65_537, 1, 9), (140_001, 300, 20), (140_001, 20_000, 1), (70_003, 70_003, 12)]


@pytest.mark.parametrize("numel, k, workers, dtype", in_turn(MEASURED, of_one(FLOATS), all_of_them=ON_A_GPU))
def test_what_is_measured_is_the_sum_of_the_cpu_and_that_of_the_whole_bucket(kernels, numel, k, workers, dtype):
    bucket, payloads = averaged(numel, k, workers, dtype)
    expected = measured(Operators(), bucket, payloads, k=k)
    assert float(expected) == reference.squared_norm(bucket) > 0
    for schedule in ({}, *SCHEDULES[:3]):
        with kernels.schedule(**schedule):
            assert same_bits(measured(kernels, bucket, payloads, k=k), expected)


def test_more_tiles_than_lanes_are_added_up_in_order(kernels):
    numel, k = 258 * reference.TILE_ENTRIES, 3_000
    bucket, payloads = averaged(numel, k, 2, torch.bfloat16)
    expected = measured(Operators(), bucket, payloads, k=k)
    assert same_bits(measured(kernels, bucket, payloads, k=k), expected) and expected.isfinite()


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_is_seen_in_what_is_measured(kernels, bad):
    bucket, payloads = averaged(70_001, 50, 3, torch.float32)
    bucket[int(bucket.nonzero()[-1])] = bad
    found = [measured(run, bucket, payloads, k=50) for run in (kernels, Operators())]
    assert same_bits(*found) and not found[0].isfinite()


@pytest.mark.parametrize("k", [100, 20_000])
def test_whatever_a_payload_says_nothing_outside_the_bucket_is_read(kernels, k):
    bucket, payloads = averaged(70_001, k, 3, torch.float32)
    generator = torch.Generator().manual_seed(1)
    for size in (1, 2**8, 2**16):  # the emulation looks at every access
        noise = torch.randint(0, 256, payloads.shape, generator=generator, dtype=torch.uint8)
        found = measured(kernels, bucket, torch.where(torch.rand(payloads.shape, generator=generator) < 1 / size, noise, payloads).contiguous(), k=k)
        assert 0 <= float(found) <= reference.squared_norm(bucket) * (1 + 1e-9)


@emulation_alone
def test_what_is_measured_moves_bytes_that_follow_k(kernels):
    numel, k = 1_000_000, 1_000
    bucket, payloads = averaged(numel, k, 8, torch.float32)
    with kernels.schedule(multiprocessors=1), kernels.traffic() as traffic:
        measured(kernels, bucket, payloads, k=k)
    loaded, stored = traffic["measure_kernel"]
    places_and_averages = 2 * 8 * k + 4 * int(bucket.count_nonzero())
    assert places_and_averages < loaded < places_and_averages + 2_500 and stored < 500, "beside them 2 tile starts of each worker for each of 16 tiles"


CODES = {torch.bits1x8: "sign", torch.bits2x4: "2bit"}
WIRE_FORMS = [(dtype, wire) for dtype in FLOATS for wire in [*FLOATS, *CODES] if wire == dtype or wire.itemsize < dtype.itemsize]


def wire_case(kernels, numel, density, dtype, wire_dtype, elias_fano):
    """(payload before, its wire form and payload and residual after it, as the reference has them; k)."""
    gradient = next(gradients_of(numel, dtype))
    given, worker = reference.Worker(density), reference.Worker(density, wire_dtype=CODES.get(wire_dtype, wire_dtype))
    before, message = given.compress(gradient), worker.compress(gradient)
    narrow = message if wire_dtype in CODES else reference.replace(message, value=message.value.to(wire_dtype))
    coded = reference.few_bits(reference.CODE_BITS[CODES[wire_dtype]], before.index, before.value)[1:] if wire_dtype in CODES else None
    encoded = [reference.encode(m, numel, step=3, plan=77) for m in (before, message)]
    wire = reference.encode(narrow, numel, step=3, plan=77, elias_fano=elias_fano, coded=coded)
    k = len(message.index)
    assert kernels.wire_bytes(numel, k, dtype, wire_dtype, elias_fano=elias_fano) == len(wire)
    return copied(encoded[0]), copied(given.residual), wire, encoded[1], worker.residual, k


@pytest.mark.parametrize("dtype, wire_dtype", WIRE_FORMS)
@pytest.mark.parametrize("order", ["ascending", "shuffled"])
def test_the_wire_form_is_the_references_and_reads_back_as_the_payload(kernels, dtype, wire_dtype, order):
    sizes = [(4097, 0.05), (200_000, 0.002)]
    if order == "ascending":
        sizes += [(1, 1), (100, 0.1), (65536, 0.2), (65537, 0.9), (70_000, 1e-4)]
    for numel, density in sizes:
        for elias_fano in (False, True):
            payload, residual, wire, after, kept, k = wire_case(kernels, numel, density, dtype, wire_dtype, elias_fano)
            form = {"k": k, "dtype": dtype, "wire_dtype": wire_dtype, "elias_fano": elias_fano}
            written, again = aligned(len(wire), torch.uint8).fill_(0xEE), aligned(3 * len(after), torch.uint8).fill_(0xEE).view(3, -1)
            with kernels.schedule(order, seed=numel, resident_blocks=3):
                kernels.to_wire(residual, payload, written, **form)
                kernels.from_wire(copied(wire.expand(3, -1)), again, numel=numel, **form)
            assert torch.equal(written, wire)
            assert torch.equal(payload, after) and same_bits(residual, kept)
            assert torch.equal(again, after.expand(3, -1))


@pytest.mark.parametrize("elias_fano", [False, True])
def test_a_row_that_is_no_wire_form_becomes_a_payload_that_is_rejected(kernels, elias_fano):
    numel, dtype, wire_dtype = 150_000, torch.float32, torch.bfloat16
    *_, wire, after, _, k = wire_case(kernels, numel, 0.002, dtype, wire_dtype, elias_fano)
    generator = torch.Generator().manual_seed(0)
    end = len(wire) - 2 * k - 32  # of the code
    for trial in range(40):
        rows = wire.repeat(3, 1)
        if trial < 4:
            rows[1, (0, 6, 16, 24)[trial]] ^= 1
        else:
            for _ in range(trial % 3 + 1):
                at = int(torch.randint(64, end, (1,), generator=generator))
                rows[1, at] = int(torch.randint(0, 256, (1,), generator=generator)) if trial % 2 else 0xFF
        payloads = aligned(3 * len(after), torch.uint8).view(3, -1)
        kernels.from_wire(copied(rows), payloads, numel=numel, k=k, dtype=dtype, wire_dtype=wire_dtype, elias_fano=elias_fano)
        status = kernels.aggregate(aligned(numel, dtype), payloads, k=k, step=3, plan=77)
        assert torch.equal(payloads[0], after) and torch.equal(payloads[2], after)
        valid = torch.equal(rows[1], wire) or (status == PAYLOADS_VALID and reads_as_valid(payloads[1], numel, k))
        assert valid or status >> 8 == 1  # rank 1, in the first stage


def reads_as_valid(payload, numel, k):
    """Other entries than were sent, but in order and in the bucket: no receiver can tell."""
    index, _ = torch.ops.regtopk.decode(payload, numel=numel, k=k, dtype=torch.float32)
    return len(index) == k


# A support that a leader has chosen, and buckets that send all their entries: the CPU operators say what is right.


LED = [  # entries, density, the wire's dtype by the gradients', a code of the places
    (20_003, 0.01, {}, False), (70_001, 0.2, {torch.float32: torch.bfloat16, torch.float64: torch.float32}, False),
    (140_001, 0.002, {torch.float32: torch.float16, torch.float64: torch.bfloat16}, True), (9_001, 0.3, {}, True),
]  # fmt: skip


@pytest.mark.parametrize("numel, density, wire_dtypes, elias_fano, mu, distortion, dtype", in_turn(LED, MODES, of_one(FLOATS), all_of_them=ON_A_GPU))
def test_steps_that_a_leader_leads_equal_those_of_the_cpu(kernels, numel, density, wire_dtypes, elias_fano, mu, distortion, dtype):
    led = Led(kernels, numel, dtype, density=density, wire_dtype=wire_dtypes.get(dtype), elias_fano=elias_fano, mu=mu, distortion=distortion)
    with kernels.schedule("shuffled", seed=numel, resident_blocks=3):
        idle, void = led.random_steps(8)
    assert idle > 10 and void == 2


@pytest.mark.parametrize("numel, workers, dtype", in_turn([(9, 2), (20_003, 3), (70_001, 1), (70_004, 4)], of_one(FLOATS), all_of_them=ON_A_GPU))
def test_steps_of_a_dense_bucket_equal_those_of_the_cpu(kernels, numel, workers, dtype):
    led = Led(kernels, numel, dtype, dense=True, workers=workers)
    with kernels.schedule("descending", resident_blocks=2):
        idle, void = led.random_steps(8)
    assert idle > (10 if numel > 9 else 0) and void == 2


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_leader_may_choose_all_and_send_to_many(kernels, dtype):
    led = Led(kernels, 9_001, dtype, density=1.0, workers=20)
    for _ in range(2):
        led.step()


@emulation_alone
def test_what_chooses_nothing_and_what_shares_a_support_move_the_bytes_promised(kernels):
    numel = 300_000
    of_all, of_few = Led(kernels, numel, torch.float32, dense=True, workers=2), Led(kernels, numel, torch.float32, workers=2, mu=None)
    for led in (of_all, of_few):
        led.step()  # so that something has been sent
    counted = {}
    for name, led in (("all", of_all), ("few", of_few)):
        with kernels.traffic() as traffic:
            led.step()
        counted[name] = {kernel: tuple(bytes / numel for bytes in both) for kernel, both in traffic.items()}
    loaded, stored = counted["all"]["whole_kernel"]
    assert 16 <= loaded / 2 + stored / 2 < 16.3, "of two workers: g and r, r and the value"
    loaded, stored = counted["all"]["lay_kernel"]
    assert 4 <= loaded < 4.25 and 4 <= stored < 4.01
    assert sum(counted["all"]["join_kernel"]) < 0.01
    assert sum(counted["all"]["average_kernel"]) / 2 < 4 + 2 + 0.1, "a value of each of two workers of every second entry, and the average"
    loaded, stored = counted["few"]["whole_kernel"]
    assert 12 <= loaded + stored < 12.2, "of the one that follows"
    loaded, stored = counted["few"]["aggregate_kernel"]
    assert 4 <= stored < 4.01 and loaded < 0.2
    assert sum(map(sum, (counted["few"][name] for name in ("take_kernel", "count_kernel", "widen_kernel", "join_kernel", "average_kernel") if name in counted["few"]))) < 0.01 * 75


def led_step(kernels, **options):
    """A step of three workers by the CPU operators, of which rank 0 leads: (the side, its form, the step's number, messages, a follower's payload and residual)."""
    led = Led(kernels, 70_001, torch.float32, density=0.01, wire_dtype=torch.bfloat16, **options)
    side, form, common = led.cpu, led.form, {"mu": None, "decay": 1.0, "distortion": "previous"}
    payloads = [side.send(rank, copied(led.gradient(torch.zeros(form.spans, dtype=torch.bool))), 3, choose=rank == 0, **common) for rank in range(3)]
    lead = side.lead_of(side.message_of(0, payloads[0]))
    return side, form, payloads, lead


@pytest.mark.parametrize("elias_fano", [False, True])
def test_a_lead_that_is_not_valid_makes_a_message_that_every_receiver_rejects(kernels, elias_fano):
    side, form, payloads, lead = led_step(kernels, elias_fano=elias_fano)
    generator, refused = torch.Generator().manual_seed(1), set()
    for trial in range(50):
        damaged = copied(lead)
        if trial < 8:
            damaged[(0, 6, 8, 16, 24, 32, 57, form.head_bytes + 4)[trial]] ^= 1
        else:
            damaged[int(torch.randint(form.head_bytes, form.values_at, (1,), generator=generator))] ^= 1 << int(torch.randint(8, (1,), generator=generator))
        (payload, expected), (residual, kept) = ([copied(tensor) for _ in range(2)] for tensor in (payloads[1], side.residual[1]))
        options = {**form.options, "leader": 2, "step": 3, "plan": 77}
        status = kernels.take(residual, payload, damaged, side.spans, side.idle, **options)
        try:
            side.run.take(kept, expected, damaged, side.spans, side.idle, **options)
        except ValueError as error:
            assert status != PAYLOADS_VALID and rank_of(status) == 2 and "in the payload of rank 2" in str(error)
            refused.add(status & 0xFF)
            assert same_bits(residual, side.residual[1]), "nothing was taken"
            assert payload[FLAGS_AT] == UNFILLED and not payload[form.head_bytes :].any()
            # It travels, and leaves the residual alone.
            message = aligned(form.bytes, torch.uint8)
            kernels.to_wire(residual, payload, message, spans=form.spans, **form.options)
            assert same_bits(residual, side.residual[1])
            rows = form.rows_of([message] * 3)[0]
            for rank in (0, 2):
                rows[rank, FLAGS_AT] = 0
            check_refused_heads(kernels, side, form, rows, rank=1, before=status)  # of this rank the lead's error is told
            # And returns nothing, and is remembered as a payload that is this bucket's.
            side.verdict[3] = 3
            kernels.settle(residual, payload, side.spans, side.idle, side.verdict, None, side.counters[0], dtype=form.dtype, sent_round=3)
            assert same_bits(residual, side.residual[1])
            next_payload = aligned(form.payload_bytes, torch.uint8)
            kernels.compress(
                aligned(form.numel, form.dtype).zero_(), residual, next_payload, k=form.k, sent=payload, spans=side.spans, idle=side.idle, verdict=side.verdict,
                counters=side.counters[0], sent_round=3, choose=False,
            )  # fmt: skip
            assert next_payload[:4].view(torch.int32) == 0x6B707472
        else:
            assert status == PAYLOADS_VALID
            assert torch.equal(payload, expected) and same_bits(residual, kept)
    assert refused >= {HEADER, STEP, PLAN} and (elias_fano or refused >= {TILE_STARTS, SUPPORT})


def check_refused_heads(kernels, side, form, rows, rank, field=HEADER, before=-1):
    """Heads of which that rank's is none: averages of no step, which make every receiver's result NaN and the round void. `before`: a status that counts more."""
    options = {"numel": form.numel, "spans": form.spans, "step": 3, "plan": 77, **form.options}
    slice = aligned(16 + form.slice * 4, torch.uint8).fill_(0xEE)
    status = kernels.average_slice(copied(rows), slice, **options)
    assert (rank_of(status), status & 0xFF) == (rank, field) and status > before
    assert not slice[:16].any() and slice[16:].view(torch.float32).isnan().all()
    return slice


@pytest.mark.parametrize("byte, field", [(0, HEADER), (4, HEADER), (6, HEADER), (7, HEADER), (8, STEP), (16, HEADER), (24, HEADER), (32, PLAN), (57, HEADER), (60, HEADER), (64, SCALE), (72, DEED)])
def test_a_damaged_head_leaves_averages_of_no_step(kernels, byte, field):
    side, form, payloads, lead = led_step(kernels)
    rows = form.rows_of([lead] * 3)[0]
    rows[2, byte] += 1
    check_refused_heads(kernels, side, form, rows, rank=2, field=field)
    with pytest.raises(ValueError, match="rank 2"):
        side.average(copied(rows), 3)
    rows[1, 0] = 0  # all bytes are looked at first, and the lowest rank is named
    check_refused_heads(kernels, side, form, rows, rank=1)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("mark", [0, 3, 260])
def test_averages_of_another_step_or_none_give_nan_everywhere_and_a_void_round(kernels, dense, mark):
    led = Led(kernels, 20_003, torch.bfloat16, dense=dense)
    for _ in range(3):
        led.step()
    side, form = led.there, led.form
    averages, idle, verdict = copied(side.averages), copied(side.idle.fill_(7)), copied(side.verdict)
    averages[1, :2] = torch.tensor([mark % 256, mark // 256])
    bucket = aligned(form.numel, form.dtype)
    if mark == 3:  # the right one
        options = {"k": form.k, "step": 2, "round": 9}
        assert kernels.spread(bucket, side.sent[0], side.received, averages, side.spans, idle, verdict, **options) == PAYLOADS_VALID
        assert same_bits(bucket, side.bucket) and verdict[9] == -1 and not (idle == 7).any()
        return
    status = kernels.spread(bucket, side.sent[0], side.received, averages, side.spans, idle, verdict, k=form.k, step=2, round=9)
    assert (status >> 40, rank_of(status), status & 0xFF) == (4, 1, AVERAGES)
    assert same_bits(bucket, torch.full_like(bucket, torch.nan))
    assert verdict[9] == 9 and (idle == 7).all()
    if not dense:
        row = aligned(form.k, torch.float32)
        kernels.feedback(row, side.sent[0], side.received, averages, side.spans, idle, dtype=form.dtype, numel=form.numel, distortion="previous", step=2)
        assert row.isnan().all()


# Parts of parameters between the ranks of a host: the CPU operators say what is right.


PARAMETERS = {
    "one": [1], "shorter than the ranks": [1, 2, 0, 3, 1, 0], "aligned": [16_384, 0, 8_192], "one by one": [5, 4_097, 3, 70_001, 2, 4_099],
    "small": [number % 11 for number in range(900)],
}  # fmt: skip


def gradients_of_a_host(host):
    """What is not finite among them, on one rank or on several, and both zeros."""
    generator = torch.Generator().manual_seed(host.numel)
    gradients = [(torch.randn(host.numel, generator=generator) * 100).to(host.dtype) for _ in range(host.ranks)]
    if host.numel > 100:
        for rank, gradient in enumerate(gradients):
            gradient[7], gradient[8 + rank], gradient[20] = (torch.inf, torch.nan, (-1) ** rank * torch.inf)
            gradient[30:40] = -0.0
            gradient[50 + rank] = -gradient[8 + rank]  # a NaN of another sign
    return gradients


@pytest.mark.parametrize("name, ranks, dtype", in_turn(of_one(PARAMETERS), of_one(range(1, 5)), of_one(FLOATS), all_of_them=True))
def test_parts_go_to_the_ranks_and_back_as_on_the_cpu(kernels, name, ranks, dtype):
    host = Host(PARAMETERS[name], ranks, dtype)
    gradients = gradients_of_a_host(host)
    expected = host.all_of_it(PartsOperators(), gradients)
    with kernels.schedule("shuffled", seed=ranks, resident_blocks=3):
        there = host.all_of_it(kernels, gradients)
    for what, tensor in expected.items():
        assert torch.equal(tensor.view(-1).view(torch.uint8), there[what].view(-1).view(torch.uint8)), what
    assert bool(expected["verdict"][9] == 9) == (host.numel > 100)
    if ranks == 1:  # a mean of one
        finite = gradients[0].isfinite()
        assert same_bits(there["bucket"][finite], gradients[0][finite])


@emulation_alone
@pytest.mark.parametrize("dtype", FLOATS)
def test_parts_move_the_bytes_promised(kernels, dtype):
    ranks, numels = 4, [40_000] * 30 + [3, 9_001, 7_777] * 6 + [64] * 20
    host, size = Host(numels, ranks, dtype), dtype.itemsize
    with kernels.traffic() as traffic:
        host.all_of_it(kernels, [torch.randn(host.numel).to(dtype)] * ranks)
    counted = {kernel.strip("(").partition("<")[0]: [bytes / host.numel for bytes in both] for kernel, both in traffic.items()}
    (loaded, stored), (of_rows, of_row), (taken, laid) = (counted[f"{name}_parts_kernel"] for name in ("split", "mean", "join"))
    assert ranks * size <= loaded < ranks * (size + 0.1) and ranks * size <= stored < ranks * (size + 0.1)
    assert ranks * size <= of_rows < ranks * (size + 0.1) and size <= of_row < size + 0.1
    assert size <= taken < size + 0.1 and size <= laid < size + 0.1


HEADS = {0: HEADER, 3: HEADER, 8: STEP, 15: STEP, 32: PLAN, 56: HEADER, 59: HEADER, 64: SCALE, 72: DEED, 79: DEED}


@pytest.mark.parametrize("byte", [*HEADS, "none", "unfilled"])
def test_a_head_that_is_not_of_this_step_leaves_nan_and_is_named(kernels, byte):
    host = Host([70_001, 3, 5], 3, torch.bfloat16)
    rows = copied(torch.stack([host.split(kernels, torch.ones(host.numel, dtype=host.dtype))[1] for _ in range(3)]))
    if byte == "none":  # as a rank sends that has an error of its own
        rows[1] = 0
    else:
        rows[1, FLAGS_AT if byte == "unfilled" else byte] ^= UNFILLED if byte == "unfilled" else 1
    status = (3 << 40 if byte == "unfilled" else {SCALE: 1, DEED: 1, STEP: 2, PLAN: 2}.get(HEADS.get(byte), 0) << 40) | 1 << 8 | HEADS.get(byte, HEADER)
    row, found = host.mean(kernels, rows, 1)
    assert found.tolist() == [-1, status]
    assert torch.equal(row[:HEAD_BYTES], host.split(kernels, torch.ones(host.numel, dtype=host.dtype))[0, :HEAD_BYTES]), "a head as ever, which is marked before it travels"
    nan = torch.full((host.entries[1],), torch.nan, dtype=host.dtype)
    assert same_bits(row[HEAD_BYTES:].view(host.dtype)[: host.entries[1]], nan)
    bucket, verdict, worst = host.join(kernels, rows)
    assert worst == status and verdict[9] == 9 and same_bits(bucket, nan.new_full((host.numel,), torch.nan))
    for call in (lambda: host.mean(PartsOperators(), rows, 1), lambda: host.join(PartsOperators(), rows)):
        with pytest.raises(ValueError, match=r"rank 1\b"):
            call()
    rows[0, 0] ^= 1  # bytes before all else, and the lowest rank
    assert host.mean(kernels, rows, 1)[1].tolist() == [-1, HEADER]


def test_what_a_head_has_beside_is_not_looked_at(kernels):
    host = Host([40], 2, torch.float32)
    rows = copied(host.split(kernels, torch.ones(40)))
    for byte in (4, 16, 24, 40, 48, 60):
        rows[1, byte] ^= 1
    for run in (kernels, PartsOperators()):
        bucket, verdict, status = host.join(run, rows)
        assert status == PAYLOADS_VALID and (bucket == 1).all() and (verdict == -1).all()


@pytest.mark.parametrize("before", [None, (-1, -1), (257, 3 << 40)])
@pytest.mark.parametrize("found", [(-1, -1), (513, -1), (-1, 2 << 40 | 258), (1 << 40, 1)])
def test_a_message_made_of_what_was_not_valid_is_marked(kernels, found, before):
    messages, statuses = [], []
    for run in (kernels, PartsOperators()):
        messages.append(copied(torch.arange(96, dtype=torch.uint8)))
        statuses.append(None if before is None else copied(torch.tensor(before)))
        run.mark_unfilled(messages[-1], copied(torch.tensor(found)), statuses[-1])
    assert torch.equal(*messages)
    changed = (messages[0] != torch.arange(96, dtype=torch.uint8)).nonzero().flatten().tolist()
    assert changed == ([] if found == (-1, -1) else [FLAGS_AT]) and (not changed or int(messages[0][FLAGS_AT]) == FLAGS_AT | UNFILLED)
    if before is not None:
        lowest = [min(one % 2**64, other % 2**64) for one, other in zip(found, before, strict=True)]
        assert [status % 2**64 for status in statuses[0].tolist()] == lowest == [status % 2**64 for status in statuses[1].tolist()]


def test_a_marked_payload_is_rejected_and_what_it_sent_returns(kernels):
    numel, k = 9_000, 90
    gradient, residual, payload = copied(next(gradients_of(numel, torch.float32))), aligned(numel, torch.float32).zero_(), aligned(reference.encode(reference.Message(torch.arange(90), torch.zeros(90), False, 0, 0), numel).numel(), torch.uint8)
    kernels.compress(gradient, residual, payload, k=k, step=3, plan=5)
    kernels.mark_unfilled(payload, copied(torch.tensor([-1, 1])))
    bucket = aligned(numel, torch.float32)
    assert kernels.aggregate(bucket, payload.view(1, -1), k=k, step=3, plan=5) == HEADER and bucket.isnan().all()
    kernels.put_back(residual, payload, dtype=torch.float32)
    assert same_bits(residual, gradient)


@emulation_alone
def test_a_table_that_is_none_reaches_nothing_outside(kernels):
    host, generator = Host([4_000, 30, 2_000], 3, torch.float32), torch.Generator().manual_seed(0)
    for _ in range(20):
        host.parts.copy_(torch.randint(-9_000, 9_000, host.parts.shape, generator=generator))
        host.split(kernels, torch.ones(host.numel))  # raises where an access leaves its buffer
        rows = host.rows()
        host.join(kernels, rows)
        with pytest.raises(ValueError, match="split_: expected parts of a bucket of 6030 entries in rows of"):
            host.split(PartsOperators(), torch.ones(host.numel))


IN_HOST, CONSEQUENCE = 1 << 8 | STEP, 3 << 40 | 1 << 8 | HEADER


@pytest.mark.parametrize(
    ("of_workers", "in_host", "words"),
    [
        (-1, -1, None),
        (2 << 8 | STEP, -1, "this rank's step in the payload of rank 13"),
        (2 << 8 | DEED, -1, "got others on rank 13 than on rank 3"),
        (2 << 8 | SCALE, -1, "got another on rank 13 than on rank 3"),
        (-1, IN_HOST, "this rank's step in the payload of rank 6"),
        (-1, 2 << 8 | DEED, "got others on rank 7 than on rank 5"),
        (-1, CONSEQUENCE, "a header of this bucket in the payload of rank 6"),
        (1 << 8 | HEADER, IN_HOST, "this rank's step in the payload of rank 6"),  # for which this rank's own payload was none
        (2 << 8 | STEP, CONSEQUENCE, "this rank's step in the payload of rank 13"),
    ],
)
def test_what_is_wrong_is_told_by_its_cause_and_by_ranks_of_the_job(of_workers, in_host, words):
    from regtopk_torch import _C

    told = _C.describe_statuses(of_workers, in_host, host=1, place=3, host_ranks=5)
    assert words in told if words else told == ""
