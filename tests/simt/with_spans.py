"""Random steps of a bucket with spans, by the CPU operators and by the kernels: idle spans, void rounds and what follows."""

import torch

from regtopk_torch import reference
from tests.simt.host import PAYLOADS_VALID, aligned, copied
from tests.simt.inputs import brackets_of

ROUNDS = 4096


def spans_of(numel, *, seed=0):
    """The ends of parameters of all sizes, an empty one and one of a single entry among them, on tile ends and beside them."""
    cuts = [1, 100, 100, 4096, 8192, 8193, 12_000, 12_001, 16_384, 65_536, 65_537, 70_000]
    cuts += torch.randint(1, numel, (20,), generator=torch.Generator().manual_seed(seed)).tolist()
    return copied(torch.tensor([0, *sorted(cut for cut in cuts if cut < numel), numel]))


def chosen_of(numel, density, chunk):
    """(k, the operators' options) of a bucket whose chunks, None: it as a whole, send that share of their entries."""
    if chunk is None:
        return reference.entries_to_send(density, numel), {}
    of_chunk, rest = reference.entries_to_send(density, chunk), numel % chunk
    return numel // chunk * of_chunk + (reference.entries_to_send(density, rest) if rest else 0), {"chunk": chunk, "chunk_k": of_chunk}


def measured(run, bucket, payloads, **options):
    """What `run` finds of an average, one NaN whichever it is."""
    squared_norm = aligned(1, torch.float64).fill_(-1)
    run.measure(bucket, payloads, squared_norm, **options)
    return squared_norm.masked_fill_(squared_norm.isnan(), torch.nan)


class Operators:
    """The CPU operators, called as the kernels are."""

    def compress(self, gradient, residual, payload, *, sent, feedback, sampling, **options):
        torch.ops.regtopk.compress_(gradient, residual, payload, sent, feedback, **options)

    def aggregate(self, gradient, payloads, *, feedback, **options):
        torch.ops.regtopk.aggregate_(gradient, payloads, feedback, **options)
        return PAYLOADS_VALID

    def measure(self, *tensors, **options):
        torch.ops.regtopk.measure_(*tensors, **options)

    def settle(self, *arguments, **options):
        torch.ops.regtopk.settle_(*arguments, **options)

    def correct(self, *arguments, **options):
        torch.ops.regtopk.correct_(*arguments, **options)

    def mask(self, *arguments, **options):
        torch.ops.regtopk.mask_(*arguments, **options)


class Side:
    """What two workers keep for one bucket with spans, and `run`, which works on it."""

    def __init__(self, run, spans, dtype, k, residual, bytes, chunks, correction):
        """`correction`: None, or the options of correct_ and whether the velocity is masked."""
        self.run, self.spans, self.dtype, self.k, self.bytes, self.chunks, self.correction = run, spans, dtype, k, bytes, chunks, correction
        self.given, self.velocity = [], [copied(torch.zeros_like(residual)) if correction and correction[0].get("momentum") else None for _ in range(2)]
        self.residual = [copied(residual) for _ in range(2)]
        self.idle, self.verdict = aligned(spans.numel() - 1, torch.uint8).zero_(), aligned(ROUNDS, torch.int64).fill_(-1)
        self.counters = [aligned(3, torch.int64).zero_() for _ in range(2)]
        self.sent = self.rows = self.bucket = None

    def step(self, gradients, *, round, distortion, mu, decay, sampling, applied, scale):
        """mu None: Top-k."""
        numel, payloads = gradients[0].numel(), aligned(2 * self.bytes, torch.uint8).fill_(0xEE).view(2, self.bytes)
        both = {"spans": self.spans, "idle": self.idle, "verdict": self.verdict, "k": self.k, "distortion": distortion, "step": round, "plan": 77}
        self.given = [self.correct(n, gradient, round=round, applied=applied) for n, gradient in enumerate(gradients)]
        for n, gradient in enumerate(self.given):
            self.run.compress(
                gradient, self.residual[n], payloads[n], sent=None if self.sent is None else self.sent[n],
                feedback=None if mu is None or self.sent is None else self.rows[n], sampling=sampling, mu=mu or 1.0, decay=decay, applied=applied,
                counters=self.counters[n], scale=scale, deed=513, sent_round=round - 1, **self.chunks, **both,
            )  # fmt: skip
        self.bucket = aligned(numel, self.dtype).view(torch.uint8).fill_(0xEE).view(self.dtype)
        rows = aligned(2 * self.k, self.residual[0].dtype).view(2, self.k)
        assert self.run.aggregate(self.bucket, payloads, feedback=rows, round=round, **both) == PAYLOADS_VALID
        self.squared_norm = measured(self.run, self.bucket, payloads, k=self.k, spans=self.spans.numel() - 1)
        self.sent, self.rows = payloads, rows

    def correct(self, n, gradient, *, round, applied):
        """What is given of a worker's gradient: for one of the two in the memory of the gradient."""
        if self.correction is None:
            return gradient
        options, masks = self.correction
        if masks and self.sent is not None:
            self.run.mask(self.velocity[n], self.sent[n], self.spans, self.idle, self.verdict, applied, dtype=self.dtype, sent_round=round - 1)
        given = gradient if n == 0 else aligned(gradient.numel(), self.dtype).fill_(3.0)
        self.run.correct(gradient, given, self.velocity[n], self.spans, **options)
        return given

    def settle(self, *, round, applied):
        for n in range(2):
            self.run.settle(
                self.residual[n], self.sent[n], self.spans, self.idle, self.verdict, applied, self.counters[n], dtype=self.dtype, sent_round=round
            )  # fmt: skip

    def kept(self):
        """{name: bytes}: all that the two sides must agree on."""
        named = {"idle": self.idle, "verdict": self.verdict, "payloads": self.sent, "bucket": self.bucket, "feedback": self.rows, "squared norm": self.squared_norm}
        for n in range(2):
            named |= {f"residual {n}": self.residual[n], f"counters {n}": self.counters[n]}
            named[f"given {n}"] = self.given[n].masked_fill(self.given[n].isnan(), torch.nan)  # a GPU's NaN has other bits
            if self.velocity[n] is not None:
                named[f"velocity {n}"] = self.velocity[n]
        return {name: tensor.contiguous().view(-1).view(torch.uint8) for name, tensor in named.items()}


