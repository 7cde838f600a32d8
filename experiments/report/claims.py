"""Find what the logs show of each claim, and fill it into the documents, which state the claim."""

import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean

from experiments.report.logs import BY_DENSITY, SCRIPT_MU, at_common_seeds, pair, select
from experiments.report.paired_test import compare, describe_several, number, spread
from regtopk_torch.options import COMMON
from runlog.document import replace as replace_between

STATED = 3  # cells of a row that the document itself states: claim, command, expected
PAPER_GAIN = 8.0  # points
MU = 4.0  # the authors' for the linear regression
BUDGETS = "<!-- budgets: begin -->"  # the mark of a table
USUAL_BUDGET = 0.005  # of the language model
TOPK = {"method": "topk"}
PREVIOUS = {"method": "regtopk", "mu": MU, "distortion": "previous"}
CURRENT = {"method": "regtopk", "mu": MU, "distortion": "current"}
PROBLEMS = [{"homogeneous": same, "dtype": dtype, "support": "own"} for same, dtype in ((False, "float64"), (True, "float64"), (False, "float32"))]
HETEROGENEOUS, HOMOGENEOUS, SINGLE = PROBLEMS


@dataclass(frozen=True)
class Finding:
    """What the logs show of one claim: words, the number of seeds, the test over them in words, the runs, the Comparison."""

    found: str
    n: int
    test: str
    runs: list
    comparison: object = None


def values(name, runs):
    return [run.value(name) for run in runs]


def mean(name, runs, digits):
    return number(fmean(values(name, runs)), digits)


def find_toy_topk(evidence):
    runs = select(evidence.toy, method="topk")
    losses = runs[0].value("losses")
    return Finding(f"loss {min(losses):.4f}…{max(losses):.4f} over {len(losses) - 1} steps", 1, "none: nothing is random", runs)


def find_toy_regtopk(evidence):
    dense, runs = (select(evidence.toy, method=method) for method in ("dense", "regtopk"))
    expected, parts = dense[0].value("losses"), []
    for run in runs:
        apart = [abs(loss / wanted - 1) for loss, wanted in zip(run.value("losses"), expected)]
        near = next((step for step in range(len(apart)) if max(apart[step:]) < 0.05), None)
        since = f"within 5 % from step {near}" if near is not None else "not within 5 %"
        parts.append(f"{run.options['distortion']}: {since}, {run.value('losses')[50]:.4f} at step 50")
    return Finding(f"dense {expected[50]:.4f} at step 50; {'; '.join(parts)}", 1, "none: nothing is random", runs)


def find_gap(evidence, density, wanted=PREVIOUS, name="RegTop-k"):
    """Compare the final gap with Top-k's at one density."""
    regtopk, topk = pair(select(evidence.regression, **HETEROGENEOUS, density=density), wanted, TOPK)
    gaps, others = values("log10_gap", regtopk), values("log10_gap", topk)
    comparison = compare(gaps, others)
    text = f"{name} {spread(gaps, 1)} ({number(min(gaps), 1)}…{number(max(gaps), 1)}), Top-k {spread(others, 1)}"
    return Finding(text, comparison.n, comparison.describe(digits=1), [*regtopk, *topk], comparison)


def find_gaps(evidence, settings, only=None):
    """List RegTop-k's and Top-k's mean final gap at every density that both have, or at those of `only`."""
    pairs = pairs_of(select(evidence.regression, **settings))
    pairs = {f"{density:g}": both for (density, mu), both in pairs.items() if mu == MU and (only is None or density in only)}
    text = "; ".join(f"{density}: {' against '.join(mean('log10_gap', runs, 1) for runs in both)}" for density, both in pairs.items())
    test = describe_several({density: compare(*(values("log10_gap", runs) for runs in both)) for density, both in pairs.items()})
    return Finding(text, min(len(topk) for _, topk in pairs.values()), test, [run for both in pairs.values() for runs in both for run in runs])


