"""Answer "Does it help?" in a few lines, from the committed logs alone."""

from statistics import fmean

from experiments.claims_cifar10 import PAPER_GAIN, accuracies, choose_pair, find_accuracy, pair_up
from experiments.claims_regression import CURRENT, HOMOGENEOUS, PREVIOUS, find_gap, find_jump, find_printed
from experiments.evidence import BY_DENSITY, select
from experiments.paired_test import compare, number

TABLE = "experiments/README.md"
OTHER_JOBS = (  # group, settings of find_accuracy, name
    (BY_DENSITY, {"density": 0.0001}, "ResNet-18 at density 0.0001"),
    (BY_DENSITY, {"density": 0.01}, "at 0.01"),
    (BY_DENSITY, {"density": 0.1}, "at 0.1"),
    ("density-0.001-long", {}, "3,000 steps at 0.001"),
    ("partition-labels", {}, "images sorted by label, 0.01"),
    ("partition-dirichlet", {}, "Dirichlet 0.1, 0.01"),
    ("mobilenet_v2", {}, "MobileNetV2, 0.01"),
    ("vgg11_bn", {}, "VGG-11-BN, 0.01"),
    ("local-40", {}, "15 rounds of 40 local steps, 0.0001"),
)


def link(text, claim):
    return f"[{text}]({TABLE}#{claim})"


def mean_gap(evidence, wanted, density):
    rows = select(evidence.regression, homogeneous=False, dtype="float64", density=density, **wanted)
    return number(fmean(row["log10_gap"] for row in rows if row["log10_gap"] is not None), 1)


def summarise_regression(evidence):
    """Say at which densities of the paper's Fig. 2 RegTop-k ends closer to the minimiser than Top-k."""
    parts = []
    for density in (0.6, 0.5, 0.4):
        finding = find_gap(evidence, density)
        if finding is None:
            continue
        gaps = [mean_gap(evidence, wanted, density) for wanted in (PREVIOUS, {"method": "topk"})]
        verdict = "" if finding.comparison.shown else ", a difference that the paired test does not show"
        parts.append(f"{link(f'{density:g}', f'fig-2-density-{density:g}')}: {gaps[0]} against {gaps[1]}{verdict} (n = {finding.n})")
    if not parts:
        return None
    return f"* Linear regression of the paper, fp64: log10 of the squared gap by density, RegTop-k against Top-k: {'; '.join(parts)}."


def summarise_jump(evidence):
    finding = find_jump(evidence)
    return None if finding is None else f"* {link('On the way', 'fig-2-to-the-end')}, at density 0.6, RegTop-k's gap was: {finding.found}."


def summarise_printed(evidence):
    finding = find_printed(evidence)
    if finding is None:
        return None
    gaps = [mean_gap(evidence, wanted, 0.6) for wanted in (CURRENT, {"method": "topk"})]
    better = finding.comparison.shown and finding.comparison.mean < 0
    return (
        f"* The form printed in the paper, `distortion=\"current\"`, {'ends closer than Top-k' if better else 'gains nothing'} there: "
        f"{link(f'{gaps[0]} against {gaps[1]} at density 0.6', 'fig-2-printed')}."
    )


def summarise_homogeneous(evidence):
    finding = find_gap(evidence, 0.6, HOMOGENEOUS)
    return None if finding is None else f"* With {link('homogeneous workers', 'fig-2-homogeneous')} at density 0.6: {finding.found} (n = {finding.n})."


def summarise_fig_3(evidence):
    """Say what became of the paper's gain on ResNet-18, and in how many entries the two methods can differ at all."""
    finding = find_accuracy(evidence, "density-0.001")
    if finding is None:
        return [f"* ResNet-18 on CIFAR-10 at density 0.001: {link('not run yet', 'density-0.001')}."]
    comparison = finding.comparison
    if comparison.n < 2:
        verdict = "one seed, so no test"
    elif not comparison.shown:
        verdict = "no difference shown"
    else:
        verdict = "RegTop-k is more accurate" if comparison.mean > 0 else "RegTop-k is less accurate"
    if comparison.excludes(PAPER_GAIN) and comparison.mean < PAPER_GAIN:
        verdict += f"; the paper's gain of more than {PAPER_GAIN:g} points is outside the interval"
    lines = [f"* ResNet-18 on CIFAR-10, {link('density 0.001', 'density-0.001')}: {finding.found}; {verdict} ({comparison.describe(' points')}; n = {finding.n})."]
    _, _, regtopk, topk = choose_pair(evidence.cifar10["density-0.001"])
    twice = fmean(100 * run.share("repeated") for run in topk.values())
    displaced = fmean(100 * run.share("displaced") for run in regtopk.values())
    sent = fmean(run.result["statistics"]["bytes_sent"] / run.result["statistics"]["bytes_dense"] for run in regtopk.values())
    lines.append(
        f"* RegTop-k differs from Top-k only in entries sent the step before that Top-k would send again, {link(f'{twice:.1f} % of those that Top-k sent', 'density-0.001-overlap')} at that density; "
        f"it displaced {displaced:.1f} % of what it sent. Both send {100 * sent:.2f} % of the bytes of a dense exchange."
    )
    return lines


def summarise_other_jobs(evidence):
    """Say what other densities, lengths, partitions, networks and protocols gave, a line for what has been run of them."""
    parts = []
    for group, settings, name in OTHER_JOBS:
        finding = find_accuracy(evidence, group, **settings)
        if finding is None:
            continue
        _, _, regtopk, _ = choose_pair(evidence.cifar10[group], **settings)
        displaced = fmean(100 * run.share("displaced") for run in regtopk.values())
        row = f"density-{settings['density']:g}" if settings else group
        test = "" if finding.comparison.p is None else f", n = {finding.n}, p {finding.comparison.p:.2g}"
        parts.append(f"{link(name, row)} {number(finding.comparison.mean, 2)} ({displaced:.1f} %{test})")
    return f"* In one pair of runs each unless n says otherwise, RegTop-k minus Top-k in points, and what it displaced: {'; '.join(parts)}." if parts else None


def summarise_tiny(evidence):
    """Say where overlap was high, and whether it mattered."""
    parts = []
    for density, _, regtopk, topk in sorted(pair_up(evidence.cifar10.get("tiny-density", [])), key=lambda pair: pair[0]):
        comparison = compare(accuracies(regtopk), accuracies(topk))
        displaced = fmean(100 * run.share("displaced") for run in regtopk.values())
        parts.append(f"{density:g}: {displaced:.1f} % displaced, {number(comparison.mean, 2)} points" + ("" if comparison.shown else " (p ≥ 0.05)"))
    return f"* A two-layer network on CIFAR-10, {link('by density', 'tiny-density')}, RegTop-k minus Top-k: {'; '.join(parts)}." if parts else None


def format_summary(evidence):
    """Return at most ten lines of Markdown."""
    lines = [summarise_regression(evidence), summarise_jump(evidence), summarise_printed(evidence), summarise_homogeneous(evidence), *summarise_fig_3(evidence), summarise_other_jobs(evidence), summarise_tiny(evidence)]
    return "\n".join(line for line in lines if line)