class Pair:
    """The CPU operators and the kernels on the same random steps, with spans that are zero for some time, void rounds and all that follows."""

    def __init__(self, kernels, numel, dtype, *, density, mu=0.8, distortion="previous", decay=0.9, seed=0, infinite=False, chunk=None, correction=None):
        """`infinite`: an entry of the residual is, which makes each round void in which it is sent."""
        from regtopk_torch import _C

        self.numel, self.dtype, self.round, self.options = numel, dtype, 0, {"mu": mu, "distortion": distortion, "decay": decay}
        self.generator = torch.Generator().manual_seed(seed)
        self.spans = spans_of(numel, seed=seed)
        self.k, chunks = chosen_of(numel, density, chunk)
        residual = torch.zeros(numel, dtype=reference.accumulate_dtype(dtype))
        residual[::3] = -0.0
        residual[1::7] = 0.25
        if infinite:
            residual[numel // 2] = torch.inf
        bytes = _C.payload_bytes(numel, self.k, dtype, self.spans.numel() - 1)
        assert bytes == kernels.payload_bytes(numel, self.k, dtype, self.spans.numel() - 1)
        self.cpu, self.there = (Side(run, self.spans, dtype, self.k, residual, bytes, chunks, correction) for run in (Operators(), kernels))
        self.seen = {"idle": 0, "void": 0, "valid": 0}

    def chance(self, probability):
        return bool(torch.rand((), generator=self.generator) < probability)

    def gradient(self, zero):
        gradient = torch.randn(self.numel, generator=self.generator) * torch.exp(torch.randn(self.numel, generator=self.generator))
        for span in zero.nonzero().flatten().tolist():
            part = gradient[self.spans[span] : self.spans[span + 1]]
            part.zero_()
            part[::2] = -0.0
        return gradient.to(self.dtype)

    def step(self, *, zero=None, bad=None, sampling=None, applied=None):
        """`zero`: spans whose gradients are zero on both workers. `bad`: what one entry of the gradients is, so that the round is void."""
        count = self.spans.numel() - 1
        zero = torch.zeros(count, dtype=torch.bool) if zero is None else zero
        gradients = []
        for worker in range(2):
            here = zero.clone()
            if worker == 1:  # one of the spans is zero here alone
                here[int(torch.randint(count, (), generator=self.generator))] = True
            gradients.append(self.gradient(here))
            if bad is not None:
                gradients[-1][7] = bad
        scale = 2.0 ** (self.round % 3)
        for side in (self.cpu, self.there):
            side.step([copied(gradient) for gradient in gradients], round=self.round, sampling=sampling, applied=applied, scale=scale, **self.options)
        self.compare()
        self.seen["idle"] += int(self.cpu.idle.sum())
        self.seen["valid"] += int(self.cpu.verdict[self.round % ROUNDS] != self.round)
        self.seen["void"] += int(self.cpu.verdict[self.round % ROUNDS] == self.round)
        self.round += 1

    def settle(self, *, applied=None):
        for side in (self.cpu, self.there):
            side.settle(round=self.round - 1, applied=applied)
        self.compare()

    def compare(self):
        there = self.there.kept()
        for name, expected in self.cpu.kept().items():
            assert torch.equal(expected, there[name]), f"round {self.round}: {name} differs from byte {int((expected != there[name]).nonzero()[0])} on"

    def random_steps(self, steps, kernels, brackets):
        """At least 4 steps."""
        count = self.spans.numel() - 1
        zero, bad = torch.zeros(count, dtype=torch.bool), None
        largest = torch.finfo(self.dtype).max
        for step in range(steps):
            if step % 2 == 0:  # most of what is zero stays so for two steps
                zero = torch.rand(count, generator=self.generator) < (1.0 if self.chance(0.15) else 0.4)
            quiet = step >= steps - 4  # at the end no round is void, all is in use, and then nearly nothing
            if quiet:
                zero = torch.full((count,), step >= steps - 2)
                zero[-1] = False
            sampling = kernels.sampling(self.numel, self.k)
            if brackets:  # names of brackets_of
                name = brackets[int(torch.randint(len(brackets), (), generator=self.generator))]
                sampling = sampling.replace(**brackets_of(self.numel)[name])
            applied = None
            if self.chance(0.5):
                applied = copied((torch.rand(count, generator=self.generator) < 0.5).to(torch.uint8))
            # Two finite gradients whose sum overflows return, and are taken away by the next; fp32 holds every sum of fp16.
            bad = -largest if bad == largest else None
            if bad is None and self.chance(0.35) and not quiet:
                bad = largest if self.chance(0.6) and self.dtype is not torch.float16 else torch.nan
            if applied is not None:
                applied[torch.searchsorted(self.spans, 7, right=True) - 1] = 0
            self.step(zero=zero, bad=bad, sampling=sampling, applied=applied)
            if self.chance(0.2):
                self.settle(applied=applied)
