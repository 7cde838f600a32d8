"""Run a function in N gloo processes and return what each returned.

The processes are forked from a server that has imported torch once. They meet through a file, use no port, and are killed
at a deadline: nothing here can hang.
"""

import datetime
import functools
import gc
import multiprocessing
import os
import pathlib
import pickle
import runpy
import sys
import tempfile
import time
import traceback

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map

ROOT = pathlib.Path(__file__).resolve().parent.parent
GROUP_TIMEOUT = datetime.timedelta(seconds=30)

_context = multiprocessing.get_context("forkserver")
# torch._dynamo is what the first optimizer step imports, for seconds in each process; pytest and hypothesis are what the files of
# tests import in which the functions are.
_context.set_forkserver_preload(["torch", "torch._dynamo", "torch.distributed", "regtopk_torch", "pytest", "hypothesis.strategies"])


# What a process does before it begins the group, picklable, or None. It returns (the backends of the group, what to call when the function
# has returned).
preparation = None


class WorkerFailed(AssertionError):
    """Some process raised, died or did not end in time; the message has every process' report."""


def run_workers(function, world_size, *arguments, seconds=300):
    """Return [function(rank, *arguments) for each rank], each in a process of one gloo group and with one thread.

    `function` must be importable. Raises WorkerFailed unless all of them return within `seconds`.
    """
    outcomes = run_workers_and_report(function, world_size, *arguments, seconds=seconds)
    failures = [f"rank {rank}: {report}" for rank, (succeeded, report) in enumerate(outcomes) if not succeeded]
    if failures:
        raise WorkerFailed("\n".join(failures))
    return [result for _, result in outcomes]


def run_alone(function, *arguments, seconds=600):
    """Return what function(*arguments) does to a process of its own: (exit status, what it wrote to stdout, to stderr).

    The process has no group and one thread. `function` must be importable; an exception and sys.exit end the process as they end a program.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = [os.path.join(folder, name) for name in ("stdout", "stderr")]
        process = _context.Process(target=_alone, args=(files, pickle.dumps((function, arguments))))
        process.start()
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
        return process.exitcode, *(pathlib.Path(path).read_text(encoding="utf-8") if os.path.exists(path) else "" for path in files)


def run_module(name, *arguments, seconds=600):
    """As run_alone, of `python -m name arguments` in the root of the checkout: torch is imported already."""
    return run_alone(_run_module, name, arguments, seconds=seconds)


def _run_module(name, arguments):
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    sys.argv = [name, *arguments]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def error_of(function, *arguments):
    """(type, text, seconds until it came) of what a call raises; (None, "", seconds) where it returns."""
    start = time.monotonic()
    try:
        function(*arguments)
    except Exception as error:
        text = str(error)
        assert not (text.startswith("rank ") and "(most recent call first)" in text), f"expected a message, got a trace of calls too: {text}"
        return type(error), text, time.monotonic() - start
    return None, "", time.monotonic() - start


def run_workers_and_report(function, world_size, *arguments, seconds=300):
    """As run_workers, but return (True, result) or (False, text) for each rank instead of raising."""
    with tempfile.TemporaryDirectory() as folder:
        workers = []
        for rank in range(world_size):
            receiver, sender = _context.Pipe(duplex=False)
            process = _context.Process(
                target=_worker,
                args=(sender, os.path.join(folder, "store"), rank, world_size, pickle.dumps((function, arguments)), preparation),
            )
            process.start()
            sender.close()
            workers.append((process, receiver))
        deadline = time.monotonic() + seconds
        return [_outcome(process, receiver, deadline) for process, receiver in workers]


def _outcome(process, receiver, deadline):
    try:
        if receiver.poll(max(0.0, deadline - time.monotonic())):
            succeeded, result = pickle.loads(receiver.recv_bytes())
        else:
            succeeded, result = False, "expected a result before the deadline, got none"
    except EOFError:
        process.join(5)
        succeeded, result = False, f"ended without a result, exit code {process.exitcode}"
    process.join(max(1.0, deadline - time.monotonic()) if succeeded else 5)
    if process.is_alive():
        process.kill()
        process.join()
        succeeded, result = False, f"{result}; killed because it did not end"
    return succeeded, result


def become_one_of_torchrun(rank, world_size, folder):
    """In a process of run_workers: what comes next is a script for torchrun; the group that it begins meets through a file in `folder`."""
    dist.destroy_process_group()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    store = dist.FileStore(os.path.join(folder, "torchrun's store"), world_size)
    dist.init_process_group = functools.partial(dist.init_process_group, store=store, rank=rank, world_size=world_size)


def _alone(files, pickled):
    for number, path in enumerate(files, 1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    torch.set_num_threads(1)
    gc.freeze()
    function, arguments = pickle.loads(pickled)
    function(*arguments)


def _on_cpu(leaf):
    return leaf.cpu() if isinstance(leaf, torch.Tensor) and leaf.device.type != "cpu" else leaf


def _worker(sender, store_path, rank, world_size, pickled, preparation):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    gc.freeze()  # what was imported is no garbage: a collection need not look at it
    try:
        function, arguments = pickle.loads(pickled)
        backends, end = preparation() if preparation else ("gloo", lambda: None)
        store = dist.FileStore(store_path, world_size)
        dist.init_process_group(backends, store=store, rank=rank, world_size=world_size, timeout=GROUP_TIMEOUT)
        # A rank that leaves at once would close the connections of one that is still making them.
        store.set(f"connected/{rank}", "")
        store.wait([f"connected/{other}" for other in range(world_size)], GROUP_TIMEOUT)
        message = True, tree_map(_on_cpu, function(rank, *arguments))
        end()
        if dist.is_initialized():  # the function may have ended the group, to begin others
            dist.destroy_process_group()
    except BaseException:
        message = False, traceback.format_exc()
    sender.send_bytes(pickle.dumps(message))
