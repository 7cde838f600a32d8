"""Find out what to do, at the end of training, with what the workers hold back.

N workers in this process train with Top-k and a learning rate that falls as a cosine to a hundredth. The last tenth of the steps is
taken once for every ending, each from the same weights, optimizer and residuals:

    nothing        what is held back stays so
    flush          after the last step, one more with the average of what is held back, as `state.flush` gives it, at the first learning rate
    flush-decayed  the same at the last learning rate
    dense          the last hundredth of the steps without compression; what is held back stays so
    all            the last hundredth at density 1: its first step sends all that was held back
    rising         the density rises geometrically to RISE times itself over the last tenth

Options that take several values make a sweep; with --out one that was killed goes on when the same command is given again.
"""

import copy
import math
import sys
from pathlib import Path

from experiments import cifar10, sweeps
from runlog.command import check, make_parser

ENDINGS = ("nothing", "flush", "flush-decayed", "dense", "all", "rising")
OPTIMIZERS = {"sgd": ("sgd", 0.05, 0.0), "momentum": ("sgd", 0.01, 0.9), "adamw": ("adamw", 0.001, 0.0)}  # kind, first rate, momentum
RISE = 100.0
LAST_RATE = 0.01  # of the first


class Training:
    """One network up to a tenth before its end, and from there to the end in every way; `tail` is the number of those steps."""

    def __init__(self, options, dataset, optimizer, seed):
        kind, self._rate, momentum = OPTIMIZERS[optimizer]
        self._options, self._dataset = options, dataset
        self._job = cifar10.parse(["--method", "topk", "--device", "cpu"])
        for name in ("model", "workers", "density", "batch_size"):
            setattr(self._job, name, getattr(options, name))
        self._job.seed, self._job.optimizer, self._job.learning_rate, self._job.momentum = seed, kind, self._rate, momentum
        self.tail = max(2, options.steps // 10)
        workers = self._make_workers()
        for step in range(options.steps - self.tail):
            self._take(workers, step)
        self._saved = [copy.deepcopy(part.state_dict()) for part in (workers.model, workers.optimizer, workers.exchange)]

    def _make_workers(self):
        from experiments.batches import make_batches
        from experiments.models import make_model
        from experiments.workers import LocalWorkers

        return LocalWorkers(self._job, make_model(self._job.model, self._job.seed), make_batches(self._dataset, self._job))

    def _take(self, workers, step):
        done = step / (self._options.steps - 1)
        for group in workers.optimizer.param_groups:
            group["lr"] = self._rate * (LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * done)) / 2)
        losses = workers.step(step)
        if not all(map(math.isfinite, losses)):
            raise ValueError(f"end_of_training: expected finite training losses, got {losses} in step {step}")

    def _densities(self, ending):
        """Return the density of every step of the tail, None for one without compression."""
        density, last = self._options.density, max(1, self._options.steps // 100)
        if ending == "rising":
            return [min(1.0, density * RISE ** ((number + 1) / self.tail)) for number in range(self.tail)]
        at_last = {"dense": None, "all": 1.0}.get(ending, density)
        return [density] * (self.tail - last) + [at_last] * last

    def end(self, ending):
        """Return the row of one ending: accuracy (0...1) and loss (nats) on the test images, and the entries that a worker sent in the tail."""
        from experiments.models import test

        workers, before, sent = self._make_workers(), self._options.density, 0
        for part, state in zip((workers.model, workers.optimizer, workers.exchange), self._saved):
            part.load_state_dict(copy.deepcopy(state))
        entries = sum(parameter.numel() for parameter in workers.model.parameters())
        for number, density in enumerate(self._densities(ending)):
            if density != before:
                workers.exchange = None if density is None else _with_density(workers.exchange, density)
            self._take(workers, self._options.steps - self.tail + number)
            before, sent = density, sent + (entries if density is None else max(1, math.floor(density * entries + 0.5)))
        if ending.startswith("flush"):
            self._flush(workers, self._rate if ending == "flush" else None)
            sent += entries
        correct, loss = test(workers.model, self._dataset)
        count = len(self._dataset.test_labels)
        # An ending may break a network: a loss that is no number is recorded as such.
        return {"accuracy": correct / count, "loss": round(loss / count, 6) if math.isfinite(loss) else None, "tail_entries": sent}

    @staticmethod
    def _flush(workers, rate):
        """Take a step with the average of what is held back, at the learning rate `rate`, or that of the last step."""
        ranks = range(workers.exchange.num_workers)
        held = [workers.exchange.residuals(rank) for rank in ranks]
        for index, parameter in enumerate(workers.model.parameters()):
            parameter.grad = (sum(residuals[index] for residuals in held) / len(held)).view_as(parameter)
        for group in workers.optimizer.param_groups:
            group["lr"] = rate or group["lr"]
        workers.optimizer.step()


def _with_density(exchange, density):
    """Return an exchange that sends this density of the entries and goes on with what `exchange` holds back."""
    import regtopk_torch as rt

    other = rt.LocalExchange(exchange.num_workers, density, method="topk")
    other.load_state_dict(exchange.state_dict())
    return other


def parse(arguments):
    from experiments.models import MODELS

    parser = make_parser("experiments.end_of_training", __doc__)

    def add(name, help, **settings):
        parser.add_argument(name, help=help, **settings)

    add("--optimizer", f"of {', '.join(OPTIMIZERS)} (all)", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    add("--ending", "(all)", nargs="+", choices=ENDINGS, default=list(ENDINGS))
    add("--seed", "of start weights and order of images (0)", nargs="+", type=int, default=[0], metavar="SEED")
    add("--model", "(%(default)s)", choices=MODELS, default="mlp")
    add("--density", "fraction of the entries that each worker sends (%(default)s)", type=float, default=0.001)
    add("--workers", "N (%(default)s)", type=int, default=4, metavar="N")
    add("--steps", "before a flush (%(default)s)", type=int, default=1000)
    add("--batch-size", "images per step and worker (%(default)s)", type=int, default=20, metavar="IMAGES")
    add("--data", "folder that holds cifar-10-batches-py, or 'digits' (%(default)s)", default="data", metavar="DIR")
    add("--out", "log to write, or to go on with", type=Path, metavar="FILE.jsonl")
    add("--threads", "CPU threads (%(default)s)", type=int, default=1)
    options = parser.parse_args(arguments)
    check(
        parser, options, *((name, lambda value: value >= 1, "at least 1") for name in ("workers", "batch_size", "threads")),
        ("steps", lambda value: value >= 4, "at least 4"), ("density", lambda value: 0 < value <= 1, "0 < density <= 1"),
    )  # fmt: skip
    return options


def main(arguments=None):
    options = parse(arguments)
    import torch

    from experiments.data import load_cifar10, load_digits

    torch.set_num_threads(options.threads)
    begun = {}  # the training that the rows of one optimizer and seed share

    def compute(run):
        key = (run["optimizer"], run["seed"])
        if key not in begun:
            begun.clear()
            begun[key] = Training(options, dataset, *key)
        return begun[key].end(run["ending"])

    runs = [
        {"optimizer": optimizer, "ending": ending, "seed": seed}
        for seed in options.seed for optimizer in options.optimizer for ending in options.ending
    ]  # fmt: skip
    settings = {name: getattr(options, name) for name in ("model", "density", "workers", "steps", "batch_size")}
    try:
        dataset = load_digits() if options.data == "digits" else load_cifar10(options.data)
        for row in sweeps.complete(options.out, {**settings, "data": dataset.name}, runs, compute):
            print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
