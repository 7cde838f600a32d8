"""The ResNet-18 job's checkpoints: whole step folders, and a run that goes on where the newest was taken."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import run_workers
from torch.nn.parallel import DistributedDataParallel
from training import batch, loss_of, make_model, make_state

import regtopk_torch as rt
from experiments import record, train
from experiments.checkpoints import StepFolders

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPT = REPOSITORY / "experiments" / "cifar10_resnet18.py"
JOB = {"method": "regtopk", "seed": 0}

try:
    import torchvision  # noqa: F401
except ImportError:
    torchvision = None


# Step folders


def names(folder):
    return sorted(path.name for path in folder.iterdir())


DAMAGED_MANIFESTS = {
    "cut": '{"format": "regtopk_torch tr',
    "a list": "[]",
    "without files": '{"format": "regtopk_torch training job", "version": 1, "job": {}}',
    "without a job": '{"format": "regtopk_torch training job", "version": 1, "files": {"training.pt": {"bytes": 1, "sha256": ""}}}',
    "to come": '{"format": "regtopk_torch training job", "version": 2}',
}


def save_and_damage(rank, directory):
    """Return what was found after each thing done to the folders."""
    ddp = DistributedDataParallel(make_model(), bucket_cap_mb=100)
    state = make_state("regtopk", 0.02)
    rt.attach(ddp, state)
    loss_of(ddp, batch(rank, 0)).backward()
    folders = StepFolders(directory, JOB)
    found = {"nothing": folders.newest()}

    def only_on_rank_0(action, *arguments):
        if rank == 0:
            action(*arguments)
        dist.barrier()

    def error_of(action, *arguments):
        try:
            return action(*arguments)
        except RuntimeError as error:
            return f"{type(error).__name__}: {error}"

    def training(step):
        return {"step": step, "tensor": torch.full((3,), float(step))}

    (directory / "step-00000001").mkdir(parents=True, exist_ok=True)  # of a save that was cut off
    for step in (2, 4, 6):
        folders.save(step, training(step), state, ddp)
    dist.barrier()
    found["kept"] = names(directory)
    found["whole"] = names(directory / "step-00000006")
    found["newest"] = folders.newest()
    found["loaded"] = folders.load(found["newest"][1], state, ddp)
    found["another job"] = error_of(StepFolders(directory, {**JOB, "seed": 1}).newest)

    newest = directory / "step-00000006"
    only_on_rank_0(shutil.copytree, newest, directory / "step-00000008")
    only_on_rank_0((directory / "step-00000008" / "manifest.json").unlink)
    found["newest without a manifest"] = folders.newest()
    only_on_rank_0(os.truncate, newest / "training.pt", 100)
    found["cut training.pt"] = error_of(folders.load, newest, state, ddp)

    damaged = directory / "step-00000008"
    for case, content in DAMAGED_MANIFESTS.items():
        only_on_rank_0((damaged / "manifest.json").write_text, content)
        found[case] = error_of(folders.newest)
        found[f"load {case}"] = error_of(folders.load, damaged, state, ddp)
    only_on_rank_0(shutil.rmtree, damaged)

    blocked = directory / "step-00000010"
    only_on_rank_0(blocked.touch)  # a file where the folder should be
    found["cannot be written"] = error_of(folders.save, 10, training(10), state, ddp)
    only_on_rank_0(blocked.unlink)
    if rank == 0:
        (blocked / "regtopk.json" / "folder").mkdir(parents=True)  # no file can take its place
    found["state cannot be written"] = error_of(folders.save, 10, training(10), state, ddp)
    found["then"] = folders.newest()
    return found


def test_step_folders_are_found_when_whole_and_pruned_to_two(tmp_path):
    for found in run_workers(save_and_damage, 2, tmp_path / "checkpoints"):
        newest = tmp_path / "checkpoints" / "step-00000006"
        assert found["nothing"] is None
        assert found["kept"] == ["step-00000004", "step-00000006"]
        assert found["whole"][0] == "manifest.json" and found["whole"][-2:] == ["regtopk.json", "training.pt"] and len(found["whole"]) == 5
        assert found["newest"] == found["newest without a manifest"] == found["then"] == (6, newest)
        assert found["loaded"]["step"] == 6 and found["loaded"]["tensor"].tolist() == [6.0, 6.0, 6.0]
        assert found["another job"] == (
            f"RuntimeError: rank 0: --checkpoint: expected a checkpoint of seed 1 in {newest}, got one of seed 0; "
            "give another folder to train another job"
        )
        cut = f"in {newest / 'training.pt'}, got 100; it is truncated"
        assert found["cut training.pt"].startswith("RuntimeError: rank 0: --checkpoint: expected ") and found["cut training.pt"].endswith(cut)
        manifest = tmp_path / "checkpoints" / "step-00000008" / "manifest.json"
        for case, message in {
            "cut": "to hold JSON, got b'{\"format\": \"regtopk_torch tr'; it is damaged",
            "a list": "to be a manifest of a regtopk_torch training job, got another file",
            "without files": "to name a job and training.pt with its bytes and sha256, got others",
            "without a job": "to name a job and training.pt with its bytes and sha256, got others",
            "to come": "of version 1, got version 2",
        }.items():
            assert found[case] == found[f"load {case}"] == f"RuntimeError: rank 0: --checkpoint: expected {manifest} {message}"
        assert found["cannot be written"].startswith("RuntimeError: rank 0: --checkpoint: ") and "step-00000010" in found["cannot be written"]
        assert found["state cannot be written"].startswith("CheckpointError: rank 0: save: expected to write and read ")


# What the log and the statistics go on with


def test_a_resumed_log_loses_what_came_after_the_checkpoint_and_says_where_it_goes_on(tmp_path):
    path = tmp_path / record.LOG_NAME
    with record.Recorder(path, seed=3) as recorder:
        recorder.write("step", step=1, loss=2.5)
        position = recorder.position()
        recorder.write("step", step=2, loss=1.5)
        header = recorder.header
    with record.Recorder.resume(path, position, step=1, workers=2) as recorder:
        assert recorder.header == header and recorder.path == path
        recorder.write("step", step=2, loss=1.5)
    _, records = record.read_log(path)
    assert [line["event"] for line in records] == ["step", "resume", "step"]
    assert [line["step"] for line in records] == [1, 1, 2]
    with pytest.raises(ValueError, match="Recorder: expected at least 100000 bytes in the log .*log.jsonl to go on with, got "):
        record.Recorder.resume(path, 100_000)


def test_statistics_go_on_as_sums_and_keep_ratios_and_norms_of_now():
    before = {"entries": 100, "sent_entries": 10, "residual_norm": 3.0, "workers": 4, "density": 0.1, "compress_seconds": 1.0}
    now = {"entries": 300, "sent_entries": 6, "residual_norm": 5.0, "workers": 2, "density": 0.02, "compress_seconds": 0.5}
    total = {"entries": 400, "sent_entries": 16, "residual_norm": 5.0, "workers": 2, "density": 0.04, "compress_seconds": 1.5}
    assert train.add_statistics(before, now) == total
    assert train.add_statistics({}, now) == now
    ranks = [{"entries": 4}, {"entries": 8}]
    assert train.share_of_statistics(ranks, 1, 2) == {"entries": 8}
    assert train.share_of_statistics(ranks, 2, 3) == {"entries": 6}


# The job


def run_job(folder, steps, *options):
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    command += ["--data", "digits", "--batch-size", "4", "--evaluate-every", "2", "--momentum", "0.9", "--timeout", "60", "--name", "job"]
    command += ["--steps", str(steps), "--checkpoint", "checkpoints", "--checkpoint-every", "2", *options]
    folder.mkdir(exist_ok=True)
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240, env=environment)


@pytest.mark.skipif(torchvision is None, reason="needs torchvision")
def test_the_job_goes_on_from_its_newest_checkpoint_bit_for_bit(tmp_path):
    runs = {"whole": [6], "in two parts": [5, 6]}
    for name, parts in runs.items():
        for steps in parts:
            ended = run_job(tmp_path / name, steps)
            assert ended.returncode == 0, ended.stderr
    assert "resumed from checkpoints/step-00000004" in ended.stdout
    whole, parts = (
        torch.load(tmp_path / name / "checkpoints" / "step-00000006" / "training.pt", weights_only=True) for name in runs
    )
    for part in ("model", "optimizer"):
        assert_same(whole[part], parts[part])
    headers, records = zip(*(record.read_log(tmp_path / name / "runs" / "job") for name in runs), strict=True)
    events = [[(line["event"], line.get("step")) for line in log] for log in records]
    assert [event for event in events[1] if event != ("resume", 4)] == events[0] and ("resume", 4) in events[1]
    assert headers[0]["options"]["checkpoint"] == "checkpoints"
    for event in ("step", "test", "result"):
        for one, other in zip(*([line for line in log if line["event"] == event] for log in records), strict=True):
            for key in {"loss", "accuracy", "training_loss", "bytes_sent", "bytes_dense", "images"} & one.keys():
                assert one[key] == other[key], (event, key)
    for one, other in zip(*(log[-1]["statistics"] for log in records), strict=True):
        for key in one.keys() - {"compress_seconds", "exchange_seconds", "aggregate_seconds", "residual_norm", "rebuilds"}:
            assert one[key] == other[key], key
        assert (one["rebuilds"], other["rebuilds"]) == (1, 2), "each process meets DDP's rebuild of its buckets"
        # The norm adds parameters up in the order of their addresses.
        assert one["residual_norm"] == pytest.approx(other["residual_norm"], rel=1e-12)
    assert names(tmp_path / "in two parts" / "checkpoints") == ["step-00000004", "step-00000006"]
    assert names(tmp_path / "in two parts" / "runs") == ["job"], "the run's own folder goes on"


def assert_same(left, right):
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    else:
        assert left == right
