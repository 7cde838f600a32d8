"""Let pairs of training processes end in given ways, many times each: `python exits.py CYCLE,CYCLE... WAY...`.

The processes are forked from this one, which has imported everything, and end as an interpreter ends: with its finalisation,
which a multiprocessing child skips. Prints one JSON object: by way, how often each pair of outcomes came; an outcome is an exit
status, the name of a signal, or "hang", which ends the way.
"""

import collections
import datetime
import faulthandler
import gc
import itertools
import json
import os
import select
import shutil
import signal
import sys
import tempfile

import torch
import torch._dynamo  # noqa: F401  (DDP imports it: once here, not in each process)
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from training import batch, loss_of, make_model, make_state

import regtopk_torch as rt

SECONDS = 60  # against hanging: an end takes 1, on a busy machine 5
GROUP_SECONDS = 4 * SECONDS  # an end that waits for the group counts as a hang

# What lives until the interpreter's own end, in half of the cycles; in the others a state dies before.
kept = []


def prepare(rank, folder, cycle):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(os.path.join(folder, f"store{cycle}"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=GROUP_SECONDS))
    model = make_model()
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.008)
    # In a quarter of the cycles the exchange holds a Python object, which must not outlive the interpreter.
    state = make_state("regtopk", 0.05, grad_scaler=torch.amp.GradScaler("cpu") if cycle // 4 % 4 == 0 else None)
    if cycle // 2 % 2:
        kept.append((ddp, state))
    return model, ddp, state


def train(rank, model, ddp, steps):
    for step in range(steps):
        loss_of(ddp, batch(rank, step)).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.05 * parameter.grad
                parameter.grad = None


def register(ddp, state, cycle):
    if cycle % 2:
        rt.attach(ddp, state)
    else:
        ddp.register_comm_hook(state, rt.sparse_hook)


def end_normally(rank, folder, cycle, other_ends):
    model, ddp, state = prepare(rank, folder, cycle)
    register(ddp, state, cycle)
    train(rank, model, ddp, 3)
    dist.destroy_process_group()


def end_without_destroying_the_group(rank, folder, cycle, other_ends):
    model, ddp, state = prepare(rank, folder, cycle)
    register(ddp, state, cycle)
    train(rank, model, ddp, 3)


def raise_in_forward(rank, folder, cycle, other_ends):
    model, ddp, state = prepare(rank, folder, cycle)
    register(ddp, state, cycle)
    train(rank, model, ddp, 3)
    if rank == cycle // 2 % 2:
        model.layers.register_forward_pre_hook(fail)
    train(rank, model, ddp, 1)


def fail(module, arguments):
    raise RuntimeError("raised in forward")


class IssueAndStop(Exception):
    pass


def end_with_an_exchange_pending(rank, folder, cycle, other_ends):
    model, ddp, state = prepare(rank, folder, cycle)
    stopping, futures = [], []

    def hook(state, bucket):
        futures.append(rt.sparse_hook(state, bucket))
        if stopping:
            raise IssueAndStop
        return futures.pop()

    ddp.register_comm_hook(state, hook)
    train(rank, model, ddp, 3)
    if rank == 1:
        os.read(other_ends, 1)  # stays alive, and answers nothing, until rank 0 is gone
        return
    stopping.append(True)
    try:
        train(rank, model, ddp, 1)
    except Exception as error:
        assert "IssueAndStop" in repr(error) or isinstance(error, IssueAndStop), error
    assert len(futures) == 1 and not futures[0].done()
    if cycle % 2:
        futures[0].then(lambda done: print("completed", file=sys.stderr))  # a Python callback that runs at the shutdown
    if cycle % 3 == 2:
        dist.destroy_process_group()  # the exchange is then the last owner of a group with an unfinished collective


WAYS = {f.__name__: f for f in (end_normally, end_without_destroying_the_group, raise_in_forward, end_with_an_exchange_pending)}


def outcome_of(pid, seconds):
    descriptor = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        hung = not poll.poll(1000 * seconds)
        if hung:
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    finally:
        os.close(descriptor)
    if hung:
        return "hang"
    return signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def main():
    cycles, ways = [int(cycle) for cycle in sys.argv[1].split(",")], sys.argv[2:]
    faulthandler.enable()
    gc.freeze()  # what was imported here is not collected again at each process' end
    torch.set_num_threads(1)
    outcomes = {way: collections.Counter() for way in ways}
    # Not a TemporaryDirectory: its finaliser would remove the folder when the first forked process ends.
    folder = tempfile.mkdtemp()
    for way in ways:
        os.mkdir(os.path.join(folder, way))
    for way, cycle in itertools.product(ways, cycles):
        if any("hang" in outcome for outcome in outcomes[way]):
            continue  # each further one would take as long
        other_ends, keep_open = os.pipe()
        pids = []
        for rank in range(2):
            pid = os.fork()
            if pid == 0:
                if rank == 1:
                    os.close(keep_open)
                WAYS[way](rank, os.path.join(folder, way), cycle, other_ends)
                return
            pids.append(pid)
        os.close(other_ends)
        os.close(keep_open)
        outcome = " ".join(str(outcome_of(pid, SECONDS)) for pid in pids)
        outcomes[way][outcome] += 1
    shutil.rmtree(folder)
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
