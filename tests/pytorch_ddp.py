"""Run PyTorch's own DDP tests with our hook on every model that they wrap: `python pytorch_ddp.py [NAME ...]`.

They come with torch, as torch.testing._internal.distributed.distributed_test. Each runs in two gloo processes forked from this one,
first without the hook and, where it passes, at density 1 with it, by both entries. Most of them are written for GPUs and about
something else: what they move to a GPU stays on the CPU here. Tests that need another backend skip themselves; tests that register
a hook of their own are run without ours only, because DDP takes one. Prints one JSON object: for each test that reaches
DistributedDataParallel and each entry "passed", "skipped", "own hook", "not run" (for it does not pass without the hook) or why it
failed.
"""

import contextlib
import dataclasses
import datetime
import functools
import inspect
import json
import os
import pathlib
import re
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import types
import unittest

os.environ |= {"BACKEND": "gloo", "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
if "expecttest" not in sys.modules:  # which torch's test cases inherit from and does not come with torch
    sys.modules["expecttest"] = types.ModuleType("expecttest")
    sys.modules["expecttest"].TestCase = unittest.TestCase

import torch
import torch._dynamo  # noqa: F401  (DDP imports it: once here, not in each process)
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal import common_distributed, common_utils

import regtopk_torch as rt


def allow_any_number_of_gpus(*arguments, **options):
    return lambda test: test


common_distributed.skip_if_lt_x_gpu = allow_any_number_of_gpus  # before the suite decorates its tests with it

import torch.testing._internal.distributed.distributed_test as suite  # noqa: E402

WORLD_SIZE = 2
SECONDS = 150  # for each test
GROUP_SECONDS = 20  # less, so that a test which hangs on one rank says where
ENTRIES = (None, "register_comm_hook", "attach")
PASSED, SKIPPED, OWN_HOOK, NOT_RUN = "passed", "skipped", "own hook", "not run"


class Tests(suite.TestDistBackend, suite.DistributedTest._DistTestBase):
    """Their tests, of which each process runs a method."""


@functools.cache
def reaches_ddp(name):
    """Whether a method of the tests, or one that it calls, has to do with DistributedDataParallel."""
    method = getattr(Tests, name, None)
    if not inspect.isfunction(method):
        return False
    source = inspect.getsource(inspect.unwrap(method))
    if re.search(r"DistributedDataParallel|\bDDP\(", source):
        return True
    return any(reaches_ddp(called) for called in set(re.findall(r"self\.(_\w+)\(", source)) - {name})


NAMES = [name for name in unittest.TestLoader().getTestCaseNames(Tests) if reaches_ddp(name)]


# On the CPU


def _is_gpu(device):
    return (isinstance(device, int) and not isinstance(device, bool)) or str(device).startswith("cuda")


def _without_gpu(function):
    """A function of torch that makes tensors, with a GPU as its device replaced by the CPU."""

    @functools.wraps(function)
    def make(*arguments, device=None, **options):
        return function(*arguments, device="cpu" if _is_gpu(device) else device, **options)

    return make


def _to_what_is_no_gpu(move):
    @functools.wraps(move)
    def to(self, *arguments, device=None, **options):
        arguments = ["cpu" if not isinstance(a, torch.dtype | torch.Tensor | bool) and _is_gpu(a) else a for a in arguments]
        if device is not None:
            options["device"] = "cpu" if _is_gpu(device) else device
        return move(self, *arguments, **options)

    return to


def stay_on_the_cpu():
    """Let tests that move models and tensors to their rank's GPU leave them where they are."""
    for name in ("empty", "zeros", "ones", "full", "rand", "randn", "randint", "arange", "tensor", "zeros_like", "ones_like"):
        setattr(torch, name, _without_gpu(getattr(torch, name)))
    for kind in (torch.Tensor, torch.nn.Module):
        kind.cuda = lambda self, *arguments, **options: self
        kind.to = _to_what_is_no_gpu(kind.to)
    torch.cuda.device_count = lambda: WORLD_SIZE
    torch.cuda.current_device = lambda: 0
    for name in ("set_device", "synchronize", "manual_seed"):
        setattr(torch.cuda, name, lambda *arguments, **options: None)
    torch.cuda.device = lambda *arguments: contextlib.nullcontext()


@dataclasses.dataclass
class Seen:
    """What a test did with DistributedDataParallel."""

    models: int = 0
    own_hooks: int = 0


def watch_ddp(entry):
    """Count in a Seen what is done with DDP, and register the hook by `entry` on every model that is wrapped."""
    seen, construct = Seen(), DistributedDataParallel.__init__

    def construct_and_register(self, module, device_ids=None, output_device=None, *arguments, **options):
        construct(self, module, None, None, *arguments, **options)
        seen.models += 1
        if entry is None:
            return
        state = rt.TopKState(1.0, process_group=self.process_group)
        if entry == "attach":
            rt.attach(self, state)
        else:
            self.register_comm_hook(state, rt.sparse_hook)

    def counted(register):
        def count_and_register(self, *arguments, **options):
            seen.own_hooks += 1
            return register(self, *arguments, **options)

        return count_and_register

    DistributedDataParallel.__init__ = construct_and_register
    if entry is None:
        for name in ("register_comm_hook", "_register_builtin_comm_hook", "_register_fused_optim"):
            setattr(DistributedDataParallel, name, counted(getattr(DistributedDataParallel, name)))
    return seen


def run_here(rank, name, entry, folder):
    """Run a test as one rank, in this process; return what is to be reported."""
    stay_on_the_cpu()
    seen = watch_ddp(entry)
    outcome = PASSED
    try:
        timeout = datetime.timedelta(seconds=min(GROUP_SECONDS, suite.CUSTOM_PG_TIMEOUT.get(name, GROUP_SECONDS)))
        store = f"file://{folder}/store"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD_SIZE, timeout=timeout)
        common_utils.set_rng_seed(1234)
        case = Tests(name)
        case.rank, case.file_name = rank, f"{folder}/file"
        getattr(case, name)()
        if dist.is_initialized():
            dist.barrier()  # no rank leaves while the other still talks to it
            dist.destroy_process_group()
    except (unittest.SkipTest, SystemExit):
        outcome = SKIPPED
    except BaseException:
        # Without the advice on how to repeat it that torch adds.
        outcome = traceback.format_exc().partition("\nTo execute this test")[0].rstrip()[-3000:]
    return {"outcome": outcome, **dataclasses.asdict(seen)}


