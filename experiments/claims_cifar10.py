"""State what the logs show of training on CIFAR-10: the paper's Fig. 3 and the questions that the papers leave open."""

from pathlib import PurePosixPath
from statistics import fmean

from experiments.claim import Claim, Finding
from experiments.evidence import BY_DENSITY, SCRIPT_MU, by_configuration
from experiments.paired_test import compare, number, spread

PAPER_GAIN = 8.0  # points
COMMAND = "python -m experiments.cifar10_workers"


def accuracies(seeds):
    """Return {seed: test accuracy in percent} of {seed: run}."""
    return {seed: 100 * run.result["accuracy"] for seed, run in seeds.items()}


def pair_up(runs):
    """Return [(density, mu, {seed: run} of RegTop-k, {seed: run} of Top-k)] of a group, "previous" form, sharing a seed."""
    configurations = by_configuration(runs) if runs else {}
    pairs = []
    for (method, density, mu, distortion), regtopk in configurations.items():
        topk = configurations.get(("topk", density, None, None), {})
        if method == "regtopk" and distortion == "previous" and set(regtopk) & set(topk):
            pairs.append((density, mu, regtopk, topk))
    return pairs


def choose_pair(runs, mu=SCRIPT_MU, density=None):
    """Return the pair with this mu, and this density where the group has several; None without one."""
    return next((pair for pair in pair_up(runs) if pair[1] == mu and density in (None, pair[0])), None)


def dense_of(runs):
    """Return {seed: run} of the group's dense runs."""
    return by_configuration(runs).get(("dense", None, None, None), {})


def describe_steps(runs):
    run = next(iter(next(iter(by_configuration(runs).values())).values()))
    return f"after {run.result['step']:,} {'rounds' if run.options['local_steps'] > 1 else 'steps'}"


def logs_of(runs):
    """Return the folders that hold the runs' logs, below results."""
    return sorted({str(PurePosixPath(run.log).parent) for run in runs})


def find_accuracy(evidence, group, mu=SCRIPT_MU, density=None, against=None, loss=False):
    """Compare RegTop-k's test accuracy with Top-k's over the seeds that both have in a group; None without one.

    `density`: where the group has several. `against`: a gain in points that the test cell holds against the interval.
    `loss`: state the training loss too.
    """
    runs = evidence.cifar10.get(group, [])
    pair = choose_pair(runs, mu, density)
    if pair is None:
        return None
    _, _, regtopk, topk = pair
    comparison = compare(accuracies(regtopk), accuracies(topk))
    common = set(regtopk) & set(topk)
    dense = dense_of(runs)
    methods = [("RegTop-k", regtopk), ("Top-k", topk), ("dense", dense)]
    methods = [(name, [seeds[seed] for seed in sorted(common)]) for name, seeds in methods if common <= set(seeds)]
    text = ", ".join(f"{name} {spread(100 * run.result['accuracy'] for run in seeds)} %" for name, seeds in methods)
    text = f"{describe_steps(runs)} {text}"
    if loss:
        losses = [f"{name} {spread(run.result['training_loss'] for run in seeds)}" for name, seeds in methods]
        text += f"; training loss {', '.join(losses)}"
    test = comparison.describe(" points")
    if against is not None and comparison.low is not None:
        test += f"; {against:g} points lie {'outside' if comparison.excludes(against) else 'inside'} the interval"
    return Finding(text, comparison.n, test, logs_of(run for _, seeds in methods for run in seeds), comparison)


def find_overlap(evidence, group):
    """Find how much was sent twice running and displaced: without either, the two methods are one."""
    pair = choose_pair(evidence.cifar10.get(group, []))
    if pair is None:
        return None
    _, _, regtopk, topk = pair
    common = sorted(set(regtopk) & set(topk))
    twice = [100 * topk[seed].share("repeated") for seed in common]
    again, displaced = ([100 * regtopk[seed].share(name) for seed in common] for name in ("repeated", "displaced"))
    text = (
        f"of what it sent, Top-k had sent {spread(twice)} % the step before, RegTop-k {spread(again)} %; "
        f"RegTop-k displaced {spread(displaced)} %"
    )
    return Finding(text, len(common), "none", [f"cifar10/{group}"])


def find_by_option(evidence, group, place):
    """List RegTop-k minus Top-k in points by density (place 0 of a pair) or mu (place 1), over the seeds of all of them."""
    pairs = sorted(pair_up(evidence.cifar10.get(group, [])), key=lambda pair: pair[place])
    common = set.intersection(*(set(seeds) for pair in pairs for seeds in pair[2:])) if pairs else set()
    if len(pairs) < 2 or not common:
        return None
    parts, comparisons = [], []
    for pair in pairs:
        regtopk, topk = ({seed: seeds[seed] for seed in sorted(common)} for seeds in pair[2:])
        comparison = compare(accuracies(regtopk), accuracies(topk))
        comparisons.append(comparison)
        displaced = fmean(100 * run.share("displaced") for run in regtopk.values())
        parts.append(f"{pair[place]:g}: {number(comparison.mean, 2)} (displaced {displaced:.1f} %)")
    return Finding(
        f"{describe_steps(evidence.cifar10[group])} RegTop-k minus Top-k in points by {('density', 'mu')[place]}, " + "; ".join(parts),
        len(common), describe_many(comparisons), logs_of(evidence.cifar10[group]),
    )  # fmt: skip


