"""Call the CUDA kernels without the extension: on CPU tensors in the emulation of simt.h, or on a GPU.

The emulation is compiled with g++. For a GPU the same launchers are compiled with nvcc, without torch, CMake or Python headers.
"""

import ctypes
import fcntl
import hashlib
import os
import pathlib
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from tests.simt import calls

ROOT = pathlib.Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "simt"
KERNELS = ["sample", "accumulate", "finish", "compress", "aggregate", "settle", "judge", "wire", "chunks", "measure", "momentum", "check", "whole", "lead", "averages", "parts"]
HOST_SOURCES = ["tests/simt/simt.cpp", "tests/simt/driver.cpp", "tests/simt/faults.cpp", "csrc/core/payload.cpp"]
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-ffp-contract=off", "-DREGTOPK_EMULATED"]
VALUE_TYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3, torch.bits2x4: 4, torch.bits1x8: 5}
NVCC_FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-fmad=false", "-lineinfo", "-Xcompiler", "-fPIC"]
DISTORTIONS = {"previous": 0, "current": 1}
ORDERS = {"ascending": 0, "descending": 1, "shuffled": 2}
PAYLOADS_VALID = 2**64 - 1
AGGREGATE_ZEROED_BYTES = 32  # kAggregateZeroedBytes of cuda/launch.h


class EmulationError(RuntimeError):
    """What a kernel did wrong: an access outside its buffers, a barrier that not all threads reach, an endless wait."""


def _digest(flags, sources):
    read = sorted({*ROOT.glob("cuda/*.cu*"), *ROOT.glob("cuda/*.h"), *ROOT.glob("tests/simt/*.h"), *ROOT.glob("csrc/core/*.h"), *sources})
    digest = hashlib.sha256(" ".join(flags).encode())
    for path in read:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def build_for_gpu(architecture, nvcc="nvcc"):
    """Return the path of the kernels compiled for one architecture ("90"); compile them, all at once, if a source has changed."""
    sources = [ROOT / "cuda" / f"{name}.cu" for name in KERNELS] + [ROOT / "tests/simt/driver.cpp", ROOT / "csrc/core/payload.cpp"]
    library = BUILD / f"libregtopk_sm{architecture}-{_digest(NVCC_FLAGS, sources)}.so"
    if not library.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        objects = [str(BUILD / f"{path.stem}-sm{architecture}-{os.getpid()}.o") for path in sources]
        command = [nvcc, *NVCC_FLAGS, f"-arch=sm_{architecture}"]
        compilers = [
            subprocess.Popen([*command, "-x", "cu", "-c", str(path), "-o", product], stdout=sys.stderr)
            for path, product in zip(sources, objects, strict=True)
        ]  # fmt: skip
        if any([compiler.wait() != 0 for compiler in compilers]):
            raise RuntimeError("build_for_gpu: expected nvcc to compile the kernels, got the errors above")
        linked = library.with_suffix(f".{os.getpid()}")
        subprocess.run([*command, "-shared", "-o", str(linked), *objects], check=True, stdout=sys.stderr)
        linked.rename(library)  # another process never sees half of it
        for path in objects:
            os.unlink(path)
    return library


def build():
    """Return the path of the compiled emulation; compile it (about 30 s) if a source has changed."""
    sources = [ROOT / "cuda" / f"{name}.cu" for name in KERNELS] + [ROOT / path for path in HOST_SOURCES]
    library = BUILD / f"libregtopk_simt-{_digest(FLAGS, sources)}.so"
    with alone():
        if library.exists():
            return library
        objects = []
        for path in sources:
            objects.append(str(BUILD / f"{path.stem}-{os.getpid()}.o"))
            language = ["-x", "c++"] if path.suffix == ".cu" else []
            command = [os.environ.get("CXX", "g++"), *FLAGS, f"-I{ROOT / 'tests/simt'}", *language, "-c", str(path), "-o", objects[-1]]
            subprocess.run(command, check=True, stdout=sys.stderr)
        linked = library.with_suffix(f".{os.getpid()}")
        subprocess.run([os.environ.get("CXX", "g++"), "-shared", "-o", str(linked), *objects], check=True)
        linked.rename(library)  # whoever is ended meanwhile leaves no half of it
        for path in [*objects, *(old for old in BUILD.glob("libregtopk_simt-*.so") if old != library)]:
            os.unlink(path)
    return library


