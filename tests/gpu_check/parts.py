"""The parts of a check, in the order in which they run. Another part is one function that takes a Log, and one line here."""

from dataclasses import dataclass
from typing import Callable

from tests.gpu_check import build, correctness, ddp, figure, memory, sanitize, timing


@dataclass(frozen=True)
class Part:
    name: str
    title: str
    function: Callable
    seconds: float  # at most
    gpu_alone: bool = False  # the emulation has nothing of it


PARTS = [
    Part("build", "compile for this GPU: the kernels by nvcc alone, and the extension", build.build, 170),
    Part("kernels", "the cases of tests/test_cuda_emulation.py", correctness.kernels, 75),
    Part("operators", "bytes equal to the CPU's: types, sizes, densities, hard inputs", correctness.operators, 90),
    Part("spans", "bytes equal to the CPU's for buckets with parameters: idle, void, applied", correctness.spans, 30),
    Part("led", "bytes equal to the CPU's where ranks share a support: a leader's, or all entries", correctness.led, 25),
    Part("hosts", "bytes equal to the CPU's: parts of parameters between the ranks of a host", correctness.hosts, 45),
    Part("misses", "bytes equal to the CPU's whatever the bracket", correctness.misses, 40),
    Part("graph", "no synchronisation; capture and replay", correctness.graph, 30, gpu_alone=True),
    Part("races", "300 calls beside a loaded stream give one result", correctness.races, 40),
    Part("gloo", "DDP, 2 and 4 ranks over gloo, equal to the simulation", ddp.gloo, 60),
    Part("nccl", "DDP over NCCL, 1, 2 and 4 ranks, equal to the simulation, no synchronisation", ddp.nccl, 90, gpu_alone=True),
    Part("lost", "a rank that is killed: an error on the other, or its end", ddp.lost, 90),
    Part("times", "time against a copy of equal bytes, the torch chain and torch.topk", timing.times, 130),
    Part("share", "what the hook adds to a step of ResNet-50", ddp.share_of_a_step, 90, gpu_alone=True),
    Part("host", "where the host's time in the hook goes, by torch's profiler", ddp.host, 40),
    Part("workers", "8 workers of ResNet-18 in one process", ddp.workers, 40),
    Part("sanitizer", "compute-sanitizer on small sizes", sanitize.sanitizer, 60),
    Part("variants", "what was predicted of single mends", timing.variants, 40),
    Part("memory", "bytes beyond gradient and residual", memory.memory, 20),
    Part("profile", "stalls and throughput of each kernel, by ncu", sanitize.profile, 45, gpu_alone=True),
    Part("large", "buckets of 2^31 + 5 and 2^32 - 1 entries", correctness.large, 45),
    Part("figure", "with --data: Fig. 3 of the paper, 8 workers of ResNet-18 on CIFAR-10", figure.figure, 420),
]
