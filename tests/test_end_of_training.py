"""Ends of training differ in what they say they differ in, and go on from one and the same training."""

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))  # experiments is not installed

from experiments import data, end_of_training  # noqa: E402

OPTIONS = argparse.Namespace(model="tiny", density=0.01, workers=2, steps=40, batch_size=4)


@pytest.fixture(scope="module")
def training():
    return end_of_training.Training(OPTIONS, data.load_digits(), "momentum", 0)


def test_an_end_is_the_same_again_and_ends_differ(training):
    rows = {name: training.end(name) for name in end_of_training.ENDINGS}
    assert rows["flush"] == training.end("flush") and rows["nothing"] == training.end("nothing")
    assert len({row["loss"] for row in rows.values()}) == len(rows)


def test_the_entries_sent_are_those_of_the_densities_and_of_what_is_flushed(training):
    entries, tail = 1906, 4
    sent = {name: training.end(name)["tail_entries"] for name in end_of_training.ENDINGS}
    assert sent["nothing"] == tail * 19
    assert sent["flush"] == sent["flush-decayed"] == tail * 19 + entries
    assert sent["dense"] == sent["all"] == 3 * 19 + entries  # the last hundredth of 40 steps is one of them
    assert sent["rising"] == sum(round(min(1, 0.01 * 100 ** ((step + 1) / tail)) * entries) for step in range(tail))


def test_a_flush_steps_with_the_mean_of_what_all_workers_hold_at_the_rate_that_it_says(training):
    workers = training._make_workers()
    generator = torch.Generator().manual_seed(0)
    workers.exchange.step([[torch.randn(p.shape, generator=generator) for p in workers.model.parameters()] for _ in range(2)])
    held = [workers.exchange.residuals(rank) for rank in range(2)]
    before = [p.detach().clone() for p in workers.model.parameters()]
    training._flush(workers, 0.5)
    for index, (parameter, old) in enumerate(zip(workers.model.parameters(), before, strict=True)):
        wanted = old - 0.5 * ((held[0][index] + held[1][index]) / 2).view_as(old)
        assert torch.allclose(parameter, wanted, atol=1e-6)


def test_a_sweep_of_ends_is_one_log_that_is_not_computed_twice(tmp_path, capsys):
    log = tmp_path / "ends.jsonl"
    arguments = [
        "--model", "tiny", "--steps", "20", "--workers", "2", "--batch-size", "4", "--optimizer", "adamw", "--ending", "nothing", "all", "--data", "digits",
    ]  # fmt: skip
    end_of_training.main([*arguments, "--out", str(log)])
    first = log.read_bytes()
    end_of_training.main([*arguments, "--out", str(log)])
    assert log.read_bytes() == first and capsys.readouterr().out.count("ending=all") == 2
    assert [json.loads(line)["ending"] for line in first.decode().splitlines()[1:]] == ["nothing", "all"]
    with pytest.raises(SystemExit, match="expected steps 20, as in the log"):
        end_of_training.main([*arguments, "--steps", "24", "--out", str(log)])
