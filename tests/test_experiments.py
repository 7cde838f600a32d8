"""The toy's published values, data and logs."""

import os
import re
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import run_module

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.append(str(REPOSITORY))  # experiments is not installed; appended, so that an installed package comes first

from experiments import data, toy_logistic  # noqa: E402
from runlog import record  # noqa: E402
from torchvision_here import needs_torchvision  # noqa: E402

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


def test_toy_command_prints_every_tenth_loss_and_logs_each_run_once(tmp_path, capsys):
    log, outputs = tmp_path / "toy.jsonl", []
    for _ in range(2):
        toy_logistic.main(["--method", "topk", "dense", "--out", str(log)])
        outputs.append((capsys.readouterr().out, log.read_bytes()))
    assert outputs[0] == outputs[1]
    lines = outputs[0][0].splitlines()
    assert [line.split()[0] for line in lines if line.startswith("step=")] == [f"step={n}" for n in range(0, 101, 10)] * 2
    losses = toy_logistic.train("dense")
    assert lines[-1] == f"final_loss={losses[-1]:.6f}"
    _, rows = record.read_log(log)
    assert [row["method"] for row in rows] == ["topk", "dense"] and rows[1]["losses"] == [round(loss, 8) for loss in losses]


# Data


def test_digits_have_the_shape_of_cifar10_their_own_name_and_are_normalised():
    digits = data.load_digits()
    assert "digits" in digits.name and "CIFAR" not in digits.name
    assert digits.train_images.shape == (1437, 3, 32, 32) and digits.test_images.shape == (360, 3, 32, 32)
    assert digits.train_images.dtype == torch.uint8 and digits.train_images.max() == 255
    assert digits.train_labels.shape == (1437,) and digits.train_labels.unique().tolist() == list(range(10))
    image = digits.test_images[0]
    assert torch.equal(image[:, ::4, ::4].repeat_interleave(4, 1).repeat_interleave(4, 2), image)
    images = digits.normalise(digits.train_images)
    assert images.dtype == torch.float32
    assert abs(images.mean().item()) < 0.02 and abs(images.std().item() - 1) < 0.02  # from a sample of the images


@needs_torchvision
def test_a_data_folder_that_is_not_cifar10_is_an_error(tmp_path):
    batches = tmp_path / "cifar-10-batches-py"
    for prepare, found in (
        (lambda: None, "a folder without it"),
        (batches.mkdir, "no file data_batch_1"),
        (lambda: (batches / "data_batch_1").write_bytes(b"\x80\x04 cut short"), "a damaged data_batch_1 of 12 bytes with another md5 sum"),
    ):
        prepare()
        advice = "give the folder that holds cifar-10-batches-py, or leave --data out to download it"
        with pytest.raises(ValueError, match=re.escape(f"--data: expected CIFAR-10 in {batches}, got {found}; {advice}")):
            data.prepare(str(tmp_path))
    with pytest.raises(ValueError, match="got no such folder"):
        data.prepare(str(tmp_path / "missing"))


def test_a_failed_download_falls_back_to_the_digits_with_its_last_line_as_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_DOWNLOAD_COMMAND", "raise OSError('no route to host')")
    assert data.prepare(None, download_folder=tmp_path) == (None, "OSError: no route to host")
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


def test_a_complete_download_replaces_a_damaged_folder(tmp_path, monkeypatch):
    script = "import pathlib, sys; folder = pathlib.Path(sys.argv[1], 'cifar-10-batches-py'); folder.mkdir(); (folder / 'new').touch()"
    monkeypatch.setattr(data, "_DOWNLOAD_COMMAND", script)
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "damaged").touch()
    assert data.download_cifar10(tmp_path) is None
    assert [path.name for path in tmp_path.rglob("*")] == ["cifar-10-batches-py", "new"]


# Logs


def test_a_log_reads_back_what_was_recorded_and_names_no_absolute_path(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/script.py", "--data", "/private/set", "--name=/x/y", str(Path.cwd() / "a" / "b")])
    path = tmp_path / record.LOG_NAME
    with record.Recorder(path, seed=3, data="digits") as recorder:
        recorder.write("step", step=1, loss=2.5)
        with pytest.raises(ValueError):
            recorder.write("step", loss=float("nan"))
    header, records = record.read_log(tmp_path)
    assert header == recorder.header and header["seed"] == 3 and header["data"] == "digits"
    assert {"command", "commit", "dirty", "versions", "processor"} <= header.keys()
    assert header["versions"]["torch"] and header["processor"]["cores"] >= 1
    assert header["command"][1:] == ["script.py", "--data", "set", "--name=y", os.path.join("a", "b")]
    assert records == [{"event": "step", "step": 1, "loss": 2.5}]
    with pytest.raises(FileExistsError):
        record.Recorder(path, seed=0)
    path.write_text(path.read_text() * 2)
    assert record.read_logs(path) == [(header, records)] * 2
    with pytest.raises(ValueError, match="expected one log in .*, got 2"):
        record.read_log(path)


def test_a_resumed_log_loses_what_came_after_the_checkpoint_and_says_where_it_goes_on(tmp_path):
    path = tmp_path / record.LOG_NAME
    with record.Recorder(path, seed=3) as recorder:
        recorder.write("step", step=1, loss=2.5)
        position = recorder.position()
        recorder.write("step", step=2, loss=1.5)
    with record.Recorder.resume(path, position, step=1, workers=2) as again:
        assert again.header == recorder.header and again.path == path
        again.write("step", step=2, loss=1.5)
    _, records = record.read_log(path)
    assert [(line["event"], line["step"]) for line in records] == [("step", 1), ("resume", 1), ("step", 2)]
    with pytest.raises(ValueError, match="Recorder: expected at least 100000 bytes in the log .*log.jsonl to go on with, got "):
        record.Recorder.resume(path, 100_000)


@pytest.mark.parametrize("text, message", [("", "expected a header on line 1"), ("{\n", "expected a JSON object on line 1"), ("{}\n", "expected a header on")])
def test_a_file_that_is_no_log_is_an_error(tmp_path, text, message):
    (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(ValueError, match=f"read_log: {message}"):
        record.read_log(tmp_path)


# Commands


def test_every_command_has_a_usage_line_of_its_own_and_prints_its_help():
    found = [path for folder in ("experiments", "benchmarks", "tests") for path in sorted((REPOSITORY / folder).rglob("*.py"))
             if re.search("^from runlog.command import", path.read_text(), re.MULTILINE)]  # fmt: skip
    assert len(found) >= 7
    for path in found:
        module = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__main__")
        status, printed, errors = run_module(module, "--help")
        assert status == 0 and re.match(rf"usage: python -m {re.escape(module)} (\S.*)?\[options\]\n\n\w", printed), printed + errors
