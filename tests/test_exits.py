"""Every way in which a training process ends, many times each: no hang, no abort."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

TESTS = pathlib.Path(__file__).resolve().parent
CYCLES = 8  # each combination of what exits.py varies from cycle to cycle


@pytest.mark.parametrize("cycles", [CYCLES, pytest.param(50, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "way, outcome",
    [
        pytest.param("end_normally", "0 0", marks=pytest.mark.long),
        ("end_without_destroying_the_group", "0 0"),
        ("raise_in_forward", "1 1"),  # on one rank; the other's exchange fails when the connection closes
        ("end_with_an_exchange_pending", "0 0"),
    ],
)
def test_processes_end_cleanly_time_after_time(way, outcome, cycles):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    command = [sys.executable, str(TESTS / "exits.py"), way, str(cycles)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=540)
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads(result.stdout.splitlines()[-1]) == {outcome: cycles}, result.stderr[-3000:]
