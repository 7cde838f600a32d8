"""Compile the kernels for every architecture with nvcc alone, and refuse what the compiler's own reports show to be slow.

    python cuda/compile.py [--nvcc nvcc] [--arch 80 90 100] [--source finish] [--jobs 1]       (make cuda)

Needs neither a GPU nor torch. Fails on a register spill or a stack frame in any kernel, on more than 64 registers in
accumulate, on more shared memory than a block has without asking, and on a load of gradient or residual in accumulate that is
not a whole vector. The first three are what ptxas reports; the last is read from the PTX. Results are kept in build/cuda.
"""

import argparse
import hashlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

ROOT = pathlib.Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "cuda"
SOURCES = ["sample", "accumulate", "finish", "compress", "aggregate", "settle", "judge", "wire", "chunks", "measure", "momentum", "check", "whole", "lead", "averages", "parts"]
ARCHITECTURES = ["80", "90", "100"]
# Also in CMakeLists.txt. Without fused multiply-adds the device computes the bits of the CPU.
FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-fmad=false"]
MOST_REGISTERS = {"accumulate_kernel": 64}
MOST_SHARED_BYTES = 48 * 1024
TYPES = {"d": "fp64", "f": "fp32", "8BFloat16": "bf16", "4Half": "fp16"}

# accumulate loads 16 entries of gradient and residual to a thread (4 in fp64), in vectors of at most 16 bytes, and has these
# scalar loads of the same types beside: the feedback of an entry, and of 16 bits a header field and an offset.
STREAMED_VECTORS = {"fp64": {".v2.f64": 4}, "fp32": {".v4.f32": 8}, "bf16": {".v4.f32": 4, ".v4.u16": 4}, "fp16": {".v4.f32": 4, ".v4.u16": 4}}
SCALARS_ALLOWED = {".f32": {False: 0, True: 1}, ".f64": {False: 0, True: 1}, ".u16": {False: 2, True: 2}}


def kernel_of(mangled):
    """('accumulate_kernel', 'fp32', has_feedback) of a mangled kernel name."""
    name = re.search(r"\d([a-z_]+_kernel)I", mangled).group(1)
    rest = mangled[mangled.index(name + "I") + len(name) + 1 :]
    value_type = next(TYPES[key] for key in TYPES if re.match(rf"(NS\d*_?{key}|{key})", rest))
    return name, value_type, "Lb1E" in rest


def parse_ptxas(log):
    """[{kernel, type, feedback, arch, registers, spilled, stack, shared}] from the output of ptxas -v."""
    rows, current = [], None
    for line in log.splitlines():
        if found := re.search(r"Compiling entry function '(\S+)' for 'sm_(\d+)'", line):
            name, value_type, feedback = kernel_of(found.group(1))
            current = {"kernel": name, "type": value_type, "feedback": feedback, "arch": found.group(2), "shared": 0}
        elif found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            if current is not None:
                current["stack"], stores, loads = map(int, found.groups())
                current["spilled"] = stores + loads
        elif found := re.search(r"Used (\d+) registers", line):
            current["registers"] = int(found.group(1))
            if shared := re.search(r"(\d+) bytes smem", line):
                current["shared"] = int(shared.group(1))
            rows.append(current)
            current = None
    return rows


def parse_ptx(ptx):
    """{(kernel, type, feedback): {kind of global load: how many in the text}}, kinds as '.v4.f32' or '.f32'."""
    loads, current = {}, None
    for line in ptx.splitlines():
        if found := re.search(r"\.entry (\S+?)\(", line):
            current = loads.setdefault(kernel_of(found.group(1)), {})
        elif (found := re.search(r"\bld\.global\S*?((?:\.v[248])?\.[bfsu]\d+)\s", line)) and current is not None:
            current[found.group(1)] = current.get(found.group(1), 0) + 1
    return loads


def complaints(rows, loads):
    """What is wrong, one sentence each; empty if nothing is."""
    found = []
    for row in rows:
        who = f"{row['kernel']}<{row['type']}{', feedback' if row['feedback'] else ''}> for sm_{row['arch']}"
        if row["spilled"] or row["stack"]:
            found.append(f"{who}: expected no spill and no stack, got {row['spilled']} bytes spilled and a stack of {row['stack']}")
        most = MOST_REGISTERS.get(row["kernel"])
        if most is not None and row["registers"] > most:
            found.append(f"{who}: expected at most {most} registers, got {row['registers']}")
        if row["shared"] > MOST_SHARED_BYTES:
            found.append(f"{who}: expected at most {MOST_SHARED_BYTES} bytes of shared memory, got {row['shared']}")
    for (kernel, value_type, feedback), kinds in loads.items():
        if kernel != "accumulate_kernel":
            continue
        for kind, least in STREAMED_VECTORS[value_type].items():
            if kinds.get(kind, 0) < least:
                found.append(f"{kernel}<{value_type}>: expected at least {least} loads {kind}, got {kinds.get(kind, 0)}")
        for kind, most in SCALARS_ALLOWED.items():
            if kinds.get(kind, 0) > most[feedback]:
                found.append(f"{kernel}<{value_type}>: expected at most {most[feedback]} scalar loads {kind}, got {kinds[kind]}")
    return found


