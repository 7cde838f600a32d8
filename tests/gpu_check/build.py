"""Compile for this machine's GPU alone, from a plain copy of the sources, without a network."""

import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from tests.simt import host

from tests.gpu_check import machine, sanitize

ROOT = pathlib.Path(__file__).resolve().parents[2]


def tool(name):
    """The program of that name beside this Python, or on PATH."""
    return shutil.which(name, path=str(pathlib.Path(sys.executable).parent)) or shutil.which(name)


def missing():
    """What an extension cannot be built without, each in words."""
    needs = {"nvcc on PATH": shutil.which("nvcc"), "cmake on PATH": tool("cmake"), "a C++ compiler (c++) on PATH": shutil.which("c++")}
    if not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists():
        needs[f"Python.h in {sysconfig.get_path('include')}"] = None
    if tool("ninja") is None and tool("make") is None:
        needs["ninja or make on PATH"] = None
    return [need for need, found in needs.items() if not found]


def build_extension(architectures, *, with_cuda=True):
    """Configure and build with CMake, by ninja or else by make, and put the extension into regtopk_torch/."""
    folder = ROOT / "build" / f"gpu-check-torch-{torch.__version__}{'' if with_cuda else '-cpu'}"
    cmake = tool("cmake")
    configure = [cmake, "-S", str(ROOT), "-B", str(folder), "-DCMAKE_BUILD_TYPE=Release", f"-DPython_EXECUTABLE={sys.executable}"]
    configure += [f"-DCMAKE_CUDA_ARCHITECTURES={architectures}", f"-DREGTOPK_CUDA={'on' if with_cuda else 'off'}"]
    # With many cores the files are ready sooner apart than read together.
    configure += [f"-DCMAKE_UNITY_BUILD={'OFF' if len(os.sched_getaffinity(0)) > 4 else 'ON'}"]
    ninja = tool("ninja")
    configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else ["-G", "Unix Makefiles"]
    subprocess.run(configure, check=True)
    subprocess.run([cmake, "--build", str(folder), "-j", str(len(os.sched_getaffinity(0)))], check=True)
    (built,) = folder.glob("_C.*.so")
    beside = ROOT / "regtopk_torch" / f"{built.name}.{os.getpid()}"
    shutil.copy(built, beside)
    beside.replace(ROOT / "regtopk_torch" / built.name)  # a process that has the old one loaded keeps it
    return built


def timed(function, *arguments, **keywords):
    """(seconds, error or None)."""
    started = time.monotonic()
    try:
        function(*arguments, **keywords)
    except Exception as error:
        return time.monotonic() - started, f"{type(error).__name__}: {error}"
    return time.monotonic() - started, None


def build(log):
    if log.emulated:
        seconds, error = timed(host.build)
        log.write("built", what="emulation", seconds=seconds)
        log.check(error is None, f"expected the emulation to compile, got {error}")
        sanitize.build_steps(log)
        return
    if not torch.cuda.is_available():
        raise RuntimeError("expected a GPU that torch can use, got none (torch.cuda.is_available() is false)")
    properties = torch.cuda.get_device_properties(0)
    log.write(
        "card", name=properties.name, multiprocessors=properties.multi_processor_count, memory=properties.total_memory,
        l2_bytes=properties.L2_cache_size, python=sys.version.split()[0], cores=len(os.sched_getaffinity(0)),
    )  # fmt: skip
    gaps = missing()
    if gaps:
        log.fail(f"expected everything that a build needs, got a machine without {' and '.join(gaps)}")
        if not shutil.which("nvcc"):
            return
    architecture = machine.architecture()
    with ThreadPoolExecutor(2) as pool:
        kernels = pool.submit(timed, host.build_for_gpu, architecture)
        extension = pool.submit(timed, build_extension, f"{architecture}-real")
    for name, (seconds, error) in (("kernels", kernels.result()), ("extension", extension.result())):
        log.write("built", what=name, seconds=seconds)
        log.check(error is None, f"expected the {name} to compile, got {error}")
    if extension.result()[1] is not None:
        # The CPU's operators are what the kernels are compared with.
        seconds, error = timed(build_extension, f"{architecture}-real", with_cuda=False)
        log.write("built", what="extension without kernels", seconds=seconds)
        log.check(error is None, f"expected the extension without kernels to compile, got {error}")
    if kernels.result()[1] is None:
        sanitize.build_steps(log)
