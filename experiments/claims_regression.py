"""State what the logs show of the paper's toy and of its linear regression."""

from statistics import fmean

from experiments.claim import Claim, Finding
from experiments.evidence import by_seed, select
from experiments.paired_test import SIGNIFICANT, compare, number, spread
from experiments.plot_regression import MU, PROBLEMS

PREVIOUS = {"method": "regtopk", "mu": MU, "distortion": "previous"}
CURRENT = {"method": "regtopk", "mu": MU, "distortion": "current"}
HETEROGENEOUS, HOMOGENEOUS, SINGLE = (settings for _, settings in PROBLEMS)
TOY_DENSE_FROM = 10
SWEEP = "python -m experiments.linear_regression"
SEEDS = "--seed 0 1 2 3 4"
LOGS = "--out runs/linear_regression"


def find_toy_topk(evidence):
    rows = select(evidence.toy, method="topk")
    if not rows:
        return None
    losses = rows[0]["losses"]
    return Finding(f"loss {min(losses):.4f}…{max(losses):.4f} over {len(losses) - 1} steps", 1, "none: nothing is random", [rows[0]["log"]])


def find_toy_regtopk(evidence):
    dense, rows = select(evidence.toy, method="dense"), select(evidence.toy, method="regtopk")
    if not dense or not rows:
        return None
    expected, parts = dense[0]["losses"], []
    for row in rows:
        apart = [abs(loss / wanted - 1) for loss, wanted in zip(row["losses"], expected)]
        near = next((step for step in range(len(apart)) if max(apart[step:]) < 0.05), None)
        since = f"within 5 % from step {near}" if near is not None else "not within 5 %"
        parts.append(f"{row['distortion']}: {since}, {row['losses'][50]:.4f} at step 50")
    return Finding(f"dense {expected[50]:.4f} at step 50; " + "; ".join(parts), 1, "none: nothing is random", [rows[0]["log"]])


def logs_of(rows):
    return sorted({row["log"] for row in rows})


def finite(rows):
    return [row for row in rows if row["log10_gap"] is not None]


def find_gap(evidence, density, settings=HETEROGENEOUS, wanted=PREVIOUS, name="RegTop-k"):
    """Compare the final gap with Top-k's at one density; None without both."""
    rows = select(finite(evidence.regression), **settings, density=density)
    regtopk, topk = select(rows, **wanted), select(rows, method="topk")
    comparison = compare(by_seed(regtopk, "log10_gap"), by_seed(topk, "log10_gap"))
    if comparison is None:
        return None
    common = {row["seed"] for row in regtopk} & {row["seed"] for row in topk}
    gaps = [[row["log10_gap"] for row in some if row["seed"] in common] for some in (regtopk, topk)]
    text = f"{name} {spread(gaps[0], 1)} ({number(min(gaps[0]), 1)}…{number(max(gaps[0]), 1)}), Top-k {spread(gaps[1], 1)}"
    return Finding(text, comparison.n, comparison.describe(digits=1), logs_of([*regtopk, *topk]), comparison)


def find_gaps(evidence, settings, only=None):
    """List RegTop-k's and Top-k's mean final gap at every density that both have."""
    rows = select(finite(evidence.regression), **settings)
    densities = sorted({row["density"] for row in select(rows, **PREVIOUS)} & {row["density"] for row in select(rows, method="topk")})
    found = {density: find_gap(evidence, density, settings) for density in densities if only is None or density in only}
    found = {density: finding for density, finding in found.items() if finding is not None}
    if not found:
        return None
    means = {}
    for density in found:
        here = select(rows, density=density)
        pair = [by_seed(select(here, **wanted), "log10_gap") for wanted in (PREVIOUS, {"method": "topk"})]
        common = set(pair[0]) & set(pair[1])
        means[density] = f"{density:g}: " + " against ".join(number(fmean(gaps[seed] for seed in common), 1) for gaps in pair)
    tested = {density: finding.comparison for density, finding in found.items() if finding.comparison.p is not None}
    shown = ", ".join(f"{density:g}" for density, comparison in tested.items() if comparison.shown) or "none"
    test = f"{len(tested)} paired t-tests, uncorrected: p < {SIGNIFICANT:g} at {shown}" if tested else "none with one seed"
    logs = sorted({log for finding in found.values() for log in finding.logs})
    return Finding("; ".join(means.values()), min(finding.n for finding in found.values()), test, logs)


def find_jump(evidence):
    """Find how low the gap of RegTop-k at density 0.6 was before the last step, and how it ended."""
    rows = select(finite(evidence.regression), **HETEROGENEOUS, **PREVIOUS, density=0.6)
    if not rows:
        return None
    lowest, steps, highest = [], [], []
    for row in rows:
        curve = [point for point in row["curve"] if point[1] is not None]
        index = min(range(len(curve)), key=lambda i: curve[i][1])
        lowest.append(curve[index][1])
        steps.append(curve[index][0])
        highest.append(max(gap for _, gap in curve[index:]))
    text = (
        f"lowest {spread(lowest, 1)} at steps {min(steps)}…{max(steps)}; after that back up to {spread(highest, 1)}; "
        f"{spread([row['log10_gap'] for row in rows], 1)} at the last step"
    )
    return Finding(text, len(rows), "none", logs_of(rows))


