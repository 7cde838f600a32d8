"""Record a run as a log of JSON lines that begins with how the run was made; a file may hold several logs."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "torchvision", "numpy", "regtopk_torch")
LOG_NAME = "log.jsonl"


def portable(argument):
    """Return a command-line argument with an absolute path made relative to the current folder, or cut to its name."""
    option, equals, value = argument.partition("=") if argument.startswith("-") else ("", "", argument)
    if os.path.isabs(value):
        relative = os.path.relpath(value)
        value = Path(value).name if relative.startswith("..") else relative
    return option + equals + value


def describe_commit():
    """Return (commit, dirty) of this repository: the hash or None, and whether tracked or new files differ from it."""

    def ask_git(*arguments):
        return subprocess.run(
            ["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=20, check=True
        ).stdout.strip()

    try:
        return ask_git("rev-parse", "HEAD"), bool(ask_git("status", "--porcelain"))
    except (OSError, subprocess.SubprocessError):  # no git, no repository, or no commit yet
        return None, None


def describe_processor():
    """Return the processor's model name and the number of logical cores this process may use."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    except OSError:
        pass  # only Linux has this file
    return {"model": model, "cores": count_cores()}


def count_cores():
    """Return the number of logical cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_versions():
    """Return the versions of Python and of the packages a result depends on; None for one that is not installed."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = getattr(sys.modules.get(package), "__version__", None)
    return versions


class Recorder:
    """Write a log: the header on the first line, then one JSON object per line, each flushed when written."""

    def __init__(self, path, seed, **values):
        """Create the file `path`, which must not exist, and write the header; `values` are added to it."""
        commit, dirty = describe_commit()  # before there is the log, which may be a new file in the repository
        self._file = open(path, "x", encoding="utf-8")
        self.header = {
            "event": "header",
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": [Path(sys.executable).name, *map(portable, sys.argv)],
            "commit": commit,
            "dirty": dirty,
            "versions": describe_versions(),
            "processor": describe_processor(),
            "seed": seed,
            **values,
        }
        self._write_line(self.header)

    @classmethod
    def resume(cls, path, position, **values):
        """Go on with the log at `path` from byte `position`: cut off what follows and append an event "resume".

        The event has the time, the commit that goes on and `values`.
        """
        size = os.path.getsize(path)
        if size < position:
            raise ValueError(f"Recorder: expected at least {position} bytes in the log {path} to go on with, got {size}")
        recorder = cls.__new__(cls)
        recorder._file = open(path, "r+", encoding="utf-8")
        recorder.header = json.loads(recorder._file.readline())
        recorder._file.truncate(position)
        recorder._file.seek(0, os.SEEK_END)
        commit, dirty = describe_commit()
        time = datetime.now(timezone.utc).isoformat(timespec="seconds")
        recorder.write("resume", time=time, commit=commit, dirty=dirty, **values)
        return recorder

    @property
    def path(self):
        """The log."""
        return Path(self._file.name)

    def position(self):
        """Return the log's length in bytes, all of them synchronised to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def write(self, event, **values):
        """Append {"event": event, ...values}; raise ValueError for a number that is not finite."""
        self._write_line({"event": event, **values})

    def _write_line(self, line):
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def close(self):
        self._file.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


def read_logs(path):
    """Return [(header, records)] of the logs at `path`, one after another in one file, or of the log in the run folder `path`."""
    path = Path(path) / LOG_NAME if Path(path).is_dir() else Path(path)
    logs = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"read_log: expected a JSON object on line {number} of {path}, got {text[:60]!r}") from error
        if line.get("event") == "header":
            logs.append((line, []))
        elif logs:
            logs[-1][1].append(line)
        else:
            raise ValueError(f"read_log: expected a header on line 1 of {path}, got {text[:60]!r}")
    if not logs:
        raise ValueError(f"read_log: expected a header on line 1 of {path}, got an empty file")
    return logs


def read_log(path):
    """Return (header, records) of the one log at `path`, or in the run folder `path`."""
    logs = read_logs(path)
    if len(logs) != 1:
        raise ValueError(f"read_log: expected one log in {path}, got {len(logs)}")
    return logs[0]
