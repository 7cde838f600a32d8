"""Step folders: all that a training job needs to go on as if it had never stopped.

    DIR/step-00000500/regtopk.json, ...-rank00000.pt, ...    residuals and history of every rank (rt.save)
                      training.pt                            rank 0's: model, optimizer and what the job adds to them

`training.pt` is written last, after every rank has written its part, and takes its name in one rename: a folder that has it is
complete. The folder before it is removed then.
"""

import contextlib
import re
import shutil
from pathlib import Path

import torch
import torch.distributed as dist

import regtopk_torch as rt
from regtopk_torch.directory import write_file

TRAINING = "training.pt"
_FOLDER = re.compile(r"step-(\d{8,})")


class JobError(RuntimeError):
    """What ends the job on every rank, with the same message on each."""


def gather(value):
    """Return [value of each rank]; collective."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def agree(action, group=None):
    """Return this rank's action(); raise JobError with the first error on every rank where it fails on any. Collective."""
    result = error = report = None
    try:
        result = action()
    except Exception as caught:  # whatever it is, the others must not wait for it
        error = caught
        said = dist.get_world_size() == 1 or str(caught).startswith("rank ")  # which rank it is
        report = ("" if said else f"rank {dist.get_rank()}: ") + (str(caught) or type(caught).__name__)
    reports = [None] * dist.get_world_size()
    dist.all_gather_object(reports, report, group=group)
    if any(reports):
        raise JobError(next(filter(None, reports))) from error
    return result


class StepFolders:
    """Save and load the step folders of one job below one directory, which every rank must see.

    Args:
        directory (path): created with the first step.
        job (dict of str, int, float, None): what must be the same in a run that goes on.

    `save` and `load` are collectives of the default group and raise RuntimeError on every rank where one fails.
    """

    def __init__(self, directory, job):
        self._directory, self._job = Path(directory), job

    def save(self, step, training, state, module):
        """Save a step, and remove what was saved before.

        Args:
            training (dict): tensors, numbers, strings, lists and dicts of them; only rank 0's is used.
            state (TopKState, RegTopKState or None), module: as for rt.save.
        """
        folder = self._directory / f"step-{step:08d}"

        def write():
            if dist.get_rank() == 0:
                folder.mkdir(parents=True, exist_ok=True)
                content = {"step": step, "job": self._job, "training": training}
                write_file(folder / TRAINING, lambda file: torch.save(content, file))

        if state is not None:
            rt.save(state, module, folder)
        agree(write)
        if dist.get_rank() == 0:
            for other in self._folders().values():
                if other != folder:
                    with contextlib.suppress(OSError):
                        (other / TRAINING).unlink(missing_ok=True)  # first: what is half removed must not look complete
                        shutil.rmtree(other)

    def load(self, state, module):
        """Return (step, what was handed over as `training`, tensors on the CPU) of the newest complete step, or (0, None).

        The state, where it is not None, is loaded. Raises RuntimeError, naming the folder, for one of another job.
        """
        step = gather(self.newest())[0]
        if step == 0:
            return 0, None
        folder = self._directory / f"step-{step:08d}"
        content = agree(lambda: self._read(folder))
        if state is not None:
            rt.load(state, module, folder)
        return step, content["training"]

    def newest(self):
        """Return the newest complete step in the directory, 0 without one; not a collective."""
        return max((step for step, folder in self._folders().items() if (folder / TRAINING).is_file()), default=0)

    def _read(self, folder):
        try:
            content = torch.load(folder / TRAINING, map_location="cpu", weights_only=True)
            job = content["job"]
        except Exception as error:
            reason = str(error).partition("\n")[0][:200]
            raise ValueError(f"expected a checkpoint in {folder / TRAINING}, got {reason}; remove {folder} to begin again") from error
        for name, value in self._job.items():
            if job.get(name, value) != value:  # an option that came later is not in it
                option = f"--{name.replace('_', '-')}"
                raise ValueError(f"{option}: expected {job.get(name)}, as in the checkpoint {folder}, got {value}; name another --folder")
        return content

    def _folders(self):
        """Return {step: folder}."""
        found = self._directory.iterdir() if self._directory.is_dir() else ()
        return {int(match[1]): folder for folder in found if (match := _FOLDER.fullmatch(folder.name))}
