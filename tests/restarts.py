"""A small job that is killed and restarted: `torchrun --max-restarts N restarts.py DIRECTORY STEPS EVERY`.

Every rank writes a line "RESTART RANK STEP PID" to the named pipe DIRECTORY/progress before each step. Rank 0 writes the
parameters, the step from which the job went on last and the number of restarts to DIRECTORY/result.pt.
"""

import datetime
import os
import sys
from pathlib import Path

import torch
import torch._dynamo  # noqa: F401  (the optimizer imports it: before the first step, not in it)
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from training import batch, loss_of, make_model, make_optimizer, make_state

import regtopk_torch as rt
from experiments.checkpoints import StepFolders


def run(rank, directory, steps, every, before_step):
    """Train from the newest checkpoint on; return (parameters, step of that checkpoint or None)."""
    model = make_model()
    ddp = DistributedDataParallel(model, bucket_cap_mb=100)  # one bucket: the same layout before and after a restart
    state = make_state("regtopk", 0.02)
    ddp.register_comm_hook(state, rt.sparse_hook)
    optimizer = make_optimizer(model)
    folders = StepFolders(Path(directory) / "checkpoints", {"job": "restarts"})
    first, training = folders.load(state, ddp)
    if training is not None:
        model.load_state_dict(training["model"])
        optimizer.load_state_dict(training["optimizer"])
    resumed_from = first or None
    for step in range(first, steps):
        before_step(step)
        optimizer.zero_grad()
        loss_of(ddp, batch(rank, step)).backward()
        optimizer.step()
        if (step + 1) % every == 0:
            folders.save(step + 1, {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, state, ddp)
    return [parameter.detach().clone() for parameter in model.parameters()], resumed_from


def main():
    directory, steps, every = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))  # starts are apart on a busy machine
    rank = dist.get_rank()
    restart = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    progress = os.open(directory / "progress", os.O_WRONLY)

    def report(step):
        os.write(progress, f"{restart} {rank} {step} {os.getpid()}\n".encode())  # short enough to arrive as a whole

    parameters, resumed_from = run(rank, directory, steps, every, report)
    if rank == 0:
        torch.save({"parameters": parameters, "resumed_from": resumed_from, "restarts": restart}, directory / "result.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