@contextmanager
def alone():
    """One process builds, others that want the same wait for it; a lock ends with its process."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build_operators():
    """Return the path of operators.cpp, compiled with the installed torch (about 1 min) if a source has changed."""
    from torch.utils import cpp_extension

    emulation = build()
    source = ROOT / "tests/simt/operators.cpp"
    read = [*ROOT.glob("tests/simt/c10/cuda/*.h"), *ROOT.glob("cuda/*operators.*")]
    read += [ROOT / "csrc/ops" / name for name in ("checks.h", "checks.cpp", "operators.h", "operators.cpp")]
    flags = [*FLAGS, "-fopenmp", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}", torch.__version__]
    library = BUILD / f"libregtopk_operators-{_digest([*flags, emulation.name], [source, *read])}.so"
    if not library.exists():
        linked = library.with_suffix(f".{os.getpid()}")
        torch_at = [f"-L{path}" for path in cpp_extension.library_paths()]
        subprocess.run(
            [os.environ.get("CXX", "g++"), *flags[:-1], f"-I{ROOT / 'tests/simt'}", *(f"-isystem{path}" for path in cpp_extension.include_paths()),
             "-shared", "-o", str(linked), str(source), str(emulation), *torch_at, "-ltorch_cpu", "-lc10"],
            check=True, stdout=sys.stderr,
        )  # fmt: skip
        linked.rename(library)
        for old in BUILD.glob("libregtopk_operators-*.so"):
            if old != library:
                old.unlink(missing_ok=True)
    return library


def emulate_on_cpu(operators):
    """In this process, put the emulated kernels in the place of the CPU operators; for `processes.preparation`."""
    import regtopk_torch  # noqa: F401, whose operators they are

    ctypes.CDLL(str(operators)).regtopk_emulate_on_cpu()
    return "gloo", lambda: None


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


def _entry(verdict, number):
    """The address of a round's entry in the verdict, or None."""
    return None if verdict is None or number < 0 else verdict.data_ptr() + 8 * (number % verdict.numel())


def _spans(spans, idle, verdict, applied, counters, sent_round):
    if spans is None:
        return calls.Spans(sent_round=-1)
    return calls.Spans(
        _pointer(spans), spans.numel() - 1, _pointer(idle), _entry(verdict, sent_round), sent_round, _pointer(applied), _pointer(counters)
    )  # fmt: skip


