"""Compile the CUDA kernels with nvcc alone, and decide whether to build them: both without a GPU."""

import collections
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("regtopk_cuda_compile", ROOT / "cuda" / "compile.py")
compiler = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compiler)

NVCC = os.environ.get("NVCC", "nvcc")
# The one that builds the extension comes with the environment; another on PATH may be too old to build CUDA.
CMAKE = shutil.which("cmake", path=str(Path(sys.executable).parent)) or shutil.which("cmake")
needs_nvcc = pytest.mark.skipif(
    shutil.which(NVCC) is None, reason="no nvcc on PATH: THE CUDA KERNELS WERE NOT COMPILED; install the CUDA toolkit or set NVCC"
)


# The set-up compiles all of them, and what it built is looked at; the loads are read from the PTX of the one that streams, here,
# and from that of all by `make cuda` and the long tests.
ONE = {"architectures": ["90"], "sources": ["accumulate"]}


TYPES = ["fp64", "fp32", "bf16", "fp16"]
KERNELS = {
    *((kernel, type_, feedback) for kernel in ("sample_kernel", "accumulate_kernel", "finish_kernel") for type_ in TYPES for feedback in (False, True)),
    *(("whole_kernel", type_, sends) for type_ in TYPES for sends in (False, True)),
    *((kernel, type_, False) for kernel in ("settle_kernel", "check_kernel", "aggregate_kernel", "measure_kernel", "judge_kernel", "take_kernel", "join_kernel", "lay_kernel", "feedback_kernel") for type_ in TYPES),
}  # fmt: skip


def cuobjdump():
    """The one of triton, which comes with torch, or that of the toolkit; None without either."""
    triton = importlib.util.find_spec("triton")
    folders = [Path(triton.origin).parent / "backends/nvidia/bin"] if triton else []
    return shutil.which("cuobjdump", path=os.pathsep.join([*map(str, folders), os.environ.get("PATH", "")]))


