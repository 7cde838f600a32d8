"""A checkpoint that an earlier version of this package wrote still loads, as it is."""

import pathlib

import torch
import torch.nn as nn
from processes import run_workers
from torch.nn.parallel import DistributedDataParallel

import regtopk_torch as rt

# Written by version 0.1.0 at commit c93b9e1, before payloads had an exchange part: two ranks, five steps of RegTop-k, density 0.1.
WRITTEN = pathlib.Path(__file__).resolve().parent / "checkpoint_version_1"


def load_and_go_on(rank):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    ddp = DistributedDataParallel(model, bucket_cap_mb=100)
    state = rt.RegTopKState(0.1, mu=2.0)
    ddp.register_comm_hook(state, rt.sparse_hook)
    rt.load(state, ddp, WRITTEN)
    loaded = state.state_dict(ddp)
    kept = state.residual_norm()
    ddp(torch.ones(2, 8)).sum().backward()
    return loaded, kept, state.stats()


def test_a_checkpoint_of_the_first_version_loads_and_the_run_goes_on():
    for rank, (loaded, kept, stats) in enumerate(run_workers(load_and_go_on, 2)):
        written = torch.load(next(WRITTEN.glob(f"*-rank{rank:05d}.pt")), weights_only=True)
        assert loaded["step"] == written["step"] == 4
        assert loaded["parameters"].keys() == written["parameters"].keys()
        for name, entry in written["parameters"].items():
            for field in ("residual", "sent_index", "sent_value", "feedback"):
                assert torch.equal(loaded["parameters"][name][field], entry[field]), (rank, name, field)
        assert kept > 0.1
        assert stats["steps"] == 1 and stats["history_dropped"] == 0
