"""Read the committed logs, of which figures and documents are made, and nothing else."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.sweeps import EARLIER, RUN_KEYS
from runlog.record import read_log, read_logs

RESULTS = Path(__file__).resolve().parent.parent / "results"
BY_DENSITY, DENSITY_GROUP = "resnet18-density", re.compile(r"density-[0-9.]+")
SCRIPT_MU = 5.0  # that of the authors' ResNet-18 script, and of every run that does not vary it


@dataclass(frozen=True)
class Run:
    """One finished run: a row of a sweep, or a training run on CIFAR-10.

    log: path below results; options: how it was run, None for what its method does not use; losses: [(step, loss)]; tests: its
    "test" records; result: its row, or its last record.
    """

    log: str
    data: str | None
    seed: int | None
    options: dict
    losses: list
    tests: list
    result: dict

    @property
    def configuration(self):
        """(method, density, mu, distortion)."""
        return tuple(self.options[key] for key in RUN_KEYS[:4])

    @property
    def length(self):
        """In words, such as "1,500 steps"."""
        return f"{self.result['step']:,} {'rounds' if self.options['local_steps'] > 1 else 'steps'}"

    def value(self, name):
        """Return a number of the result; in percent "accuracy", and of the entries sent those "repeated" and "displaced"."""
        if name in ("repeated", "displaced"):
            return 100 * self.result["statistics"][name] / self.result["statistics"]["sent_entries"]
        return 100 * self.result[name] if name == "accuracy" else self.result[name]

    def cut(self, step):
        """Return the run as it stood at `step`, one of those at which it was tested; raise ValueError at any other."""
        if step == self.result["step"]:
            return self
        tests = [test for test in self.tests if test["step"] <= step]
        if not tests or tests[-1]["step"] != step:
            raise ValueError(f"{self.log}: expected a test at step {step}, got {[test['step'] for test in self.tests]}")
        losses = [point for point in self.losses if point[0] <= step]
        return replace(self, losses=losses, tests=tests, result={"step": step, "accuracy": tests[-1]["accuracy"], "statistics": tests[-1]})


def select(runs, **wanted):
    """Return the runs whose options are those given."""
    return [run for run in runs if all(run.options[key] == value for key, value in wanted.items())]


def at_common_seeds(groups):
    """Return the groups, lists of runs, at the seeds that all of them have, in the order of the seeds."""
    common = set.intersection(*({run.seed for run in runs} for runs in groups))
    return [sorted((run for run in runs if run.seed in common), key=lambda run: run.seed) for runs in groups]


def pair(runs, first, second):
    """Return two lists, the runs with the options `first` and those with `second`, at the seeds that both have."""
    return at_common_seeds([select(runs, **first), select(runs, **second)])


def finished_run(header, records, log):
    """Return the Run of a log, `log` its path; raise ValueError for one that does not end with a result: it has not finished, or goes on."""
    if not records or records[-1]["event"] != "result":
        raise ValueError(f"finished_run: expected a finished run in {log}, got a log that does not end with a result")
    options = dict(header["options"])
    for key in {"dense": RUN_KEYS[1:4], "topk": RUN_KEYS[2:4], "regtopk": ()}[options["method"]]:
        options[key] = None
    losses = [(record["step"], record["loss"]) for record in records if record["event"] == "step"]
    tests = [record for record in records if record["event"] == "test"]
    return Run(log, header["data"], header["seed"], options, losses, tests, records[-1])


def read_run(folder):
    """Return the Run whose log is in the run folder; raise ValueError for one that has not finished."""
    return finished_run(*read_log(folder), folder)


def _read_sweeps(results, name):
    """Return the Runs of the sweeps, several in a log, below `results` / `name`."""
    return [
        Run(path.relative_to(results).as_posix(), None, row["seed"], EARLIER | header["settings"] | row, [], [], row)
        for path in sorted(results.glob(f"{name}/*.jsonl")) for header, records in read_logs(path) for row in records if row["event"] == "run"
    ]  # fmt: skip


class Evidence:
    """All committed logs: runs of the toy, of the regression, of the ends of training, of equal bytes, of the language model, and of CIFAR-10
    by group.

    A group's runs are sorted. Last comes the group BY_DENSITY: those of the groups density-D, each as it stood where the shortest
    ended, so that they differ in density alone.
    """

    def __init__(self, results=RESULTS):
        names = ("toy_logistic", "linear_regression", "end_of_training", "equal_bytes", "language_model")
        self.toy, self.regression, self.endings, self.equal_bytes, self.language = (_read_sweeps(results, name) for name in names)
        self.cifar10 = {}
        for path in sorted(results.glob("cifar10/*.jsonl")):
            runs = [finished_run(*log, path.relative_to(results).as_posix()) for log in read_logs(path)]
            self.cifar10[path.stem] = sorted(runs, key=lambda run: [(part is not None, part or 0) for part in (*run.configuration[:3], run.seed)])
        groups = [runs for group, runs in self.cifar10.items() if DENSITY_GROUP.fullmatch(group)]
        if len(groups) > 1:
            shortest = min(run.result["step"] for runs in groups for run in runs)
            self.cifar10[BY_DENSITY] = [run.cut(shortest) for runs in groups for run in runs if run.options["mu"] in (None, SCRIPT_MU)]
