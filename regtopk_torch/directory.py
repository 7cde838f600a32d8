"""Checkpoints in a directory: one file per rank, and a manifest that makes them a checkpoint.

    regtopk-3f09c1d2-rank00000.pt      what rank 0 keeps: its state dict
    regtopk-3f09c1d2-rank00001.pt
    regtopk.json                       names, sizes and checksums of these files; written last, after all ranks have theirs

The files of one save share a random name, so saving into a directory again touches nothing of the checkpoint that is there
until the new manifest takes the old one's place, in one rename. Whatever happens before leaves the old checkpoint as it was.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import re
import secrets
import weakref

import torch

from regtopk_torch import local_steps, states

MANIFEST = "regtopk.json"
FORMAT = "regtopk_torch checkpoint"
VERSION = 1
_RANK_FILE = re.compile(r"regtopk-[0-9a-f]{8}-rank\d{5}\.pt")
_PARTIAL = ".partial"
_CHUNK_BYTES = 1 << 22
_owners: weakref.WeakValueDictionary = weakref.WeakValueDictionary()  # the states of this process, by the directory that they saved to or loaded from


class CheckpointError(RuntimeError):
    """A checkpoint that was not written, or not loaded, as a whole; raised on every rank of the group.

    `agreed` (bool): whether every rank has said how it fared; False where one did not answer within the group's timeout.
    """

    def __init__(self, message, *, agreed=True):
        super().__init__(message)
        self.agreed = agreed


def save(state, module, directory):
    """Save the state of every rank into `directory`, in place of a checkpoint that is there; a collective.

    Args:
        state (TopKState, RegTopKState or LocalSteps): constructed on the same ranks. Of LocalSteps each rank's model and optimizer are
            saved with it.
        module (torch.nn.Module or None): the model, or the DistributedDataParallel around it; None for a state that averages tensors
            and for LocalSteps.
        directory (path): the same for every rank, on a file system that all of them see; created where it is missing. It
            may hold other files, such as those of torch.distributed.checkpoint, and the checkpoint of one state.

    Call it between steps. Every file is written under another name, synchronised to the disk and renamed; the manifest comes
    last. Ranks wait for each other three times, each time at most the group's timeout.

    Raises:
        CheckpointError: on every rank, naming the rank and the reason, if any rank failed (a full disk, say). The directory
            then holds the checkpoint that was there before, whole, or the new one, whole, where what failed came after its
            manifest was in place.
        ValueError: a directory that another state of this process saves to; nothing is written.
    """
    directory = pathlib.Path(directory)
    group = _Group("save", state, module)
    _claim(group.who, state, directory)

    def prepare():
        directory.mkdir(parents=True, exist_ok=True)
        content = state._saved(module)
        return {"id": secrets.token_hex(4), "step": content["step"]}, content

    (mine, content), prepared = group.agree("begin the checkpoint", prepare)
    if len({each["step"] for each in prepared}) > 1:
        raise CheckpointError(f"{group.who}: expected the same step on every rank, got {[each['step'] for each in prepared]}")
    name = prepared[0]["id"]
    path = directory / f"regtopk-{name}-rank{group.rank:05d}.pt"

    def write_mine():
        content["id"] = name
        size, digest = write_file(path, lambda file: torch.save(content, file))
        return {"name": path.name, "bytes": size, "sha256": digest}, None

    def write_manifest():
        if group.rank == 0:
            for file in files:
                if not (directory / file["name"]).is_file():
                    raise FileNotFoundError(
                        f"expected {directory / file['name']}, which its rank has written, got no such file; "
                        "every rank must see the same directory"
                    )
            manifest = {"format": FORMAT, "version": VERSION, "id": name, "world_size": group.size, "step": mine["step"], "files": files}
            write_file(directory / MANIFEST, lambda file: file.write(json.dumps(manifest, indent=1).encode()))
        return None, None

    try:
        _, files = group.agree("write its file", write_mine)
        group.agree("see the manifest", write_manifest)
    except CheckpointError as error:
        # Not where a manifest may name it: rank 0, if it did not answer, may still write one, and the disk may have failed
        # after the manifest was in its place. A file too many costs space, one too few the checkpoint.
        if error.agreed and not _names(directory / MANIFEST, path.name):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        raise
    if group.rank == 0:
        _remove_others(directory, {file["name"] for file in files})


def load(state, module, directory):
    """Replace residuals, history and step by those that `save` wrote; a collective.

    Args:
        state, module, directory: as for `save`. The bucket layout and the size of the group may differ from those of the
            run that saved; in a group of another size the residuals are redistributed as `checkpoint.shares` says, and
            the history is dropped (`stats()["history_dropped"]`). LocalSteps need a group of the same size.

    Every rank reads the manifest and the files that it needs, with `weights_only=True`, and checks all of them before any
    rank changes anything.

    Raises:
        CheckpointError: on every rank, naming the file, if one is missing, truncated, damaged, or of another save or model.
            The state is unchanged then, on every rank.
    """
    directory = pathlib.Path(directory)
    group = _Group("load", state, module)

    def read():
        manifest, digest = _read_own_manifest(directory / MANIFEST)

        def read_file(rank):
            return _read_rank_file(directory, manifest, rank)

        take_in = state._loader(read_file, manifest["world_size"], module)
        state._exchange.wait_idle()  # for a pending exchange, which may fail: now, not when others have changed theirs
        return digest, take_in

    (_, take_in), digests = group.agree("read the checkpoint", read)
    if len(set(digests)) > 1:
        raise CheckpointError(
            f"{group.who}: expected the same {directory / MANIFEST} on every rank, got {len(set(digests))} different files; "
            "every rank must see the same directory"
        )
    take_in()
    _owners.setdefault(directory.resolve(), state)


def _claim(who, state, directory):
    """Make the directory this state's; raise ValueError if it belongs to another one of this process."""
    owner = _owners.get(path := directory.resolve())
    if owner is not None and owner is not state:
        raise ValueError(f"{who}: expected a directory of this state's own, got {directory}, which another state of this job saves to")
    _owners[path] = state


