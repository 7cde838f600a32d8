"""Compare two methods over seeds: the paired t-test, its interval, and what to say of them."""

from dataclasses import dataclass
from statistics import fmean, stdev

CONFIDENCE, SIGNIFICANT = 0.95, 0.05


@dataclass(frozen=True)
class Comparison:
    """First minus second over the seeds that both have.

    mean: of the differences; low, high: its interval at CONFIDENCE; p: two-sided, of the paired t-test against 0. The
    last three are None where there is no test: fewer than two seeds, or all differences equal.
    """

    n: int
    mean: float
    low: float | None = None
    high: float | None = None
    p: float | None = None

    @property
    def shown(self):
        """Whether the test shows a difference."""
        return self.p is not None and self.p < SIGNIFICANT

    def describe(self, unit="", digits=2):
        """Return the test in words, such as "paired t: -0.20 points (95 % -0.81...0.41), p 0.3"."""
        amount = f"{number(self.mean, digits)}{unit}"
        if self.n < 2:
            return f"none with one seed; difference {amount}"
        if self.p is None:
            return f"none: every difference is {amount}"
        return f"paired t: {amount} ({CONFIDENCE:.0%} {number(self.low, digits)}…{number(self.high, digits)}), p {self.p:.2g}"


def compare(first, second):
    """Return the Comparison of two lists of values, of the same seeds in the same order; at least one."""
    differences = [one - other for one, other in zip(first, second, strict=True)]
    if min(differences) == max(differences):
        return Comparison(len(differences), differences[0])
    from scipy import stats

    result = stats.ttest_1samp(differences, 0.0)
    low, high = map(float, result.confidence_interval(CONFIDENCE))
    return Comparison(len(differences), fmean(differences), low, high, float(result.pvalue))


def describe_several(comparisons):
    """Return the tests of {label: Comparison} in words, such as "2 paired t-tests, uncorrected: p < 0.05 at 0.3"."""
    tested = [comparison for comparison in comparisons.values() if comparison.p is not None]
    shown = ", ".join(label for label, comparison in comparisons.items() if comparison.shown) or "none"
    return f"{len(tested)} paired t-tests, uncorrected: p < {SIGNIFICANT:g} at {shown}" if tested else "none with one seed"


def number(value, digits):
    """Return a number with a true minus sign; never -0."""
    text = f"{value:.{digits}f}"
    return (text.lstrip("-") if float(text) == 0 else text).replace("-", "−")


def spread(values, digits=2):
    """Return mean ± standard deviation, the mean alone for one value."""
    values = list(values)
    text = number(fmean(values), digits)
    return text if len(values) < 2 else f"{text} ± {stdev(values):.{digits}f}"