def _count(spans):
    return 0 if spans is None else spans.numel() - 1


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
    """The launchers of cuda/launch.h. Tensors begin at multiples of 16 bytes.

    device "emulated": tensors are on the CPU. device "cuda": `library` is what build_for_gpu returned, calls go to the current
    stream of the current GPU, and tensors of the CPU are copied there for the call and back after it.
    """

    def __init__(self, device="emulated", library=None):
        self.device = device
        self._library = ctypes.CDLL(str(library or build()))
        for name in ("call_compress", "call_aggregate", "call_measure", "call_settle", "call_correct", "call_judge", "call_to_wire", "call_from_wire", "call_take", "call_average_slice", "call_spread", "call_feedback", "call_split", "call_mean", "call_join", "call_mark") + (("simt_traffic",) if device == "emulated" else ()):
            getattr(self._library, name).restype = ctypes.c_char_p
        for name in ("call_compress_workspace", "call_aggregate_workspace", "call_zeroed_bytes", "call_measure_workspace", "call_measure_zeroed_bytes", "call_correct_workspace", "call_correct_zeroed_bytes", "call_payload_bytes", "call_wire_bytes", "call_to_wire_workspace", "call_from_wire_workspace", "call_take_room", "call_spread_room"):
            getattr(self._library, name).restype = ctypes.c_int64

    @contextmanager
    def _operands(self, *tensors):
        """Yield the tensors where the kernels reach them; copy those that were moved back afterwards."""
        there = tensors
        if self.device == "cuda":
            there = [tensor if tensor is None or tensor.is_cuda else tensor.cuda() for tensor in tensors]
        yield there
        for tensor, moved in zip(tensors, there, strict=True):
            if tensor is not moved:
                tensor.copy_(moved)

    def _stream(self):
        return torch.cuda.current_stream().cuda_stream if self.device == "cuda" else None

    def _workspace(self, numel, zeroed):
        """Garbage behind as many zeros as a workspace begins with."""
        workspace = torch.full((numel,), 0xAB, dtype=torch.uint8, device="cuda") if self.device == "cuda" else aligned(numel, torch.uint8).fill_(0xAB)
        workspace[:zeroed] = 0
        return workspace

    def payload_bytes(self, numel, k, dtype, spans=0):
        return self._library.call_payload_bytes(*map(ctypes.c_int64, (numel, k, VALUE_TYPES[dtype], spans)))

    def compress_workspace(self, numel, k, dtype, *, has_feedback, sampling=None, spans=0):
        """A workspace for compress; of no other use than to give it."""
        sampling = sampling or self.sampling(numel, k)
        call = calls.Compress(type=VALUE_TYPES[dtype], numel=numel, k=k, feedback=1 if has_feedback else None, sampling=calls.Sampling(**vars(sampling)))
        call.spans.count = spans
        return self._workspace(self._library.call_compress_workspace(ctypes.byref(call)), self._library.call_zeroed_bytes())

    @contextmanager
    def schedule(self, order="ascending", *, seed=0, resident_blocks=1, multiprocessors=2):
        """Run the blocks of every kernel, and the threads of a block, in this order; several blocks interleaved. A GPU decides itself."""
        if self.device == "cuda":
            yield
            return
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

    def fault(self, name, *numbers):
        """Run a kernel that is wrong on purpose, or a part of one (faults.cpp); return the error's text, or the number it gives."""
        function = getattr(self._library, f"fault_{name}")
        function.restype = ctypes.c_uint32 if name in ("unwritten_shared_memory", "last_block_wins", "sums_before") else ctypes.c_char_p
        result = function(*map(ctypes.c_uint32, numbers))
        return result.decode() if isinstance(result, bytes) else result

    def sampling(self, numel, k):
        numbers = calls.Sampling()
        self._library.call_sampling(ctypes.c_int64(numel), ctypes.c_int64(k), ctypes.byref(numbers))
        return Sampling(numbers.sectors, numbers.rank_high, numbers.rank_low, numbers.list_capacity)

    def compress(
        self, gradient, residual, payload, *, k, sent=None, feedback=None, distortion="previous", mu=1.0, step=0, plan=0, sampling=None, workspace=None,
        spans=None, idle=None, verdict=None, applied=None, counters=None, scale=1.0, deed=0, sent_round=-1, decay=1.0, chunk=0, chunk_k=0, choose=True,
    ):  # fmt: skip
        """As regtopk::compress_; `residual`, `payload` and `counters` are written. Without a workspace, one is made and looked at afterwards."""
        sampling = sampling or self.sampling(gradient.numel(), k)
        used = workspace
        if used is None:
            used = self.compress_workspace(
                gradient.numel(), k, gradient.dtype, has_feedback=feedback is not None, sampling=sampling, spans=_count(spans)
            )
        operands = (gradient, residual, payload, sent, feedback, spans, idle, verdict, applied, counters)
        with self._operands(*operands) as (gradient, residual, payload, sent, feedback, spans, idle, verdict, applied, counters):
            call = calls.Compress(
                VALUE_TYPES[gradient.dtype], gradient.numel(), k, _pointer(gradient), _pointer(residual), _pointer(payload), step, plan,
                _spans(spans, idle, verdict, applied, counters, sent_round), scale, deed,
                _pointer(sent), 0 if sent is None else sent.numel(), _pointer(feedback), 0 if feedback is None else feedback.numel(),
                DISTORTIONS[distortion], mu, decay, calls.Sampling(**vars(sampling)), chunk, chunk_k, choose, _pointer(used), self._stream(),
            )  # fmt: skip
            self._raise(self._library.call_compress(ctypes.byref(call)))
        if workspace is None and used[: self._library.call_zeroed_bytes()].any():
            raise EmulationError("compress left its workspace without the zeros it begins with")

    def aggregate(
        self, gradient, payloads, *, k, feedback=None, rank=0, distortion="previous", step=0, plan=0, workspace=None, status=None,
        spans=None, idle=None, verdict=None, round=-1,
    ):  # fmt: skip
        """As regtopk::aggregate_; returns what the device found wrong with the payloads, PAYLOADS_VALID if nothing.

        With a workspace that begins with AGGREGATE_ZEROED_BYTES zero bytes and a status, int64 [1] of -1, on the device, waits for nothing and returns None.
        """
        with self._operands(gradient, payloads, feedback, spans, idle, verdict) as (gradient, payloads, feedback, spans, idle, verdict):
            call = calls.Aggregate(
                VALUE_TYPES[gradient.dtype], gradient.numel(), k, _pointer(payloads), payloads.shape[0], _pointer(gradient), _pointer(feedback),
                rank, 0 if feedback is None else feedback.shape[0], DISTORTIONS[distortion], step, plan,
                _pointer(spans), _count(spans), _pointer(idle), _entry(verdict, round), round, None, None, self._stream(),
            )  # fmt: skip
            used, found = workspace, status
            if workspace is None:
                used = self._workspace(self._library.call_aggregate_workspace(ctypes.byref(call)), AGGREGATE_ZEROED_BYTES)
                found = torch.full((1,), -1, dtype=torch.int64, device=used.device)
            call.worst_status, call.workspace = _pointer(found), _pointer(used)
            self._raise(self._library.call_aggregate(ctypes.byref(call)))
        if workspace is not None:
            return None
        if used[:AGGREGATE_ZEROED_BYTES].any():
            raise EmulationError("aggregate left its workspace without the zeros it begins with")
        return int(found) % 2**64

    def measure(self, gradient, payloads, squared_norm, *, k, spans=0):
        """As regtopk::measure_; `squared_norm` is written."""
        with self._operands(gradient, payloads, squared_norm) as (gradient, payloads, squared_norm):
            call = calls.Measure(
                VALUE_TYPES[gradient.dtype], gradient.numel(), k, spans, _pointer(payloads), len(payloads), _pointer(gradient), _pointer(squared_norm),
                None, self._stream(),
            )  # fmt: skip
            zeroed = self._library.call_measure_zeroed_bytes()
            workspace = self._workspace(self._library.call_measure_workspace(ctypes.byref(call)), zeroed)
            call.workspace = _pointer(workspace)
            self._raise(self._library.call_measure(ctypes.byref(call)))
        if workspace[:zeroed].any():
            raise EmulationError("measure left its workspace without the zeros it begins with")

    def put_back(self, residual, payload, *, dtype):
        """As regtopk::put_back_; `residual` is written."""
        self.settle(residual, payload, None, None, None, None, None, dtype=dtype, sent_round=-1)

    def settle(self, residual, sent, spans, idle, verdict, applied, counters, *, dtype, sent_round, masks=False):
        """As regtopk::settle_; `residual`, `sent` and `counters` are written."""
        with self._operands(residual, sent, spans, idle, verdict, applied, counters) as (residual, sent, spans, idle, verdict, applied, counters):
            call = calls.Settle(
                VALUE_TYPES[dtype], residual.numel(), _pointer(sent), sent.numel(), _pointer(residual),
                _spans(spans, idle, verdict, applied, counters, sent_round), masks, self._stream(),
            )  # fmt: skip
            self._raise(self._library.call_settle(ctypes.byref(call)))

    def mask(self, velocity, sent, spans, idle, verdict, applied, *, dtype, sent_round):
        """As regtopk::mask_; `velocity` is written."""
        self.settle(velocity, sent, spans, idle, verdict, applied, None, dtype=dtype, sent_round=sent_round, masks=True)

    def correct(self, gradient, given, velocity, spans, *, momentum=0.0, nesterov=False, largest_norm=0.0):
        """As regtopk::correct_; `given` and `velocity` are written. The two gradients may be one."""
        in_place = given is gradient
        with self._operands(gradient, None if in_place else given, velocity, spans) as (gradient, given, velocity, spans):
            call = calls.Correct(
                VALUE_TYPES[gradient.dtype], gradient.numel(), _pointer(gradient), _pointer(gradient if in_place else given), _pointer(velocity),
                _pointer(spans), _count(spans), momentum, nesterov, largest_norm, None, self._stream(),
            )  # fmt: skip
            zeroed = self._library.call_correct_zeroed_bytes()
            workspace = self._workspace(self._library.call_correct_workspace(ctypes.byref(call)), zeroed)
            call.workspace = _pointer(workspace)
            self._raise(self._library.call_correct(ctypes.byref(call)))
        if workspace[:zeroed].any():
            raise EmulationError("correct left its workspace without the zeros it begins with")

    def judge(self, tensor, verdict, *, round):
        """As regtopk::judge_; `verdict` is written."""
        with self._operands(tensor, verdict) as (tensor, verdict):
            call = calls.Judge(VALUE_TYPES[tensor.dtype], tensor.numel(), _pointer(tensor), _entry(verdict, round), round, self._stream())
            self._raise(self._library.call_judge(ctypes.byref(call)))

    def wire_bytes(self, numel, k, dtype, wire_dtype, *, elias_fano=False, spans=0):
        return self._library.call_wire_bytes(ctypes.byref(calls.Wire(VALUE_TYPES[dtype], VALUE_TYPES[wire_dtype], elias_fano, numel, k, spans)))

    def to_wire(self, residual, payload, wire, *, k, dtype, wire_dtype, elias_fano=False, spans=0):
        """As regtopk::to_wire_; `residual`, `payload` and `wire` are written."""
        with self._operands(residual, payload, wire) as (residual, payload, wire):
            call = calls.Wire(
                VALUE_TYPES[dtype], VALUE_TYPES[wire_dtype], elias_fano, residual.numel(), k, spans, 1, _pointer(payload), _pointer(residual),
                _pointer(wire), None, self._stream(),
            )  # fmt: skip
            workspace = self._workspace(self._library.call_to_wire_workspace(ctypes.byref(call)), 0)
            call.workspace = _pointer(workspace)
            self._raise(self._library.call_to_wire(ctypes.byref(call)))

    def from_wire(self, wire, payloads, *, numel, k, dtype, wire_dtype, elias_fano=False, spans=0):
        """As regtopk::from_wire_; `payloads` is written, without a magic number where a row is no wire form."""
        with self._operands(wire, payloads) as (wire, payloads):
            call = calls.Wire(
                VALUE_TYPES[dtype], VALUE_TYPES[wire_dtype], elias_fano, numel, k, spans, len(wire), _pointer(payloads), None, _pointer(wire),
                None, self._stream(),
            )  # fmt: skip
            workspace = self._workspace(self._library.call_from_wire_workspace(ctypes.byref(call)), 0)
            call.workspace = _pointer(workspace)
            self._raise(self._library.call_from_wire(ctypes.byref(call)))

    @contextmanager
    def _checked_workspace(self, numel, k, dtype, spans):
        """Yield (an aggregate's workspace, a status to lower); see that the first is left as it was."""
        call = calls.Aggregate(type=VALUE_TYPES[dtype], numel=numel, k=k, spans=spans)
        workspace = self._workspace(self._library.call_aggregate_workspace(ctypes.byref(call)), AGGREGATE_ZEROED_BYTES)
        yield workspace, torch.full((1,), -1, dtype=torch.int64, device=workspace.device)
        if workspace[:AGGREGATE_ZEROED_BYTES].any():
            raise EmulationError("expected the zeros that the workspace began with, got others")

    def take(self, residual, payload, lead, spans, idle, *, dtype, wire_dtype, elias_fano=False, k, leader=0, step, plan):
        """As regtopk::take_; returns what the device found wrong with the lead."""
        with self._operands(residual, payload, lead, spans, idle) as (residual, payload, lead, spans, idle), self._checked_workspace(residual.numel(), k, dtype, _count(spans)) as (workspace, found):
            wire = calls.Wire(
                VALUE_TYPES[dtype], VALUE_TYPES[wire_dtype], elias_fano, residual.numel(), k, _count(spans), 1, _pointer(payload), _pointer(residual),
                _pointer(lead), _pointer(workspace), self._stream(),
            )  # fmt: skip
            call = calls.Take(wire, leader, step, plan, _pointer(spans), _pointer(idle), _pointer(found), None)
            room = self._workspace(self._library.call_take_room(ctypes.byref(call)), 0)
            call.room = _pointer(room)
            self._raise(self._library.call_take(ctypes.byref(call)))
        return int(found) % 2**64

    def average_slice(self, rows, averages, *, dtype, wire_dtype, elias_fano=False, numel, k, spans, step, plan):
        """As regtopk::average_slice_; `averages` is written. Returns what the device found wrong with the heads."""
        with self._operands(rows, averages) as (rows, averages):
            found = torch.full((1,), -1, dtype=torch.int64, device=rows.device)
            wire = calls.Wire(VALUE_TYPES[dtype], VALUE_TYPES[wire_dtype], elias_fano, numel, k, spans, len(rows))
            call = calls.AverageSlice(
                wire, _pointer(rows), rows.shape[1], step, plan, _pointer(averages), averages.numel(), _pointer(found), self._stream()
            )  # fmt: skip
            self._raise(self._library.call_average_slice(ctypes.byref(call)))
        return int(found) % 2**64

    def spread(self, gradient, payload, rows, averages, spans, idle, verdict, *, k, step, round):
        """As regtopk::spread_; returns what the device found wrong with the averages."""
        tensors = (gradient, payload, rows, averages, spans, idle, verdict)
        with self._operands(*tensors) as (gradient, payload, rows, averages, spans, idle, verdict), self._checked_workspace(gradient.numel(), k, gradient.dtype, _count(spans)) as (workspace, found):
            call = self._spread_call(gradient.dtype, gradient.numel(), k, payload, rows, averages, spans, idle, step)
            call.gradient, call.verdict, call.round = _pointer(gradient), _entry(verdict, round), round
            call.worst_status, call.workspace = _pointer(found), _pointer(workspace)
            room = self._workspace(self._library.call_spread_room(ctypes.byref(call)), 0)
            call.room = _pointer(room)
            self._raise(self._library.call_spread(ctypes.byref(call)))
        return int(found) % 2**64

    def feedback(self, feedback, payload, rows, averages, spans, idle, *, dtype, numel, distortion, step):
        """As regtopk::feedback_; `feedback` is written."""
        with self._operands(feedback, payload, rows, averages, spans, idle) as (feedback, payload, rows, averages, spans, idle):
            call = self._spread_call(dtype, numel, feedback.numel(), payload, rows, averages, spans, idle, step)
            call.distortion, call.feedback = DISTORTIONS[distortion], _pointer(feedback)
            self._raise(self._library.call_feedback(ctypes.byref(call)))

    @staticmethod
    def _parts_call(rows, *, dtype=None, gradient=None, parts=None, step, plan, scale=1.0, deed=0, **of_one):
        return calls.Parts(
            type=VALUE_TYPES[dtype or gradient.dtype], numel=0 if gradient is None else gradient.numel(), ends=_pointer(parts),
            parameters=0 if parts is None else parts.shape[1] - 1, ranks=len(rows), row_bytes=rows.shape[1], step=step, plan=plan, scale=scale, deed=deed,
            gradient=_pointer(gradient), rows=_pointer(rows), **of_one,
        )  # fmt: skip

    def split(self, gradient, rows, parts, **stamp):
        """As regtopk::split_; `rows` is written."""
        with self._operands(gradient, rows, parts) as (gradient, rows, parts):
            self._raise(self._library.call_split(ctypes.byref(self._parts_call(rows, gradient=gradient, parts=parts, stream=self._stream(), **stamp))))

    def mean(self, rows, row, found, *, entries, dtype, **stamp):
        """As regtopk::mean_; `row` and `found` are written."""
        with self._operands(rows, row, found) as (rows, row, found):
            call = self._parts_call(rows, dtype=dtype, row=_pointer(row), entries=entries, found=_pointer(found), stream=self._stream(), **stamp)
            self._raise(self._library.call_mean(ctypes.byref(call)))

    def join(self, rows, gradient, parts, verdict, *, round, **stamp):
        """As regtopk::join_; returns what the device found wrong with the heads."""
        with self._operands(rows, gradient, parts, verdict) as (rows, gradient, parts, verdict):
            found = torch.full((1,), -1, dtype=torch.int64, device=rows.device)
            call = self._parts_call(
                rows, gradient=gradient, parts=parts, verdict=_entry(verdict, round), round=round, worst_status=_pointer(found), stream=self._stream(), **stamp
            )  # fmt: skip
            self._raise(self._library.call_join(ctypes.byref(call)))
        return int(found) % 2**64

    def mark_unfilled(self, message, found, status=None):
        """As regtopk::mark_unfilled_; `message` and `status` are written."""
        with self._operands(message, found, status) as (message, found, status):
            pointers = (ctypes.c_void_p(_pointer(tensor)) for tensor in (found, status))
            self._raise(self._library.call_mark(ctypes.c_void_p(_pointer(message)), ctypes.c_int64(message.numel()), *pointers, ctypes.c_void_p(self._stream())))

    def _spread_call(self, dtype, numel, k, payload, rows, averages, spans, idle, step):
        return calls.Spread(
            type=VALUE_TYPES[dtype], numel=numel, k=k, spans=_count(spans), rows=_pointer(rows), averages=_pointer(averages), workers=len(rows),
            row_bytes=rows.shape[1], averages_bytes=averages.shape[1], step=step, payload=_pointer(payload), span_ends=_pointer(spans),
            idle=_pointer(idle), stream=self._stream(),
        )  # fmt: skip

    @staticmethod
    def _raise(error):
        if error:
            raise EmulationError(error.decode())
