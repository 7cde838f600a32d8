"""Test the experiments: the toy's published values, data, logs, figures, and a short torchrun job."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.append(str(REPOSITORY))  # experiments is not installed; appended, so that an installed package comes first

from experiments import data, plot, plot_curves, record, sweeps, table, toy_logistic  # noqa: E402
from torchvision_here import needs_torchvision  # noqa: E402

SCRIPT = REPOSITORY / "experiments" / "cifar10_resnet18.py"


# The toy: the paper's Fig. 1. Dense and Top-1 have known values, to 4 printed digits; RegTop-1 must follow dense.


def test_toy_dense_falls_to_0_0215_at_step_50():
    losses = toy_logistic.train("dense")
    assert len(losses) == 101
    assert losses[0] == pytest.approx(0.3133, abs=5e-5)
    assert losses[50] == pytest.approx(0.0215, abs=5e-5)


def test_toy_top_1_does_not_move_for_100_steps():
    assert toy_logistic.train("topk") == [toy_logistic.train("dense", steps=1)[0]] * 101


@pytest.mark.parametrize("distortion, from_step", [("previous", 10), ("current", 50)])
def test_toy_regtop_1_comes_within_5_percent_of_dense(distortion, from_step):
    losses = toy_logistic.train("regtopk", mu=1.0, distortion=distortion)
    pairs = list(zip(losses, toy_logistic.train("dense"), strict=True))[from_step:]
    assert all(abs(loss / dense - 1) < 0.05 for loss, dense in pairs)


def test_toy_command_prints_every_tenth_loss_and_logs_each_run_once(tmp_path):
    log = tmp_path / "toy.jsonl"
    command = [sys.executable, "-m", "experiments.toy_logistic", "--method", "topk", "dense", "--out", str(log)]
    outputs = []
    for _ in range(2):
        ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
        assert ended.returncode == 0, ended.stderr
        outputs.append((ended.stdout, log.read_bytes()))
    assert outputs[0] == outputs[1]
    lines = ended.stdout.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("step=")] == [f"step={n}" for n in range(0, 101, 10)] * 2
    assert lines[-1] == f"final_loss={toy_logistic.train('dense')[-1]:.6f}"
    rows = sweeps.read_sweep(log)[1]
    assert [row["method"] for row in rows] == ["topk", "dense"]
    assert rows[1]["losses"] == [round(loss, 8) for loss in toy_logistic.train("dense")]


# Data


def test_digits_have_the_shape_of_cifar10_and_their_own_name():
    digits = data.load_digits()
    assert "digits" in digits.name and "CIFAR" not in digits.name
    assert digits.train_images.shape == (1437, 3, 32, 32) and digits.test_images.shape == (360, 3, 32, 32)
    assert digits.train_images.dtype == torch.uint8 and digits.train_images.max() == 255
    assert digits.train_labels.shape == (1437,) and digits.train_labels.unique().tolist() == list(range(10))
    image = digits.test_images[0]
    assert torch.equal(image[:, ::4, ::4].repeat_interleave(4, 1).repeat_interleave(4, 2), image)


def test_normalised_images_have_zero_mean_and_unit_deviation():
    digits = data.load_digits()
    images = digits.normalise(digits.train_images)
    assert images.dtype == torch.float32
    assert abs(images.mean().item()) < 0.02 and abs(images.std().item() - 1) < 0.02  # from a sample of the images


def test_a_data_folder_that_is_not_cifar10_is_an_error(tmp_path):
    advice = "; give the folder that holds cifar-10-batches-py, or leave --data out to download it"
    batches = tmp_path / "cifar-10-batches-py"
    with pytest.raises(ValueError, match=re.escape(f"--data: expected CIFAR-10 in {batches}, got a folder without it{advice}")):
        data.prepare(str(tmp_path))
    missing = tmp_path / "missing"
    with pytest.raises(ValueError, match=re.escape(f"in {missing / batches.name}, got no such folder{advice}")):
        data.prepare(str(missing))


@needs_torchvision
def test_a_cifar10_folder_with_a_missing_or_truncated_file_is_an_error(tmp_path):
    batches = tmp_path / "cifar-10-batches-py"
    batches.mkdir()
    with pytest.raises(ValueError, match="got no file data_batch_1; give the folder"):
        data.prepare(str(tmp_path))
    (batches / "data_batch_1").write_bytes(b"\x80\x04 cut short")
    with pytest.raises(ValueError, match="expected md5 .*data_batch_1, got a file of 12 bytes with another sum; it is damaged"):
        data.prepare(str(tmp_path))


def test_a_failed_download_falls_back_to_the_digits_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "download_cifar10", lambda folder: f"no route to {folder}")
    assert data.prepare(None, download_folder="elsewhere") == (None, "no route to elsewhere")
    assert data.prepare("digits") == (None, "")


@needs_torchvision
def test_a_download_from_a_host_that_never_answers_ends_and_leaves_nothing_behind(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/cifar-10-python.tar.gz"
        start = time.monotonic()
        reason = data.download_cifar10(tmp_path, url=url, patience_seconds=1.0)
    assert reason == "fewer than 2 MB arrived in 1 s"
    assert time.monotonic() - start < data.PATIENCE_SECONDS
    assert list(tmp_path.iterdir()) == []


def test_a_download_that_fails_reports_its_last_line(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_DOWNLOAD_COMMAND", "raise OSError('no route to host')")
    assert data.download_cifar10(tmp_path) == "OSError: no route to host"


def test_a_complete_download_replaces_a_damaged_folder(tmp_path, monkeypatch):
    script = "import pathlib, sys; folder = pathlib.Path(sys.argv[1], 'cifar-10-batches-py'); folder.mkdir(); (folder / 'new').touch()"
    monkeypatch.setattr(data, "_DOWNLOAD_COMMAND", script)
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "damaged").touch()
    assert data.download_cifar10(tmp_path) is None
    assert [path.name for path in tmp_path.rglob("*")] == ["cifar-10-batches-py", "new"]


# Logs


def test_a_log_reads_back_what_was_recorded(tmp_path):
    with record.Recorder(tmp_path / record.LOG_NAME, seed=3, data="digits") as recorder:
        recorder.write("step", step=1, loss=2.5)
    header, records = record.read_log(tmp_path)
    assert header == recorder.header and header["seed"] == 3 and header["data"] == "digits"
    assert {"command", "commit", "dirty", "versions", "processor"} <= header.keys()
    assert header["versions"]["torch"] and header["processor"]["cores"] >= 1
    assert records == [{"event": "step", "step": 1, "loss": 2.5}]


def test_a_log_names_no_absolute_path(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/script.py", "--data", "/private/set", "--name=/x/y", str(Path.cwd() / "a" / "b")])
    with record.Recorder(tmp_path / "log.jsonl", seed=0) as recorder:
        assert recorder.header["command"][1:] == ["script.py", "--data", "set", "--name=y", os.path.join("a", "b")]
    assert not any(os.path.isabs(word) for word in recorder.header["command"])


def test_a_log_is_never_overwritten_and_takes_finite_numbers_only(tmp_path):
    with record.Recorder(tmp_path / "log.jsonl", seed=0) as recorder, pytest.raises(ValueError):
        recorder.write("step", loss=float("nan"))
    with pytest.raises(FileExistsError):
        record.Recorder(tmp_path / "log.jsonl", seed=0)


def test_a_taken_run_name_gets_a_number(tmp_path):
    names = [record.create_run_folder("run", tmp_path).name for _ in range(3)]
    assert names == ["run", "run-2", "run-3"]
    with pytest.raises(ValueError, match="--name: expected a folder name without separators, got 'a/b'"):
        record.create_run_folder("a/b", tmp_path)


@pytest.mark.parametrize("text, message", [("", "expected a header on line 1"), ("{\n", "expected a JSON object on line 1")])
def test_a_file_that_is_no_log_is_an_error(tmp_path, text, message):
    (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(ValueError, match=f"read_log: {message} of "):
        record.read_log(tmp_path)


# Figures and tables, from logs alone


def write_log(folder, method="regtopk", finished=True):
    """Write a log of 100 steps with round numbers: each of 2 workers sent 10 of 1000 entries a step."""
    options = {"method": method, "density": 0.01, "mu": 5.0, "distortion": "previous", "batch_size": 20, "steps": 100}
    statistics = {"entries": 100_000, "sent_entries": 1000, "bytes_sent": 6100, "bytes_dense": 400_000, "repeated": 250,
                  "displaced": 5, "compress_seconds": 1.0, "aggregate_seconds": 0.5, "exchange_seconds": 2.0}  # fmt: skip
    with record.Recorder(folder / record.LOG_NAME, seed=0, workers=2, data="digits", options=options) as recorder:
        for step in range(101):
            if step:
                recorder.write("step", step=step, loss=2.3 / step**0.5, seconds=0.1)
            if step % 20 == 0:
                sent = 4000 * step if method == "dense" else 61 * step
                recorder.write("test", step=step, accuracy=0.1 + step / 200, images=1000, bytes_sent=sent, bytes_dense=4000 * step)
        if finished:
            recorder.write("result", accuracy=0.6, test_images=10_000, training_loss=0.25, training_seconds=10.0,
                           median_step_seconds=0.1, replicas_identical=True, statistics=[statistics] * 2)  # fmt: skip
    return folder


def test_the_figure_is_drawn_from_the_log_alone(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one, two = write_log(tmp_path / "one"), write_log(tmp_path / "two", method="dense", finished=False)
    plot.main([str(one)])
    plot.main([str(one), str(two), "--output", str(tmp_path / "both.png")])
    for figure in (one / "curves.png", tmp_path / "both.png"):
        assert figure.read_bytes().startswith(b"\x89PNG")


def test_a_running_mean_starts_with_what_there_is():
    assert plot_curves.running_mean([2.0, 4.0, 6.0, 8.0], window=2) == [2.0, 3.0, 5.0, 7.0]


def read_table(text):
    return dict(re.split(r"\s{2,}", line, maxsplit=1) for line in text.splitlines() if "  " in line)


def test_the_table_shows_accuracy_bytes_and_the_share_of_the_hook(tmp_path):
    rows = read_table(table.format_table(write_log(tmp_path)))
    assert rows["data"] == "digits"
    assert rows["method"] == "regtopk, density 0.01, mu 5, distortion previous"
    assert rows["test accuracy"] == "60.00% of 10,000 images"
    assert rows["bytes sent per worker and step"] == "61 B"
    assert rows["dense ring all-reduce would send"] == "4 kB"
    assert rows["bytes sent against dense"] == "1.525%"
    assert rows["share of the step spent in the hook"] == "15.0%"
    assert rows["share of the step waiting for payloads"] == "20.0%"
    assert rows["entries sent twice running"] == "25.00% of those sent"
    assert rows["entries displaced"] == "0.500% of those sent"


def test_the_table_of_an_unfinished_run_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="format_table: expected a finished run in .*, got a log without a result"):
        table.format_table(write_log(tmp_path, finished=False))


# The job


def run_script(*options, cwd, workers=None):
    """Run the script in `cwd`, under torchrun with `workers` processes where that is given."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)] if workers else []
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, *launcher, str(SCRIPT), *options]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240, env=environment)