def compile_one(nvcc, source, architecture, folder):
    """Return (ptxas rows, PTX loads) of one source for one architecture; CalledProcessError with nvcc's words if it fails."""
    ptx = folder / f"{source}-{architecture}.ptx"
    # Through PTX, so that one front end run serves both readings.
    front = [nvcc, *FLAGS, f"-arch=compute_{architecture}", "-ptx", str(ROOT / "cuda" / f"{source}.cu"), "-o", str(ptx)]
    subprocess.run(front, check=True, capture_output=True, text=True)
    back = [nvcc, f"-arch=sm_{architecture}", "-Xptxas", "-v", "-cubin", str(ptx), "-o", str(ptx.with_suffix(".cubin"))]
    log = subprocess.run(back, check=True, capture_output=True, text=True)
    return parse_ptxas(log.stdout + log.stderr), parse_ptx(ptx.read_text())


def compile_all(nvcc="nvcc", architectures=ARCHITECTURES, *, sources=SOURCES, jobs=1):
    """Compile, or take the results of the same sources, flags and compiler from build/cuda. Return (rows, complaints)."""
    digest = hashlib.sha256(repr((architectures, sources, FLAGS)).encode())
    digest.update(pathlib.Path(__file__).read_bytes())
    digest.update(subprocess.run([nvcc, "--version"], check=True, capture_output=True).stdout)
    for path in sorted([*ROOT.glob("cuda/*.cu*"), *ROOT.glob("cuda/*.h"), *ROOT.glob("csrc/core/*.h")]):
        digest.update(path.name.encode() + path.read_bytes())
    folder = BUILD / digest.hexdigest()[:16]
    report = folder / "report.json"
    if not report.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as products, ThreadPoolExecutor(jobs) as pool:
            tasks = [
                pool.submit(compile_one, nvcc, source, architecture, pathlib.Path(products))
                for source in sources for architecture in architectures
            ]  # fmt: skip
            results = [task.result() for task in tasks]
        rows = [row for result in results for row in result[0]]
        found = [sentence for row_list, loads in results for sentence in complaints(row_list, loads)]
        report.write_text(json.dumps({"rows": rows, "complaints": sorted(set(found))}))
    content = json.loads(report.read_text())
    return content["rows"], content["complaints"]


def table(rows):
    """One line per kernel and type: registers on each architecture."""
    architectures = sorted({row["arch"] for row in rows}, key=int)
    lines = [f"{'kernel':34} {'shared':>6}  " + "  ".join(f"sm_{a:>3}: registers spilled" for a in architectures)]
    by_kernel = {}
    for row in rows:
        key = (row["kernel"], row["type"], row["feedback"])
        by_kernel.setdefault(key, {})[row["arch"]] = row
    for (kernel, value_type, feedback), by_arch in sorted(by_kernel.items()):
        name = f"{kernel}<{value_type}{', feedback' if feedback else ''}>"
        cells = [f"{by_arch[a]['registers']:>17} {by_arch[a]['spilled']:>7}" for a in architectures]
        lines.append(f"{name:34} {max(row['shared'] for row in by_arch.values()):>6}  " + "  ".join(cells))
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--nvcc", default=os.environ.get("NVCC", "nvcc"))
    parser.add_argument("--arch", nargs="+", default=ARCHITECTURES)
    parser.add_argument("--source", nargs="+", choices=SOURCES, default=SOURCES)
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    if shutil.which(options.nvcc) is None:
        sys.exit(f"cuda/compile.py: expected nvcc on PATH, got none at '{options.nvcc}'; install the CUDA toolkit or set NVCC")
    try:
        rows, found = compile_all(options.nvcc, options.arch, sources=options.source, jobs=options.jobs)
    except subprocess.CalledProcessError as error:
        sys.exit(f"cuda/compile.py: expected nvcc to compile, got\n{error.stderr or error.stdout}")
    print(table(rows))
    if found:
        sys.exit("\n".join(["cuda/compile.py: expected kernels that neither spill nor load entry by entry, got", *found]))


if __name__ == "__main__":
    main()
