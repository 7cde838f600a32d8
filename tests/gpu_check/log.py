"""The lines that a check writes, and what a part may ask about the check it belongs to."""

import hashlib
import json
import pathlib
import time

import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"


class NotRun(Exception):
    """A part cannot be run here; the text says why."""


def sources_digest():
    """Of what is compiled: names the code where the commit is not known."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in ("csrc", "cuda") for path in (ROOT / folder).rglob("*") if path.is_file()):
        digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


class Log:
    """Appends to gpu-check.jsonl: each line has the part, the card, the versions and the commit, and is flushed at once."""

    NotRun = NotRun

    def __init__(self, folder, device, commit, part, *, seconds=480.0, data=None):
        self.folder, self.device, self.failures, self.data = folder, device, 0, data
        self._end = time.monotonic() + 0.9 * seconds
        card = torch.cuda.get_device_name() if device == "cuda" and torch.cuda.is_available() else "none" if device == "cuda" else "emulated"
        self._facts = {"part": part, "card": card, "torch": torch.__version__, "cuda": torch.version.cuda, "commit": commit, "sources": sources_digest()}
        self._file = open(folder / "gpu-check.jsonl", "a", encoding="utf-8")

    @property
    def emulated(self):
        return self.device == "emulated"

    def write(self, event, **values):
        self._file.write(json.dumps({"event": event, **values, **self._facts}) + "\n")
        self._file.flush()

    def seconds_left(self):
        """Of the part's time, less a tenth: a part that asks ends by itself and says what it left out."""
        return self._end - time.monotonic()

    def fail(self, what):
        self.failures += 1
        self.write("failure", what=what)

    def check(self, holds, what):
        """Record a failure and go on, where `holds` is false."""
        if not holds:
            self.fail(what)
        return bool(holds)
