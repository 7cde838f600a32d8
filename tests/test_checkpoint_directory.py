"""Checkpoints in a directory: whole or not there, and what is missing, cut or foreign is named on every rank."""

import contextlib
import errno
import hashlib
import json
import os
import re
import resource
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import run_workers
from test_checkpoint import same_state
from torch.nn.parallel import DistributedDataParallel
from training import batch, loss_of, make_model, make_optimizer, make_state

import regtopk_torch as rt
from regtopk_torch import directory as checkpoint_directory

STEPS, STOP = 10, 5


def make(method="regtopk"):
    model = make_model()
    ddp = DistributedDataParallel(model, bucket_cap_mb=100)
    state = make_state(method, 0.02)
    rt.attach(ddp, state)
    return model, ddp, state, make_optimizer(model)


def train(rank, ddp, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        loss_of(ddp, batch(rank, step)).backward()
        optimizer.step()


def file_names(directory):
    return sorted(path.name for path in Path(directory).iterdir())


@pytest.fixture(scope="module")
def lone_rank(tmp_path_factory):
    """A model and its state in a group of this process alone, and a directory with one checkpoint of it."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    directory = tmp_path_factory.mktemp("lone") / "checkpoint"
    model, ddp, state, optimizer = make()
    train(0, ddp, optimizer, range(2))
    rt.save(state, ddp, directory)
    yield ddp, state, optimizer, directory
    dist.destroy_process_group()


# Saved and loaded


def stop_and_go_on(rank, directory, method):
    model, ddp, state, optimizer = make(method)
    train(rank, ddp, optimizer, range(STOP))
    dcp.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=directory)
    rt.save(state, ddp, directory)
    train(rank, ddp, optimizer, range(STOP, STEPS))

    resumed, resumed_ddp, resumed_state, resumed_optimizer = make(method)
    train(rank, resumed_ddp, resumed_optimizer, range(1))  # DCP fills what is there: the momentum must be
    saved = {"model": resumed.state_dict(), "optimizer": resumed_optimizer.state_dict()}
    dcp.load(saved, checkpoint_id=directory)
    resumed.load_state_dict(saved["model"])
    resumed_optimizer.load_state_dict(saved["optimizer"])
    rt.load(resumed_state, resumed_ddp, directory)
    train(rank, resumed_ddp, resumed_optimizer, range(STOP, STEPS))
    same_parameters = all(map(torch.equal, resumed.parameters(), model.parameters()))
    return same_parameters, same_state(resumed_state.state_dict(resumed_ddp), state.state_dict(ddp))


@pytest.mark.parametrize("method", ["topk", "regtopk"])
def test_beside_torchs_distributed_checkpoint_a_run_goes_on_bit_for_bit(tmp_path, method):
    assert run_workers(stop_and_go_on, 2, tmp_path, method) == [(True, True)] * 2
    ours = [name for name in file_names(tmp_path) if name.startswith("regtopk")]
    names = ["regtopk-ID-rank00000.pt", "regtopk-ID-rank00001.pt", "regtopk.json"]
    assert [re.sub("-[0-9a-f]{8}-", "-ID-", name) for name in ours] == names
    assert ".metadata" in file_names(tmp_path)


def save_twice(rank, directory):
    model, ddp, state, optimizer = make()
    contents = []
    for steps in (range(2), range(2, 4)):
        train(rank, ddp, optimizer, steps)
        rt.save(state, ddp, directory)
        dist.barrier()  # rank 0 removes the former files after the others have returned
        contents.append((file_names(directory), state.state_dict(ddp)))
    fresh = make()
    rt.load(fresh[2], fresh[1], directory)
    return contents, same_state(fresh[2].state_dict(fresh[1]), contents[1][1])


def test_saving_again_replaces_the_checkpoint_and_leaves_no_other_file_of_it(tmp_path):
    (tmp_path / "regtopk-0123abcd-rank00000.pt.partial").touch()  # of a save that was killed
    (tmp_path / "notes.txt").touch()
    for contents, loaded in run_workers(save_twice, 2, tmp_path):
        (first, _), (second, _) = contents
        assert loaded and len(first) == len(second) == 4 and set(first) & set(second) == {"notes.txt", "regtopk.json"}


# What does not fit


class Evil:
    """Unpickled without weights_only, it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def manifest_of(directory):
    return json.loads((directory / "regtopk.json").read_text())


def rewrite_manifest(directory, change):
    manifest = manifest_of(directory)
    change(manifest)
    (directory / "regtopk.json").write_text(json.dumps(manifest))


def rewrite_file(directory, rank, content):
    """Put bytes in the place of a rank's file and make the manifest fit them."""
    path = directory / manifest_of(directory)["files"][rank]["name"]
    path.write_bytes(content)
    rewrite_manifest(
        directory, lambda m: m["files"][rank].update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    )


def repickle(directory, rank, change):
    path = directory / manifest_of(directory)["files"][rank]["name"]
    content = change(torch.load(path, weights_only=True))
    torch.save(content, path)
    rewrite_file(directory, rank, path.read_bytes())


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def damages(directory, other):
    """{case: (how rank 0 damages the directory, what every rank's message must match)}; {1} is the name of rank 1's file."""

    def name(rank):
        return directory / manifest_of(directory)["files"][rank]["name"]

    def lie(**values):
        return lambda: rewrite_manifest(directory, lambda m: m.update(values))

    def another_version(content):
        return {**content, "version": 2}

    manifest = "regtopk.json"
    return {
        "no manifest": ((directory / manifest).unlink, rf"rank 0: load: expected a checkpoint with a manifest .*{manifest}, got none; 1 more of 2 ranks failed"),
        "cut manifest": (lambda: os.truncate(directory / manifest, 30), rf"expected .*{manifest} to hold JSON, got b'.*'; it is damaged"),
        "other manifest": (lie(format="other"), rf"expected .*{manifest} to be a manifest of a regtopk_torch checkpoint, got another file"),
        "version": (lie(version=2), rf"expected .*{manifest} of version 1, got version 2"),
        "world size": (lie(world_size=3), rf"expected .*{manifest} to name a file for each of world_size ranks, got world_size 3"),
        "step": (lie(step="4"), rf"expected step in .*{manifest} to be an integer of at least -1, got '4'"),
        "way out": (
            lambda: rewrite_manifest(directory, lambda m: m["files"][1].update(name="../" + m["files"][1]["name"])),
            rf"expected .*{manifest} to name a file with its bytes and sha256 for rank 1, got ",
        ),
        "missing": (lambda: name(1).unlink(), "rank 1: load: expected the file .*{1}, got none$"),
        "truncated": (lambda: os.truncate(name(1), 1000), r"rank 1: load: expected \d+ bytes in .*{1}, got 1000; it is truncated$"),
        "one bit": (lambda: flip_a_byte(name(1)), r"rank 1: load: expected sha256 [0-9a-f]{16}\.\.\. of .*{1}, got [0-9a-f]{16}\.\.\.; it is damaged or of another save$"),
        "of another save": (
            lambda: shutil.copy(other / manifest_of(other)["files"][1]["name"], name(1)),
            r"rank 1: load: expected (sha256 .* of|\d+ bytes in) .*{1}, got ",
        ),
        "of another save, with its checksum": (
            lambda: rewrite_file(directory, 1, (other / manifest_of(other)["files"][1]["name"]).read_bytes()),
            "rank 1: load: expected .*{1} to be of save '[0-9a-f]{8}', as its manifest, got '[0-9a-f]{8}'$",
        ),
        "of another rank": (
            lambda: rewrite_file(directory, 1, name(0).read_bytes()),
            "rank 1: load: .*{1}: expected a state dict of rank 1, got rank 0$",
        ),
        "no archive": (lambda: rewrite_file(directory, 1, b"no archive" * 9), "rank 1: load: expected a state dict in .*{1}, got "),
        "no dict": (lambda: repickle(directory, 1, lambda content: [content]), "rank 1: load: expected .*{1} to be of save '.*', as its manifest, got 'list'$"),
        "a version to come": (lambda: repickle(directory, 1, another_version), "rank 1: load: .*{1}: expected a state dict of version 1, got version 2$"),
        "code": (
            lambda: repickle(directory, 1, lambda content: {**content, "evil": Evil(directory / "evil")}),
            "rank 1: load: expected a state dict in .*{1}, got UnpicklingError: ",
        ),
    }


def load_what_is_damaged(rank, folder):
    model, ddp, state, optimizer = make()
    train(rank, ddp, optimizer, range(2))
    for name in ("other", "good"):
        rt.save(state, ddp, folder / name)
        train(rank, ddp, optimizer, range(2, 3))
    before = state.state_dict(ddp)
    messages, unchanged = {}, {}
    for case in damages(folder, folder):
        directory = folder / case.replace(" ", "-")
        if rank == 0:
            shutil.copytree(folder / "good", directory)
            damages(directory, folder / "other")[case][0]()
        dist.barrier()
        messages[case] = "loaded"
        with contextlib.suppress(rt.CheckpointError):
            try:
                rt.load(state, ddp, directory)
            except rt.CheckpointError as error:
                messages[case] = str(error)
                raise
        unchanged[case] = same_state(state.state_dict(ddp), before)
    with pytest.raises(rt.CheckpointError) as caught:
        rt.load(state, nn.Linear(3, 3), folder / "good")
    messages["another model"] = str(caught.value)
    with pytest.raises(rt.CheckpointError) as caught:
        rt.load(state, ddp, folder / ("good" if rank else "other"))
    messages["two directories"] = str(caught.value)
    unchanged["two directories"] = same_state(state.state_dict(ddp), before)
    return messages, unchanged


def test_what_is_missing_cut_or_foreign_is_named_on_every_rank_and_changes_nothing_on_any(tmp_path):
    results = run_workers(load_what_is_damaged, 2, tmp_path)
    file = manifest_of(tmp_path / "good")["files"][1]["name"]
    for rank, (messages, unchanged) in enumerate(results):
        for case, (_, pattern) in damages(tmp_path, tmp_path).items():
            pattern = pattern.replace("{1}", file)
            assert re.search(pattern, messages[case]), f"{case}: {messages[case]}"
        assert re.fullmatch(
            r"rank 0: load: .*rank00000\.pt: expected a state dict of this model's 2 parameters, got 9; missing .*; 1 more of 2 ranks failed",
            messages["another model"],
        )
        assert re.fullmatch(
            rf"rank {rank}: load: expected the same .*regtopk.json on every rank, got 2 different files; every rank must see the same directory",
            messages["two directories"],
        )
        assert all(unchanged.values()), unchanged
    assert not (tmp_path / "code" / "evil").exists()


FUZZ_SECONDS = float(os.environ.get("REGTOPK_FUZZ_SECONDS", 0))  # make fuzz: so many, and other bytes each time


@settings(
    max_examples=150 + int(20 * FUZZ_SECONDS), derandomize=not FUZZ_SECONDS, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(
    of_manifest=st.booleans(),
    keep=st.floats(0, 2),
    edits=st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=9)), max_size=4),
)
def test_any_other_bytes_are_an_error_that_changes_nothing_or_a_state_that_fits(lone_rank, of_manifest, keep, edits):
    ddp, state, _, directory = lone_rank
    directory = shutil.copytree(directory, directory.with_name("fuzzed"), dirs_exist_ok=True)
    path = directory / ("regtopk.json" if of_manifest else manifest_of(directory)["files"][0]["name"])
    content = path.read_bytes()
    content = content[: int(keep * len(content))] if keep < 1 else content
    for place, replacement in edits:
        position = int(place * len(content))
        content = content[:position] + replacement + content[position + len(replacement) :]
    if of_manifest:
        path.write_bytes(content)
    else:
        rewrite_file(directory, 0, content)
    before = state.state_dict(ddp)
    try:
        rt.load(state, ddp, directory)
    except rt.CheckpointError as error:
        assert str(path) in str(error) or "regtopk-" in str(error), error
        assert same_state(state.state_dict(ddp), before)
    after = state.state_dict(ddp)
    assert all(entry["residual"].isfinite().all() for entry in after["parameters"].values())
    state.load_state_dict(after, ddp)  # fits itself


# Saves that fail


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


def test_a_full_disk_is_an_error_wherever_it_shows(lone_rank, tmp_path, monkeypatch):
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


def test_a_disk_that_is_full_for_a_moment_is_an_error_too(lone_rank, tmp_path, monkeypatch):
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


def test_a_save_that_is_cut_off_at_any_operation_leaves_the_old_checkpoint_or_the_new(lone_rank, tmp_path, monkeypatch):
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
