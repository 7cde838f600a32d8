"""make gpu-check, on the emulation: every part runs, the lines say what was checked, and what is wrong fails it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from processes import run_alone

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # benchmarks are not installed

from tests.gpu_check import __main__ as main  # noqa: E402
from tests.gpu_check import sanitize, summary  # noqa: E402
from tests.gpu_check.log import Log  # noqa: E402
from tests.gpu_check.parts import PARTS, Part  # noqa: E402

FACTS = {"card", "torch", "cuda", "commit", "sources", "part", "event"}


def lines_of(folder):
    return [json.loads(line) for line in (folder / "gpu-check.jsonl").read_text().splitlines()]


def run_part(options):
    sys.exit(main.run_part(options))


def run_forked(part, options, seconds):
    """As main.run_in_process, in a process that need not import torch for seconds."""
    options = SimpleNamespace(**vars(options) | {"part": part.name, "seconds": seconds})
    # What starts processes itself starts them from here, for the same reason.
    status, *output = (main.run_part(options), "", "") if part.name in ("gloo", "lost", "host") else run_alone(run_part, options, seconds=seconds)
    with open(options.out / "gpu-check.log", "a", encoding="utf-8") as log:
        log.writelines([f"== {part.name}\n", *output])
    return {0: ("passed", ""), 3: ("not run", "")}.get(status, ("failed", ""))


def test_every_part_runs_on_the_emulation_and_leaves_lines_and_a_summary(tmp_path, monkeypatch, capsys):
    alone = main.run_in_process  # of one part, as the command starts each
    monkeypatch.setattr(main, "run_in_process", lambda part, *rest: (alone if part.name == "memory" else run_forked)(part, *rest))
    options = SimpleNamespace(out=tmp_path, device="emulated", seconds=900, commit="abc", only=None, data="digits")
    status, printed, lines = main.run_all(options), capsys.readouterr().out, lines_of(tmp_path)
    assert status == 0, printed + (tmp_path / "gpu-check.log").read_text()[-3000:]
    assert all(FACTS <= set(line) and line["commit"] == "abc" and line["card"] == "emulated" for line in lines)
    results = {line["name"]: line["result"] for line in lines if line["event"] == "part"}
    assert results == {part.name: "not run" if part.gpu_alone or part.name == "sanitizer" else "passed" for part in PARTS}
    text = (tmp_path / "gpu-check.txt").read_text()
    assert "no part failed" in text and "x: against the copy of equal bytes" in text
    assert printed.rstrip().endswith(text.rstrip())
    with pytest.raises(SystemExit, match="expected a folder without gpu-check.jsonl"):
        main.run_all(options)


def test_what_ncu_prints_of_kernels_is_read():
    text = """
  void unnamed>::sample_kernel<float, 1>(CompressDevice<T1>) (8, 1, 1)x(512, 1, 1), Context 1, Stream 7, Device 0, CC 9.0
    DRAM Throughput                   %         0.52
    Duration                         us        13.76
    Achieved Occupancy                        %        24.93
  void unnamed>::accumulate_kernel<float, 1>(CompressDevice<T1>) (264, 1, 1)x(512, 1, 1), Context 1, Stream 7, Device 0, CC 9.0
    Duration                         ms        1,050.50
"""
    first, second = sanitize.kernels_in(text)
    assert first == {"kernel": "sample", "dram": pytest.approx(0.0052), "us": 13.76, "warps": pytest.approx(0.2493)}
    assert second == {"kernel": "accumulate", "us": 1050500.0}


def test_a_part_that_failed_before_it_said_that_it_does_not_run_has_failed(tmp_path, monkeypatch):
    def part(log):
        log.fail("something")
        raise log.NotRun("the rest")

    monkeypatch.setattr(main, "PARTS", [SimpleNamespace(name="build", function=part)])
    assert main.run_part(SimpleNamespace(part="build", out=tmp_path, device="emulated", commit="abc", seconds=5, data=None)) == 1


def test_bytes_that_differ_fail_the_part_and_are_named(tmp_path, monkeypatch):
    from tests.gpu_check import correctness, machine

    class Wrong(machine.Operators):
        """The CPU's operators, but for one bit of the payload."""

        def compress(self, gradient, residual, payload, **keywords):
            super().compress(gradient, residual, payload, **keywords)
            payload[-1] ^= 1

    log = Log(tmp_path, "emulated", "abc", "operators")
    pair = correctness.Pair(log, machine.Operators(), 16, correctness.FLOATS[0], 0.25, "previous")
    gradients = [next(correctness.steady(log, 16, correctness.FLOATS[0], seed)) for seed in range(2)]
    assert pair.take_step(gradients) and log.failures == 0
    wrong = correctness.Pair(log, Wrong(), 16, correctness.FLOATS[0], 0.25, "previous")
    assert not wrong.take_step(gradients)
    assert log.failures > 0
    log.write("part", name="operators", title="", result="failed", reason="", seconds=1)
    text, failed = summary.of(tmp_path / "gpu-check.jsonl")
    assert failed and "expected the CPU's payload of worker 0, got others" in text and "failed: operators" in text


def test_a_part_that_hangs_or_crashes_costs_itself_alone(tmp_path, monkeypatch):
    # A part's process is replaced by one that hangs, or dies.
    options = SimpleNamespace(out=tmp_path, device="emulated", commit="abc", data=None)
    part = Part("build", "", lambda log: None, 1)
    monkeypatch.setattr(main.sys, "executable", shutil.which("true"))
    assert main.run_in_process(part, options, 20) == ("passed", "")
    for name, script, expected in (("hangs", "sleep 60", ("failed", "still ran after 1 s")), ("dies", "kill -SEGV $$", ("failed", "ended by signal 11"))):
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setattr(main.sys, "executable", str(program))
        assert main.run_in_process(part, options, 1 if name == "hangs" else 20) == expected


def test_parts_without_time_left_are_reported(tmp_path):
    command = [sys.executable, "-m", "tests.gpu_check", "--out", str(tmp_path), "--device", "emulated", "--seconds", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert {line["reason"] for line in lines_of(tmp_path) if line["event"] == "part"} == {"no time left", "the emulation has nothing of it"}
    assert "no time left" in done.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_gpu_check_asks_for_a_folder():
    done = subprocess.run(["make", "gpu-check"], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OUT": ""})
    assert done.returncode != 0 and "make gpu-check: expected OUT=DIR" in done.stdout


def test_a_machine_without_a_tool_is_told_which(monkeypatch):
    from tests.gpu_check import build

    monkeypatch.setattr(build.shutil, "which", lambda name, path=None: None if name in ("nvcc", "ninja", "make") else f"/bin/{name}")
    assert build.missing() == ["nvcc on PATH", "ninja or make on PATH"]
