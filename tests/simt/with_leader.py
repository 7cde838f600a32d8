"""Steps of workers that share a support, a leader's or all entries, by the CPU operators and by the kernels."""

from dataclasses import dataclass

import torch

from regtopk_torch import reference
from tests.simt.host import PAYLOADS_VALID, aligned, copied
from tests.simt.with_spans import ROUNDS, Operators, measured, spans_of

PLAN, MARK_BYTES = 77, 16
FLAGS_AT, ABSENT, UNFILLED = 56, 2, 4  # in the header


class LedOperators(Operators):
    """The CPU operators, called as the kernels are."""

    def to_wire(self, *tensors, **options):
        torch.ops.regtopk.to_wire_(*tensors, **options)

    def take(self, *tensors, **options):
        torch.ops.regtopk.take_(*tensors, **options)
        return PAYLOADS_VALID

    def average_slice(self, *tensors, **options):
        torch.ops.regtopk.average_slice_(*tensors, **options)
        return PAYLOADS_VALID

    def spread(self, *tensors, **options):
        torch.ops.regtopk.spread_(*tensors, **options)
        return PAYLOADS_VALID

    def feedback(self, *tensors, **options):
        torch.ops.regtopk.feedback_(*tensors, **options)


@dataclass
class Form:
    """Of a bucket's messages: sizes, and where their parts begin."""

    numel: int
    k: int
    dtype: torch.dtype
    spans: int
    wire_dtype: torch.dtype
    elias_fano: bool
    workers: int

    def __post_init__(self):
        from regtopk_torch import _C

        numel, k = self.numel, self.k
        self.head_bytes = -(-(80 + -(-self.spans // 8)) // 8) * 8
        support = -(-(self.head_bytes + -(-numel // reference.TILE_ENTRIES) * 4) // 8) * 8
        self.values_at = -(-(support + (-(-numel // 8) if k > numel // 16 else 2 * k)) // 8) * 8
        low = 0
        while low < 16 and numel >> (low + 1) >= k:
            low += 1
        coded = -(-(self.head_bytes + -(-k * low // 8)) // 8) * 8 + -(-(k + ((numel - 1) >> low) + 1) // 64) * 8
        has_code = self.elias_fano and coded < self.values_at
        self.has_wire_form = has_code or self.wire_dtype != self.dtype
        self.values_at = coded if has_code else self.values_at
        self.payload_bytes = _C.payload_bytes(numel, k, self.dtype, self.spans)
        self.bytes = _C.wire_bytes(numel, k, self.dtype, self.spans, self.wire_dtype, self.elias_fano)
        assert self.bytes == -(-(self.values_at + k * self.wire_dtype.itemsize) // 16) * 16
        self.slice = -(-k // (4 * self.workers)) * 4
        self.options = {"k": k, "dtype": self.dtype, "wire_dtype": self.wire_dtype, "elias_fano": self.elias_fano}

    def rows_of(self, messages):
        """[to, from, bytes] of what the ranks send one another."""
        bytes, size = self.slice * self.wire_dtype.itemsize, len(messages)
        rows = torch.zeros(size, size, self.head_bytes + bytes, dtype=torch.uint8)
        for rank, message in enumerate(messages):
            rows[:, rank, : self.head_bytes] = message[: self.head_bytes]
            values = torch.zeros(size * bytes, dtype=torch.uint8)
            values[: self.k * self.wire_dtype.itemsize] = message[self.values_at : self.values_at + self.k * self.wire_dtype.itemsize]
            rows[:, rank, self.head_bytes :] = values.view(size, bytes)
        return rows


class Side:
    """What the workers keep for one bucket, and `run`, which works on it."""

    def __init__(self, run, form, spans, residual):
        self.run, self.form, self.spans = run, form, spans
        self.residual = [copied(residual) for _ in range(form.workers)]
        self.idle, self.verdict = aligned(form.spans, torch.uint8).zero_(), aligned(ROUNDS, torch.int64).fill_(-1)
        self.counters = [aligned(3, torch.int64).zero_() for _ in range(form.workers)]
        self.sent = [None] * form.workers
        self.rows = [None] * form.workers  # of feedback
        self.bucket = aligned(form.numel, form.dtype)

    def lead_of(self, message):
        """As it is broadcast: up to its values."""
        lead = aligned(self.form.bytes, torch.uint8).zero_()
        lead[: self.form.values_at] = message[: self.form.values_at]
        return lead

    def send(self, rank, gradient, step, *, choose, mu, decay, distortion, absent=False):
        """(the payload, its message: undefined where the rank follows)."""
        payload = aligned(self.form.payload_bytes, torch.uint8).fill_(0xEE)
        self.run.compress(
            gradient, self.residual[rank], payload, sent=self.sent[rank], feedback=None if mu is None else self.rows[rank], sampling=None, mu=mu or 1.0,
            decay=decay, spans=self.spans, idle=self.idle, verdict=self.verdict, applied=None, counters=self.counters[rank], k=self.form.k,
            distortion=distortion, step=step, plan=PLAN, scale=2.0, deed=513, sent_round=step - 1, choose=choose,
        )  # fmt: skip
        if absent:
            payload[FLAGS_AT] |= ABSENT
        return payload

    def message_of(self, rank, payload):
        if not self.form.has_wire_form:
            return payload
        message = aligned(self.form.bytes, torch.uint8).fill_(0xEE)
        self.run.to_wire(self.residual[rank], payload, message, spans=self.form.spans, **self.form.options)
        return message

    def average(self, received, step):
        """(status of the worst head, a row of averages)."""
        form = self.form
        slice = aligned(MARK_BYTES + form.slice * form.dtype.itemsize, torch.uint8).fill_(0xEE)
        options = {"numel": form.numel, "spans": form.spans, "step": step, "plan": PLAN, **form.options}
        return self.run.average_slice(received, slice, **options), slice

    def step(self, gradients, step, *, dense, mu, decay, distortion, absent=()):
        form, leader = self.form, step % self.form.workers
        payloads = [
            self.send(rank, gradient, step, choose=dense or rank == leader, mu=mu, decay=decay, distortion=distortion, absent=rank in absent)
            for rank, gradient in enumerate(gradients)
        ]  # fmt: skip
        self.kept_payloads = [copied(payload) for payload in payloads]  # as compress left them
        messages = [self.message_of(rank, payload) if dense or rank == leader else None for rank, payload in enumerate(payloads)]
        for rank, payload in enumerate(payloads):
            if messages[rank] is None:
                lead = self.lead_of(messages[leader])
                assert self.run.take(self.residual[rank], payload, lead, self.spans, self.idle, leader=leader, step=step, plan=PLAN, **form.options) == PAYLOADS_VALID
                messages[rank] = self.message_of(rank, payload)
        rows = form.rows_of(messages)
        averages = []
        for received in rows:
            found, slice = self.average(copied(received), step)
            assert found == PAYLOADS_VALID
            averages.append(slice)
        self.averages, self.received = copied(torch.stack(averages)), copied(rows[0])
        self.bucket.view(torch.uint8).fill_(0xEE)
        found = self.run.spread(self.bucket, payloads[0], self.received, self.averages, self.spans, self.idle, self.verdict, k=form.k, step=step, round=step)
        assert found == PAYLOADS_VALID
        self.squared_norm = measured(self.run, self.bucket, payloads[0].view(1, -1), k=form.k, spans=form.spans)
        if mu is not None and not dense:
            for rank, payload in enumerate(payloads):
                self.rows[rank] = aligned(form.k, self.residual[0].dtype)
                self.run.feedback(
                    self.rows[rank], payload, self.received, self.averages, self.spans, self.idle, dtype=form.dtype, numel=form.numel,
                    distortion=distortion, step=step,
                )  # fmt: skip
        self.sent, self.messages = payloads, messages

    def kept(self):
        """{name: bytes}: all that the two sides must agree on."""
        named = {"idle": self.idle, "verdict": self.verdict, "bucket": self.bucket, "averages": self.averages, "squared norm": self.squared_norm}
        for rank in range(self.form.workers):
            named |= {f"residual {rank}": self.residual[rank], f"counters {rank}": self.counters[rank], f"payload {rank}": self.sent[rank]}
            # A payload without entries has no values.
            named[f"payload {rank} before its values"] = self.kept_payloads[rank][: self.form.payload_bytes - self.form.k * self.form.dtype.itemsize - 16]
            named[f"message {rank}"] = self.messages[rank]
            if self.rows[rank] is not None:
                named[f"feedback {rank}"] = self.rows[rank]
        return {name: tensor.contiguous().view(-1).view(torch.uint8) for name, tensor in named.items()}


class Led:
    """The CPU operators and the kernels on the same random steps of workers that share a support."""

    def __init__(
        self, kernels, numel, dtype, *, density=0.01, workers=3, wire_dtype=None, elias_fano=False, dense=False, mu=0.8, distortion="previous", decay=0.9, seed=0
    ):  # fmt: skip
        self.generator = torch.Generator().manual_seed(seed)
        self.spans = spans_of(numel, seed=seed)
        self.form = Form(
            numel, numel if dense else reference.entries_to_send(density, numel), dtype, self.spans.numel() - 1, dtype if dense else wire_dtype or dtype,
            elias_fano and not dense, workers,
        )  # fmt: skip
        self.options = {"dense": dense, "mu": mu, "decay": decay, "distortion": distortion}
        residual = torch.zeros(numel, dtype=reference.accumulate_dtype(dtype))
        residual[::3] = -0.0
        residual[1::7] = 0.25
        self.cpu, self.there = (Side(run, self.form, self.spans, residual) for run in (LedOperators(), kernels))
        self.steps = 0

    def gradient(self, zero):
        gradient = torch.randn(self.form.numel, generator=self.generator) * torch.exp(torch.randn(self.form.numel, generator=self.generator))
        for span in zero.nonzero().flatten().tolist():
            part = gradient[self.spans[span] : self.spans[span + 1]]
            part.zero_()
            part[::2] = -0.0
        return gradient.to(self.form.dtype)

    def step(self, *, zero=None, bad=None, absent=()):
        """`zero`: spans whose gradients are zero on all workers. `bad`: (rank, what one of its entries is)."""
        count, gradients = self.form.spans, []
        for rank in range(self.form.workers):
            here = torch.zeros(count, dtype=torch.bool) if zero is None else zero.clone()
            here[int(torch.randint(count, (), generator=self.generator))] = True  # here alone
            here |= torch.tensor(rank in absent)
            gradients.append(self.gradient(here))
            if bad is not None and bad[0] == rank:
                gradients[-1][7] = bad[1]
        for side in (self.cpu, self.there):
            side.step([copied(gradient) for gradient in gradients], self.steps, absent=absent, **self.options)
        self.compare()
        self.steps += 1

    def compare(self):
        there = self.there.kept()
        for name, expected in self.cpu.kept().items():
            assert torch.equal(expected, there[name]), f"step {self.steps}: {name} differs from byte {int((expected != there[name]).nonzero()[0])} on"

    def random_steps(self, steps):
        """Idle spans that come back, and void rounds, a leader's and a follower's. Returns how many (idle, void) were seen."""
        idle = void = 0
        zero = None
        for step in range(steps):
            if step % 2 == 1:
                zero = torch.rand(self.form.spans, generator=self.generator) < 0.5
            bad = {3: (step % self.form.workers, torch.inf), 6: ((step + 1) % self.form.workers, torch.nan)}.get(step % 8)
            self.step(zero=zero, bad=bad, absent=(1,) if step == 5 else ())
            idle += int(self.cpu.idle.sum())
            void += int(self.cpu.verdict[step % ROUNDS] == step)
        return idle, void
