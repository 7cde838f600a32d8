"""Create process group, model and state, train 3 steps and destroy them, again and again: `python cycles.py CYCLES`.

Two processes, forked from this one, do it together. Prints one JSON line: for each of them [resident bytes, threads, open
files] after each cycle.
"""

import datetime
import gc
import json
import os
import sys
import tempfile

import torch
import torch._dynamo  # noqa: F401  (DDP imports it: before the first measurement)
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
    torch.set_num_threads(1)
    measurements = []
    for cycle in range(cycles):
        open_group(rank, folder, cycle)
        train(rank, cycle)
        dist.destroy_process_group()
        gc.collect()
        measurements.append(measure())
    return measurements


def main():
    cycles = int(sys.argv[1])
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    gc.freeze()  # what was imported is no garbage: a collection need not look at it
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(2):
            reading, writing = os.pipe()
            child = os.fork()
            if child == 0:
                os.close(reading)
                with os.fdopen(writing, "w") as file:
                    json.dump(run(rank, cycles, folder), file)
                os._exit(0)
            os.close(writing)
            children.append(reading)
        results = []
        for reading in children:
            with os.fdopen(reading) as file:
                results.append(json.load(file))
        print(json.dumps(results))


if __name__ == "__main__":
    main()
