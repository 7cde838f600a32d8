"""Ranks that disagree get an error on every rank, which names the ranks and both values; nothing hangs or aborts."""

import datetime
import re
import struct
import time

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from processes import run_workers, run_workers_and_report
from torch.nn.parallel import DistributedDataParallel
from training import batch, loss_of, make_model, make_state

import regtopk_torch as rt
from regtopk_torch import groups


# The options of either rank.
OF_MOMENTUM: dict = {
    "momentum": ({}, {"momentum": 0.9}),
    "nesterov": ({}, {"nesterov": True}),
    "mask_momentum": ({"mask_momentum": True}, {}),
    "clip_norm": ({}, {"clip_norm": 2.5}),
}


def disagree(rank, case, entry):
    """Train one step with something that differs on rank 1; return the error and the seconds it took."""
    odd = rank == 1
    dtype = torch.float64 if odd and case == "dtype" else torch.float32
    torch.manual_seed(0)
    if case == "model":
        # One rank has a parameter fewer that requires a gradient.
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        if odd:
            model[1].bias.requires_grad_(False)
    else:
        model = make_model(dtype)
    started = time.monotonic()
    try:
        ddp = DistributedDataParallel(model)
        method = "topk" if odd and case == "method" else "regtopk"
        if case == "mu":
            state = rt.RegTopKState(0.05, mu=2.0 + rank)
        elif case == "wire dtype":
            state = rt.RegTopKState(0.05, wire_dtype=torch.bfloat16 if odd else None)
        elif case == "index code":
            state = rt.RegTopKState(0.05, index_code="elias-fano" if odd else "offsets")
        elif case == "adaptive density":
            state = rt.RegTopKState(rt.AdaptiveDensity(0.05, power=1 + rank))
        elif case == "chunk":
            state = rt.RegTopKState(0.05, chunk=4096 if odd else None)
        elif case == "dense":
            state = rt.RegTopKState(0.05, dense="auto" if odd else "never")
        elif case in OF_MOMENTUM:
            state = rt.RegTopKState(0.05, **{"momentum": 0.5, **OF_MOMENTUM[case][rank]})
        elif case == "support":
            state = rt.RegTopKState(0.05, support="leader" if odd else "own")
        elif case == "distortion":
            state = rt.RegTopKState(0.05, distortion="current" if odd else "previous")
        else:
            state = make_state(method, 0.01 if odd and case == "density" else 0.05)
        if case == "step" and odd:
            state._exchange.import_pieces({}, 7)
        if entry == "attach":
            rt.attach(ddp, state)
        else:
            ddp.register_comm_hook(state, rt.sparse_hook)
        if case == "pause" and odd:
            state.pause()
        loss = ddp(torch.ones(2, 6)).sum() if case == "model" else loss_of(ddp, batch(rank, 0, dtype))
        loss.backward()
    except (ValueError, RuntimeError) as error:
        return str(error), time.monotonic() - started
    return "no error", time.monotonic() - started


@pytest.mark.parametrize("entry", ["register_comm_hook", "attach"])
@pytest.mark.parametrize(
    "case, field, on_0, on_1",
    [
        ("density", "density", "0.05", "0.01"),
        ("adaptive density", "density", "adaptive, mean 0.05, power 1, 0.0125 to 0.2", "adaptive, mean 0.05, power 2, 0.0125 to 0.2"),
        ("method", "method", "RegTop-k", "Top-k"),
        ("mu", "mu", "2", "3"),
        ("distortion", "distortion", "previous", "current"),
        ("wire dtype", "wire dtype", "the gradients'", "BFloat16"),
        ("index code", "index code", "offsets", "elias-fano"),
        ("support", "support", "own", "leader"),
        ("chunk", "chunk", "none", "4096"),
        ("dense", "dense", "never", "auto"),
        ("momentum", "momentum", "0.5", "0.9"),
        ("nesterov", "nesterov", "no", "yes"),
        ("mask_momentum", "mask_momentum", "yes", "no"),
        ("clip_norm", "clip_norm", "none", "2.5"),
        ("dtype", "gradient dtype", "Float", "Double"),
        ("step", "step", "0", "8"),
        ("pause", "mode", "sparse", r"dense \(paused\)"),
    ],
)
def test_what_differs_is_an_error_on_every_rank(case, field, on_0, on_1, entry):
    for rank, (message, seconds) in enumerate(run_workers(disagree, 2, case, entry)):
        advice = {"step": "load the same checkpoint", "pause": "pause, resume and the rule of dense"}.get(case, "construct the state")
        pair = sorted([f"{on_0} on rank 0", f"{on_1} on rank 1"], key=lambda text: text.replace("\\", ""))
        assert re.search(rf"rank {rank}: sparse_hook: expected the same {field} on every rank, got {pair[0]} and {pair[1]}; {advice}", message), message
        assert seconds < 30