def find_jump(evidence):
    """Find how low the gap of RegTop-k at density 0.6 was before the last step, and how it ended."""
    runs = select(evidence.regression, **HETEROGENEOUS, **PREVIOUS, density=0.6)
    curves = [[point for point in run.value("curve") if point[1] is not None] for run in runs]
    lowest = [min(curve, key=lambda point: point[1]) for curve in curves]
    highest = [max(gap for step, gap in curve if step >= start) for curve, (start, _) in zip(curves, lowest)]
    steps = [step for step, _ in lowest]
    text = f"lowest {spread((gap for _, gap in lowest), 1)} at steps {min(steps)}…{max(steps)}; after that back up to {spread(highest, 1)}; "
    return Finding(f"{text}{spread(values('log10_gap', runs), 1)} at the last step", len(runs), "none", runs)


def find_mu(evidence, density):
    parts, runs, n = [], [], []
    for distortion in ("previous", "current"):
        own = select(evidence.regression, **HETEROGENEOUS, density=density, method="regtopk", distortion=distortion)
        by_mu = {mu: select(own, mu=mu) for mu in sorted({run.options["mu"] for run in own})}
        if len(by_mu) > 2:
            parts.append(f"{distortion}: " + ", ".join(f"{mu:g}: {mean('log10_gap', some, 1)}" for mu, some in by_mu.items()))
            runs, n = [*runs, *own], [*n, *map(len, by_mu.values())]
    return Finding(f"mean gap by mu, {'; '.join(parts)}", min(n), "none; bars in the figure", runs)


def find_genie(evidence):
    runs, dense = (select(evidence.regression, **HETEROGENEOUS, method=method) for method in ("genie", "dense"))
    gaps, densities = values("log10_gap", runs), sorted({run.options["density"] for run in runs})
    text = f"{number(min(gaps), 1)}…{number(max(gaps), 1)} at densities {densities[0]:g}…{densities[-1]:g}"
    return Finding(f"{text}, dense {spread(values('log10_gap', dense), 1)}", len(dense), "none", runs)


def find_leader(evidence, density):
    """Compare the final gap of Top-k with one worker after the other choosing for all with that of Top-k with each choosing its own."""
    at_density = select(evidence.regression, homogeneous=False, dtype="float64", density=density)
    led, topk = pair(at_density, TOPK | {"support": "leader"}, TOPK | {"support": "own"})
    regularised = select(at_density, **PREVIOUS, support="leader")
    gaps, others = values("log10_gap", led), values("log10_gap", topk)
    comparison = compare(gaps, others)
    text = f"leader {spread(gaps, 1)} ({number(min(gaps), 1)}…{number(max(gaps), 1)}), with RegTop-k's score {spread(values('log10_gap', regularised), 1)}; own {spread(others, 1)}"
    return Finding(text, comparison.n, comparison.describe(digits=1), [*led, *regularised, *topk], comparison)


def pairs_of(runs):
    """Return {(density, mu): (RegTop-k's runs in its "previous" form, Top-k's runs), at the seeds that both have}."""
    options = sorted({(run.options["density"], run.options["mu"]) for run in select(runs, method="regtopk", distortion="previous")})
    found = {(d, mu): pair(runs, {**PREVIOUS, "mu": mu, "density": d}, {**TOPK, "density": d}) for d, mu in options}
    return {key: both for key, both in found.items() if both[0]}


def find_accuracy(evidence, group, density, against=None, loss=False):
    """Compare RegTop-k's test accuracy with Top-k's, mu that of the authors' script, over the seeds that both have in a group.

    `against`: a gain in points that the test cell holds against the interval. `loss`: state the training loss too.
    """
    runs = evidence.cifar10[group]
    regtopk, topk = pairs_of(runs)[density, SCRIPT_MU]
    dense = [run for run in select(runs, method="dense") if run.seed in {other.seed for other in topk}]
    methods = {"RegTop-k": regtopk, "Top-k": topk} | ({"dense": dense} if len(dense) == len(topk) else {})
    text = f"after {runs[0].length} " + ", ".join(f"{name} {spread(values('accuracy', some))} %" for name, some in methods.items())
    if loss:
        text += "; training loss " + ", ".join(f"{name} {spread(values('training_loss', some))}" for name, some in methods.items())
    comparison = compare(values("accuracy", regtopk), values("accuracy", topk))
    test = comparison.describe(" points")
    if against is not None and comparison.low is not None:
        test += f"; {against:g} points lie {'inside' if comparison.low <= against <= comparison.high else 'outside'} the interval"
    return Finding(text, comparison.n, test, [run for some in methods.values() for run in some], comparison)


