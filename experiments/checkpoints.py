"""Step folders: all that a training job needs to go on as if it had never stopped, one folder per step.

    DIR/step-00000500/training.pt            rank 0's: what the job hands over, model and optimizer among it
                      regtopk.json, ...-rank00000.pt, ...    residuals and history of every rank (rt.save); not for dense
                      manifest.json          written last, after every rank has written its part: now the folder is complete
"""

import contextlib
import json
import re
import shutil
from pathlib import Path

import torch
import torch.distributed as dist

import regtopk_torch as rt
from regtopk_torch.directory import VERSION, check_file, read_manifest, write_file

MANIFEST = "manifest.json"
TRAINING = "training.pt"
FORMAT = "regtopk_torch training job"
KEEP = 2
_FOLDER = re.compile(r"step-(\d{8,})")


def agree(what, action):
    """Return [action() of each rank]; raise RuntimeError on every rank, with the first error, if any rank's failed.

    Collective; each rank waits for the others to `what` at most the default group's timeout.
    """
    who = f"rank {dist.get_rank()}: --checkpoint"
    value = error = None
    try:
        value = action()
    except Exception as caught:  # whatever it is, the others must not wait for it
        error = caught
    reports = [None] * dist.get_world_size()
    try:
        dist.all_gather_object(reports, (value, None if error is None else f"{who}: {error}"))
    except RuntimeError as lost:
        raise RuntimeError(f"{who}: expected all {len(reports)} ranks to {what}, got: {lost}") from lost
    failed = [text for _, text in reports if text is not None]
    if failed:
        raise RuntimeError(failed[0]) from error
    return [value for value, _ in reports]


class StepFolders:
    """Save and find the step folders of one job below one directory, which every rank must see.

    Args:
        directory (path): created with the first step.
        job (dict of str, int, float): what must be the same in a run that goes on; compared with the checkpoint's.

    Every method is a collective of the default group and raises RuntimeError (rt.CheckpointError for the state's files) on
    every rank where one of them fails, naming the file.
    """

    def __init__(self, directory, job):
        self._directory = Path(directory)
        self._job = job

    def newest(self):
        """Return (step, folder) of the newest complete step, None where there is none.

        Raises RuntimeError if it is of another job.
        """

        def look():
            complete = self._complete_folders() if dist.get_rank() == 0 else {}
            if not complete:
                return None
            step = max(complete)
            job = _read(complete[step])["job"]
            different = [f"{name} {job.get(name)}" for name, value in self._job.items() if job.get(name) != value]
            if different:
                wanted = [f"{name} {value}" for name, value in self._job.items() if job.get(name) != value]
                raise ValueError(
                    f"expected a checkpoint of {', '.join(wanted)} in {complete[step]}, got one of {', '.join(different)}; "
                    "give another folder to train another job"
                )
            return step, str(complete[step])

        found = agree("look for checkpoints", look)[0]
        return None if found is None else (found[0], Path(found[1]))

    def load(self, folder, state, module):
        """Load the state (None for dense) and return what was handed over as `training`, tensors on the CPU."""

        def read():
            file = _read(folder)["files"][TRAINING]
            check_file(folder / TRAINING, file["bytes"], file["sha256"])
            training.append(torch.load(folder / TRAINING, map_location="cpu", weights_only=True))

        training = []
        agree("read the model and the optimizer", read)
        if state is not None:
            rt.load(state, module, folder)
        return training[0]

    def save(self, step, training, state, module):
        """Save a step and remove all but the newest two.

        Args:
            training (dict): tensors, numbers, strings, lists and dicts of them; only rank 0's is used.
            state (TopKState, RegTopKState or None), module: as for rt.save.
        """
        folder = self._directory / f"step-{step:08d}"

        def write_training():
            if dist.get_rank() > 0:
                return None
            folder.mkdir(parents=True, exist_ok=True)
            size, digest = write_file(folder / TRAINING, lambda file: torch.save(training, file))
            return {"bytes": size, "sha256": digest}

        def write_manifest():
            if dist.get_rank() > 0:
                return
            manifest = {"format": FORMAT, "version": VERSION, "step": step, "job": self._job, "files": {TRAINING: written}}
            write_file(folder / MANIFEST, lambda file: file.write(json.dumps(manifest, indent=1).encode()))

        written = agree("write the model and the optimizer", write_training)[0]
        if state is not None:
            rt.save(state, module, folder)
        agree("see the manifest", write_manifest)  # every rank is past its own writing
        if dist.get_rank() == 0:
            self._prune()

    def _complete_folders(self):
        """Return {step: folder}."""
        folders = {}
        if self._directory.is_dir():
            for folder in self._directory.iterdir():
                match = _FOLDER.fullmatch(folder.name)
                if match and (folder / MANIFEST).is_file():
                    folders[int(match[1])] = folder
        return folders

    def _prune(self):
        complete = self._complete_folders()
        kept = {complete[step] for step in sorted(complete)[-KEEP:]}
        for folder in self._directory.iterdir():
            match = _FOLDER.fullmatch(folder.name)
            if match and folder not in kept and int(match[1]) < max(complete):
                with contextlib.suppress(OSError):
                    (folder / MANIFEST).unlink(missing_ok=True)  # first: what is half removed must not look complete
                    shutil.rmtree(folder)


def _read(folder):
    """Return the manifest of a step folder; raise FileNotFoundError or ValueError, naming it, if it is not one."""
    path = folder / MANIFEST
    manifest, _ = read_manifest(path, FORMAT)
    files = manifest.get("files")
    file = files.get(TRAINING) if isinstance(files, dict) else None
    known = isinstance(file, dict) and type(file.get("bytes")) is int and isinstance(file.get("sha256"), str)
    if not known or not isinstance(manifest.get("job"), dict):
        raise ValueError(f"expected {path} to name a job and {TRAINING} with its bytes and sha256, got others")
    return manifest