def find_mu(evidence, density):
    rows = select(finite(evidence.regression), **HETEROGENEOUS, density=density)
    parts, logs, n = [], [], []
    for distortion in ("previous", "current"):
        own = select(rows, method="regtopk", distortion=distortion)
        mus = sorted({row["mu"] for row in own})
        if len(mus) > 2:
            gaps = {mu: [row["log10_gap"] for row in select(own, mu=mu)] for mu in mus}
            parts.append(f"{distortion}: " + ", ".join(f"{mu:g}: {number(fmean(values), 1)}" for mu, values in gaps.items()))
            logs += logs_of(own)
            n += map(len, gaps.values())
    if not parts:
        return None
    return Finding("mean gap by mu, " + "; ".join(parts), min(n), "none; bars in the figure", sorted(set(logs)))


def find_genie(evidence):
    rows = select(finite(evidence.regression), **HETEROGENEOUS, method="genie")
    dense = select(finite(evidence.regression), **HETEROGENEOUS, method="dense")
    if not rows or not dense:
        return None
    densities = sorted({row["density"] for row in rows})
    gaps, reference = [row["log10_gap"] for row in rows], [row["log10_gap"] for row in dense]
    text = f"{number(min(gaps), 1)}…{number(max(gaps), 1)} at densities {densities[0]:g}…{densities[-1]:g}, dense {spread(reference, 1)}"
    return Finding(text, len(dense), "none", logs_of(rows))


def sweep(options, log):
    return f"`{SWEEP} {options} {SEEDS} {LOGS}/{log}.jsonl`"


def find_printed(evidence):
    return find_gap(evidence, 0.6, wanted=CURRENT, name="as printed")


BOTH = "--method topk regtopk"
ALL = "--method dense genie topk regtopk"
TOY = "`python -m experiments.toy_logistic --method dense topk regtopk --distortion previous current --out runs/toy_logistic/toy.jsonl`"

CLAIMS = [
    Claim("fig-1-top-1", "Fig. 1: Top-1 does not move for 100 steps", TOY, "loss stays 0.3133", "toy_logistic", find_toy_topk),
    Claim("fig-1-regtop-1", "Fig. 1: RegTop-1 (mu 1) follows dense", TOY,
          "within 5 %; at step 50 dense 0.0215, RegTop-1 0.0205", "toy_logistic", find_toy_regtopk),
    *(
        Claim(f"fig-2-density-{density:g}", f"Fig. 2, density {density:g}: log10 of the squared gap, mu 4, {note}",
              sweep(f"{BOTH} --density {density:g}", "density"), expected, "linear_regression_curves",
              lambda evidence, density=density: find_gap(evidence, density))
        for density, note, expected in (
            (0.6, "RegTop-k converges, Top-k does not", "RegTop-k −17.6…−22.2, Top-k −2.6…−3.3"),
            (0.5, "RegTop-k comes closer", "RegTop-k −4.1…−5.1, Top-k −2.4…−3.0"),
            (0.4, "no gain", "the same for both"),
        )
    ),
    Claim("fig-2-to-the-end", "Fig. 2, density 0.6: how RegTop-k gets there",
          sweep("--method regtopk --density 0.6", "density"), "follows dense", "linear_regression_curves", find_jump),
    Claim("fig-2-printed", "Algorithm 1 as printed (current) at density 0.6, mu 4", sweep("--method topk regtopk --distortion current --density 0.6", "density"),
          "never better than −3.5", "linear_regression_curves", find_printed),
    Claim("fig-2-densities", "Other densities, mu 4: RegTop-k against Top-k", sweep(f"{BOTH} --density 0.2 0.3 0.7 0.8", "density"),
          "no gain below 0.5, gain above", "linear_regression_density", lambda evidence: find_gaps(evidence, HETEROGENEOUS, (0.2, 0.3, 0.7, 0.8))),
    *(
        Claim(f"fig-2-mu-{density:g}", f"Sensitivity to mu at density {density:g}",
              sweep(f"--method regtopk --density {density:g} --mu {mus}", "mu"), "open in the paper", "linear_regression_mu",
              lambda evidence, density=density: find_mu(evidence, density))
        for density, mus in ((0.5, "0.1 1 2 4 8 20 200"), (0.6, "0.1 0.5 1 2 4 8 20 50 200"))
    ),
    Claim("fig-2-genie", "Top-k of the true aggregate, which RegTop-k estimates", sweep("--method dense genie --density 0.2 0.3 0.4 0.5 0.6 0.7 0.8", "density"),
          "as dense", "linear_regression_density", find_genie),
    Claim("fig-2-homogeneous", "Homogeneous workers (one model t for all), mu 4: RegTop-k against Top-k",
          sweep(f"{ALL} --density 0.2 0.4 0.5 0.6 0.8 --homogeneous", "homogeneous"), "open in the paper", "linear_regression_density",
          lambda evidence: find_gaps(evidence, HOMOGENEOUS)),
    Claim("fig-2-fp32", "The same in fp32, heterogeneous, mu 4: RegTop-k against Top-k",
          sweep(f"{BOTH} --density 0.5 0.6 --dtype float32", "float32"), "stops at −8…−12", "linear_regression_density",
          lambda evidence: find_gaps(evidence, SINGLE)),
]  # fmt: skip
