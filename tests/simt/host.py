"""The CUDA kernels on the host: compile them with g++ against the emulation in simt.h, and call them on CPU tensors."""

import ctypes
import hashlib
import os
import pathlib
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "simt"
KERNELS = ["sample", "accumulate", "finish", "compress", "aggregate", "put_back"]
HOST_SOURCES = ["tests/simt/simt.cpp", "tests/simt/driver.cpp", "tests/simt/faults.cpp", "csrc/core/payload.cpp"]
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-ffp-contract=off", "-DREGTOPK_EMULATED"]
VALUE_TYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
DISTORTIONS = {"previous": 0, "current": 1}
ORDERS = {"ascending": 0, "descending": 1, "shuffled": 2}
PAYLOADS_VALID = 2**64 - 1


class EmulationError(RuntimeError):
    """What a kernel did wrong: an access outside its buffers, a barrier that not all threads reach, an endless wait."""


def build():
    """Return the path of the compiled emulation; compile it (about 10 s) if a source has changed."""
    sources = [ROOT / "cuda" / f"{name}.cu" for name in KERNELS] + [ROOT / path for path in HOST_SOURCES]
    read = sorted({*ROOT.glob("cuda/*.cu*"), *ROOT.glob("cuda/*.h"), *ROOT.glob("tests/simt/*.h"), *ROOT.glob("csrc/core/*.h"), *sources})
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for path in read:
        digest.update(path.name.encode() + path.read_bytes())
    library = BUILD / f"libregtopk_simt-{digest.hexdigest()[:16]}.so"
    if not library.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        objects = []
        for path in sources:
            objects.append(str(BUILD / f"{path.stem}-{os.getpid()}.o"))
            language = ["-x", "c++"] if path.suffix == ".cu" else []
            command = [os.environ.get("CXX", "g++"), *FLAGS, f"-I{ROOT / 'tests/simt'}", *language, "-c", str(path), "-o", objects[-1]]
            subprocess.run(command, check=True, stdout=sys.stderr)
        linked = library.with_suffix(f".{os.getpid()}")
        subprocess.run([os.environ.get("CXX", "g++"), "-shared", "-o", str(linked), *objects], check=True)
        linked.rename(library)  # another process never sees half of it
        for path in [*objects, *(old for old in BUILD.glob("libregtopk_simt-*.so") if old != library)]:
            os.unlink(path)
    return library


class _Sampling(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("sectors", "rank_high", "rank_low", "list_capacity")]


class _Compress(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int64), ("numel", ctypes.c_int64), ("k", ctypes.c_int64), ("gradient", ctypes.c_void_p),
        ("residual", ctypes.c_void_p), ("payload", ctypes.c_void_p), ("step", ctypes.c_uint64), ("plan", ctypes.c_uint64),
        ("sent", ctypes.c_void_p), ("sent_bytes", ctypes.c_int64), ("feedback", ctypes.c_void_p), ("feedback_entries", ctypes.c_int64),
        ("distortion", ctypes.c_int64), ("mu", ctypes.c_double), ("sampling", _Sampling), ("workspace", ctypes.c_void_p),
    ]  # fmt: skip


class _Aggregate(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int64), ("numel", ctypes.c_int64), ("k", ctypes.c_int64), ("payloads", ctypes.c_void_p),
        ("workers", ctypes.c_int64), ("gradient", ctypes.c_void_p), ("feedback", ctypes.c_void_p),
        ("first_feedback_worker", ctypes.c_int64), ("feedback_workers", ctypes.c_int64), ("distortion", ctypes.c_int64),
        ("step", ctypes.c_uint64), ("plan", ctypes.c_uint64), ("worst_status", ctypes.c_void_p),
    ]  # fmt: skip


@dataclass(frozen=True)
class Sampling:
    """How the bracket is found; the payload must not depend on it. See cuda/launch.h."""

    sectors: int
    rank_high: int
    rank_low: int
    list_capacity: int

    def replace(self, **changes):
        return replace(self, **changes)


def _pointer(tensor):
    return None if tensor is None else tensor.data_ptr()


def aligned(numel, dtype):
    """An empty tensor that begins at a multiple of 16 bytes, as CUDA memory does."""
    size = torch.empty(0, dtype=dtype).element_size()
    memory = torch.empty(numel * size + 16, dtype=torch.uint8)
    start = -memory.data_ptr() % 16
    return memory[start : start + numel * size].view(dtype)


