"""A model with a state that is saved into a directory, and that directory rewritten."""

import hashlib
import json
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from training import batch, loss_of, make_model, make_optimizer, make_state

import regtopk_torch as rt


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
