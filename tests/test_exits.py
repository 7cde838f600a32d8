"""Every way in which a training process ends, many times each: no hang, no abort."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

TESTS = pathlib.Path(__file__).resolve().parent
WAYS = {
    "end_normally": "0 0",
    "end_without_destroying_the_group": "0 0",
    "raise_in_forward": "1 1",  # on one rank; the other's exchange fails when the connection closes
    "end_with_an_exchange_pending": "0 0",
}


@pytest.mark.parametrize(
    "cycles, ways",
    [
        # Any two of the three things that exits.py varies from cycle to cycle in all their combinations; of all three, in the long test.
        # Who ends normally does so in every other test too.
        ((0, 3, 5, 6), list(WAYS)[1:]),
        pytest.param(range(50), list(WAYS), marks=pytest.mark.long),
    ],
    ids=["few", "many"],
)
def test_processes_end_cleanly_time_after_time(cycles, ways):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    command = [sys.executable, str(TESTS / "exits.py"), ",".join(map(str, cycles)), *ways]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=2000)  # against hanging
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads(result.stdout.splitlines()[-1]) == {way: {WAYS[way]: len(cycles)} for way in ways}, result.stderr[-3000:]
