"""Define a claim, what the logs show of it, and the logs that all claims are held against."""

from dataclasses import dataclass, field

from experiments import evidence as committed


@dataclass(frozen=True)
class Finding:
    """What the logs show of one claim.

    found: in words and numbers, with the spread; n: number of seeds; test: the test over seeds, in words; logs: paths
    below results; comparison: the paired test behind `test`, where there is one.
    """

    found: str
    n: int
    test: str
    logs: list
    comparison: object = None


@dataclass(frozen=True)
class Claim:
    """One row: `name` is its anchor, `figure` the name of a file in figures/, `find(evidence)` its Finding or None."""

    name: str
    claim: str
    command: str
    expected: str
    figure: str
    find: object


@dataclass
class Evidence:
    """All committed logs: rows of the toy and of the regression, finished runs by group."""

    toy: list = field(default_factory=list)
    regression: list = field(default_factory=list)
    cifar10: dict = field(default_factory=dict)


def read_evidence(results=committed.RESULTS):
    return Evidence(committed.toy_rows(results), committed.regression_rows(results), committed.cifar10_runs(results))
