"""Times on the device, by events, with rotating buckets so that no cache helps; beside them a copy of equal bytes.

The host runs ahead: a call that sleeps on the device comes first, so that the queue is full when the first event passes, and
a time holds what the device does and the gaps between its kernels, but not what the host does.
"""

import statistics
import time

import torch
from tests.simt import host

from tests.gpu_check import machine

WORKERS, PLAN = 8, 0
SLEEP_CYCLES_A_CALL = 300_000  # about 150 us at 2 GHz: more than the host needs for the launches of a call


def targets_of(numel, density, dtype, times):
    """{name: (value, limit, larger is better)} of what is asked for at density 0.001 in fp32."""
    if dtype != torch.float32 or density != 1e-3:
        return {}
    step, found = times["topk"], {}
    most = {11_200_000: 1.5, 25_600_000: 1.3, 1_500_000_000: 1.2}.get(numel)
    if most:
        found["x the copy of equal bytes"] = (step / times["copy"], most, False)
    if numel <= 1_100_000:
        found["us"] = (1e6 * step, 30.0, False)
    if "chain" in times:
        found["x faster than the chain"] = (times["chain"] / step, 4.0, True)
    found["RegTop-k x Top-k"] = (times["regtopk"] / step, 1.05, False)
    return found


class Bucket:
    """Gradient and residual in one piece of memory, so that a bucket copied to another is one copy of equal bytes."""

    def __init__(self, log, numel, dtype, seed):
        size, wide = dtype.itemsize, 8 if dtype == torch.float64 else 4
        begin = -(-numel * size // 512) * 512
        self.memory = machine.empty_on_device(log, (begin + numel * wide,), torch.uint8)
        self.gradient = self.memory[: numel * size].view(dtype)
        self.residual = self.memory[begin:].view(torch.float64 if wide == 8 else torch.float32)
        self.seed, self.step = seed, 0
        self.fill()
        self.residual.copy_(self.gradient)
        self.fill()

    def fill(self):
        """A fresh gradient; a piece at a time, because a bucket may fill half the memory."""
        self.seed += 1000
        generator = torch.Generator(self.gradient.device).manual_seed(self.seed)
        for part in self.gradient.split(1 << 26):
            part.copy_(torch.randn(part.numel(), generator=generator, device=part.device))


class Case:
    """The buckets of one size, density and type, and the candidates that are timed on them."""

    def __init__(self, log, kernels, numel, density, dtype, *, workers=WORKERS, buckets=3):
        from regtopk_torch import reference

        self.log, self.kernels, self.numel, self.dtype = log, kernels, numel, dtype
        self.k = reference.entries_to_send(density, numel)
        size = machine.payload_bytes(numel, self.k, dtype)
        self.buckets = [Bucket(log, numel, dtype, seed) for seed in range(buckets)]
        # The payloads of the others, made from a gradient of the same distribution and different entries.
        self.payloads = machine.empty_on_device(log, (workers, size), torch.uint8)
        self.sent = machine.empty_on_device(log, (size,), torch.uint8)
        self.feedback = machine.empty_on_device(log, (1, self.k), self.buckets[0].residual.dtype)
        self.next_feedback = torch.empty_like(self.feedback) if not log.emulated else machine.on_device(log, self.feedback)
        spare = self.buckets[0]
        for payload in [*self.payloads, self.sent]:
            kernels.compress(spare.gradient, spare.residual, payload, k=self.k)
            spare.fill()
        self.feedback.uniform_(0, 3)
        self.extra = {}

    def compress(self, bucket, *, mode):
        feedback = None if mode == "topk" else self.feedback[0]
        self.kernels.compress(bucket.gradient, bucket.residual, self.payloads[0], k=self.k, sent=self.sent, feedback=feedback, **self.extra)

    def aggregate(self, bucket, *, mode):
        self.kernels.aggregate(bucket.gradient, self.payloads, k=self.k, feedback=None if mode == "topk" else self.next_feedback)

    def candidates(self):
        """{name: (timed calls one after the other, ...)}; each is given a bucket and the next one."""

        def chain(bucket, _):
            bucket.residual.add_(bucket.gradient)
            index = torch.topk(bucket.residual.abs(), self.k, sorted=False).indices
            value = bucket.residual.gather(0, index).to(bucket.gradient.dtype)
            bucket.residual.index_fill_(0, index, 0.0)
            bucket.gradient.zero_()
            bucket.gradient.index_add_(0, index, value)

        def floor(bucket, _):
            bucket.residual.add_(bucket.gradient)
            bucket.gradient.zero_()

        found = {}
        for mode in ("topk", "regtopk"):
            found[mode] = (
                lambda bucket, _, mode=mode: self.compress(bucket, mode=mode),
                lambda bucket, _, mode=mode: self.aggregate(bucket, mode=mode),
            )
        found["floor"] = (floor,)
        found["copy"] = (lambda bucket, other: other.memory.copy_(bucket.memory),)
        found["torch.topk"] = (lambda bucket, _: torch.topk(bucket.residual.abs(), self.k, sorted=False),)
        found["chain"] = (chain,)
        return found

    def measure(self, name, calls):
        """[seconds of each timed call] of `calls` turns, the first ones thrown away; the gradient is renewed between, untimed."""
        stages = self.candidates()[name]
        turns = calls + 3
        marks = []
        kept = None if self.log.emulated else self.buckets[0].gradient.clone() if name in ("topk", "regtopk", "chain", "floor") else None
        if not self.log.emulated:
            torch.cuda._sleep(turns * SLEEP_CYCLES_A_CALL)
        for turn in range(turns):
            bucket, other = self.buckets[turn % len(self.buckets)], self.buckets[(turn + 1) % len(self.buckets)]
            marks.append([self.mark()])
            for stage in stages:
                stage(bucket, other)
                marks[-1].append(self.mark())
            # The gradients of a bucket are new in each step; here three buckets share one. What this leaves in the cache is
            # gone when the bucket's turn comes.
            if kept is not None:
                bucket.gradient.copy_(kept)
        if not self.log.emulated:
            torch.cuda.synchronize()
        return [[self.seconds(one, two) for one, two in zip(row, row[1:], strict=False)] for row in marks[3:]]

    def mark(self):
        if self.log.emulated:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, one, two):
        return two - one if self.log.emulated else 1e-3 * one.elapsed_time(two)


