"""Reproduce Fig. 1 of "Novel Gradient Sparsification Algorithm via Bayesian Inference": two workers, two weights.

Worker n holds one data point x_n = [+-100, 1] with label 1 and the loss F_n(w) = log(1 + exp(-<w, x_n>)). The first
gradient entries are large and cancel; Top-1 sends nothing else for about 100 steps. Nothing is random. Options that take
several values make a sweep: every combination is run; with --out its log is kept and never computed twice.
"""

import sys
from pathlib import Path

from experiments import sweeps
from runlog.command import check, make_parser

METHODS = ("dense", "topk", "regtopk")
STEPS = 100
LEARNING_RATE = 0.9
WORKERS = 2
DENSITY = 0.5  # one of the two entries


def train(method, steps=STEPS, mu=1.0, distortion="previous"):
    """Train from w = [0, 1] in fp64 and return the `steps` + 1 losses F(w^0), F(w^1), ..., F(w^steps).

    The loss at step t is (F_1 + F_2) / 2 at w^t, the weights after t updates. `method` is "dense" (the plain mean of
    the gradients), "topk" or "regtopk" (one of the two entries per worker and step); `mu` and `distortion` are
    RegTop-k's.
    """
    import torch

    points = torch.tensor([[100.0, 1.0], [-100.0, 1.0]], dtype=torch.float64)
    weights = torch.tensor([0.0, 1.0], dtype=torch.float64)

    def evaluate_loss():
        return torch.nn.functional.softplus(-(points @ weights)).mean().item()

    exchange = None
    if method != "dense":
        import regtopk_torch as rt

        options = {"mu": mu, "distortion": distortion} if method == "regtopk" else {}
        exchange = rt.LocalExchange(WORKERS, DENSITY, method=method, **options)
    losses = [evaluate_loss()]
    for _ in range(steps):
        gradients = [-torch.sigmoid(-(point @ weights)) * point for point in points]  # eq. 2
        mean = torch.stack(gradients).mean(dim=0) if exchange is None else exchange.step(gradients)
        weights = weights - LEARNING_RATE * mean
        losses.append(evaluate_loss())
    return losses


def parse(arguments):
    parser = make_parser("experiments.toy_logistic", __doc__)
    add = parser.add_argument
    add("--method", nargs="+", choices=METHODS, default=["regtopk"], help="(regtopk)")
    add("--mu", nargs="+", type=float, default=[1.0], metavar="VALUE", help="RegTop-k's mu, no unit, above 0 (1)")
    add("--distortion", nargs="+", choices=("previous", "current"), default=["previous"], help="RegTop-k's form (previous)")
    add("--steps", type=int, default=STEPS, help="updates of the weights (%(default)s)")
    add("--out", type=Path, metavar="FILE.jsonl", help="log to write, or to go on with")
    options = parser.parse_args(arguments)
    check(parser, options, ("steps", lambda value: value >= 1, "at least 1"))
    return options


def main(arguments=None):
    options = parse(arguments)

    def compute(run):
        return {"losses": [round(loss, 8) for loss in train(run["method"], options.steps, run["mu"], run["distortion"])]}

    runs = sweeps.list_runs(options.method, [DENSITY], options.mu, options.distortion, [None])
    try:
        for row in sweeps.complete(options.out, {"steps": options.steps}, runs, compute):
            if len(runs) > 1:
                print(sweeps.describe(row))
            for step in range(0, options.steps + 1, 10):
                print(f"step={step} loss={row['losses'][step]:.6f}")
    except ValueError as error:
        sys.exit(str(error))
    print(f"final_loss={row['losses'][-1]:.6f}")


if __name__ == "__main__":
    main()
