"""Record a sweep, many short runs in one process and one log, so that a killed sweep goes on where it stopped."""

import json
from pathlib import Path

from runlog.record import Recorder, read_log

# Of a run's row: how it was made. Everything else in the row is a result.
RUN_KEYS = ("method", "density", "mu", "distortion", "seed")
# What logs mean that are older than a setting.
EARLIER = {"support": "own", "model": "mnist_mlp"}


def list_runs(methods, densities, mus, distortions, seeds):
    """Return one dict with RUN_KEYS per run, seed by seed, each run once: what a method does not use is None."""
    runs = []
    for seed in seeds:
        for method in methods:
            for density in densities if method != "dense" else [None]:
                for distortion in distortions if method == "regtopk" else [None]:
                    for mu in mus if method == "regtopk" else [None]:
                        run = dict(zip(RUN_KEYS, (method, density, mu, distortion, seed)))
                        if run not in runs:
                            runs.append(run)
    return runs


def describe(run):
    """Return what sets a run apart, such as "regtopk density=0.6 mu=4 distortion=previous seed=0"."""
    return " ".join([run["method"], *(f"{key}={run[key]}" for key in RUN_KEYS[1:] if run[key] is not None)])


def complete(path, settings, runs, compute):
    """Yield the row of each of `runs`, in order: from the log at `path`, or computed now and appended to it.

    Args:
        path (path or None): the log; None computes every run and records none.
        settings (dict): what all runs share, kept in the header under "settings".
        runs (list of dict): what sets each apart, under the same keys.
        compute (callable): takes a run, returns its results as a dict of finite numbers, strings, lists and None.

    Raises ValueError where the log's settings are others.
    """
    found, recorder = {} if path is None else _read_rows(Path(path), settings, list(runs[0])), None
    try:
        for run in runs:
            key = json.dumps(run)
            if key not in found:
                found[key] = {**run, **compute(run)}
                if path is not None:
                    recorder = recorder or _open(Path(path), settings)
                    recorder.write("run", **found[key])
            yield found[key]
    finally:
        if recorder is not None:
            recorder.close()


def _read_rows(path, settings, keys):
    """Return {run as text: row}; cut off the part of a row with which a killed sweep ended."""
    if not path.exists():
        return {}
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with open(path, "r+b") as file:
            file.truncate(whole)
    if whole == 0:
        path.unlink()
        return {}
    header, records = read_log(path)
    for name, value in settings.items():
        if (found := header["settings"].get(name, EARLIER.get(name))) != value:
            raise ValueError(f"sweep: expected {name} {found}, as in the log {path}, got {value}; name another log")
    rows = [{key: value for key, value in record.items() if key != "event"} for record in records if record["event"] == "run"]
    return {json.dumps({key: row[key] for key in keys}): row for row in rows}


def _open(path, settings):
    if path.exists():
        return Recorder.resume(path, path.stat().st_size)
    path.parent.mkdir(parents=True, exist_ok=True)
    return Recorder(path, seed=None, settings=settings)