def spread(values):
    if len(values) < 2:
        return {"median": values[0], "quartiles": [values[0]] * 2, "n": len(values)}
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "quartiles": [low, high], "n": len(values)}


def time_case(log, kernels, numel, density, dtype):
    case = Case(log, kernels, numel, density, dtype)
    calls = 2 if log.emulated else 30 if numel < 50_000_000 else 12 if numel < 500_000_000 else 6
    rows, times = {}, {}
    for name in case.candidates():
        try:
            taken = case.measure(name, calls)
        except torch.OutOfMemoryError:
            log.write("note", what=f"no memory for {name} at {numel} entries")
            continue
        total = [sum(stages) for stages in taken]
        rows[name] = spread(total)
        times[name] = rows[name]["median"]
        if len(taken[0]) == 2:
            rows[f"{name}: compress"], rows[f"{name}: aggregate"] = (spread([stages[i] for stages in taken]) for i in range(2))
    targets = {
        name: {"value": value, "target": limit, "met": value >= limit if larger else value <= limit}
        for name, (value, limit, larger) in targets_of(numel, density, dtype, times).items()
    }  # fmt: skip
    log.write(
        "times", numel=numel, density=density, k=case.k, dtype=str(dtype).removeprefix("torch."), workers=WORKERS, seconds=rows,
        to_copy={name: value / times["copy"] for name, value in times.items()},
        copy_bytes=2 * case.buckets[0].memory.numel(), targets=targets,
    )  # fmt: skip


