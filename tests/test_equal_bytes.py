"""Ways to spend bytes are compared at equal ones, and a threshold loses nothing."""

import argparse
import struct
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))  # experiments is not installed

from experiments import data, equal_bytes  # noqa: E402
from torchvision_here import needs_torchvision  # noqa: E402

OPTIONS = argparse.Namespace(model="mnist_mlp", workers=2, steps=60, batch_size=4, learning_rate=0.05)


def images(count, seed):
    """Grey images of 28 x 28 that differ by their label, a bright row."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (count,), generator=generator)
    pixels = torch.randint(60, (count, 28, 28), generator=generator, dtype=torch.uint8)
    pixels[torch.arange(count), labels * 2] = 250
    return pixels, labels


@pytest.fixture(scope="module")
def dataset():
    (train, labels), (test, others) = images(400, 0), images(100, 1)
    return data.Dataset("rows", train.unsqueeze(1), labels, test.unsqueeze(1), others)


def test_a_threshold_sends_what_is_at_least_as_large_and_keeps_the_rest():
    exchange = equal_bytes.Threshold(2.0)
    first, second = torch.tensor([1.0, -3.0, 2.0, 0.5]), torch.tensor([[1.5, 0.0]])
    given = [[first, second], [first, -second]]
    total = [torch.zeros(4), torch.zeros(1, 2)]
    for _ in range(2):
        for sum_of, average in zip(total, exchange.step(given), strict=True):
            sum_of += average
    # One after the other: 1, 3 and 1.5 of one worker; entries below 2 wait for the second step.
    assert total[0].tolist() == [2.0, -6.0, 4.0, 0.0] and not total[1].any()
    assert exchange.stats()["sent_entries"] == 2 * (2 + 4) and exchange._residuals[0].tolist() == [0.0, 0.0, 0.0, 1.0, 0.0, 0.0]


def test_a_search_ends_at_the_budget(dataset):
    row = equal_bytes.search(OPTIONS, dataset, 0.001, 0, 0.05)
    assert row["bytes_sent"] == pytest.approx(2 * 60 * equal_bytes.bytes_of(101_770, 102, 4), rel=equal_bytes.WITHIN)
    assert row["sent_entries"] == pytest.approx(2 * 60 * 102, rel=2 * equal_bytes.WITHIN)
    assert equal_bytes.search(OPTIONS, dataset, 0.001, 0, row["lambda"]) == row  # at once
    again = equal_bytes.train(OPTIONS, dataset, 0.001, equal_bytes.Threshold(row["lambda"]), 0)
    assert again == {name: row[name] for name in again}


@needs_torchvision
def test_a_sweep_reads_mnist_and_sends_as_much_by_every_rule(tmp_path, capsys):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, (pixels, labels) in {"train": images(400, 0), "t10k": images(100, 1)}.items():
        head = struct.pack(">iiii", 2051, len(pixels), 28, 28)
        (raw / f"{name}-images-idx3-ubyte").write_bytes(head + pixels.numpy().tobytes())
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">ii", 2049, len(labels)) + labels.to(torch.uint8).numpy().tobytes())
    rules = list(dict.fromkeys(equal_bytes.RULES + equal_bytes.VALUES))
    arguments = ["--rule", *rules, "--workers", "2", "--steps", "120", "--batch-size", "4", "--data", str(tmp_path), "--out", str(tmp_path / "log.jsonl")]
    equal_bytes.main(arguments)
    rows = [dict(part.split("=") for part in line.split()) for line in capsys.readouterr().out.splitlines()]
    assert [row["rule"] for row in rows] == rules
    sent = [int(row["bytes_sent"]) for row in rows]
    assert sent == pytest.approx([sent[0]] * len(rules), rel=0.1) and len({row["loss"] for row in rows}) == len(rules)
    entries = [int(row["sent_entries"]) for row in rows]
    assert 1.03 * entries[0] < entries[-4] < 0.75 * entries[-3] < 0.75 * entries[-2] < 0.75 * 0.96 * entries[-1] and max(sent[-4:]) <= sent[0]
    with pytest.raises(SystemExit, match="expected the four files of MNIST"):
        equal_bytes.main(["--data", str(tmp_path / "elsewhere")])