def write_file(path, write):
    """Write a file as a whole or not at all: under another name, synchronised to the disk, then renamed to `path`.

    Args:
        write (function): gets a file object that can only be written to.

    Returns:
        (int, str): the file's size in bytes and its SHA-256.

    Raises:
        OSError: naming the file. What was at `path` before is unchanged.
    """
    path = pathlib.Path(path)
    partial = path.with_name(path.name + _PARTIAL)
    try:
        with open(partial, "wb") as file:
            measured = _MeasuredFile(file)
            write(measured)
            measured.check()
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _synchronise_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise
    return measured.bytes, measured.digest.hexdigest()


def check_file(path, size, digest):
    """Raise FileNotFoundError or ValueError, naming the file, unless it has this size in bytes and this SHA-256."""
    if not path.is_file():
        raise FileNotFoundError(f"expected the file {path}, got none")
    found = path.stat().st_size
    if found != size:
        cut = "; it is truncated" if found < size else ""
        raise ValueError(f"expected {size} bytes in {path}, got {found}{cut}")
    actual = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            actual.update(chunk)
    if actual.hexdigest() != digest:
        raise ValueError(
            f"expected sha256 {digest[:16]}... of {path}, got {actual.hexdigest()[:16]}...; it is damaged or of another save"
        )


class _MeasuredFile:
    """Count and hash what is written, and keep the first error for later: torch.save must not see it, for the destructor of
    its C++ writer would report another one in its place."""

    def __init__(self, file):
        self._file, self._error = file, None
        self.bytes, self.digest = 0, hashlib.sha256()

    def write(self, data):
        data = memoryview(data).cast("B")
        if self._error is None:
            try:
                self._file.write(data)
                self.digest.update(data)
                self.bytes += len(data)
            except OSError as error:
                self._error = error
        return len(data)

    def flush(self):
        pass

    def check(self):
        if self._error is not None:
            raise self._error


