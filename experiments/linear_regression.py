"""Reproduce Fig. 2 of "Novel Gradient Sparsification Algorithm via Bayesian Inference": N workers, one linear regression.

Worker n holds D points x ~ N(0, 1)^J with labels <x, t_n> + noise, t_n ~ N(u_n, h^2) and u_n ~ N(0, sigma^2), and the
loss |X_n w - y_n|^2 / D. What is reported is log10 of the squared gap |w - w*|^2 to the minimiser of the mean loss.
Options that take several values make a sweep: every combination is run, in one process. With --out a sweep that was
killed goes on when the same command is given again, and a command with more values adds theirs.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

from experiments import sweeps
from runlog.command import check, make_parser

METHODS = ("dense", "topk", "regtopk", "genie")
SAMPLES, DIMENSION = 500, 100  # D, J
MEAN_VARIANCE, MODEL_VARIANCE, NOISE_VARIANCE = 5.0, 1.0, 0.5  # sigma^2, h^2, epsilon
LEARNING_RATE = 0.01
CURVE_POINTS = 50


@dataclass
class Problem:
    """Hold what the gradients need; worker n's gradient at w is curvature[n] @ w - offset[n].

    curvature: (N, J, J), 2 X^T X / D; offset: (N, J), 2 X^T y / D; minimiser: (J,), w*. All fp64, on the CPU.
    """

    curvature: object
    offset: object
    minimiser: object


def make_problem(num_workers, seed, homogeneous=False):
    """Return the Problem that the seed decides; in a homogeneous one all workers share worker 0's model t_0."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, variance=1.0):
        return math.sqrt(variance) * torch.randn(*shape, generator=generator, dtype=torch.float64)

    points = draw(num_workers, SAMPLES, DIMENSION)
    models = draw(num_workers, 1, variance=MEAN_VARIANCE) + draw(num_workers, DIMENSION, variance=MODEL_VARIANCE)
    if homogeneous:
        models = models[:1].expand_as(models)
    labels = torch.einsum("ndj,nj->nd", points, models) + draw(num_workers, SAMPLES, variance=NOISE_VARIANCE)
    curvature = torch.einsum("ndi,ndj->nij", points, points) * (2 / SAMPLES)
    offset = torch.einsum("ndj,nd->nj", points, labels) * (2 / SAMPLES)
    return Problem(curvature, offset, torch.linalg.solve(curvature.sum(0), offset.sum(0)))


def make_exchange(run, num_workers, support="own"):
    """Return (exchange, number of its workers), (None, N) for dense.

    The genie lets every worker send the k entries where the mean over workers of residual + gradient is largest. Their
    supports are then equal, and what reaches the weights depends on the mean alone: it is Top-k with one worker that
    holds the mean gradient.
    """
    if run["method"] == "dense":
        return None, num_workers
    import regtopk_torch as rt

    if run["method"] == "genie":
        return rt.LocalExchange(1, run["density"], method="topk"), 1
    options = {"mu": run["mu"], "distortion": run["distortion"]} if run["method"] == "regtopk" else {}
    return rt.LocalExchange(num_workers, run["density"], method=run["method"], support=support, **options), num_workers


def train(run, *, workers, steps, dtype="float64", homogeneous=False, support="own"):
    """Train from w = 0 and return the run's results as a dict.

    log10_gap: after the last step, None where it is not finite; curve: [step, log10_gap] of about CURVE_POINTS steps;
    repeated, displaced: shares of the sent entries (0...1), None for dense and genie.

    `run` has sweeps.RUN_KEYS. Gradients, residuals and weights are of `dtype`, "float64" or "float32"; the problem is
    made, and the gap taken, in fp64.
    """
    import torch

    problem = make_problem(workers, run["seed"], homogeneous)
    kind = getattr(torch, dtype)
    curvature, offset = problem.curvature.to(kind), problem.offset.to(kind)
    weights = torch.zeros(DIMENSION, dtype=kind)
    exchange, senders = make_exchange(run, workers, support)

    def log10_gap():
        squared = ((weights.double() - problem.minimiser) ** 2).sum().item()
        return round(math.log10(squared), 4) if 0 < squared < math.inf else None

    curve = [[0, log10_gap()]]
    for step in range(1, steps + 1):
        gradients = curvature @ weights - offset
        if exchange is None or senders < workers:
            gradients = gradients.mean(dim=0, keepdim=True)
        average = gradients[0] if exchange is None else exchange.step(list(gradients))
        weights = weights - LEARNING_RATE * average
        if step % max(1, steps // CURVE_POINTS) == 0 or step == steps:
            curve.append([step, log10_gap()])
    shares = {"repeated": None, "displaced": None}
    if exchange is not None and run["method"] != "genie":
        statistics = exchange.stats()
        shares = {name: round(statistics[name] / statistics["sent_entries"], 6) for name in shares}
    return {"log10_gap": curve[-1][1], **shares, "curve": curve}


def parse(arguments):
    parser = make_parser("experiments.linear_regression", __doc__)

    def add(name, help, **settings):
        parser.add_argument(name, help=help, **settings)

    several = {"nargs": "+", "metavar": "VALUE"}
    add("--method", f"of {', '.join(METHODS)} (regtopk); genie is Top-k of the true aggregate", nargs="+", choices=METHODS, default=["regtopk"])
    add("--density", "fraction of the entries each worker sends (0.6)", type=float, default=[0.6], **several)
    add("--mu", "RegTop-k's mu, no unit (4)", type=float, default=[4.0], **several)
    add("--distortion", "RegTop-k's form (previous)", nargs="+", choices=("previous", "current"), default=["previous"])
    add("--support", "who chooses the entries: each worker its own, or one for all (%(default)s)", choices=("own", "leader"), default="own")
    add("--seed", "of the problem (0)", type=int, default=[0], **several)
    add("--workers", "N (%(default)s)", type=int, default=20, metavar="N")
    add("--steps", "updates of the weights (%(default)s)", type=int, default=2500)
    add("--homogeneous", "all workers' labels come from one model", action="store_true")
    add("--dtype", "of gradients, residuals and weights (%(default)s)", choices=("float64", "float32"), default="float64")
    add("--out", "log to write, or to go on with", type=Path, metavar="FILE.jsonl")
    add("--threads", "CPU threads (%(default)s: a step is too short for more)", type=int, default=1)
    options = parser.parse_args(arguments)
    check(parser, options, *((name, lambda value: value >= 1, "at least 1") for name in ("workers", "steps", "threads")))
    return options


def main(arguments=None):
    options = parse(arguments)
    import torch

    torch.set_num_threads(options.threads)
    settings = {name: getattr(options, name) for name in ("workers", "steps", "dtype", "homogeneous", "support")}

    def compute(run):
        return train(run, **settings)

    runs = sweeps.list_runs(options.method, options.density, options.mu, options.distortion, options.seed)
    try:
        for row in sweeps.complete(options.out, settings, runs, compute):
            print(f"{sweeps.describe(row)} log10_gap={row['log10_gap']}", flush=True)
    except ValueError as error:
        sys.exit(str(error))
    print(f"log10_gap={row['log10_gap']}")


if __name__ == "__main__":
    main()