def find_overlap(evidence, group, density):
    """Find how much was sent twice running and displaced: without either, the two methods are one."""
    regtopk, topk = pairs_of(evidence.cifar10[group])[density, SCRIPT_MU]
    twice, again, displaced = (spread(values(name, runs)) for name, runs in (("repeated", topk), ("repeated", regtopk), ("displaced", regtopk)))
    text = f"of what it sent, Top-k had sent {twice} % the step before, RegTop-k {again} %; RegTop-k displaced {displaced} %"
    return Finding(text, len(topk), "none", [*regtopk, *topk])


def find_by_option(evidence, group, place):
    """List RegTop-k minus Top-k in points by density (place 0 of a pair) or mu (place 1), over the seeds of all of them."""
    runs = evidence.cifar10[group]
    pairs = pairs_of(runs)
    groups = at_common_seeds([some for both in pairs.values() for some in both])
    tests = [compare(values("accuracy", regtopk), values("accuracy", topk)) for regtopk, topk in zip(groups[::2], groups[1::2])]
    parts = [f"{of[place]:g}: {number(test.mean, 2)} (displaced {mean('displaced', own, 1)} %)" for of, test, own in zip(pairs, tests, groups[::2])]
    chances = [test.p for test in tests if test.p is not None]
    test = "none with one seed"
    if chances:
        test = f"{len(chances)} paired t-tests: smallest p {min(chances):.2g}, corrected for their number {min(1.0, len(chances) * min(chances)):.2g}"
    text = f"after {runs[0].length} RegTop-k minus Top-k in points by {('density', 'mu')[place]}, {'; '.join(parts)}"
    return Finding(text, len(groups[0]), test, runs)


def variants_of(runs, option):
    """Return {value of the option: its runs}, in the order of the logs, at the seeds that all values have."""
    names = dict.fromkeys(run.options[option] for run in runs)
    return dict(zip(names, at_common_seeds([select(runs, **{option: name}) for name in names])))


def find_gains(runs, variants):
    """Find the accuracy of the first of {name: its runs}, and what every other one adds to it, at the seeds that both have."""
    (name, usual), *others = variants.items()
    tests = {other: compare(*(values("accuracy", some) for some in at_common_seeds([own, usual]))) for other, own in others}
    gains = ", ".join(f"{other} {number(test.mean, 2)}{'' if test.n == len(usual) else f' (n = {test.n})'}" for other, test in tests.items())
    return Finding(f"{name} {spread(values('accuracy', usual))} %; points more than it: {gains}", len(usual), describe_several(tests), runs)


def find_endings(evidence, model, optimizer):
    """Find the accuracy that training without an ending came to, and what every ending adds to it."""
    runs = select(evidence.endings, model=model, optimizer=optimizer)
    return find_gains(runs, variants_of(runs, "ending"))


def by_sweep(evidence):
    """Return {(stem of the log, density): the runs of equal bytes}."""
    found = {}
    for run in evidence.equal_bytes:
        found.setdefault((Path(run.log).stem, run.options["density"]), []).append(run)
    return found


def find_equal_bytes(evidence, sweep):
    """Find what other ways to spend the bytes add to the usual one, with the losses and how far from equal the bytes in all were."""
    rules = dict(variants_of_each(by_sweep(evidence)[sweep], "rule"))
    found = find_gains(by_sweep(evidence)[sweep], rules)
    losses = ", ".join(f"{rule} {mean('loss', own, 4)}" for rule, own in rules.items())
    pairs = [pair for own in rules.values() for pair in zip(*at_common_seeds([own, rules["fixed"]]), strict=True)]
    against = [run.value("bytes_sent") / fixed.value("bytes_sent") for run, fixed in pairs]
    return replace(found, found=f"{found.found}; test loss {losses}; bytes {min(against):.3f}…{max(against):.3f} times those of fixed")


def at_best_rate(runs):
    """Return {row: its runs at the learning rate with the least mean loss}, over the seeds that all rates of the row have; the least first."""
    rows = {row: variants_of(own, "learning_rate").values() for row, own in variants_of_each(runs, "row")}
    best = {row: min(rates, key=lambda own: fmean(values("loss", own))) for row, rates in rows.items()}
    return dict(sorted(best.items(), key=lambda item: fmean(values("loss", item[1]))))