class _Group:
    """The ranks of a state, and what they agree on before any of them goes on."""

    def __init__(self, what, state, module):
        if not isinstance(state, (states.TopKState, local_steps.LocalSteps)):
            raise TypeError(f"{what}: expected a TopKState, RegTopKState or LocalSteps, got {type(state).__name__}")
        self._exchange = state._exchange
        if module is None and not self._exchange.is_open:
            self._exchange.use("average")  # for messages; a state that has served a hook says so when all ranks listen
        self.rank, self.size = self._exchange.rank(), self._exchange.workers()
        self._what = what
        self.who = f"rank {self.rank}: {what}"

    def agree(self, what, action):
        """Return (own result, [shared value of each rank]); raise CheckpointError on every rank if any rank's action failed.

        `action` returns (shared value, ...); what it returns as a whole stays on this rank.
        """
        result = error = None
        try:
            result = action()
            shared = result[0]
        except Exception as caught:
            shared, error = None, caught
        report = {"value": shared, "error": None if error is None else f"{self.who}: {_message(error)}"}
        try:
            texts = self._exchange.gather_texts(json.dumps(report).encode(), self._what, f"rt.{self._what}, which is to {what}")
        except RuntimeError as lost:
            reason = f"; this rank failed too: {_message(error)}" if error else ""
            raise CheckpointError(f"{self.who}: expected all {self.size} ranks to {what}, got: {lost}{reason}", agreed=False) from lost
        reports = [json.loads(text) for text in texts]
        errors = [each["error"] for each in reports if each["error"] is not None]
        if errors:
            others = f"; {len(errors) - 1} more of {self.size} ranks failed" if len(errors) > 1 else ""
            raise CheckpointError(errors[0] + others) from error
        return result, [each["value"] for each in reports]


def _message(error):
    if isinstance(error, OSError) and error.errno is not None:
        return f"expected to write and read {error.filename or 'its files'}, got {os.strerror(error.errno)} (errno {error.errno})"
    if isinstance(error, (OSError, ValueError, TypeError)):
        return str(error)
    return f"{type(error).__name__}: {error}"


def read_manifest(path, expected_format):
    """Return (manifest, its bytes); raise FileNotFoundError or ValueError, naming the file, if it is not one of that format."""
    if not path.is_file():
        raise FileNotFoundError(f"expected a checkpoint with a manifest {path}, got none")
    content = path.read_bytes()
    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected {path} to hold JSON, got {content[:40]!r}; it is damaged") from error
    if not isinstance(manifest, dict) or manifest.get("format") != expected_format:
        raise ValueError(f"expected {path} to be a manifest of a {expected_format}, got another file")
    if manifest.get("version") != VERSION:
        raise ValueError(f"expected {path} of version {VERSION}, got version {manifest.get('version')!r}")
    return manifest, content


def _read_own_manifest(path):
    """Return (manifest, SHA-256 of the file); raise FileNotFoundError or ValueError, naming the file, if it is not one."""
    manifest, content = read_manifest(path, FORMAT)
    files, size, step = manifest.get("files"), manifest.get("world_size"), manifest.get("step")
    if not isinstance(files, list) or type(size) is not int or size < 1 or len(files) != size:
        raise ValueError(f"expected {path} to name a file for each of world_size ranks, got world_size {size!r}")
    if type(step) is not int or step < -1:
        raise ValueError(f"expected step in {path} to be an integer of at least -1, got {step!r}")
    if not isinstance(manifest.get("id"), str):
        raise ValueError(f"expected {path} to hold the id of a save, got {manifest.get('id')!r}")
    for rank, file in enumerate(files):
        # A name with a folder in it could lead out of the directory.
        if not (
            isinstance(file, dict)
            and isinstance(file.get("name"), str)
            and _RANK_FILE.fullmatch(file["name"])
            and type(file.get("bytes")) is int
            and isinstance(file.get("sha256"), str)
        ):
            raise ValueError(f"expected {path} to name a file with its bytes and sha256 for rank {rank}, got {str(file)[:80]}")
    return manifest, hashlib.sha256(content).hexdigest()


def _read_rank_file(directory, manifest, rank):
    """Return (path, state dict) of one rank's file; raise FileNotFoundError or ValueError, naming it, if it does not fit."""
    file = manifest["files"][rank]
    path = directory / file["name"]
    check_file(path, file["bytes"], file["sha256"])
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"expected a state dict in {path}, got {type(error).__name__}: {reason[:200]}") from error
    if not isinstance(content, dict) or content.get("id") != manifest["id"]:
        found = content.get("id") if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"expected {path} to be of save {manifest['id']!r}, as its manifest, got {found!r}")
    return path, content


def _names(manifest, file_name):
    """Whether the manifest, if it can be read, names this file."""
    try:
        return file_name.encode() in manifest.read_bytes()
    except OSError:
        return False


def _remove_others(directory, names):
    """Remove the files of earlier saves, and of saves that did not come to their end; failing to is no error."""
    for path in directory.iterdir():
        if _RANK_FILE.fullmatch(path.name.removesuffix(_PARTIAL)) and path.name not in names:
            with contextlib.suppress(OSError):
                path.unlink()


def _synchronise_folder(folder):
    # A rename is on the disk when its folder is.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