def describe_many(comparisons):
    """Return the smallest of several p values, corrected for their number."""
    values = [comparison.p for comparison in comparisons if comparison.p is not None]
    if not values:
        return "none with one seed"
    return f"{len(values)} paired t-tests: smallest p {min(values):.2g}, corrected for their number {min(1.0, len(values) * min(values)):.2g}"


def command(options, also):
    return f"`{COMMAND} {options}`, {also}"


def comparison_claim(group, title, options, seeds, expected="open in the paper", of=None, **settings):
    """Return the row of one group that compares RegTop-k and Top-k at one density; `of`: a wider group that has the runs too."""
    folder = f"--folder runs/cifar10/{group}/regtopk-s0"
    return Claim(group, title, command(f"{options} {folder}", f"topk and dense too; {seeds}"), expected, f"cifar10_{group}",
                 lambda evidence: find_accuracy(evidence, of or group, **settings))  # fmt: skip


TINY = "--model tiny --steps 1000"

CLAIMS = [
    comparison_claim("density-0.001", "Fig. 3: ResNet-18, N = 8, batch 20, lr 0.01, density 0.001, mu 5: RegTop-k is more accurate",
                     "--method regtopk --steps 1500", "seeds 0, 1, 2", "more than 8 points over Top-k", against=PAPER_GAIN),
    Claim("density-0.001-overlap", "The same runs: entries sent twice running and displaced, the only place where RegTop-k differs",
          command("--method regtopk --steps 1500 --folder runs/cifar10/density-0.001/regtopk-s0", "topk too; seeds 0, 1, 2"),
          "not in the paper", "cifar10_density-0.001", lambda evidence: find_overlap(evidence, "density-0.001")),
    comparison_claim("density-0.001-long", "Twice as long: 3,000 steps", "--method regtopk --steps 3000", "seed 0"),
    *(comparison_claim(f"density-{density}", f"ResNet-18, density {density}, 600 steps", f"--method regtopk --density {density} --steps 600",
                       "seed 0", of=BY_DENSITY, density=float(density)) for density in ("0.0001", "0.01", "0.1")),
    Claim(BY_DENSITY, "ResNet-18, 600 steps: sensitivity to the density",
          command("--method regtopk --density 0.01 --steps 600 --folder runs/cifar10/density-0.01/regtopk-s0", "densities 0.0001, 0.001, 0.1 and topk too; seed 0"),
          "open in the paper", f"cifar10_{BY_DENSITY}_by_density", lambda evidence: find_by_option(evidence, BY_DENSITY, 0)),
    Claim("density-0.01-mu", "ResNet-18, density 0.01, 600 steps: sensitivity to mu",
          command("--method regtopk --density 0.01 --mu 50 --steps 600 --folder runs/cifar10/density-0.01/regtopk-mu50-s0", "mu 0.5, 1, 2, 5, 10 and topk too; seed 0"),
          "open in the paper", "cifar10_density-0.01_by_mu", lambda evidence: find_by_option(evidence, "density-0.01", 1)),
    comparison_claim("partition-labels", "Images sorted by label, ResNet-18, density 0.01, 600 steps",
                     "--method regtopk --density 0.01 --partition labels --steps 600", "seed 0", loss=True),
    comparison_claim("partition-dirichlet", "Dirichlet 0.1, ResNet-18, density 0.01, 600 steps",
                     "--method regtopk --density 0.01 --partition dirichlet --steps 600", "seed 0", loss=True),
    comparison_claim("mobilenet_v2", "MobileNetV2, density 0.01, 600 steps", "--method regtopk --density 0.01 --model mobilenet_v2 --steps 600", "seeds 0, 1, 2"),
    comparison_claim("vgg11_bn", "VGG-11-BN, density 0.01, 300 steps", "--method regtopk --density 0.01 --model vgg11_bn --steps 300", "seed 0"),
    comparison_claim("local-40", "As the authors' script as far as it can be had: 40 local steps a round, density 0.0001, no pretrained weights; 15 rounds",
                     "--method regtopk --density 0.0001 --local-steps 40 --steps 15 --evaluate-every 5", "seed 0", "open in the paper"),
    Claim("tiny-density", "Where overlap is high: the two-layer network `tiny`, 1,000 steps, mu 5, by density",
          command(f"--method regtopk {TINY} --density 0.3 --folder runs/cifar10/tiny-density/regtopk-d0.3-s0", "densities 0.001, 0.01, 0.1, topk and dense too; seeds 0…4"),
          "open in the paper", "cifar10_tiny-density_by_density", lambda evidence: find_by_option(evidence, "tiny-density", 0)),
    Claim("tiny-mu", "The same at density 0.3, by mu",
          command(f"--method regtopk {TINY} --density 0.3 --mu 50 --folder runs/cifar10/tiny-mu/regtopk-mu50-s0", "mu 0.5, 1, 2, 10 and topk too; seeds 0…4"),
          "open in the paper", "cifar10_tiny-mu_by_mu", lambda evidence: find_by_option(evidence, "tiny-mu", 1)),
    comparison_claim("tiny-labels", "The same network, images sorted by label, density 0.1",
                     f"--method regtopk {TINY} --density 0.1 --partition labels", "seeds 0…4", loss=True),
    comparison_claim("tiny-dirichlet", "The same network, Dirichlet 0.1, density 0.1",
                     f"--method regtopk {TINY} --density 0.1 --partition dirichlet", "seeds 0…4", loss=True),
]  # fmt: skip
