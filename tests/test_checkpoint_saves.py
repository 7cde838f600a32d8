"""Saves that fail or are cut off, wherever that happens: the old checkpoint stays."""

import contextlib
import errno
import os
import re
import resource
import shutil
from pathlib import Path

import pytest
import torch.distributed as dist
from checkpointing import file_names, lone_rank, make, train  # noqa: F401  (lone_rank is a fixture)
from processes import run_workers
from test_checkpoint import same_state

import regtopk_torch as rt
from regtopk_torch import directory as checkpoint_directory


def save_with_a_limit(rank, directory):
    """Rank 1's files must not grow beyond 4 KiB: its own cannot be written."""
    model, ddp, state, optimizer = make()
    train(rank, ddp, optimizer, range(2))
    rt.save(state, ddp, directory)
    dist.barrier()
    before, names = state.state_dict(ddp), file_names(directory)
    train(rank, ddp, optimizer, range(2, 4))
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    with pytest.raises(rt.CheckpointError) as caught:
        rt.save(state, ddp, directory)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    dist.barrier()
    left = file_names(directory)
    train(rank, ddp, optimizer, range(4, 5))  # the group still works
    rt.load(state, ddp, directory)
    return str(caught.value), left == names, same_state(state.state_dict(ddp), before)


def test_without_room_for_one_ranks_file_the_old_checkpoint_stays(tmp_path):
    for message, same_files, same in run_workers(save_with_a_limit, 2, tmp_path):
        assert re.fullmatch(
            r"rank 1: save: expected to write and read .*-rank00001\.pt, got File too large \(errno 27\)", message
        ), message
        assert same_files and same


def test_a_full_disk_is_an_error_wherever_it_shows(lone_rank, tmp_path, monkeypatch):  # noqa: F811
    ddp, state, _, directory = lone_rank
    directory = shutil.copytree(directory, tmp_path / "checkpoint")
    before = file_names(directory)
    synchronised = []

    def full_when_synchronising(descriptor):
        synchronised.append(descriptor)
        if len(synchronised) == 3:  # the rank's file, its folder, the manifest
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full_when_synchronising)
    with pytest.raises(
        rt.CheckpointError, match=r"rank 0: save: expected to write and read .*regtopk.json, got No space left on device \(errno 28\)"
    ):
        rt.save(state, ddp, directory)
    monkeypatch.undo()
    assert file_names(directory) == before
    rt.load(state, ddp, directory)


def test_a_disk_that_fails_behind_the_manifest_leaves_the_new_checkpoint_whole(lone_rank, tmp_path, monkeypatch):  # noqa: F811
    ddp, state, optimizer, directory = lone_rank
    directory = shutil.copytree(directory, tmp_path / "checkpoint")
    train(0, ddp, optimizer, range(1))
    new = state.state_dict(ddp)
    synchronised = []

    def fail_when_synchronising(descriptor):
        synchronised.append(descriptor)
        if len(synchronised) == 4:  # the rank's file, its folder, the manifest, its folder
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail_when_synchronising)
    with pytest.raises(rt.CheckpointError, match=r"rank 0: save: expected to write and read .*regtopk.json, got Input/output error"):
        rt.save(state, ddp, directory)
    monkeypatch.undo()
    state.reset()
    rt.load(state, ddp, directory)  # what its manifest names is there
    assert same_state(state.state_dict(ddp), new)


class FullForAMoment:
    """A file that fails to take the second thing written to it, and only that."""

    def __init__(self, file):
        self._file, self._count = file, 0

    def write(self, data):
        self._count += 1
        if self._count == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._file.write(data)

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._file.close()


def test_a_disk_that_is_full_for_a_moment_is_an_error_too(lone_rank, tmp_path, monkeypatch):  # noqa: F811
    ddp, state, _, directory = lone_rank
    directory = shutil.copytree(directory, tmp_path / "checkpoint")
    before = file_names(directory)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_directory, "open", lambda *arguments: FullForAMoment(open(*arguments)), raising=False)
        with pytest.raises(rt.CheckpointError, match=r"rank 0: save: expected to write and read .*\.pt, got No space left on device"):
            rt.save(state, ddp, directory)
    assert file_names(directory) == before


class PowerCut(BaseException):
    pass


def cut_power_at(monkeypatch, operation):
    """From the given operation on, nothing changes the disk any more; return the list that counts the operations."""
    done = []

    def until_the_cut(change):
        def guarded(*arguments, **options):
            done.append(change)
            if len(done) > operation:
                raise PowerCut
            return change(*arguments, **options)

        return guarded

    for owner, name in ((os, "replace"), (os, "fsync"), (Path, "unlink"), (checkpoint_directory._MeasuredFile, "write")):
        monkeypatch.setattr(owner, name, until_the_cut(getattr(owner, name)))
    return done


def test_a_save_that_is_cut_off_at_any_operation_leaves_the_old_checkpoint_or_the_new(lone_rank, tmp_path, monkeypatch):  # noqa: F811
    ddp, state, optimizer, directory = lone_rank
    rt.load(state, ddp, directory)
    old = state.state_dict(ddp)
    train(0, ddp, optimizer, range(2, 3))
    new = state.state_dict(ddp)
    outcomes = []
    for operation in range(10_000):
        copy = shutil.copytree(directory, tmp_path / str(operation))
        state.load_state_dict(new, ddp)
        with monkeypatch.context() as patch:
            done = cut_power_at(patch, operation)
            with contextlib.suppress(PowerCut):
                rt.save(state, ddp, copy)
        rt.load(state, ddp, copy)
        found = state.state_dict(ddp)
        outcomes.append("old" if same_state(found, old) else "new" if same_state(found, new) else "neither")
        if len(done) <= operation:
            break
    assert "neither" not in outcomes
    assert outcomes == sorted(outcomes, reverse=True) and {*outcomes} == {"old", "new"}, "first the old one, then the new"
    assert len(file_names(copy)) == 2, "the whole save removes the old file"


def test_a_save_that_fails_beside_a_damaged_manifest_is_still_the_error_that_it_is(lone_rank, tmp_path, monkeypatch):  # noqa: F811
    ddp, state, _, directory = lone_rank
    directory = shutil.copytree(directory, tmp_path / "checkpoint")
    (directory / "regtopk.json").write_bytes(b"\xff\xfe")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail_to_replace)
        with pytest.raises(rt.CheckpointError, match=r"rank 0: save: expected to write and read .*\.pt, got Input/output error \(errno 5\)"):
            rt.save(state, ddp, directory)
    rt.save(state, ddp, directory)
    rt.load(state, ddp, directory)


def fail_to_replace(source, target):
    raise OSError(errno.EIO, os.strerror(errno.EIO), str(target))
