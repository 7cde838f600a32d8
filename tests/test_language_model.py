"""experiments.language_model: rows send what they may, and processes train as the simulation does."""

import sys
from pathlib import Path

import pytest
import torch
from processes import run_workers

sys.path.append(str(Path(__file__).resolve().parents[1]))  # experiments are not installed

import regtopk_torch as rt  # noqa: E402
from experiments import language_model  # noqa: E402

OPTIONS = ["--workers", "2", "--steps", "6", "--batch-size", "2", "--evaluate-every", "6", "--budget", "0.01"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_bytes(b"".join(b"%d bottles of beer on the wall, %d bottles of beer.\n" % (i, i) for i in range(8000)))
    return path


def options_of(row, text, *more):
    return language_model.parse([*OPTIONS, "--row", row, "--text", str(text), *more])


def train(rank, name, text):
    options = options_of(name, text)
    return language_model.train(options, language_model.Text(text, 64), options.rows[name], 0.001, 0)


@pytest.mark.parametrize("row", ["topk", "h2-2bit-d95", "h2-sign-d95-chunk", "h2-leader", "h2-2bit-regtopk", "diloco3"])
def test_processes_train_as_the_simulation_does_and_send_as_much(row, text):
    options = options_of(row, text)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = language_model.simulate(options, language_model.Text(text, 64), options.rows[row], 0.001, 0)
    finally:
        torch.set_num_threads(threads)
    for result in run_workers(train, 2, row, text):
        assert result["bytes_per_step"] == alone["bytes_per_step"] and result["of_dense"] == alone["of_dense"] > 0
        assert result["loss"] == alone["loss"] if row != "topk" else abs(result["loss"] - alone["loss"]) < 2e-3  # DDP's bucket has another order


def test_rows_send_equal_bytes(text):
    numel = 420_000
    for name in ("topk", "h5", "h5-2bit-d95", "h5-bf16-d95", "topk-leader"):
        row = language_model.Row(name)
        density, given = row.options(numel, 4, 0.005)
        sent = language_model.wire_bytes_of(row, numel, 4, round(density * numel)) / max(1, row.every)
        assert 0.99 < sent / (0.005 * numel * 6) <= 1
        assert given["decay"] == (0.95 if "d95" in name else 1.0)
        exchange = rt.LocalExchange(4, density, **given)
        for _ in range(4):
            exchange.step([[torch.rand(numel)] for _ in range(4)])
        assert exchange.stats(0)["bytes_sent"] / 4 / 3 / max(1, row.every) == pytest.approx(sent, abs=150)  # bytes of heads


def test_what_is_no_row_is_an_error_in_words(capsys):
    with pytest.raises(SystemExit):
        language_model.parse(["--row", "h"])
    assert "--row: expected a row such as dense, topk, " in capsys.readouterr().err


def test_a_text_is_parted_in_blocks_and_short_ones_are_refused(tmp_path, text):
    path = tmp_path / "short"
    path.write_bytes(b"short")
    with pytest.raises(ValueError, match="expected a text of at least 163840 bytes, got 5"):
        language_model.Text(path, 64)
    parted = language_model.Text(text, 64)
    assert parted.batch(0, 1, 2, 3).shape == (3, 65) and parted.validation().max() < 256
    assert not torch.equal(parted.batch(0, 1, 2, 3), parted.batch(0, 0, 2, 3))