def run_test(name, entry):
    """Fork the ranks of a test and return their reports; one that does not come in time is a failure of its own."""
    folder = tempfile.mkdtemp()
    os.environ["TEMP_DIR"] = folder
    os.mkdir(f"{folder}/barrier")
    os.mkdir(f"{folder}/test_dir")
    pids = []
    for rank in range(WORLD_SIZE):
        pid = os.fork()
        if pid == 0:
            # What a test prints, and what a library writes as the process ends, is not a report.
            quiet = os.open(f"{folder}/output{rank}", os.O_WRONLY | os.O_CREAT)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            report = run_here(rank, name, entry, folder)
            pathlib.Path(f"{folder}/report{rank}").write_text(json.dumps(report))
            os._exit(0)
        pids.append(pid)
    deadline = time.monotonic() + SECONDS
    endings = [end_of(pid, deadline) for pid in pids]
    reports = []
    for rank, ending in enumerate(endings):
        path = pathlib.Path(f"{folder}/report{rank}")
        lost = {"outcome": f"rank {rank} {ending}", "models": 0, "own_hooks": 0}
        reports.append(json.loads(path.read_text()) if ending == "ended" else lost)
    shutil.rmtree(folder)
    return reports


def end_of(pid, deadline):
    descriptor = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        in_time = poll.poll(max(0, 1000 * (deadline - time.monotonic())))
        if not in_time:
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    finally:
        os.close(descriptor)
    if not in_time:
        return f"did not end within {SECONDS} s"
    return "ended" if status == 0 else f"died with status {status}"


def outcome_of(reports):
    """One outcome of a test: a failure on some rank, else what most say."""
    outcomes = [report["outcome"] for report in reports]
    failures = [outcome for outcome in outcomes if outcome not in (PASSED, SKIPPED)]
    # Where one rank fails, the other may only report that it has lost its partner.
    failures.sort(key=lambda text: "Connection closed" in text or "Timed out" in text)
    return failures[0] if failures else outcomes[0]


def run_all(names):
    """{test: {entry: outcome}} of the tests that reach DDP."""
    results = {}
    for name in names:
        reports = run_test(name, None)
        if not any(report["models"] for report in reports):
            continue
        outcome = outcome_of(reports)
        results[name] = {"without": outcome}
        for entry in ENTRIES[1:]:
            if any(report["own_hooks"] for report in reports):
                results[name][entry] = OWN_HOOK
            else:
                results[name][entry] = outcome_of(run_test(name, entry)) if outcome == PASSED else NOT_RUN
        print(name, *[one.splitlines()[-1][:200] for one in results[name].values()], sep=" | ", file=sys.stderr, flush=True)
    return results


def main():
    torch.set_num_threads(1)
    print(json.dumps(run_all(sys.argv[1:] or NAMES)))


if __name__ == "__main__":
    main()
