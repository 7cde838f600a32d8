"""Compare ways to spend the same bytes: on as many entries in every step, on more in some than in others, or on more of fewer bits.

N workers in this process train 128 hidden units on MNIST, or ResNet-18 on CIFAR-10, with Top-k:

    fixed      k = density * J in every step, fp32 values
    power-P    rt.AdaptiveDensity(density, power=P): k follows the norm of the last average to the power P
    threshold  every entry of at least lambda, the same in all steps and workers, travels: what minimises the sum over the steps of the
               squared errors for a number of entries in all; lambda is searched until the bytes are those of `fixed`, within 5 %
    coded      fixed with Elias-Fano's code of the places, and as many more entries as fit into the bytes; behind a hyphen the values: coded-bf16, coded-2bit, coded-sign

Options that take several values make a sweep; with --out one that was killed goes on when the same command is given again.
"""

import math
import sys
from pathlib import Path

from experiments import cifar10, sweeps
from runlog.command import check, make_parser

RULES = ("fixed", "power-1", "power-2", "threshold")
VALUES = ("fixed", "coded", "coded-bf16", "coded-2bit", "coded-sign")
MODELS = ("mnist_mlp", "resnet18")
WITHIN, TRIES = 0.05, 12  # of the search for lambda: of two that differ by 4 % the larger one may send more, as ResNet-18's training goes another way


class Threshold:
    """N workers with error feedback in plain PyTorch: each sends what is at least `threshold` in magnitude, as `rt.LocalExchange` its k."""

    def __init__(self, threshold):
        self.threshold, self._residuals, self._sent = threshold, None, {"sent_entries": 0, "bytes_sent": 0}

    def step(self, gradients):
        """Return the averages of what the workers send of [[tensor per parameter] per worker]."""
        import torch

        flat = torch.stack([torch.cat([part.flatten() for part in worker]) for worker in gradients])
        accumulated = flat if self._residuals is None else self._residuals + flat
        sent = torch.where(accumulated.abs() >= self.threshold, accumulated, 0.0)
        self._residuals = accumulated - sent
        for count in sent.count_nonzero(dim=1).tolist():
            self._sent["sent_entries"] += count
            self._sent["bytes_sent"] += (len(gradients) - 1) * bytes_of(flat.shape[1], count, len(gradients[0]))
        averages = sent.mean(dim=0).split([part.numel() for part in gradients[0]])
        return [average.view_as(part) for average, part in zip(averages, gradients[0])]

    def stats(self):
        """Return the sums over workers and steps, under the keys of `rt.LocalExchange.stats`."""
        return self._sent


def bytes_of(numel, count, parameters):
    """Return the bytes of a payload of that many entries, fp32; one of none is counted as if it had one."""
    import torch

    import regtopk_torch as rt

    return rt._C.payload_bytes(numel, max(1, count), torch.float32, parameters)


def entries_of(options, density, seed):
    """Return (J, k, number of parameters)."""
    from experiments.models import make_model

    sizes = [parameter.numel() for parameter in make_model(options.model, seed).parameters()]
    return sum(sizes), max(1, math.floor(density * sum(sizes) + 0.5)), len(sizes)


def coded_density(options, density, wire_dtype, seed):
    """Return the largest density whose messages, with a code of the places, have no more bytes than those of `fixed`."""
    import torch

    import regtopk_torch as rt
    from regtopk_torch.options import CODES

    numel, k, parameters = entries_of(options, density, seed)
    types = {"fp32": torch.float32, "bf16": torch.bfloat16, **CODES}
    low, high, allowed = 1, numel, bytes_of(numel, k, parameters)
    while low < high:
        middle = (low + high + 1) // 2
        fits = rt._C.wire_bytes(numel, middle, torch.float32, parameters, types[wire_dtype], True) <= allowed
        low, high = (middle, high) if fits else (low, middle - 1)
    return low / numel


def train(options, dataset, density, exchange, seed, wire_dtype=None, steps=None):
    """Return the row of one training, or with `steps` only what its first ones send, by `exchange`, or with None a LocalExchange of that density, a number or a rule.

    `wire_dtype`: of the values, beside a code of the places; None sends them as they are, beside offsets.
    """
    from experiments.batches import make_batches
    from experiments.models import make_model, test
    from experiments.workers import LocalWorkers

    job = cifar10.parse(["--method", "topk", "--device", "cpu"])
    job.workers, job.batch_size, job.learning_rate, job.seed, job.density = options.workers, options.batch_size, options.learning_rate, seed, density
    job.index_code = "offsets"
    if wire_dtype is not None:
        job.wire_dtype, job.index_code = wire_dtype, "elias-fano"
    workers = LocalWorkers(job, make_model(options.model, seed), make_batches(dataset, job))
    workers.exchange = exchange or workers.exchange
    for step in range(steps or options.steps):
        losses = workers.step(step)
        if not all(map(math.isfinite, losses)):
            raise ValueError(f"equal_bytes: expected finite training losses, got {losses} in step {step}")
    sent = {name: int(workers.exchange.stats()[name]) for name in ("sent_entries", "bytes_sent")}
    if steps is not None:
        return sent
    correct, loss = test(workers.model, dataset)
    count = len(dataset.test_labels)
    return {"accuracy": correct / count, "loss": round(loss / count, 6), **sent}


