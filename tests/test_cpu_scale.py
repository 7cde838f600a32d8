"""Buckets beyond 2^31 entries, and how much memory a bucket takes."""

import ctypes
import mmap
import os
import subprocess
import sys

import pytest
import torch

from regtopk_torch import _C

ops = torch.ops.regtopk
VECTOR_VARIANTS = [name for name in _C.available_cpu_variants() if name != "scalar"]
EDGE = 1 << 21  # bytes


class LargeTensor:
    """A tensor of more bytes than there is memory for: zeros in all of its middle, which is one small piece of memory
    mapped again and again; the first and last EDGE bytes, and the one around `own`, are its own."""

    def __init__(self, numel, dtype, own):
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
        size = numel * dtype.itemsize
        self.bytes = -(-size // EDGE) * EDGE
        self.munmap = libc.munmap
        self.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

        def map_at(address, length, flags, file):
            got = libc.mmap(address, length, mmap.PROT_READ | mmap.PROT_WRITE, flags, file, 0)
            assert got != ctypes.c_void_p(-1).value, os.strerror(ctypes.get_errno())
            return got

        fixed, anonymous = 0x10, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self.address = map_at(None, self.bytes, anonymous | 0x4000, -1)  # 0x4000: reserve no memory
        shared = 16 * EDGE
        file = os.memfd_create("zeros")
        os.truncate(file, shared)
        for begin in range(0, self.bytes, shared):
            map_at(self.address + begin, min(shared, self.bytes - begin), mmap.MAP_SHARED | fixed, file)
        for begin in {0, own * dtype.itemsize // EDGE * EDGE, self.bytes - 2 * EDGE, self.bytes - EDGE}:
            map_at(self.address + begin, EDGE, anonymous | fixed, -1)
        os.close(file)
        buffer = (ctypes.c_char * size).from_address(self.address)
        self.tensor = torch.frombuffer(buffer, dtype=dtype)

    def close(self):
        del self.tensor
        self.munmap(self.address, self.bytes)


@pytest.mark.skipif(sys.platform != "linux", reason="maps memory as only Linux does")
@pytest.mark.parametrize("bracket", [None, (0x7F800000, 0x7FFFFFFF)], ids=["sampled", "missed"])
@pytest.mark.parametrize("variant", VECTOR_VARIANTS)
def test_entries_beyond_2_to_the_31_are_sent_and_averaged(variant, bracket):
    beyond = (1 << 31) + 65_536
    numel = beyond + 300_001
    k = 1_000
    gradient, residual = LargeTensor(numel, torch.bfloat16, beyond), LargeTensor(numel, torch.float32, beyond)
    previous = _C.cpu_variant()
    try:
        _C.set_cpu_variant(variant)
        # Some at the start, some beyond 2^31, some at the very end; zeros, by index, are the rest of the k.
        index = torch.cat([torch.arange(100, 200), torch.arange(beyond, beyond + 500), torch.arange(numel - 50, numel)])
        value = torch.arange(1, len(index) + 1).to(torch.bfloat16)
        gradient.tensor[index] = value
        payload = torch.empty(1, _C.payload_bytes(numel, k, torch.bfloat16), dtype=torch.uint8)
        ops.compress_(gradient.tensor, residual.tensor, payload[0], None, None, k=k, bracket=bracket)

        got_index, got_value = ops.decode(payload[0], numel=numel, k=k, dtype=torch.bfloat16)
        ties = torch.cat([torch.arange(0, 100), torch.arange(200, 200 + k - len(index) - 100)])
        assert torch.equal(got_index, torch.cat([ties, index]).sort().values)
        assert torch.equal(got_value[torch.isin(got_index, index)], value)
        assert not residual.tensor[index].any()

        gradient.tensor[index] = 77.0
        gradient.tensor[beyond - 1] = 77.0
        feedback = torch.empty(1, k)
        ops.aggregate_(gradient.tensor, payload, feedback, k=k)
        assert torch.equal(gradient.tensor[index], value)
        assert gradient.tensor[beyond - 1] == 0
        ops.compress_(gradient.tensor, residual.tensor, payload.clone()[0], payload[0], feedback[0], k=k, bracket=bracket)
    finally:
        _C.set_cpu_variant(previous)
        gradient.close()
        residual.close()


MEASURE_PEAK = """
import sys, torch
from regtopk_torch import _C
ops = torch.ops.regtopk

def steps(gradient, residual, k, workers, count):
    size = _C.payload_bytes(gradient.numel(), k, gradient.dtype)
    payload, sent, feedback = torch.zeros(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8), torch.zeros(1, k)
    for step in range(count):
        history = (sent, feedback[0]) if step else (None, None)
        ops.compress_(gradient, residual, payload, *history, k=k, mu=1.0)
        payloads = payload.repeat(workers, 1)
        ops.aggregate_(gradient, payloads, feedback, k=k)
        del payloads
        payload, sent = sent, payload
        gradient.normal_()

def high_water_mark():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

numel, density, workers = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(2)
steps(torch.randn(300_000), torch.zeros(300_000), 30, workers, 2)  # code, threads and their stacks
gradient, residual = torch.randn(numel), torch.randn(numel)
open("/proc/self/clear_refs", "w").write("5")  # forget the high-water mark
before = high_water_mark()
steps(gradient, residual, round(density * numel), workers, 4)
print(high_water_mark() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("variant", VECTOR_VARIANTS)
def test_a_bucket_takes_at_most_2_percent_more_memory_than_its_residual(variant):
    # Eight workers' payloads, the payload and the feedback kept from the last step, and whatever the kernels allocate.
    numel = 25_600_000
    program = [sys.executable, "-c", MEASURE_PEAK, str(numel), "0.001", "8"]
    # glibc would learn to keep tensors of this size in its heap, and fragment it: what is measured is what is in use.
    environment = os.environ | {"REGTOPK_CPU": variant, "MALLOC_MMAP_THRESHOLD_": "65536"}
    result = subprocess.run(program, env=environment, capture_output=True, text=True, check=True)
    assert int(result.stdout) <= 0.02 * numel * 4