def variants_of_each(runs, option):
    """Return [(value of the option, all runs that have it)], in the order of the logs."""
    return [(value, select(runs, **{option: value})) for value in dict.fromkeys(run.options[option] for run in runs)]


def language_sweeps(evidence):
    """Return {name: the runs of the language model of one length and one budget of bytes, and of what sends all}."""
    found = {}
    for run in evidence.language:
        budget = run.options.get("budget", USUAL_BUDGET)
        found.setdefault((run.options["steps"], budget), []).append(run)
    dense = {steps: select(runs, row="dense") for (steps, budget), runs in found.items() if budget == USUAL_BUDGET}
    return {
        f"{steps}" if budget == USUAL_BUDGET else f"{steps}-{budget:g}": runs if budget == USUAL_BUDGET else dense[steps] + runs
        for (steps, budget), runs in found.items()
    }


def format_budgets(evidence):
    """Return a table of what came closest to dense training at each budget of bytes, and what came second."""
    lines = ["| steps | of dense training's bytes | closest to it | as a state, at a learning rate | second | s per step on a link of 100 Mbit/s (1 Gbit/s) | dense: s per step |", "|" + "---|" * 7]

    def link(run):
        return f"{run.value('bytes_per_step') * 8e-8:.2g} ({run.value('bytes_per_step') * 8e-9:.2g})"

    for rows in map(at_best_rate, language_sweeps(evidence).values()):
        (dense, *_), least = rows.pop("dense"), min(own[0].value("of_dense") for own in rows.values())
        rows = {row: own for row, own in rows.items() if own[0].value("of_dense") < 1.1 * least}  # the others send more
        best, second = [f"{row}, {spread(values('loss', own), 3)}" for row, own in rows.items()][:2] + [""] * (len(rows) < 2)
        first = next(iter(rows.values()))[0]
        cells = f"{dense.options['steps']:,}", f"{least:.2g}", best, state_of(first), second, link(first), link(dense)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines[:2], *sorted(lines[2:])])


def state_of(run):
    """Return what makes the exchange of a run of the language model, with the learning rate."""
    from experiments.language_model import Row, make_model

    row, numel = Row(run.options["row"]), sum(parameter.numel() for parameter in make_model(run.options["size"], 0).parameters())
    density, given = row.options(numel, run.options["workers"], run.options.get("budget", USUAL_BUDGET))
    parts = [f"{density:.2g}", *(f"{name}={value!r}" for name, value in given.items() if value != COMMON[name])]
    return f"`{'Reg' * (row.method == 'regtopk')}TopKState({', '.join(parts)})`, `every={row.every}`, {run.options['learning_rate']:g}"


def find_language(evidence, sweep):
    """Find the validation loss of each way to send, at the learning rate that was best for it, and its bytes against dense ones'."""
    runs = language_sweeps(evidence)[sweep]
    rows = at_best_rate(runs)
    dense = rows.pop("dense")
    tests = {row: compare(*(values("loss", some) for some in at_common_seeds([own, dense]))) for row, own in rows.items()}
    parts = [f"{row} {spread(values('loss', own), 3)} at {own[0].options['learning_rate']:g} ({own[0].value('of_dense'):.4f})" for row, own in rows.items()]
    text = f"dense {spread(values('loss', dense), 3)} at {dense[0].options['learning_rate']:g}; {', '.join(parts)}"
    seeds = sorted({len(own) for own in (dense, *rows.values())})
    return Finding(text, " to ".join(map(str, dict.fromkeys((seeds[0], seeds[-1])))), describe_several(tests), runs)


