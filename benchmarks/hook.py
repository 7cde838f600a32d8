"""Time the whole hook in DistributedDataParallel, two processes with a thread each, against the hooks that PyTorch brings.

    python -m benchmarks.hook                     # all cases, the installed package
    python -m benchmarks.hook --old DIR           # the same, and beside it the package of another checkout, built, in DIR

Cases: `large`, one bucket of 25.6 M entries, as a multiple of `residual.add_(gradient); gradient.zero_()`; `small`, 300 buckets
of 4,000 entries, microseconds per bucket beyond a hook that does nothing; `average`, state.average of the 11.2 M entries of
ResNet-18's 62 parameters, as a multiple of the hook on one bucket of as many, both in seconds of the processor. Every round times a
backward pass, or an average, of every candidate, one after the other; the medians of the rounds count, and ratios are those of the same round.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time



def resnet18():
    """Entries of its parameters for 10 classes, in order."""
    sizes, channels = [3 * 64 * 49, 64, 64], 64
    for width in (64, 128, 256, 512):
        for block in range(2):
            sizes += [9 * channels * width, width, width, 9 * width * width, width, width]
            if channels != width:
                sizes += [channels * width, width, width]
            channels = width
    return [*sizes, 5120, 10]


CASES = {"average": (resnet18(), 2000, 15), "large": ([25_600_000], 2000, 15), "small": ([4_000] * 300, 0.01, 20)}


def worker(rank, port_file, case, repository):
    """One of two processes of one package; rank 0 prints {candidate: [seconds of each round]}."""
    sys.path.insert(0, repository)
    import torch
    import torch.distributed as dist
    import torch.nn as nn
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
    from torch.nn.parallel import DistributedDataParallel

    import regtopk_torch as rt

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{port_file}", rank=rank, world_size=2)
    sizes, bucket_cap_mb, rounds = CASES[case]
    parts, sizes = sizes, [sum(sizes)] if case == "average" else sizes

    def nothing(state, bucket):
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ParameterList(torch.zeros(size) for size in sizes)
            self.gradients = [torch.randn(size) for size in sizes]

        def forward(self):
            return sum((part * gradient).sum() for part, gradient in zip(self.parts, self.gradients, strict=True))

    hooks = {
        "nothing": lambda ddp: ddp.register_comm_hook(None, nothing),
        "bf16": lambda ddp: ddp.register_comm_hook(None, default_hooks.bf16_compress_hook),
        "sparse_hook": lambda ddp: ddp.register_comm_hook(rt.TopKState(0.001), rt.sparse_hook),
        "attach": lambda ddp: rt.attach(ddp, rt.TopKState(0.001)),
    }
    if case != "small":
        hooks.pop("bf16"), hooks.pop("attach")
    models = {}
    for name, register in hooks.items():
        models[name] = DistributedDataParallel(Model(), bucket_cap_mb=bucket_cap_mb, gradient_as_bucket_view=True)
        register(models[name])
    if case == "average":
        return print_seconds(rank, time_averages(rt, torch, dist, models["sparse_hook"], parts, rounds))
    residual, gradient = torch.zeros(sum(sizes)), torch.randn(sum(sizes))
    seconds = {name: [] for name in [*models, "floor"]}
    for _ in range(rounds + 4):
        for name, ddp in models.items():
            loss = ddp()
            dist.barrier()
            start = time.perf_counter()
            loss.backward()
            seconds[name].append(time.perf_counter() - start)
        dist.barrier()
        start = time.perf_counter()
        residual.add_(gradient)
        gradient.zero_()
        seconds["floor"].append(time.perf_counter() - start)
    print_seconds(rank, seconds)
    dist.barrier()


def print_seconds(rank, seconds):
    if rank == 0:
        print(json.dumps({name: taken[4:] for name, taken in seconds.items()}))


def time_averages(rt, torch, dist, ddp, sizes, rounds):
    """Return {candidate: [seconds of each round]}, of the processor: while a process waits for the other one it has none."""

    def hook(state, bucket):
        start = time.process_time()
        future = rt.sparse_hook(state, bucket)
        future.wait()
        seconds["hook"].append(time.process_time() - start)
        return future

    def separate():
        return [torch.randn(size) for size in sizes]

    def views():
        return list(torch.randn(sum(sizes)).split(sizes))

    timed = torch.nn.parallel.DistributedDataParallel(ddp.module, bucket_cap_mb=2000, gradient_as_bucket_view=True)
    timed.register_comm_hook(rt.TopKState(0.001), hook)
    in_place = views()
    candidates = {
        "one tensor": ([torch.randn(sum(sizes))], {}),
        "62 tensors": (separate(), {}),
        "62 tensors, out": (separate(), {"out": separate()}),
        "62 views of a buffer": (views(), {}),
        "62 views, out views": (views(), {"out": views()}),
        "62 views, out themselves": (in_place, {"out": in_place}),
        "62 tensors, results kept": (separate(), {}),
    }
    states = {name: rt.TopKState(0.001) for name in candidates}
    seconds = {name: [] for name in ["hook", *candidates]}
    for _ in range(rounds + 4):
        loss = timed()
        dist.barrier()
        loss.backward()
        for name, (tensors, options) in candidates.items():
            dist.barrier()
            start = time.process_time()
            averages = states[name].average(tensors, **options)
            seconds[name].append(time.process_time() - start)
            if "kept" in name:
                kept = averages  # noqa: F841 (until the next ones are there)
            del averages
    return seconds


def run(case, repository):
    with tempfile.TemporaryDirectory() as folder:
        arguments = [sys.executable, os.path.abspath(__file__), "--case", case, "--repository", repository, "--file", f"{folder}/store", "--rank"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        processes = [subprocess.Popen([*arguments, str(rank)], stdout=subprocess.PIPE, env=environment, text=True) for rank in range(2)]
        outputs = [process.communicate(timeout=600)[0] for process in processes]
    return json.loads(outputs[0].splitlines()[-1])


def median_of_ratios(numerators, denominators):
    return statistics.median(one / other for one, other in zip(numerators, denominators, strict=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--old", help="another checkout, built, to compare with")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--repeat", type=int, default=3, help="runs of each package, in turn (default 3)")
    for internal in ("--case", "--repository", "--file", "--rank"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        return worker(int(options.rank), options.file, options.case, options.repository)
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    packages = {"this": here, **({"old": options.old} if options.old else {})}
    for case in options.cases:
        sizes = CASES[case][0]
        for _ in range(options.repeat):
            for package, repository in packages.items():
                seconds = run(case, repository)
                if case == "average":
                    ratios = {name: median_of_ratios(taken, seconds["hook"]) for name, taken in seconds.items() if name != "hook"}
                    words = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
                    print(f"average, {package}: of the hook's time: {words} (n={len(seconds['hook'])})", flush=True)
                    continue
                if case == "large":
                    beyond = [one - other for one, other in zip(seconds["sparse_hook"], seconds["nothing"], strict=True)]
                    print(f"large, {package}: hook / floor {median_of_ratios(beyond, seconds['floor']):.3f} (n={len(beyond)})")
                    continue
                per_bucket = {
                    name: statistics.median(1e6 * (one - other) / len(sizes) for one, other in zip(taken, seconds["nothing"], strict=True))
                    for name, taken in seconds.items()
                }
                words = ", ".join(f"{name} {per_bucket[name]:.1f} us ({per_bucket[name] / per_bucket['bf16']:.2f})" for name in ("bf16", "sparse_hook", "attach"))
                print(f"small, {package}: beyond nothing per bucket (of bf16's): {words} (n={len(seconds['bf16'])})", flush=True)


if __name__ == "__main__":
    main()