def pause_on_one_rank(rank):
    group = dist.new_group(timeout=datetime.timedelta(seconds=4))
    ddp = DistributedDataParallel(make_model(), process_group=group)
    state = make_state("topk", 0.05, process_group=group)
    rt.attach(ddp, state)
    for step in range(3):  # the ranks have agreed on the layouts before and after DDP's rebuild
        loss_of(ddp, batch(rank, step)).backward()
    if rank == 1:
        state.pause()
    with pytest.raises(dist.DistBackendError) as caught:
        loss_of(ddp, batch(rank, 3)).backward()
    dist.barrier()
    return str(caught.value)


def test_a_pause_on_one_rank_only_is_an_error_on_every_rank_within_the_timeout():
    # Rank 1 wants to agree on the new mode; rank 0, which knows of none, sends its payload.
    sparse, paused = run_workers(pause_on_one_rank, 2)
    # Which of them says so first is chance; the other finds that out or its connection closed.
    assert sparse.startswith("rank 0: sparse_hook: expected the payloads of all 2 ranks of step 3 within 4 s, got ")
    assert paused.startswith("rank 1: sparse_hook: expected all 2 ranks to come to the agreement on a bucket and its options within 4 s, got ")
    assert any("pause()" in message for message in (sparse, paused))


def test_models_that_differ_are_an_error_on_every_rank():
    # DistributedDataParallel compares the parameters itself, before the first bucket.
    for message, seconds in run_workers(disagree, 2, "model", "attach"):
        assert "DDP expects same model across all ranks" in message
        assert seconds < 30


def grow_apart(rank):
    """Unequal layouts behind equal shapes: the bucket sizes differ between the ranks."""
    model = nn.Sequential(*[nn.Linear(40, 40) for _ in range(6)])
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.01 if rank else 100, find_unused_parameters=True)
    state = make_state("topk", 0.1)
    rt.attach(ddp, state)
    try:
        ddp(torch.ones(2, 40)).sum().backward()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "no error"


def test_layouts_that_differ_are_an_error_on_every_rank():
    for rank, message in enumerate(run_workers(grow_apart, 2)):
        assert message.startswith(f"rank {rank}: sparse_hook: expected the same bucket on every rank, got "), message
        assert re.search(r"12 parameters with 9840 entries, the last bucket on rank 0", message), message


def send_another_fingerprint(rank, text):
    """Rank 1 takes part with a fingerprint of its own making; return rank 0's error."""
    ddp = DistributedDataParallel(make_model())
    state = make_state("topk", 0.05)
    if rank == 1:
        _, control, *_ = groups.open_groups(state)
        sent = torch.frombuffer(bytearray(struct.pack("<q", len(text)) + text.ljust(1016, b"\0")), dtype=torch.uint8)
        control._allgather_base(torch.empty(2 * 1024, dtype=torch.uint8), sent).wait()
        return None
    rt.attach(ddp, state)
    try:
        loss_of(ddp, batch(rank, 0)).backward()
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(
    "text, different",
    [
        (b"method=Top-k\nk=7\n", "density on every rank, got 0.05 on rank 0 and another version's fingerprint on rank 1"),
        (b"\xff=\n==\n" * 128, "method on every rank, got Top-k on rank 0 and another version's fingerprint on rank 1"),
        (b"", "method on every rank, got Top-k on rank 0 and another version's fingerprint on rank 1"),
    ],
)
def test_a_fingerprint_of_another_version_is_named(text, different):
    message, _ = run_workers(send_another_fingerprint, 2, text)
    assert message.startswith(f"rank 0: sparse_hook: expected the same {different}; construct the state and the model")


def lose_a_rank(rank):
    model = make_model()
    ddp = DistributedDataParallel(model)
    state = make_state("regtopk", 0.05)
    rt.attach(ddp, state)
    for step in range(5):
        if rank == 1 and step == 3:
            import os

            os._exit(7)
        loss_of(ddp, batch(rank, step)).backward()


def test_a_worker_that_dies_is_an_error_on_the_others():
    (ended, report), (_, lost) = run_workers_and_report(lose_a_rank, 2)
    assert not ended
    assert "DistBackendError: rank 0: sparse_hook: expected the payloads of all 2 ranks of step 3 within 30 s" in report
    assert "exit code 7" in lost
