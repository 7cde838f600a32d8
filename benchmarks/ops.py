"""Time the operators against the floor and against torch: python -m benchmarks.ops --out FILE.jsonl [--device cpu|cuda] ...

A case is one bucket: size, density, dtype, input. Its candidates take turns, one after the other in every round, each from
the same residual and gradient, restored before the clock starts; a round gives one ratio per pair of candidates. On CUDA three
buckets take turns, so that no restored operand lies in the cache, and the clock is the device's: events around the call, which is
queued behind a pause of the device, so that the host's work is not in it. `python -m tests.gpu_check` times kernel by kernel.

    floor              residual.add_(gradient); gradient.zero_(): 16 bytes per fp32 entry, the least that a hook moves
    chain              what a plain hook calls: add, abs, topk, gather, index_fill, zero, index_add
    torch.topk         torch.topk(residual.abs(), k) alone
    topk               compress_ and aggregate_ of one payload; the last step's payload is given
    regtopk            the same with the last step's feedback and recording the next one, mu = 1
    topk, 8 payloads   as topk, and aggregate_ adds 8 payloads

With --wire, of a bucket of four workers in fp32 instead, and to which the ratios are is `offsets`:

    offsets            compress_, and aggregate_ of four payloads: fp32 values, 16-bit offsets
    TYPE, CODE         the same through the wire form: to_wire_ of this worker's payload, from_wire_ of four messages

Every row has median, quartiles and n of the seconds, and of three ratios: to the floor, of the chain to the candidate, and to topk.
"""

import argparse
import copy
import functools
import random
import statistics
import time

import torch

from regtopk_torch import _C, reference
from regtopk_torch.options import CODES
from runlog.record import Recorder

ops = torch.ops.regtopk
WIRE_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, **CODES}
WIRE_WORKERS = 4
PAYLOADS = {"topk": 1, "regtopk": 1, "topk, 8 payloads": 8}
# No score is this large: nothing lies in the bracket, and compress has to recover from it.
MISSED_BRACKET = (0x7F800000, 0x7FFFFFFF)


def normal(numel, generator):
    return torch.randn(numel, generator=generator)