@needs_torchvision
@pytest.mark.parametrize("method", ["dense", "regtopk"])
def test_the_job_trains_logs_and_draws(tmp_path, method):
    options = ["--data", "digits", "--steps", "3", "--evaluate-every", "2", "--batch-size", "4", "--timeout", "60"]
    ended = run_script("--method", method, "--name", "short", *options, cwd=tmp_path, workers=2)
    assert ended.returncode == 0, ended.stderr
    rows = read_table(ended.stdout)
    assert "digits" in rows["data"] and rows["replicas identical, bit for bit"] == "yes"
    assert re.fullmatch(r"[\d.]+% of 360 images", rows["test accuracy"])
    header, records = record.read_log(tmp_path / "runs" / "short")
    assert "digits" in header["data"] and header["workers"] == 2 and header["options"]["method"] == method
    assert [line["event"] for line in records] == ["test", "step", "step", "test", "step", "test", "result"]
    assert (tmp_path / "runs" / "short" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path) not in json.dumps(header)
    entries = 3 * 11_181_642  # of 3 steps
    for statistics in records[-1]["statistics"]:
        assert statistics["entries"] == entries and statistics["bytes_dense"] == entries * 4
        if method == "regtopk":
            assert statistics["sent_entries"] == 3 * 11_182
            assert statistics["bytes_sent"] < 0.002 * statistics["bytes_dense"]
    if method == "dense":
        assert rows["share of the step spent in the hook"] == "not applicable"
        assert rows["bytes sent against dense"] == "100.000%"
    else:
        assert re.fullmatch(r"[\d.]+%", rows["share of the step spent in the hook"])


