"""Copy logs of finished runs from a folder of runs into experiments/results, from which figures and claims are made.

RUNS/cifar10/GROUP/NAME/log.jsonl becomes results/cifar10/GROUP/NAME.jsonl; RUNS/linear_regression/NAME.jsonl and
RUNS/toy_logistic/NAME.jsonl keep their names. What has not finished, was run on changed sources or on another data set is named and left.
"""

import argparse
import sys
from pathlib import Path

from experiments.data import CIFAR10_NAME
from experiments.evidence import RESULTS, read_run
from experiments.record import LOG_NAME, read_log


def collect(runs, results=RESULTS):
    """Copy what has finished; return (copied, left), lists of lines to print."""
    runs, results = Path(runs), Path(results)
    found = {path: Path("cifar10", path.parent.parent.name, f"{path.parent.name}.jsonl") for path in runs.glob(f"cifar10/*/*/{LOG_NAME}")}
    for sweep in ("linear_regression", "toy_logistic"):
        found |= {path: Path(sweep, path.name) for path in runs.glob(f"{sweep}/*.jsonl")}
    copied, left = [], []
    for path, target in sorted(found.items()):
        try:
            reason = why_not(path, sweep=target.parts[0] != "cifar10")
        except ValueError as error:  # a line that is being written
            reason = str(error)
        if reason:
            left.append(f"{path.relative_to(runs)}: {reason}")
            continue
        (results / target).parent.mkdir(parents=True, exist_ok=True)
        (results / target).write_bytes(path.read_bytes())
        copied.append(f"{path.relative_to(runs)} -> {target}")
    return copied, left


def why_not(path, sweep):
    """Return why a log is not to be copied, "" where it is; a sweep counts as finished with the rows it has."""
    header, records = read_log(path)
    parts = [header, *(record for record in records if record["event"] == "resume")]
    if not all(part["commit"] and part["dirty"] is False for part in parts):
        return "not of a clean commit"
    if sweep:
        return ""
    if header["data"] != CIFAR10_NAME:
        return f"of {header['data']}"
    return "" if read_run(path) is not None else "not finished"


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m experiments.collect", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="?", type=Path, default=Path("runs"), metavar="RUNS", help="folder of runs (%(default)s)")
    options = parser.parse_args(arguments)
    if not options.runs.is_dir():
        sys.exit(f"collect: expected a folder of runs, got {options.runs}")
    copied, left = collect(options.runs)
    for line in [*copied, *(f"left out: {line}" for line in left)]:
        print(line)


if __name__ == "__main__":
    main()
