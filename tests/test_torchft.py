"""examples/torchft_diloco.py against torchft itself, which the tests do without where it is not installed."""

import json
import os
import subprocess
import sys

import pytest
from processes import ROOT

pytest.importorskip("torchft", reason="torchft is not installed")


def replicas(*arguments):
    """(what replicas 0 and 1 say of themselves, the last line) of the example on this machine."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "examples/torchft_diloco.py"), *arguments]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    lines = ended.stdout.splitlines()
    return *map(json.loads, lines[-3:-1]), lines[-1]


@pytest.mark.parametrize("fragments", [1, 2])
def test_two_replicas_train_the_same_weights_at_a_share_of_the_bytes(fragments):
    zero, one, summary = replicas("--rounds", "8", "--fragments", str(fragments))
    assert zero["weights"] == one["weights"] and summary.startswith("equal weights: True")
    for result in (zero, one):
        assert result["rounds"] == 8 and result["replicas"] == [2] and result["rounds that did not count"] == 0
        assert 0 < result["bytes_sent"] < 0.02 * result["bytes_dense"]
        assert result["loss"] < result["first loss"]


def test_a_replica_that_is_killed_within_an_average_recovers_and_the_others_round_does_not_count():
    survivor, recovered, _ = replicas("--rounds", "9", "--kill")
    assert survivor["weights"] == recovered["weights"]
    assert survivor["rounds"] == recovered["rounds"] == 9 and survivor["replicas"] == recovered["replicas"] == [2]
    assert survivor["rounds that did not count"] == 1
