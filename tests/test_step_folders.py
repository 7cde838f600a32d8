"""The training job's checkpoints: whole step folders, found, pruned, and named where they are damaged or of another job."""

import os
import shutil

import torch
import torch.distributed as dist
from processes import run_workers
from torch.nn.parallel import DistributedDataParallel
from training import batch, loss_of, make_model, make_state

import regtopk_torch as rt
from experiments.checkpoints import StepFolders

JOB = {"method": "regtopk", "seed": 0}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def save_and_damage(rank, directory):
    """Return what was found after each thing done to the folders."""
    ddp = DistributedDataParallel(make_model(), bucket_cap_mb=100)
    state = make_state("regtopk", 0.02)
    rt.attach(ddp, state)
    loss_of(ddp, batch(rank, 0)).backward()
    folders = StepFolders(directory, JOB)
    found = {"nothing": folders.load(state, ddp)}

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
        return {"tensor": torch.full((3,), float(step))}

    only_on_rank_0((directory / "step-00000001").mkdir, 0o777, True, True)  # of a save that was cut off
    for step in (2, 4):
        folders.save(step, training(step), state, ddp)
    dist.barrier()
    found["kept"], found["whole"] = names(directory), names(directory / "step-00000004")
    found["loaded"] = folders.load(state, ddp)
    found["another job"] = error_of(StepFolders(directory, {**JOB, "seed": 1}).load, state, ddp)

    newest = directory / "step-00000004"
    only_on_rank_0(shutil.copytree, newest, directory / "step-00000006")
    only_on_rank_0((directory / "step-00000006" / "training.pt").unlink)
    found["newest cut off"] = folders.load(state, ddp)[0]
    only_on_rank_0(shutil.copy, newest / "training.pt", directory / "kept.pt")
    only_on_rank_0(os.truncate, newest / "training.pt", 100)
    found["cut training.pt"] = error_of(folders.load, state, ddp)
    only_on_rank_0(shutil.copy, directory / "kept.pt", newest / "training.pt")
    only_on_rank_0((newest / "regtopk.json").write_text, "[]")
    found["damaged state"] = error_of(folders.load, state, ddp)

    blocked = directory / "step-00000010"
    only_on_rank_0(blocked.touch)  # a file where the folder should be
    found["cannot be written"] = error_of(folders.save, 10, training(10), state, ddp)
    only_on_rank_0(blocked.unlink)
    only_on_rank_0((blocked / "training.pt" / "folder").mkdir, 0o777, True)  # no file can take its place
    found["training cannot be written"] = error_of(folders.save, 10, training(10), state, ddp)
    return found


def test_step_folders_are_found_when_whole_and_only_the_newest_stays(tmp_path):
    directory = tmp_path / "checkpoints"
    for found in run_workers(save_and_damage, 2, directory):
        newest = directory / "step-00000004"
        assert found["nothing"] == (0, None)
        assert found["kept"] == ["step-00000004"]
        assert found["whole"][-2:] == ["regtopk.json", "training.pt"] and len(found["whole"]) == 4
        assert found["loaded"][0] == found["newest cut off"] == 4 and found["loaded"][1]["tensor"].tolist() == [4.0, 4.0, 4.0]
        assert found["another job"] == f"JobError: rank 0: --seed: expected 0, as in the checkpoint {newest}, got 1; name another --folder"
        assert found["cut training.pt"].startswith(f"JobError: rank 0: expected a checkpoint in {newest / 'training.pt'}, got ")
        assert found["cut training.pt"].endswith(f"; remove {newest} to begin again")
        assert found["damaged state"].startswith(f"CheckpointError: rank 0: load: expected {newest / 'regtopk.json'} to be a manifest")
        assert found["cannot be written"].startswith("CheckpointError: rank 0: save: expected to write and read ")
        assert found["training cannot be written"].startswith("JobError: rank 0: ") and "training.pt" in found["training cannot be written"]
