"""Reproduce Fig. 1 of "Novel Gradient Sparsification Algorithm via Bayesian Inference": two workers, two weights.

Worker n holds one data point x_n = [+-100, 1] with label 1 and the loss F_n(w) = log(1 + exp(-<w, x_n>)). The first
gradient entries are large and cancel; Top-1 sends nothing else for about 100 steps.
"""

import argparse
import sys
from pathlib import Path

METHODS = ("dense", "topk", "regtopk")
STEPS = 100
LEARNING_RATE = 0.9
WORKERS = 2


def run(method, steps=STEPS, mu=1.0, distortion="previous"):
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
        exchange = rt.LocalExchange(WORKERS, 0.5, method=method, **options)
    losses = [evaluate_loss()]
    for _ in range(steps):
        gradients = [-torch.sigmoid(-(point @ weights)) * point for point in points]  # eq. 2
        mean = torch.stack(gradients).mean(dim=0) if exchange is None else exchange.step(gradients)
        weights = weights - LEARNING_RATE * mean
        losses.append(evaluate_loss())
    return losses


def draw(curves, path):
    """Draw the losses of `curves`, a dict from label to list of losses, against the step into the image `path`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    styles = {"dense": ("black", "--", 1.6), "Top-1": ("tab:red", "-", 1.8), "RegTop-1": ("tab:blue", "-", 1.8)}
    for label, losses in curves.items():
        colour, line, width = styles[label.split(" (")[0]]
        axes.plot(losses, line, color=colour, linewidth=width, label=label, zorder=3 if label == "dense" else 2)
    axes.set(xlabel="step (updates of the weights)", ylabel="training loss (nats)", ylim=(0, None))
    axes.set_title(f"Logistic regression, {WORKERS} workers, learning rate {LEARNING_RATE}, fp64")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def parse(arguments):
    parser = argparse.ArgumentParser(prog="python -m experiments.toy_logistic", description=__doc__.split("\n\n")[0])
    parser.add_argument("--method", choices=METHODS, default="regtopk", help="default: %(default)s")
    parser.add_argument("--mu", type=float, default=1.0, help="RegTop-k's mu, no unit, above 0 (default: %(default)s)")
    parser.add_argument(
        "--distortion", choices=("previous", "current"), default="previous", help="RegTop-k's form (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="updates of the weights (default: %(default)s)")
    parser.add_argument(
        "--plot", nargs="?", const=Path("runs/toy_logistic.png"), type=Path, metavar="PATH",
        help="also draw all three methods into PATH (default: %(const)s)",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error(f"--steps: expected at least 1, got {options.steps}")
    return options


def main(arguments=None):
    options = parse(arguments)
    shared = {"steps": options.steps, "mu": options.mu, "distortion": options.distortion}
    try:
        losses = run(options.method, **shared)
    except ValueError as error:
        sys.exit(str(error))
    for step in range(0, options.steps + 1, 10):
        print(f"step={step} loss={losses[step]:.6f}")
    if options.plot is not None:
        options.plot.parent.mkdir(parents=True, exist_ok=True)
        regtopk = f"RegTop-1 (mu {options.mu:g}, {options.distortion})"
        draw(
            {
                "dense": run("dense", options.steps),
                "Top-1": run("topk", options.steps),
                regtopk: run("regtopk", **shared),
            },
            options.plot,
        )
        print(f"figure={options.plot}")
    print(f"final_loss={losses[-1]:.6f}")


if __name__ == "__main__":
    main()