def search(options, dataset, density, seed, start):
    """Return the row of the threshold that sends the budget, `start` the first one tried, or None: one is searched in the first steps."""
    if start is None:
        start = search_in(options, dataset, density, seed, 1.0, max(1, options.steps // 10))[0]
    threshold, row = search_in(options, dataset, density, seed, start, None)
    return {**row, "lambda": threshold}


def search_in(options, dataset, density, seed, threshold, steps):
    """Return (threshold, row) of the search in the first `steps`, or None for all."""
    budget = options.workers * (options.workers - 1) * (steps or options.steps) * bytes_of(*entries_of(options, density, seed))
    tried = {}  # log of the threshold: log of the bytes that it sends against the budget
    for _ in range(TRIES):
        row = train(options, dataset, density, Threshold(threshold), seed, steps=steps)
        over = math.log(row["bytes_sent"] / budget)
        print(f"lambda={threshold:.6g} bytes={math.exp(over):.4f} of the budget in {steps or options.steps} steps", file=sys.stderr, flush=True)
        if abs(over) <= WITHIN:
            break
        tried[math.log(threshold)] = over
        above = [at for at, value in tried.items() if value > 0]  # sends too much: too low
        below = [at for at, value in tried.items() if value < 0]
        if above and below:
            low, high = max(above), min(below)
            threshold = math.exp(low + (high - low) * tried[low] / (tried[low] - tried[high]) if low < high else (low + high) / 2)
        else:
            threshold *= math.exp(over)
    return threshold, row


def parse(arguments):
    parser = make_parser("experiments.equal_bytes", __doc__)

    def add(name, help, **settings):
        parser.add_argument(name, help=help, **settings)

    add("--rule", f"what the bytes are spent on ({' '.join(RULES)})", nargs="+", choices=list(dict.fromkeys(RULES + VALUES)), default=list(RULES))
    add("--threshold", "where the search for lambda begins (one is searched in the first steps)", type=float, metavar="LAMBDA")
    add("--model", "(%(default)s)", choices=MODELS, default="mnist_mlp")
    add("--density", "mean fraction of the entries that each worker sends (0.001)", nargs="+", type=float, default=[0.001], metavar="DENSITY")
    add("--seed", "of start weights and order of images (0)", nargs="+", type=int, default=[0], metavar="SEED")
    add("--workers", "N (%(default)s)", type=int, default=4, metavar="N")
    add("--steps", "(%(default)s)", type=int, default=2000)
    add("--batch-size", "images per step and worker (%(default)s)", type=int, default=20, metavar="IMAGES")
    add("--learning-rate", "constant (%(default)s)", type=float, default=0.05, metavar="RATE")
    add("--data", "folder that holds MNIST/raw, or for resnet18 cifar-10-batches-py, torchvision's layouts (%(default)s)", default="data", metavar="DIR")
    add("--out", "log to write, or to go on with", type=Path, metavar="FILE.jsonl")
    add("--threads", "CPU threads (%(default)s)", type=int, default=1)
    options = parser.parse_args(arguments)
    check(
        parser, options, *((name, lambda value: value >= 1, "at least 1") for name in ("steps", "batch_size", "threads")),
        ("workers", lambda value: value >= 2, "at least 2"), ("learning_rate", lambda value: value > 0, "a number above 0"),
        ("threshold", lambda value: value > 0, "a number above 0"),
    )  # fmt: skip
    if not all(0 < density <= 1 for density in options.density):
        parser.error(f"--density: expected 0 < density <= 1, got {options.density}")
    return options


def main(arguments=None):
    options = parse(arguments)
    import torch

    import regtopk_torch as rt
    from experiments.data import load_cifar10, load_mnist

    torch.set_num_threads(options.threads)
    found = {}  # the last threshold of each density: where the next search begins

    def compute(run):
        density, rule, seed = run["density"], run["rule"], run["seed"]
        if rule == "threshold":
            return search(options, dataset, density, seed, found.get(density, options.threshold))
        wire_dtype = None
        if rule.startswith("power-"):
            density = rt.AdaptiveDensity(density, power=float(rule.removeprefix("power-")))
        elif rule.startswith("coded"):
            wire_dtype = rule.removeprefix("coded").removeprefix("-") or "fp32"
            density = coded_density(options, density, wire_dtype, seed)
        return {**train(options, dataset, density, None, seed, wire_dtype), "lambda": None}

    runs = [{"density": density, "rule": rule, "seed": seed} for density in options.density for seed in options.seed for rule in options.rule]
    settings = {name: getattr(options, name) for name in ("model", "workers", "steps", "batch_size", "learning_rate")}
    try:
        dataset = (load_mnist if options.model == "mnist_mlp" else load_cifar10)(options.data)
        for row in sweeps.complete(options.out, {**settings, "data": dataset.name}, runs, compute):
            if row["lambda"] is not None:
                found[row["density"]] = row["lambda"]
            print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