def times(log):
    """The sizes that have targets first, then the other densities and bf16; a case that has no time left is left out."""
    kernels = machine.kernels_of(log)
    if not isinstance(kernels, machine.Operators):
        kernels = Reused(log, kernels)
    wide, narrow = torch.float32, torch.bfloat16
    sizes = [1_100_000, 11_200_000, 25_600_000, 124_000_000, 1_500_000_000]
    if log.emulated:
        cases = [(3_001, 1e-2, wide), (3_001, 1e-2, narrow)]
    else:
        cases = [(numel, 1e-3, wide) for numel in (11_200_000, 25_600_000, 1_100_000, 1_500_000_000, 124_000_000)]
        cases += [(numel, density, wide) for density in (1e-2, 1e-1, 1e-4) for numel in sizes[1:3]]
        cases += [(numel, 1e-3, narrow) for numel in sizes]
        cases += [(numel, density, wide) for density in (1e-2, 1e-1, 1e-4) for numel in (sizes[0], *sizes[3:])]
        cases += [(numel, density, narrow) for density in (1e-2, 1e-1, 1e-4) for numel in sizes]
    for number, case in enumerate(cases):
        if log.seconds_left() < (20 if case[0] > 1_000_000_000 else 4) and not log.emulated:
            log.write("left out", case=str(case), cases=len(cases) - number)
            continue
        time_case(log, kernels, *case)
        if not log.emulated:
            torch.cuda.empty_cache()


def variants(log):
    """Single mends against what was predicted of them, through the launchers: (what, prediction, {variant: seconds})."""
    kernels = Reused(log, machine.library_kernels(log))
    numel = 3_001 if log.emulated else 11_200_000
    calls = 2 if log.emulated else 30

    def median(case, stage):
        return statistics.median(row[stage] for row in case.measure("topk", calls))

    case = Case(log, kernels, numel, 1e-3, torch.float32)
    sampling = kernels.kernels.sampling(numel, case.k)
    found = {}
    for sectors in (sampling.sectors, sampling.sectors // 4):
        share = sectors / max(1, sampling.sectors)
        ranks = (max(1, int(sampling.rank_high * share)), int(sampling.rank_low * share) + 20) if sectors else (0, 0)
        case.extra = {"sampling": sampling.replace(sectors=sectors, rank_high=ranks[0], rank_low=ranks[1])}
        found[f"{sectors} sectors"] = median(case, 0)
    log.write("variants", what="compress by sampled sectors", predicted="a quarter of the sectors: 5 us less", seconds=found)
    found = {}
    for workers in (1, 2, 7, 8) if log.emulated else (1, 7, 8, 64):
        case = Case(log, kernels, numel, 1e-3, torch.float32, workers=workers)
        found[f"{workers} workers"] = median(case, 1)
    log.write(
        "variants", what="aggregate by workers (7: divisions, the others: products)",
        predicted="28 to 38 us for 8 with divisions of zeros, 18 to 22 us without; 64 workers: 60 to 70 us", seconds=found,
    )  # fmt: skip
    case = Case(log, kernels, numel, 1 / 16, torch.float32, workers=2)
    found = {name: statistics.median(map(sum, case.measure(name, calls))) for name in ("topk", "regtopk", "copy")}
    log.write("variants", what="density 1/16, 2 workers", predicted="sample 100 to 250 us with RegTop-k", seconds=found)


class Reused:
    """The launchers with workspaces that are kept, as the operators keep them."""

    def __init__(self, log, kernels):
        self.log, self.kernels, self.workspaces = log, kernels, {}
        self.aggregates = kernels._workspace(host.AGGREGATE_ZEROED_BYTES, host.AGGREGATE_ZEROED_BYTES)
        self.status = torch.full((1,), -1, dtype=torch.int64, device=self.aggregates.device)

    def compress(self, gradient, residual, payload, *, k, feedback=None, sampling=None, **keywords):
        key = (gradient.numel(), k, gradient.dtype, feedback is not None, sampling)
        if key not in self.workspaces:
            self.workspaces[key] = self.kernels.compress_workspace(*key[:3], has_feedback=key[3], sampling=sampling)
        self.kernels.compress(gradient, residual, payload, k=k, feedback=feedback, sampling=sampling, workspace=self.workspaces[key], **keywords)

    def aggregate(self, gradient, payloads, **keywords):
        self.kernels.aggregate(gradient, payloads, workspace=self.aggregates, status=self.status, **keywords)
