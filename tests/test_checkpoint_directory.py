"""Checkpoints in a directory: whole or not there, and what is missing, cut or foreign is named on every rank."""

import contextlib
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
from checkpointing import file_names, make, manifest_of, rewrite_file, rewrite_manifest, train
from processes import run_workers
from test_checkpoint import same_state

import regtopk_torch as rt

STEPS, STOP = 10, 5

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
        "no save": (lie(id=None), rf"expected .*{manifest} to hold the id of a save, got None"),
        "nested too deeply": (
            lambda: (directory / manifest).write_text("[" * 100_000), rf"expected .*{manifest} to hold JSON, got b'.*'; it is damaged"
        ),
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


def use_wrongly(rank, folder):
    """Return the messages of save and load for what is not theirs to work with."""
    model, ddp, state, optimizer = make()
    train(rank, ddp, optimizer, range(2))
    rt.save(state, ddp, folder)
    messages = []

    def note(function, *arguments):
        try:
            function(*arguments)
        except Exception as error:
            messages.append(f"{type(error).__name__}: {error}")
        dist.barrier()

    note(rt.save, None, ddp, folder)
    note(rt.load, ddp, ddp, folder)
    note(rt.load, state, None if rank else ddp, folder)
    note(rt.save, state, ddp, folder / f"of-rank-{rank}")
    state._exchange.import_pieces({}, 5 + rank)
    note(rt.save, state, ddp, folder)
    rt.load(state, ddp, folder)
    return messages, state.state_dict(ddp)["step"]


def test_save_and_load_say_what_they_were_given(tmp_path):
    for messages, step in run_workers(use_wrongly, 2, tmp_path):
        assert len(messages) == 5 and step == 1
        assert messages[0] == "TypeError: save: expected a TopKState, RegTopKState or LocalSteps, got NoneType"
        assert messages[1] == "TypeError: load: expected a TopKState, RegTopKState or LocalSteps, got DistributedDataParallel"
        assert messages[2] == (
            "CheckpointError: rank 1: load: rank 1: sparse_hook: expected a state that average alone uses, got one that sparse_hook has used; "
            "construct another state"
        )
        assert re.fullmatch(
            r"CheckpointError: rank 0: save: expected .*of-rank-0/regtopk-\w{8}-rank00001.pt, which its rank has written, "
            "got no such file; every rank must see the same directory",
            messages[3],
        ), messages[3]
        assert re.fullmatch(r"CheckpointError: rank \d: save: expected the same step on every rank, got \[5, 6\]", messages[4])
