"""N workers on one model: kill and resume, one process against torchrun, partitions, local steps and options."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # experiments is not installed

from experiments import cifar10_workers, data, models, partitions, record, workers  # noqa: E402
from torchvision_here import needs_torchvision  # noqa: E402

SHORT = ("--model", "tiny", "--data", "digits", "--batch-size", "8", "--density", "0.1", "--mu", "1", "--evaluate-every", "4", "--record-every", "2")
TIMES = ("seconds", "median_step_seconds")


def train(folder, *options, num_workers=2, steps=10):
    """Run the command in this process, with its number of threads, and return the log's records without times."""
    cifar10_workers.main([*SHORT, "--workers", str(num_workers), "--steps", str(steps), "--threads", "1", "--folder", str(folder), *options])
    return read_records(folder)


def read_records(folder):
    _, records = record.read_log(folder)
    return [{key: value for key, value in line.items() if key not in TIMES} for line in records if line["event"] != "resume"]


@pytest.fixture(autouse=True)
def one_thread():
    """One thread, as each process under torchrun has here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Killed(BaseException):
    """What ends a run in the middle of a step: nothing in the command may catch it."""


def kill_at(step, monkeypatch, folder, *options, **settings):
    """Run until `step` (counted from 0) begins, then leave what a kill in the middle of a write leaves behind."""
    take_step = workers.LocalWorkers.step

    def interrupted(self, number):
        if number == step:
            raise Killed
        return take_step(self, number)

    with monkeypatch.context() as patched:
        patched.setattr(workers.LocalWorkers, "step", interrupted)
        with pytest.raises(Killed):
            train(folder, *options, **settings)
    with open(folder / record.LOG_NAME, "a", encoding="utf-8") as log:
        log.write('{"event": "step", "st')
    (folder / "save.new").write_bytes(b"half a save")


@pytest.mark.parametrize("method, partition", [("dense", "iid"), ("topk", "labels"), ("regtopk", "iid")])
def test_a_killed_run_ends_with_the_log_and_the_bits_of_one_that_never_stopped(tmp_path, monkeypatch, method, partition):
    options = ("--method", method, "--partition", partition, "--save-every", "3")
    expected = train(tmp_path / "whole", *options)
    for step in (2, 8, 9):  # before the first save, between saves and tests, right after a save
        kill_at(step, monkeypatch, tmp_path / "killed", *options)
    assert train(tmp_path / "killed", *options) == expected
    assert expected[-1]["event"] == "result" and expected[-1]["step"] == 10
    assert expected[-1]["statistics"]["steps"] == 10


def test_more_steps_continue_a_finished_run_and_equal_a_long_one(tmp_path):
    train(tmp_path / "continued", steps=6)
    continued, long = train(tmp_path / "continued", steps=10), train(tmp_path / "long", steps=10)
    assert continued[-1] == long[-1]
    before = (tmp_path / "long" / record.LOG_NAME).read_bytes()
    train(tmp_path / "long", steps=10)  # finished: nothing to do
    assert (tmp_path / "long" / record.LOG_NAME).read_bytes() == before


def test_a_save_of_other_options_is_an_error(tmp_path):
    train(tmp_path, steps=1)
    with pytest.raises(SystemExit, match="--mu: expected 1.0, with which the save in .* was made, got 2.0; name another --folder"):
        train(tmp_path, "--mu", "2", steps=2)


def run_distributed(folder, *options, num_workers, steps):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_workers)]
    settings = ["--distributed", "--workers", str(num_workers), "--steps", str(steps), "--threads", "1", "--timeout", "60"]
    command = [sys.executable, *launcher, "-m", "experiments.cifar10_workers", *SHORT, *settings, "--folder", str(folder), *options]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, env=environment)
    assert ended.returncode == 0, ended.stderr
    return read_records(folder)


@pytest.mark.parametrize("method", ["dense", "regtopk"])
def test_two_processes_under_torchrun_equal_one_process_bit_for_bit(tmp_path, method):
    options = ("--method", method)
    alone = train(tmp_path / "alone", *options, steps=7)
    assert alone[-1]["statistics"]["bytes_sent"] > 0
    if method == "regtopk":  # each form goes on with the other's save, residuals and history among it
        train(tmp_path / "together", *options, steps=3)
        run_distributed(tmp_path / "together", *options, num_workers=2, steps=5)
        together = train(tmp_path / "together", *options, steps=7)
    else:
        together = run_distributed(tmp_path / "together", *options, num_workers=2, steps=7)
    assert together[-1] == alone[-1]


def test_dense_is_top_k_at_density_1(tmp_path):
    digests = {train(tmp_path / method, "--method", method, "--density", "1")[-1]["parameters_sha256"] for method in ("dense", "topk")}
    assert len(digests) == 1


def test_methods_differ_from_each_other_and_repeat_themselves(tmp_path):
    methods = ("dense", "topk", "regtopk")
    digests = [train(tmp_path / f"{method}-{n}", "--method", method)[-1]["parameters_sha256"] for n in (1, 2) for method in methods]
    assert digests[:3] == digests[3:] and len(set(digests)) == 3


def test_one_worker_with_local_steps_ends_where_its_own_steps_lead(tmp_path):
    rounds = train(tmp_path / "rounds", "--method", "dense", "--local-steps", "5", num_workers=1, steps=2)
    steps = train(tmp_path / "steps", "--method", "dense", num_workers=1, steps=10)
    # Not bit for bit: (w - a) - b is not w - (a + b).
    assert rounds[-1]["accuracy"] == pytest.approx(steps[-1]["accuracy"], abs=0.01)
    saved = [torch.load(tmp_path / name / "save.pt", weights_only=True)["model"] for name in ("rounds", "steps")]
    for name, value in saved[0].items():
        assert torch.allclose(value.float(), saved[1][name].float(), atol=1e-5), name


@pytest.mark.parametrize("partition", ["dirichlet", "labels"])
def test_every_image_has_one_owner_and_few_labels_are_shared(partition):
    labels = torch.arange(1000) % 10
    if partition == "labels":
        owned = partitions.partition_labels(labels, 5)
        assert all(len(labels[images].unique()) == 2 for images in owned)
    else:
        owned = partitions.partition_dirichlet(labels, 5, 0.1, seed=3)
        again = partitions.partition_dirichlet(labels, 5, 0.1, seed=3)
        assert all(torch.equal(images, same) for images, same in zip(owned, again))
        assert len({len(images) for images in owned}) > 1
    assert torch.equal(torch.cat(owned).sort().values, torch.arange(1000))


def test_own_batches_use_every_image_once_an_epoch_in_an_order_that_the_seed_decides():
    digits = data.load_digits()
    digits.train_labels = torch.arange(len(digits.train_labels))  # the label now names the image
    images = torch.arange(100, 130)
    batches = partitions.OwnBatches(digits, images, 10, seed=1, rank=0)
    epochs = [torch.cat([batches[3 * epoch + step][1] for step in range(3)]) for epoch in (0, 1)]
    for epoch in epochs:
        assert torch.equal(epoch.sort().values, images)
    assert not torch.equal(*epochs)
    assert torch.equal(batches[0][1], epochs[0][:10])  # also after a later epoch
    with pytest.raises(ValueError, match="--batch-size: expected at most the images of a worker, 30 on rank 4, got 31"):
        partitions.OwnBatches(digits, images, 31, seed=1, rank=4)


@needs_torchvision
@pytest.mark.parametrize(
    "name, entries",
    [("resnet18", 11_181_642), ("resnet18_3x3", 11_173_962), ("vgg11_bn", 9_231_114), ("mobilenet_v2", 2_236_682), ("tiny", 1_906)],
)
def test_a_network_has_its_entries_and_start_weights_that_the_seed_decides(name, entries):
    one, again, other = (models.make_model(name, seed) for seed in (1, 1, 2))
    assert sum(parameter.numel() for parameter in one.parameters()) == entries
    assert cifar10_workers.digest(one) == cifar10_workers.digest(again) != cifar10_workers.digest(other)
    assert one(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(
    "options, message",
    [
        (("--steps", "0"), "--steps: expected at least 1, got 0"),
        (("--local-steps", "0"), "--local-steps: expected at least 1, got 0"),
        (("--concentration", "0"), "--concentration: expected a number above 0, got 0.0"),
        (("--distributed",), "--distributed: expected torchrun's WORLD_SIZE of 8, got none; start it with torchrun"),
    ],
)
def test_an_option_out_of_range_is_an_error(options, message, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(SystemExit) as ended:
        cifar10_workers.parse(list(options))
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_folder_is_named_after_what_sets_the_run_apart():
    names = [
        cifar10_workers.parse(options).folder.name
        for options in (
            ["--method", "dense", "--mu", "3"],
            ["--density", "0.01", "--mu", "50", "--seed", "2"],
            ["--partition", "dirichlet", "--distortion", "current", "--local-steps", "40"],
        )
    ]
    assert names == ["resnet18-dense-s0", "resnet18-regtopk-d0.01-mu50-s2", "resnet18-regtopk-d0.001-mu5-current-dirichlet0.1-local40-s0"]
