"""The kernels under NVIDIA's tools, in a small program without torch (steps.cpp)."""

import itertools
import pathlib
import re
import shutil
import subprocess

from tests.simt import host

from tests.gpu_check import machine
from tests.gpu_check.log import NotRun

ROOT = pathlib.Path(__file__).resolve().parents[2]
TOOLS = ["memcheck", "racecheck", "synccheck", "initcheck"]


def steps_program(log):
    return host.BUILD / f"steps-{log.device}"


def build_steps(log):
    source = ROOT / "tests/gpu_check/steps.cpp"
    if log.emulated:
        command = ["g++", *host.FLAGS, str(source), str(host.build())]
    else:
        library = host.build_for_gpu(machine.architecture())
        command = ["nvcc", "-std=c++20", "-O2", f"-arch=sm_{machine.architecture()}", str(source), str(library)]
    rpath = f"-Wl,-rpath,{host.BUILD}" if log.emulated else f"-Xlinker=-rpath,{host.BUILD}"
    subprocess.run([*command, rpath, "-o", str(steps_program(log))], check=True)


def run_steps(log, numel, density, value_type, *, steps=3, missed=False, before=(), seconds=60):
    command = [*before, str(steps_program(log)), str(numel), str(density), str(value_type), str(steps), str(int(missed))]
    print(" ".join(command), flush=True)
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    print(done.stdout[-4000:], done.stderr[-4000:], flush=True)
    return done


def sanitizer(log):
    """memcheck and racecheck first, of all types with the bracket held and missed; then the other two of fp32."""
    numel = 9_001 if log.emulated else 100_003
    done = run_steps(log, numel, 0.01, 1)
    log.check(done.returncode == 0, f"expected the steps to run without a tool, got {done.stderr[-500:]}")
    tool = shutil.which("compute-sanitizer")
    if log.emulated or tool is None:
        raise NotRun("no compute-sanitizer for what is emulated" if log.emulated else "no compute-sanitizer on PATH")
    cases = [(name, 1, missed, 0.01) for name in TOOLS for missed in (False, True)]
    # Where a rank has more entries in a block tile than a warp holds, and where a payload has a bitmap.
    cases += [(name, 1, False, density) for name in TOOLS[:2] for density in (0.03, 0.2)]
    cases += [(name, value_type, missed, 0.01) for name, value_type, missed in itertools.product(TOOLS[:2], (0, 2, 3), (False, True))]
    for number, (name, value_type, missed, density) in enumerate(cases):
        if log.seconds_left() < 5:
            log.write("left out", cases=len(cases) - number)
            break
        before = [tool, "--tool", name, "--error-exitcode", "9"]
        try:
            done = run_steps(log, numel, density, value_type, missed=missed, before=before, seconds=log.seconds_left())
        except subprocess.TimeoutExpired:
            log.write("left out", cases=len(cases) - number, reason=f"{name} (type {value_type}, missed {missed}) took too long")
            break
        log.write("sanitized", tool=name, type=value_type, missed=missed, density=density, returncode=done.returncode, words=done.stdout.strip().splitlines()[-1:])
        log.check(done.returncode == 0, f"expected nothing from {name} (type {value_type}, missed {missed}), got {done.stdout[-800:]}{done.stderr[-200:]}")


def kernels_in(text):
    """[{kernel, microseconds, share of the memory's rate, of the warps that could be there}] of what ncu has printed."""
    kernels = []
    for line in text.splitlines():
        begun = re.search(r"(\w+)_kernel<.*Context", line)
        if begun:
            kernels.append({"kernel": begun.group(1)})
        found = re.match(r"\s+(Duration|DRAM Throughput|Achieved Occupancy)\s+(ns|us|ms|%)\s+([\d.,]+)\s*$", line)
        if found and kernels:
            name, unit, value = found.groups()
            kernels[-1][{"Duration": "us", "DRAM Throughput": "dram", "Achieved Occupancy": "warps"}[name]] = float(value.replace(",", "")) * {"ns": 1e-3, "us": 1, "ms": 1e3, "%": 1e-2}[unit]
    return kernels


def profile(log):
    """What ncu sees of each kernel in the third step, to profile.txt: one after the other, which the stream does not wait for."""
    tool = shutil.which("ncu")
    if tool is None:
        raise NotRun("no ncu on PATH")
    sections = itertools.chain.from_iterable(("--section", name) for name in ("SpeedOfLight", "WarpStateStats", "MemoryWorkloadAnalysis", "Occupancy"))
    for numel in (11_200_000, 1_100_000, 25_600_000):
        if log.seconds_left() < 10:
            log.write("left out", numel=numel)
            break
        # A step of two workers is 6 + 2 + 1 + 1 kernels; of the second one the last worker's are looked at, and what follows but put_back.
        before = [tool, "--clock-control", "none", "--launch-skip", "13", "--launch-count", "6", *sections]
        done = run_steps(log, numel, 1e-3, 1, steps=2, before=before, seconds=log.seconds_left())
        with open(log.folder / "profile.txt", "a", encoding="utf-8") as file:
            file.write(done.stdout)
        for kernel in kernels_in(done.stdout):
            log.write("profiled", numel=numel, density=1e-3, dtype="float32", **kernel)
        log.check(done.returncode == 0, f"expected ncu to profile, got {done.stdout[-300:]}{done.stderr[-300:]}")
