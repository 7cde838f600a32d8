"""Check and time the CUDA kernels on this machine's GPU: python -m tests.gpu_check --out DIR     (make gpu-check OUT=DIR)

Builds for this GPU's architecture alone, then runs parts, the most valuable first, each in a process of its own with a time
limit. Every result is a line of DIR/gpu-check.jsonl, flushed at once, so a part that crashes or hangs costs itself alone; what
the parts print is in DIR/gpu-check.log, and the summary, printed last, in DIR/gpu-check.txt. The exit status is 0 if no part
failed. Parts for which no time is left are reported as such. No network and no installed package are needed: an nvcc that fits
the installed torch, CMake and a C++ compiler are. The extension that is built is put into regtopk_torch/.

--device emulated runs the same parts, tiny, on the host emulation of the kernels; what only a GPU has is not run.
"""

import argparse
import os
import pathlib
import signal
import subprocess
import sys
import time

from tests.gpu_check import summary
from tests.gpu_check.log import FAILED, NOT_RUN, Log
from tests.gpu_check.parts import PARTS

ROOT = pathlib.Path(__file__).resolve().parents[2]
LEAST_SECONDS = 5  # with less time left, a part is not begun


def run_in_process(part, options, seconds):
    """Run one part in a new process group; return (result, reason)."""
    command = [sys.executable, "-m", "tests.gpu_check", "--out", str(options.out), "--device", options.device]
    command += ["--part", part.name, "--seconds", str(seconds), "--commit", options.commit]
    command += ["--data", str(options.data)] if options.data else []
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
    if options.device == "emulated":
        environment["OMP_NUM_THREADS"] = "1"  # many small operations: more threads would only wait for each other
    with open(options.out / "gpu-check.log", "a", encoding="utf-8") as output:
        print(f"== {part.name}", file=output, flush=True)
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return FAILED, f"still ran after {seconds:.0f} s"
    if status < 0:
        return FAILED, f"ended by signal {-status}"
    return {0: ("passed", ""), 3: (NOT_RUN, "")}.get(status, (FAILED, ""))


def run_all(options):
    options.out.mkdir(parents=True, exist_ok=True)
    if (options.out / "gpu-check.jsonl").exists():
        sys.exit(f"gpu-check: expected a folder without gpu-check.jsonl, got {options.out}; pass another OUT")
    log = Log(options.out, options.device, options.commit, "gpu-check")
    end = time.monotonic() + options.seconds
    for part in PARTS:
        if options.only and part.name not in options.only:
            continue
        started = time.monotonic()
        left = end - started
        if part.gpu_alone and options.device == "emulated":
            log.write("part", name=part.name, result=NOT_RUN, reason="the emulation has nothing of it", seconds=0)
            continue
        if left < LEAST_SECONDS:
            log.write("part", name=part.name, result=NOT_RUN, reason="no time left", seconds=0)
            continue
        # The limits are those of a GPU's machine; the emulation may have to share a slow one.
        limit = part.seconds * (4 if options.device == "emulated" else 1)
        result, reason = run_in_process(part, options, min(limit, left))
        log.write("part", name=part.name, title=part.title, result=result, reason=reason, seconds=round(time.monotonic() - started, 1))
        print(f"{part.name}: {result} {reason} ({time.monotonic() - started:.0f} s)", flush=True)
    text, failed = summary.of(options.out / "gpu-check.jsonl")
    (options.out / "gpu-check.txt").write_text(text + "\n", encoding="utf-8")
    print(text)
    return 1 if failed else 0


def run_part(options):
    """In the part's own process: 0 passed, 1 failed, 3 not run."""
    part = next(part for part in PARTS if part.name == options.part)
    log = Log(options.out, options.device, options.commit, part.name, seconds=options.seconds, data=options.data)
    try:
        part.function(log)
    except log.NotRun as reason:
        log.write("not run", reason=str(reason))
        return 1 if log.failures else 3  # what came before may have failed
    except Exception as error:
        log.fail(f"{type(error).__name__}: {str(error)[:2000]}")
        raise
    return 1 if log.failures else 0


def commit_of_checkout():
    try:
        words = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=ROOT, capture_output=True, text=True, check=True)
        return words.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main():
    parts = "\n".join(f"    {part.name:<10} {part.title}" for part in PARTS)
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu_check", description=__doc__, epilog=f"parts:\n{parts}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for the results")
    parser.add_argument("--device", choices=["cuda", "emulated"], default="cuda", help="(%(default)s)")
    parser.add_argument("--seconds", type=float, default=480.0, help="for everything (%(default)g)")
    parser.add_argument("--commit", default="", help="of what is checked, where there is no git to ask")
    parser.add_argument("--data", help="folder that holds cifar-10-batches-py, of `figure`: without it that part is not run", metavar="DIR")
    parser.add_argument("--only", nargs="+", metavar="PART", choices=[part.name for part in PARTS], help="these parts, as all are run; what `build` made must be there")
    parser.add_argument("--part", choices=[part.name for part in PARTS], help=argparse.SUPPRESS)  # this part, in this process
    options = parser.parse_args()
    if options.part and options.only:
        parser.error("--part: expected no --only beside it")
    options.out = options.out.resolve()
    options.commit = options.commit or commit_of_checkout()
    if options.part:
        options.out.mkdir(parents=True, exist_ok=True)
    sys.exit(run_part(options) if options.part else run_all(options))


if __name__ == "__main__":
    main()