def copied(tensor):
    """A copy that begins at a multiple of 16 bytes, or None."""
    return None if tensor is None else aligned(tensor.numel(), tensor.dtype).view(tensor.shape).copy_(tensor)


class Kernels:
    """The launchers of cuda/launch.h; tensors are on the CPU and begin at multiples of 16 bytes."""

    def __init__(self):
        self._library = ctypes.CDLL(str(build()))
        for name in ("simt_compress", "simt_aggregate", "simt_put_back", "simt_traffic"):
            getattr(self._library, name).restype = ctypes.c_char_p
        self._library.simt_compress_workspace.restype = ctypes.c_int64

    @contextmanager
    def schedule(self, order="ascending", *, seed=0, resident_blocks=1, multiprocessors=2):
        """Run the blocks of every kernel, and the threads of a block, in this order; several blocks interleaved."""
        self._library.simt_schedule(ORDERS[order], ctypes.c_uint64(seed), resident_blocks, multiprocessors)
        try:
            yield
        finally:
            self._library.simt_schedule(0, ctypes.c_uint64(0), 1, 2)

    @contextmanager
    def traffic(self):
        """Yield a dict that holds {kernel: (bytes loaded, bytes stored)} of global memory when the block ends."""
        self._library.simt_reset_traffic()
        result = {}
        yield result
        for line in self._library.simt_traffic().decode().splitlines():
            kernel, loaded, stored = line.split()
            result[kernel] = (int(loaded), int(stored))

    def fault(self, name):
        """Run a kernel that is wrong on purpose (faults.cpp); return the error's text, or the number it gives."""
        function = getattr(self._library, f"fault_{name}")
        function.restype = ctypes.c_uint32 if name in ("unwritten_shared_memory", "last_block_wins") else ctypes.c_char_p
        result = function()
        return result.decode() if isinstance(result, bytes) else result

    def sampling(self, numel, k):
        numbers = _Sampling()
        self._library.simt_sampling(ctypes.c_int64(numel), ctypes.c_int64(k), ctypes.byref(numbers))
        return Sampling(numbers.sectors, numbers.rank_high, numbers.rank_low, numbers.list_capacity)

    def compress(self, gradient, residual, payload, *, k, sent=None, feedback=None, distortion="previous", mu=1.0, step=0, plan=0, sampling=None):
        """As regtopk::compress_; `residual` and `payload` are written."""
        sampling = sampling or self.sampling(gradient.numel(), k)
        call = _Compress(
            VALUE_TYPES[gradient.dtype], gradient.numel(), k, _pointer(gradient), _pointer(residual), _pointer(payload), step, plan,
            _pointer(sent), 0 if sent is None else sent.numel(), _pointer(feedback), 0 if feedback is None else feedback.numel(),
            DISTORTIONS[distortion], mu, _Sampling(sampling.sectors, sampling.rank_high, sampling.rank_low, sampling.list_capacity), None,
        )  # fmt: skip
        workspace = aligned(self._library.simt_compress_workspace(ctypes.byref(call)), torch.uint8).fill_(0xAB)
        call.workspace = workspace.data_ptr()
        self._raise(self._library.simt_compress(ctypes.byref(call)))

    def aggregate(self, gradient, payloads, *, k, feedback=None, rank=0, distortion="previous", step=0, plan=0):
        """As regtopk::aggregate_; returns what the device found wrong with the payloads, PAYLOADS_VALID if nothing."""
        status = torch.full((1,), -1, dtype=torch.int64)
        call = _Aggregate(
            VALUE_TYPES[gradient.dtype], gradient.numel(), k, _pointer(payloads), payloads.shape[0], _pointer(gradient), _pointer(feedback),
            rank, 0 if feedback is None else feedback.shape[0], DISTORTIONS[distortion], step, plan, _pointer(status),
        )  # fmt: skip
        self._raise(self._library.simt_aggregate(ctypes.byref(call)))
        return int(status) % 2**64

    def put_back(self, residual, payload, *, dtype):
        """As regtopk::put_back_; `residual` is written."""
        self._raise(
            self._library.simt_put_back(
                ctypes.c_int64(VALUE_TYPES[dtype]), ctypes.c_int64(residual.numel()), ctypes.c_void_p(payload.data_ptr()),
                ctypes.c_int64(payload.numel()), ctypes.c_void_p(residual.data_ptr()),
            )  # fmt: skip
        )

    @staticmethod
    def _raise(error):
        if error:
            raise EmulationError(error.decode())
