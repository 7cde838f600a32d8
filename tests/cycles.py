"""Create process group, model and state, train 3 steps and destroy them, again and again: what test_faults.py measures."""

import datetime
import gc
import os

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from training import batch, loss_of, make_model, make_optimizer, make_state

import regtopk_torch as rt


def open_group(rank, folder, number):
    store = dist.FileStore(os.path.join(folder, f"store{number}"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=30))


def train(rank, cycle):
    model = make_model()
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.008)
    state = make_state("regtopk", 0.05)
    if cycle % 2:
        rt.attach(ddp, state)
    else:
        ddp.register_comm_hook(state, rt.sparse_hook)
    optimizer = make_optimizer(model)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(ddp, batch(rank, step)).backward()
        optimizer.step()


def measure():
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resident, len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))


def run(rank, cycles, folder):
    """Return (resident bytes, threads, open files) after each cycle of two processes that do it together."""
    measurements = []
    for cycle in range(cycles):
        open_group(rank, folder, cycle)
        train(rank, cycle)
        dist.destroy_process_group()
        gc.collect()
        measurements.append(measure())
    return measurements