INPUTS = {
    "normal": normal,
    "bracket missed": normal,
    "all equal": lambda numel, generator: torch.full((numel,), 0.5),
    "all zero": lambda numel, generator: torch.zeros(numel),
    "repeated in 99 %": lambda numel, generator: torch.where(torch.rand(numel, generator=generator) < 0.99, 0.75, normal(numel, generator)),
    "one binade": lambda numel, generator: 1 + torch.rand(numel, generator=generator),
    "different scales": lambda numel, generator: normal(numel, generator) * torch.where(torch.arange(numel) < numel // 2, 1.0, 1e-6),
    "sorted up": lambda numel, generator: torch.arange(numel) / numel,
    "sorted down": lambda numel, generator: torch.arange(numel, 0, -1) / numel,
}


class Bucket:
    """One case: the state before a step, kept aside, and the tensors that the candidates work on."""

    def __init__(self, size, density, dtype, name, device):
        generator = torch.Generator().manual_seed(0)
        self.k = reference.entries_to_send(density, size)
        self.bracket = MISSED_BRACKET if name == "bracket missed" and device == "cpu" else None  # else the operator samples one
        first, self.initial_gradient = (INPUTS[name](size, generator).to(dtype).to(device) for _ in range(2))
        self.initial_residual = torch.zeros(size, device=device)
        self.gradient, self.residual = self.initial_gradient.clone(), self.initial_residual.clone()
        payload_bytes = _C.payload_bytes(size, self.k, dtype)
        self.sent = torch.zeros(1, payload_bytes, dtype=torch.uint8, device=device)
        # The history: a first step. Its feedback is spread over what several workers would have made of it.
        ops.compress_(first, self.initial_residual, self.sent[0], None, None, k=self.k)
        feedback = torch.empty(1, self.k, device=device)
        ops.aggregate_(first, self.sent, feedback, k=self.k)
        self.next_feedback = torch.empty_like(feedback)
        self.feedback = feedback[0] * torch.rand(self.k, generator=generator).to(device)
        # The payloads of the other workers are there already; rank 0's is this step's.
        self.payloads = {1: torch.zeros_like(self.sent), 8: torch.zeros(8, payload_bytes, dtype=torch.uint8, device=device)}
        for payload in self.payloads[8]:
            other = INPUTS[name](size, generator).to(dtype).to(device)
            ops.compress_(other, self.initial_residual.clone(), payload, None, None, k=self.k)

    def twin(self):
        """Another bucket in the same state, with operands in memory of its own."""
        other = copy.copy(self)
        other.gradient, other.residual = self.gradient.clone(), self.residual.clone()
        return other

    def restore(self):
        self.gradient.copy_(self.initial_gradient)
        self.residual.copy_(self.initial_residual)

    def floor(self):
        self.residual.add_(self.gradient)
        self.gradient.zero_()

    def chain(self):
        self.residual.add_(self.gradient)
        index = torch.topk(self.residual.abs(), self.k, sorted=False).indices
        value = self.residual.gather(0, index).to(self.gradient.dtype)
        self.residual.index_fill_(0, index, 0.0)
        self.gradient.zero_()
        self.gradient.index_add_(0, index, value)

    def torch_topk(self):
        torch.topk(self.residual.abs(), self.k, sorted=False)

    def exchange(self, candidate):
        payloads = self.payloads[PAYLOADS[candidate]]
        feedback, next_feedback = (self.feedback, self.next_feedback) if candidate == "regtopk" else (None, None)
        ops.compress_(self.gradient, self.residual, payloads[0], self.sent[0], feedback, k=self.k, mu=1.0, bracket=self.bracket)
        ops.aggregate_(self.gradient, payloads, next_feedback, k=self.k)

    def candidates(self):
        exchanges = {name: lambda name=name: self.exchange(name) for name in PAYLOADS}
        return {"floor": self.floor, "chain": self.chain, "torch.topk": self.torch_topk} | exchanges

    def wire_candidates(self):
        candidates = {"offsets": self.exchange_messages}
        for name, dtype in WIRE_TYPES.items():
            for elias_fano in (False, True):
                if (dtype, elias_fano) == (torch.float32, False):
                    continue  # the payload itself
                form = {"dtype": torch.float32, "wire_dtype": dtype, "elias_fano": elias_fano, "k": self.k}
                message_bytes = _C.wire_bytes(len(self.gradient), self.k, torch.float32, 0, dtype, elias_fano)
                messages = torch.empty(WIRE_WORKERS, message_bytes, dtype=torch.uint8, device=self.gradient.device)
                for payload, message in zip(self.payloads[8], messages, strict=False):
                    ops.to_wire_(self.residual.clone(), payload.clone(), message, **form)
                candidates[f"{name}, {'Elias-Fano' if elias_fano else 'offsets'}"] = functools.partial(self.exchange_messages, messages, form)
        return candidates

    def exchange_messages(self, messages=None, form=None):
        payloads = self.payloads[8][:WIRE_WORKERS]
        ops.compress_(self.gradient, self.residual, payloads[0], self.sent[0], None, k=self.k)
        if messages is not None:
            ops.to_wire_(self.residual, payloads[0], messages[0], **form)
            ops.from_wire_(messages, payloads, **form, numel=len(self.gradient))
        ops.aggregate_(self.gradient, payloads, None, k=self.k)


def seconds(function, device):
    if device == "cuda":
        return seconds_on_cuda(function)
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def seconds_on_cuda(function):
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(1_000_000)  # cycles, about half a millisecond: the host queues the call meanwhile
    first.record()
    function()
    last.record()
    last.synchronize()
    return 1e-3 * first.elapsed_time(last)


def time_rounds(bucket, device, seconds_per_case, candidates_of=Bucket.candidates):
    """Return {candidate: [seconds of each round]}: 7 to 200 rounds after one that is thrown away."""
    buckets = [bucket] + [bucket.twin() for _ in range(2 if device == "cuda" else 0)]
    candidates = [candidates_of(each) for each in buckets]
    times = {name: [] for name in candidates[0]}
    turn = 0
    started, rounds = time.perf_counter(), 0
    while rounds < 8 or (rounds < 201 and time.perf_counter() - started < seconds_per_case):
        # In another order each time: what ran before leaves the caches and the clock in another state.
        for name in random.sample(sorted(times), len(times)):
            # Of three, restored two turns before it is used: what the others move meanwhile takes its place in the cache.
            turn += 1
            buckets[turn % len(buckets)].restore()
            taken = seconds(candidates[(turn + 1) % len(buckets)][name], device)
            if rounds > 0:
                times[name].append(taken)
        rounds += 1
    return times


def summarise(values):
    """Median, quartiles and count of a list of numbers."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "quartiles": [low, high], "n": len(values)}


def ratios(numerators, denominators):
    return summarise([one / other for one, other in zip(numerators, denominators, strict=True)])


def run_case(recorder, options, variant, size, density, dtype, name):
    bucket = Bucket(size, density, getattr(torch, dtype), name, options.device)
    times = time_rounds(bucket, options.device, options.seconds_per_case)
    for candidate, taken in times.items():
        to_floor, chain_to, to_topk = ratios(taken, times["floor"]), ratios(times["chain"], taken), ratios(taken, times["topk"])
        recorder.write(
            "row", device=options.device, variant=variant, size=size, density=density, k=bucket.k, dtype=dtype, input=name,
            candidate=candidate, torch=torch.__version__, seconds=summarise(taken), to_floor=to_floor, chain_to=chain_to, to_topk=to_topk,
        )  # fmt: skip
        print(
            f"{variant} {size:>10} {density:g} {dtype} {name}: {candidate:<17} {1e3 * statistics.median(taken):9.3f} ms, "
            f"{to_floor['median']:7.2f} x the floor, chain takes {chain_to['median']:6.2f} x, {to_topk['median']:5.2f} x topk, n={len(taken)}",
            flush=True,
        )


def run_wire_case(recorder, options, variant, size, density, name):
    bucket = Bucket(size, density, torch.float32, name, options.device)
    times = time_rounds(bucket, options.device, options.seconds_per_case, Bucket.wire_candidates)
    for candidate, taken in times.items():
        to_offsets = ratios(taken, times["offsets"])
        recorder.write(
            "wire", device=options.device, variant=variant, size=size, density=density, k=bucket.k, input=name, candidate=candidate,
            torch=torch.__version__, seconds=summarise(taken), to_offsets=to_offsets,
        )  # fmt: skip
        print(f"{variant} {size:>10} {density:g} {name}: {candidate:<20} {1e3 * statistics.median(taken):9.3f} ms, {to_offsets['median']:5.2f} x offsets, n={len(taken)}", flush=True)


def numbers(text):
    return [float(part) for part in text.split(",")]


def parse():
    parser = argparse.ArgumentParser(prog="benchmarks.ops", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--sizes", type=numbers, default=[1e5, 11.2e6, 25.6e6], help="entries of a bucket, comma-separated")
    parser.add_argument("--densities", type=numbers, default=[1e-4, 1e-3, 1e-2, 1e-1], help="comma-separated")
    parser.add_argument("--dtypes", default="float32", help="of float32, bfloat16, float16")
    parser.add_argument("--inputs", default="normal", help=f"all, or of {', '.join(INPUTS).replace('%', '%%')}")
    parser.add_argument("--variants", default=_C.cpu_variant(), help=f"CPU instruction sets, of {', '.join(_C.available_cpu_variants())}")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds-per-case", type=float, default=20.0)
    parser.add_argument("--wire", action="store_true", help="the forms in which values and places travel, in place of the candidates; of float32 alone")
    parser.add_argument("--out", required=True, help="JSON lines, a file that does not exist yet")
    return parser.parse_args()


def main():
    options = parse()
    torch.set_num_threads(options.threads)
    random.seed(0)
    names = list(INPUTS) if options.inputs == "all" else options.inputs.split(",")
    if options.device == "cuda" and "bracket missed" in names:
        raise SystemExit("benchmarks.ops: expected no input 'bracket missed' on cuda, where the bracket cannot be forced; tests.gpu_check does")
    with Recorder(options.out, 0, device=options.device, threads=options.threads, torch=torch.__version__) as recorder:
        for variant in options.variants.split(","):
            _C.set_cpu_variant(variant)
            for size in map(int, options.sizes):
                for density in options.densities:
                    for name in names:
                        if options.wire:
                            run_wire_case(recorder, options, variant, size, density, name)
                            continue
                        for dtype in options.dtypes.split(","):
                            run_case(recorder, options, variant, size, density, dtype, name)


if __name__ == "__main__":
    main()
