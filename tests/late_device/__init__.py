"""A device of torch's that does nothing at once, "late": DDP on it takes the path of a GPU, and what does not wait reads NaN. See streams.h.

`begin` makes it the device of a process, over the emulated kernels; `run_workers` calls it where `processes.preparation` is one of these.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import pathlib
import subprocess
import sys
import sysconfig
import types

import torch
import torch.distributed as dist

from tests.simt import host

FOLDER = pathlib.Path(__file__).resolve().parent
BUILD = FOLDER.parents[1] / "build" / "late"
# Microseconds: of the current stream of the hook, of those that futures go on on, and of the collectives'.
PACES = {"even": (0, 0, 0), "hook": (2000, 0, 0), "futures": (0, 2000, 0), "collectives": (0, 0, 2000), "all": (500, 700, 900), "seconds": (0, 0, 3_000_000)}


def build():
    """Return (path of the module, path of the operators); compile them if a source or torch has changed."""
    from torch.utils import cpp_extension

    emulation, operators = host.build(), host.build_operators()
    flags = [*host.FLAGS, f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"]
    sources = [FOLDER / f"{name}.cpp" for name in ("streams", "device", "module")]
    read = [*sources, FOLDER / "streams.h", FOLDER.parent / "simt/simt.h"]
    digest = hashlib.sha256(" ".join([*flags, torch.__version__, emulation.name]).encode() + b"".join(path.read_bytes() for path in read))
    module = BUILD / digest.hexdigest()[:16] / "late_device.so"
    with host.alone():
        if not module.exists():
            module.parent.mkdir(parents=True, exist_ok=True)
            includes = [f"-isystem{path}" for path in (*cpp_extension.include_paths(), sysconfig.get_path("include"))]
            libraries = [*(f"-L{path}" for path in cpp_extension.library_paths()), "-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"]
            compiler, unfinished = os.environ.get("CXX", "g++"), module.with_suffix(".unfinished")
            command = [compiler, *flags, *includes, "-shared", *map(str, sources), str(emulation), "-o", str(unfinished), *libraries]
            subprocess.run(command, check=True, stdout=sys.stderr)
            unfinished.rename(module)
    return module, operators


def _load(path):
    spec = importlib.util.spec_from_file_location("late_device", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def begin(module, operators, pace="all"):
    """Make it this process' default device; as `processes.preparation` wants it."""
    device = _load(module)
    torch.utils.rename_privateuse1_backend("late")
    torch._register_device_module("late", _python_module(device))
    import regtopk_torch  # noqa: F401, whose operators they are

    ctypes.CDLL(str(operators)).regtopk_emulate_on_late_device()
    for kind, microseconds in zip(("main", "pool", "collectives"), PACES[pace], strict=True):
        device.set_pace(kind, microseconds)
    dist.Backend.register_backend("streams", functools.partial(_backend, device), devices=["late"])
    torch.set_default_device("late")
    return "cpu:gloo,late:streams", device.finish_and_check_memory


def _backend(device, store, rank, size, timeout):
    return device.backend(dist.ProcessGroupGloo(store, rank, size, timeout))


def _python_module(device):
    """What torch asks of torch.late."""
    module = types.ModuleType("torch.late")
    module.__dict__.update(
        is_available=lambda: True, is_initialized=lambda: True, device_count=lambda: 1, current_device=lambda: 0, _is_in_bad_fork=lambda: False, manual_seed_all=lambda seed: None, device=lambda device: contextlib.nullcontext(),
    )  # fmt: skip
    return module
