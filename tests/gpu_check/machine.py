"""The kernels on the device that is checked, and the CPU's operators, with the same arguments for both.

For `cuda` the kernels are those of the extension; the library that nvcc compiled alone serves where the extension was built
without them, and where a call gives its own Sampling. For `emulated` they are the host emulation's.
"""

import shutil

import torch
from tests.simt import host

from tests.gpu_check import package_without_extension


def architecture():
    return "%d%d" % torch.cuda.get_device_capability()


def library_kernels(log):
    """The launchers, called directly."""
    if log.emulated:
        return host.Kernels()
    return host.Kernels("cuda", host.build_for_gpu(architecture(), shutil.which("nvcc") or "nvcc"))


class Operators:
    """torch.ops.regtopk, for tensors of whatever device, called as host.Kernels is."""

    def compress(self, gradient, residual, payload, *, k, sent=None, feedback=None, distortion="previous", mu=1.0, step=0, plan=0, **shared):
        options = {"k": k, "mu": mu, "distortion": distortion, "step": step, "plan": plan}
        torch.ops.regtopk.compress_(gradient, residual, payload, sent, feedback, **options, **shared)

    def aggregate(self, gradient, payloads, *, k, feedback=None, rank=0, distortion="previous", step=0, plan=0, **shared):
        torch.ops.regtopk.aggregate_(gradient, payloads, feedback, k=k, rank=rank, distortion=distortion, step=step, plan=plan, **shared)

    def measure(self, *tensors, k):
        torch.ops.regtopk.measure_(*tensors, k=k)

    def put_back(self, residual, payload, *, dtype):
        torch.ops.regtopk.put_back_(residual, payload, dtype=dtype)


def extension_has_kernels():
    if package_without_extension():
        return False
    lines = torch._C._dispatch_dump("regtopk::compress_").splitlines()
    return any(line.startswith("CUDA:") and "without_cuda" not in line for line in lines)


def kernels_of(log):
    """What is checked."""
    if log.emulated:
        return library_kernels(log)
    if extension_has_kernels():
        return Operators()
    log.write("note", what="the extension was built without the kernels: the launchers are called directly")
    return library_kernels(log)


def on_device(log, tensor):
    """A copy of a CPU tensor where the kernels reach it, or None."""
    if tensor is None:
        return None
    return host.copied(tensor) if log.emulated else tensor.cuda()


def empty_on_device(log, shape, dtype):
    if log.emulated:
        return host.aligned(torch.Size(shape).numel(), dtype).view(*shape)
    return torch.empty(*shape, dtype=dtype, device="cuda")


def payload_bytes(numel, k, dtype, spans=0):
    if package_without_extension():
        return host.Kernels("cuda", host.build_for_gpu(architecture())).payload_bytes(numel, k, dtype, spans)
    from regtopk_torch import _C

    return _C.payload_bytes(numel, k, dtype, spans)


def same_bytes(one, other):
    """Of two tensors of one dtype and shape, on whatever devices."""
    one, other = (tensor.contiguous().view(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(one, other.to(one.device))