def parse_resource_usage(text):
    """As compiler.parse_ptxas, from cuobjdump --dump-resource-usage, which counts what is spilled with the stack and LOCAL."""
    rows, architecture = [], None
    for found in re.finditer(r"arch = sm_(\d+)|Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text):
        if found[1]:
            architecture = found[1]
        else:
            kernel, type_, feedback = compiler.kernel_of(found[2])
            registers, stack, shared, local = map(int, found.groups()[2:])
            rows.append({"kernel": kernel, "type": type_, "feedback": feedback, "arch": architecture, "registers": registers, "stack": stack,
                         "shared": shared, "spilled": local})  # fmt: skip
    return rows


def test_the_kernels_in_the_extension_keep_to_their_bounds():
    import regtopk_torch

    if not regtopk_torch.has_cuda_kernels():
        pytest.skip("the extension was built without the CUDA kernels")
    if cuobjdump() is None:
        pytest.skip("no cuobjdump, neither triton's nor on PATH")
    usage = subprocess.run([cuobjdump(), "--dump-resource-usage", regtopk_torch._C.__file__], check=True, capture_output=True, text=True, timeout=600)
    rows = parse_resource_usage(usage.stdout)
    assert compiler.complaints(rows, {}) == []
    for architecture in {row["arch"] for row in rows}:
        assert KERNELS <= {(row["kernel"], row["type"], row["feedback"]) for row in rows if row["arch"] == architecture}
    assert rows


def test_what_cuobjdump_says_of_a_kernel_beyond_its_bounds_is_complained_about():
    text = f"arch = sm_90\n Function {MANGLED}:\n  REG:66 STACK:8 SHARED:50000 LOCAL:16 CONSTANT[0]:700"
    assert parse_resource_usage(text) == compiler.parse_ptxas(PTXAS)


@needs_nvcc
def test_the_kernel_that_streams_compiles_and_keeps_to_its_bounds():
    rows, complaints = compiler.compile_all(NVCC, **ONE, jobs=2)
    assert complaints == [] and len(rows) == 8 and all(row["registers"] <= 64 for row in rows)


@needs_nvcc
@pytest.mark.long
def test_the_kernels_compile_for_every_architecture_and_keep_to_their_bounds():
    architectures = compiler.ARCHITECTURES
    rows, complaints = compiler.compile_all(NVCC, architectures, jobs=2)
    assert complaints == []
    of_each = [
        collections.Counter((row["kernel"], row["type"], row["feedback"]) for row in rows if row["arch"] == architecture) for architecture in architectures
    ]
    assert KERNELS <= of_each[0].keys() and all(of_one == of_each[0] for of_one in of_each)


@needs_nvcc
def test_make_cuda_prints_registers_and_spills():
    command = [sys.executable, "cuda/compile.py", "--nvcc", NVCC, "--arch", *ONE["architectures"], "--source", *ONE["sources"]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"accumulate_kernel<fp32, feedback> +\d+ +\d+ +0", done.stdout)


def test_make_cuda_without_nvcc_says_what_is_missing():
    done = subprocess.run([sys.executable, "cuda/compile.py", "--nvcc", "no-such-nvcc"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "cuda/compile.py: expected nvcc on PATH, got none at 'no-such-nvcc'" in done.stderr


MANGLED = "_ZN7regtopk51_GLOBAL__N__de302677_13_accumulate_cu_3634f8a7_700917accumulate_kernelIfLb1EEEvNS_14CompressDeviceIT_EE"
PTXAS = f"""ptxas info    : Compiling entry function '{MANGLED}' for 'sm_90'
ptxas info    : Function properties for {MANGLED}
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 66 registers, used 1 barriers, 50000 bytes smem
"""


def test_spills_registers_and_shared_memory_beyond_the_bounds_are_complained_about():
    rows = compiler.parse_ptxas(PTXAS)
    row = {"kernel": "accumulate_kernel", "type": "fp32", "feedback": True, "arch": "90"}
    assert rows == [{**row, "registers": 66, "spilled": 16, "stack": 8, "shared": 50000}]
    text = "\n".join(compiler.complaints(rows, {}))
    assert "accumulate_kernel<fp32, feedback> for sm_90: expected no spill and no stack, got 16 bytes spilled and a stack of 8" in text
    assert "expected at most 64 registers, got 66" in text
    assert "expected at most 49152 bytes of shared memory, got 50000" in text


@pytest.mark.parametrize("scalar, complaint", [("ld.global.f32 \t%f1, [%rd1];", True), ("ld.global.nc.f32 %f1, [%rd1];", True), ("", False)])
def test_scalar_loads_of_the_stream_are_complained_about(scalar, complaint):
    vectors = "ld.global.v4.f32 \t{%f1, %f2, %f3, %f4}, [%rd1];\n" * 8
    loads = compiler.parse_ptx(f".visible .entry {MANGLED}(\n{vectors}ld.global.f32 %f1, [%rd1];\n{scalar}\n")
    assert bool(compiler.complaints([], loads)) == complaint  # one is allowed: the feedback of an entry
    assert compiler.complaints([], compiler.parse_ptx(f".visible .entry {MANGLED}(\n"))  # no vector at all


def test_kernels_include_the_core_and_nothing_of_torch():
    for path in [*ROOT.glob("cuda/*.cu*"), ROOT / "cuda" / "launch.h"]:
        for quoted, bracketed in re.findall(r'#include (?:"([^"]+)"|<([^>]+)>)', path.read_text()):
            assert not quoted.startswith("../") or quoted.startswith("../csrc/core/"), f"{path.name} includes {quoted}"
            assert not re.match(r"(ATen|c10|torch)/", bracketed), f"{path.name} includes {bracketed}"


def decide(wish, torch_cuda, *, path=None):
    environment = {**os.environ, "REGTOPK_CUDA": wish}
    if path is not None:
        environment = {"PATH": path, "REGTOPK_CUDA": wish}
    done = subprocess.run(
        [CMAKE, "-Dtorch_version=2.14.1", f"-Dtorch_cuda={torch_cuda}", "-P", str(ROOT / "cuda" / "decide.cmake")],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    return done.returncode, " ".join((done.stdout + done.stderr).split())


@pytest.fixture
def nvcc_of_13(tmp_path):
    """A PATH with a compiler that says it is nvcc of CUDA 13."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    nvcc.chmod(0o755)
    return str(tmp_path)


def test_auto_builds_cuda_where_nvcc_and_a_cuda_torch_are(nvcc_of_13):
    code, words = decide("auto", "13.0", path=nvcc_of_13)
    assert code == 0
    assert f"CPU and CUDA kernels: REGTOPK_CUDA=auto, torch has CUDA 13.0, nvcc is {nvcc_of_13}/nvcc" in words


def test_off_builds_no_cuda_even_where_it_could(nvcc_of_13):
    code, words = decide("off", "13.0", path=nvcc_of_13)
    assert code == 0
    assert "building for torch 2.14.1, CPU kernels only: REGTOPK_CUDA=off" in words


@pytest.mark.parametrize(
    "torch_cuda, has_nvcc, missing",
    [
        ("None", True, "a CUDA build of torch (torch 2.14.1 is a CPU build)"),
        ("13.0", False, "nvcc (not on PATH, nor in CUDA_HOME)"),
        ("None", False, "a CUDA build of torch (torch 2.14.1 is a CPU build) and nvcc (not on PATH, nor in CUDA_HOME)"),
        ("12.6", True, "nvcc of CUDA 12 like torch 2.14.1"),
    ],
)
def test_what_is_missing_is_said_by_auto_and_is_an_error_with_on(nvcc_of_13, torch_cuda, has_nvcc, missing):
    path = nvcc_of_13 if has_nvcc else "/nowhere"
    code, words = decide("auto", torch_cuda, path=path)
    assert code == 0
    assert f"CPU kernels only: REGTOPK_CUDA=auto, and missing is {missing}" in words
    code, words = decide("on", torch_cuda, path=path)
    assert code != 0
    assert f"regtopk_torch: expected with REGTOPK_CUDA=on {missing}" in words


def test_another_wish_is_an_error(nvcc_of_13):
    code, words = decide("yes", "13.0", path=nvcc_of_13)
    assert code != 0
    assert "expected REGTOPK_CUDA=auto, on or off, got 'yes'" in words


def test_the_extension_has_the_cuda_operators_that_the_build_says_it_has():
    import regtopk_torch  # noqa: F401

    built = [path.read_text() for path in ROOT.glob(f"build/torch-{torch.__version__}/kernels.txt")]
    for name in ("compress_", "aggregate_", "measure_", "judge_", "settle_", "put_back_", "to_wire_", "from_wire_", "take_", "average_slice_", "spread_", "feedback_", "encode", "decode"):
        of_cuda = [line for line in torch._C._dispatch_dump(f"regtopk::{name}").splitlines() if line.startswith("CUDA:")]
        assert len(of_cuda) == 1
        if built:
            assert ("operators.cpp" if "CPU and CUDA kernels" in built[0] else "csrc/ops/without_cuda.cpp") in of_cuda[0]


@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf is not installed")
def test_the_extension_has_no_cuda_runtime_of_its_own():
    from regtopk_torch import _C

    built = [path.read_text() for path in ROOT.glob(f"build/torch-{torch.__version__}/kernels.txt")]
    if not built or "CPU and CUDA kernels" not in built[0]:
        pytest.skip("the extension was built without the CUDA kernels")
    needed = subprocess.run(["readelf", "-d", _C.__file__], check=True, capture_output=True, text=True).stdout
    assert f"libcudart.so.{torch.version.cuda.split('.')[0]}" in needed
