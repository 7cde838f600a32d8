"""Time training steps of ResNet-18 over the network between hosts, beside what PyTorch brings. On every host, with its own R:

    torchrun --nnodes 4 --node-rank R --nproc-per-node 1 --master-addr HOST0 --master-port 29500 -m benchmarks.network --out 1gbit.jsonl

Rank 0 writes the log, named after the rate of the hosts' links; `python -m benchmarks.hosts` makes the table of those in
benchmarks/results/hosts. Every round takes one step of every method, one after the other, on the same batch of random images;
one bucket holds the model, unless --bucket-cap-mb says otherwise. The first rounds are not recorded.
"""

import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

import regtopk_torch as rt
from benchmarks.hosts import METHODS, bits_per_second
from runlog.command import check, make_parser
from runlog.record import Recorder

MORE = {  # beside those of the table
    "offsets": "topk with index_code='offsets'", "leader": "topk with support='leader'",
    "leader-waits": "the same, the backward pass waiting for each bucket",
}  # fmt: skip
WARM_UP = 3  # rounds; PowerSGD begins with two steps of all-reduce


def exchange_nothing(state, bucket):
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


class Chain:
    """Top-k with error feedback as it is usually written: torch calls in a hook."""

    def __init__(self, density):
        self.density, self.residuals = density, {}

    def exchange(self, bucket):
        buffer, workers = bucket.buffer(), dist.get_world_size()
        residual = self.residuals.setdefault((bucket.index(), buffer.numel()), torch.zeros_like(buffer))
        residual.add_(buffer)
        index = residual.abs().topk(max(1, round(self.density * buffer.numel())), sorted=False).indices
        values = residual[index]
        residual[index] = 0
        indices, payloads = ([torch.empty_like(sent) for _ in range(workers)] for sent in (index, values))
        dist.all_gather(indices, index)
        dist.all_gather(payloads, values)
        buffer.zero_()
        for where, payload in zip(indices, payloads, strict=True):
            buffer.index_add_(0, where, payload, alpha=1 / workers)
        return exchange_nothing(None, bucket)


def chain_hook(state, bucket):
    return state.exchange(bucket)


def waiting_hook(state, bucket):
    """sparse_hook, and the backward pass goes on when the bucket has come back."""
    future = rt.sparse_hook(state, bucket)
    future.wait()
    return future


def make_hooks(density):
    """Return {method: its state and hook}; None for DDP alone."""
    return {
        "none": (None, exchange_nothing),
        "dense": None,
        "bf16": (None, default_hooks.bf16_compress_hook),
        "powersgd": (powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=2), powerSGD_hook.powerSGD_hook),
        "chain": (Chain(density), chain_hook),
        "topk": (rt.TopKState(density), rt.sparse_hook),
        "regtopk": (rt.RegTopKState(density), rt.sparse_hook),
        "offsets": (rt.TopKState(density, index_code="offsets"), rt.sparse_hook),
        "leader": (rt.TopKState(density, support="leader"), rt.sparse_hook),
        "leader-waits": (rt.TopKState(density, support="leader"), waiting_hook),
    }


def make_network(name):
    if name == "small":
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 10))
    from torchvision import models

    return models.resnet18(num_classes=10)


def add_common(parser, rounds):
    """The options of every benchmark between hosts."""
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl", help="a new log, named after the rate of every host's link: 100mbit, 1gbit")
    parser.add_argument("--rounds", type=int, default=rounds, help="of each method (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads per process (%(default)s)")


def begin(parser, options, *checks):
    """Check the options and join the group of torchrun's processes."""
    check(parser, options, *((name, lambda value: value >= 1, "at least 1") for name in ("batch_size", "threads")), ("rounds", lambda value: value >= 2, "at least 2"), *checks)
    bits_per_second(options.out.stem)  # or an error, before anything is measured
    torch.set_num_threads(options.threads)
    dist.init_process_group("gloo")
    if dist.get_rank() == 0:  # or an error, before anything is measured
        options.out.parent.mkdir(parents=True, exist_ok=True)
        if options.out.exists():
            raise FileExistsError(f"{parser.prog.split()[-1]}: expected a new log, got {options.out}, which exists; name another one")
    torch.manual_seed(dist.get_rank())


def measure(options, rounds, warm_up, steps=1):
    """Take the rounds, {method: function}, one after the other again and again, and write a log of their seconds per step; a round has `steps` of them."""
    seconds = {method: [] for method in rounds}
    for _ in range(warm_up + options.rounds):
        for method, take in rounds.items():
            dist.barrier()
            start = time.perf_counter()
            take()
            seconds[method].append((time.perf_counter() - start) / steps)
    if dist.get_rank() == 0:
        settings = {**vars(options), "out": options.out.name}
        with Recorder(options.out, 0, workers=dist.get_world_size(), options=settings) as log:
            for method, taken in seconds.items():
                for step, value in enumerate(taken[warm_up:], start=1):
                    log.write("step", method=method, step=step, seconds=value)
    dist.barrier()
    dist.destroy_process_group()


def main(arguments=None):
    parser = make_parser("benchmarks.network", __doc__)
    add_common(parser, 15)
    parser.add_argument("--method", nargs="+", default=list(METHODS), choices=[*METHODS, *MORE], help=f"{'; '.join(f'{name}: {what}' for name, what in MORE.items())} ({' '.join(METHODS)})")
    parser.add_argument("--density", type=float, default=0.001, help="of the sparse methods (%(default)s)")
    parser.add_argument("--bucket-cap-mb", type=float, default=1024.0, metavar="MIB", help="of DDP (%(default)g)")
    parser.add_argument("--batch-size", type=int, default=20, metavar="IMAGES", help="per host and step (%(default)s)")
    parser.add_argument("--model", choices=("resnet18", "small"), default="resnet18", help="(%(default)s)")
    options = parser.parse_args(arguments)
    begin(parser, options, ("bucket_cap_mb", lambda value: value > 0, "a number above 0"))
    images, labels = torch.randn(options.batch_size, 3, 32, 32), torch.randint(10, (options.batch_size,))
    hooks = make_hooks(options.density)

    def steps_of(hook):
        network = DistributedDataParallel(make_network(options.model), bucket_cap_mb=options.bucket_cap_mb)
        if hook is not None:
            network.register_comm_hook(*hook)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01)

        def step():
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(images), labels).backward()
            optimizer.step()

        return step

    measure(options, {method: steps_of(hooks[method]) for method in options.method}, WARM_UP)


if __name__ == "__main__":
    main()
