"""Read the committed logs: what figures and claims are made of, and nothing else."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.record import read_log
from experiments.sweeps import read_sweep

RESULTS = Path(__file__).resolve().parent / "results"
BY_DENSITY, DENSITY_GROUP = "resnet18-density", re.compile(r"density-[0-9.]+")
SCRIPT_MU = 5.0  # that of the authors' ResNet-18 script, and of every run that does not vary it


def regression_rows(results=RESULTS):
    """Return the rows of all linear-regression sweeps, each with its sweep's settings and `log`, a path below `results`."""
    rows = []
    for path in sorted((Path(results) / "linear_regression").glob("*.jsonl")):
        header, found = read_sweep(path)
        rows += [{**header["settings"], **row, "log": path.relative_to(results).as_posix()} for row in found]
    return rows


def toy_rows(results=RESULTS):
    """Return the rows of the toy's log, [] where there is none."""
    path = Path(results) / "toy_logistic" / "toy.jsonl"
    return [{**row, "log": path.relative_to(results).as_posix()} for row in read_sweep(path)[1]] if path.exists() else []


def select(rows, **wanted):
    """Return the rows whose values are those given."""
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def by_seed(rows, value):
    """Return {seed: row[value]}."""
    return {row["seed"]: row[value] for row in rows}


@dataclass
class Run:
    """One finished training run of experiments.cifar10_workers.

    group: the folder below results/cifar10; log: path below results; result: the log's last "result" record; tests:
    its "test" records, one per step.
    """

    group: str
    log: str
    header: dict
    tests: list
    result: dict

    @property
    def options(self):
        return self.header["options"]

    @property
    def seed(self):
        return self.header["seed"]

    @property
    def configuration(self):
        """(method, density, mu, distortion), None for what the method does not use."""
        options = self.options
        density = None if options["method"] == "dense" else options["density"]
        if options["method"] != "regtopk":
            return options["method"], density, None, None
        return "regtopk", density, options["mu"], options["distortion"]

    def share(self, name):
        """Return the share (0...1) of the entries sent that were `name`, "repeated" or "displaced"."""
        statistics = self.result["statistics"]
        return statistics[name] / statistics["sent_entries"]


def cut(run, step):
    """Return the run as it stood at `step`, one of those at which it was tested; raise ValueError at any other."""
    if step == run.result["step"]:
        return run
    found = [test for test in run.tests if test["step"] == step]
    if not found:
        raise ValueError(f"{run.log}: expected a test at step {step}, got {[test['step'] for test in run.tests]}")
    (test,) = found
    statistics = {name: test[name] for name in ("sent_entries", "repeated", "displaced", "bytes_sent", "bytes_dense")}
    result = {"step": step, "accuracy": test["accuracy"], "statistics": statistics}
    return replace(run, tests=[test for test in run.tests if test["step"] <= step], result=result)


def by_density(groups):
    """Return the runs of the groups density-D, each as it stood where the shortest ended: they differ in density alone.

    A dense run does not depend on the density, so that of any group serves all.
    """
    runs = [run for group, found in groups.items() if DENSITY_GROUP.fullmatch(group) for run in found]
    shortest = min((run.result["step"] for run in runs), default=0)
    return [cut(run, shortest) for run in runs if run.configuration[2] in (None, SCRIPT_MU)]


def read_run(path, group="", log=""):
    """Return the Run of a log, None for one that does not end with a result: it has not finished, or goes on."""
    header, records = read_log(path)
    if not records or records[-1]["event"] != "result":
        return None
    tests = {record["step"]: record for record in records if record["event"] == "test"}
    return Run(group, log, header, [tests[step] for step in sorted(tests)], records[-1])


def cifar10_runs(results=RESULTS):
    """Return {group: its finished runs}, groups and runs in the order of their names; last the group BY_DENSITY."""
    groups = {}
    for path in sorted((Path(results) / "cifar10").glob("*/*.jsonl")):
        run = read_run(path, path.parent.name, path.relative_to(results).as_posix())
        if run is not None:
            groups.setdefault(path.parent.name, []).append(run)
    runs = by_density(groups)
    return {**groups, BY_DENSITY: runs} if len({run.group for run in runs}) > 1 else groups


def by_configuration(runs):
    """Return {configuration: {seed: run}} of runs that took equally many steps: the number that most of them took."""
    steps = [run.result["step"] for run in runs]
    usual = max(sorted(set(steps), reverse=True), key=steps.count)
    found = {}
    for run in sorted(runs, key=lambda run: (run.configuration[0], run.configuration[1] or 0, run.configuration[2] or 0, run.seed)):
        if run.result["step"] == usual:
            found.setdefault(run.configuration, {})[run.seed] = run
    return found