# The anchor of each claim's row: its figure, and what finds its cells in the evidence.
CLAIMS = {
    "fig-1-top-1": ("toy_logistic", find_toy_topk),
    "fig-1-regtop-1": ("toy_logistic", find_toy_regtopk),
    **{f"fig-2-density-{density}": ("linear_regression_curves", partial(find_gap, density=density)) for density in (0.6, 0.5, 0.4)},
    "fig-2-to-the-end": ("linear_regression_curves", find_jump),
    "fig-2-printed": ("linear_regression_curves", partial(find_gap, density=0.6, wanted=CURRENT, name="as printed")),
    "fig-2-densities": ("linear_regression_density", partial(find_gaps, settings=HETEROGENEOUS, only=(0.2, 0.3, 0.7, 0.8))),
    **{f"fig-2-mu-{density}": ("linear_regression_mu", partial(find_mu, density=density)) for density in (0.5, 0.6)},
    "fig-2-leader": ("linear_regression_density", partial(find_leader, density=0.05)),
    "fig-2-genie": ("linear_regression_density", find_genie),
    "fig-2-homogeneous": ("linear_regression_density", partial(find_gaps, settings=HOMOGENEOUS)),
    "fig-2-fp32": ("linear_regression_density", partial(find_gaps, settings=SINGLE)),
    "density-0.001": ("cifar10_density-0.001", partial(find_accuracy, group="density-0.001", density=0.001, against=PAPER_GAIN)),
    "density-0.001-overlap": ("cifar10_density-0.001", partial(find_overlap, group="density-0.001", density=0.001)),
    **{f"density-{text}": (f"cifar10_density-{text}", partial(find_accuracy, group=BY_DENSITY, density=float(text))) for text in ("0.0001", "0.01", "0.1")},
    BY_DENSITY: (f"cifar10_{BY_DENSITY}_by_density", partial(find_by_option, group=BY_DENSITY, place=0)),
    "density-0.01-mu": ("cifar10_density-0.01_by_mu", partial(find_by_option, group="density-0.01", place=1)),
    "tiny-density": ("cifar10_tiny-density_by_density", partial(find_by_option, group="tiny-density", place=0)),
    "tiny-mu": ("cifar10_tiny-mu_by_mu", partial(find_by_option, group="tiny-mu", place=1)),
    **{group: (f"cifar10_{group}", partial(find_accuracy, group=group, density=density))
       for group, density in (("density-0.001-long", 0.001), ("mobilenet_v2", 0.01), ("vgg11_bn", 0.01), ("local-40", 0.0001))},
    **{f"{kind}-{labels}": (f"cifar10_{kind}-{labels}", partial(find_accuracy, group=f"{kind}-{labels}", density=density, loss=True))
       for kind, density in (("partition", 0.01), ("tiny", 0.1)) for labels in ("labels", "dirichlet")},
}  # fmt: skip


def claims_of(evidence):
    """Return CLAIMS, and a claim for each model and optimizer whose ends of training, each sweep and density at which ways to spend equal bytes, and
    each length of the language model's training, are in the evidence."""
    ends = dict.fromkeys((run.options["model"], run.options["optimizer"]) for run in evidence.endings)
    found = {f"end-{model}-{optimizer}": partial(find_endings, model=model, optimizer=optimizer) for model, optimizer in ends}
    bytes_of = {f"equal-{stem}-{density:g}": partial(find_equal_bytes, sweep=(stem, density)) for stem, density in by_sweep(evidence)}
    figures = {name: ("end_of_training", find) for name, find in found.items()} | {name: ("equal_bytes", find) for name, find in bytes_of.items()}
    return CLAIMS | figures | {
        f"language-{sweep}": (f"language_model_{sweep}", partial(find_language, sweep=sweep)) for sweep in language_sweeps(evidence)
    }


def fill(document, evidence):
    """Return the document with what the logs show in every row of its tables that begins with a claim's anchor, and in every line
    of its lists that begins with a link to one."""

    def fill_row(row):
        figure, find = claims_of(evidence)[row[1]]
        finding = find(evidence)
        stated = [cell.strip() for cell in row[0].strip("|").split(" | ")[:STATED]]
        logs = ", ".join(f"[{Path(log).stem}](results/{log})" for log in sorted({run.log for run in finding.runs}))
        cells = [*stated, finding.found, str(finding.n), finding.test, logs, f"[figure](figures/{figure}.svg)"]
        return f"| {' | '.join(cells)} |"

    def fill_line(line):
        finding = claims_of(evidence)[line[2]][1](evidence)
        verdict = "" if finding.comparison is None or finding.comparison.shown else "; no difference shown"
        test = "" if finding.test == "none" else f" ({finding.test}; n = {finding.n})"
        return f"{line[1]} {finding.found}{verdict}{test}."

    if BUDGETS in document:
        document = replace_between(document, format_budgets(evidence), BUDGETS)
    document = re.sub(r'^\| <a id="([^"]+)">.*$', fill_row, document, flags=re.MULTILINE)
    return re.sub(r"^(\* \[[^]]+\]\(\S+#([^)]+)\):).*$", fill_line, document, flags=re.MULTILINE)