@needs_torchvision
def test_the_job_ends_with_one_message_for_a_folder_that_is_not_cifar10(tmp_path):
    ended = run_script("--method", "dense", "--data", str(tmp_path), "--timeout", "60", cwd=tmp_path, workers=2)
    assert ended.returncode != 0
    assert ended.stderr.count("rank 0: --data: expected CIFAR-10 in ") == 1 and "rank 1: --data" not in ended.stderr
    assert not (tmp_path / "runs").exists()


def test_the_script_without_torchrun_names_the_command(tmp_path):
    ended = run_script(cwd=tmp_path)
    assert ended.returncode == 2
    assert "start it with torchrun --standalone --nproc-per-node 2 experiments/cifar10_resnet18.py" in ended.stderr


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("--steps", "0", "expected at least 1, got 0"),
        ("--batch-size", "1", "expected at least 2, which BatchNorm needs, got 1"),
        ("--learning-rate", "-1", "expected a number above 0, got -1.0"),
        ("--momentum", "1", "expected 0 <= momentum < 1, got 1.0"),
        ("--seed", "-1", "expected at least 0, got -1"),
        ("--evaluate-every", "0", "expected at least 1, got 0"),
        ("--bucket-cap-mb", "0", "expected a number above 0, got 0.0"),
        ("--threads", "0", "expected at least 1, got 0"),
        ("--timeout", "nan", "expected a number above 0, got nan"),
        ("--name", "a/b", "expected a folder name without separators, got a/b"),
        ("--workers", "3", "expected torchrun's number of processes, 2, got 3; hand it to torchrun as --nproc-per-node"),
    ],
)
def test_an_option_out_of_range_is_an_error(option, value, message, monkeypatch, capsys):
    from experiments import cifar10_resnet18

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as ended:
        cifar10_resnet18.parse([option, value])
    assert ended.value.code == 2
    assert f"{option}: {message}" in capsys.readouterr().err


def test_workers_see_different_images_that_depend_on_the_seed_alone():
    from experiments.train import Batches

    digits = data.load_digits()
    digits.train_labels = torch.arange(len(digits.train_labels))  # the label now names the image
    seen = [Batches(digits, 10, seed=1, rank=rank, world_size=2)[step][1] for rank in (0, 1) for step in range(71)]
    assert torch.cat(seen).unique().numel() == 2 * 71 * 10  # an epoch of 1437 images has 71 steps; no image comes twice
    one, again, other = (Batches(digits, 10, seed=seed, rank=0, world_size=2)[75][1] for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_a_batch_larger_than_the_data_is_an_error():
    from experiments.train import Batches

    with pytest.raises(ValueError, match="--batch-size: expected at most 1437 images over all workers, got 1000 on each of 2"):
        Batches(data.load_digits(), 1000, seed=0, rank=0, world_size=2)
