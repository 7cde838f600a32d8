"""Workers that are killed or stopped: the job resumes to the same bits, and nobody waits for ever."""

import concurrent.futures
import contextlib
import functools
import os
import random
import select
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import restarts
import torch
import torch.distributed as dist
from cycles import run as run_cycles
from processes import error_of, run_workers, run_workers_and_report
from torch.nn.parallel import DistributedDataParallel
from training import batch, loss_of, make_model, make_state

import regtopk_torch as rt

TESTS = Path(__file__).resolve().parent

# Killed

WORKERS, EVERY, STEPS_PER_KILL = 2, 3, 8
# Otherwise a restarted worker may find the address of a dead one in the store that torchrun keeps (pytorch issue 135712).
RESTARTING = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
KILL_WITHIN_SECONDS = 0.03  # of the report of a step: a step takes a few milliseconds, a checkpoint after it 10 to 30


def kill_workers(ended, pipe, kills, draw, deadline):
    """Kill a random worker at a random moment of a random step, once per start of the job; return [(rank, step)]."""
    done, partial, victim = [], b"", None
    while len(done) < kills:
        assert not ended(), f"expected a job that still runs, got one that ended after {len(done)} of {kills} kills"
        assert time.monotonic() < deadline, f"expected {kills} kills in time, got {len(done)}"
        if not select.select([pipe], [], [], 1.0)[0]:
            continue
        *lines, partial = (partial + os.read(pipe, 1 << 16)).split(b"\n")
        for restart, rank, step, pid in (map(int, line.split()) for line in lines):
            if restart != len(done):
                continue  # written before the last kill took effect
            if victim is None:
                victim = draw.randrange(WORKERS), step + draw.randrange(STEPS_PER_KILL)
            if (rank, step) == victim:
                handle = os.pidfd_open(pid)  # unlike a number, never another process
                select.select([], [], [], draw.uniform(0, KILL_WITHIN_SECONDS))
                signal.pidfd_send_signal(handle, signal.SIGKILL)
                os.close(handle)
                done.append(victim)
                victim = None
    return done


def undisturbed(rank, directory, steps):
    return restarts.run(rank, directory, steps, EVERY, before_step=lambda step: None)


@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.long)])
def test_a_job_whose_workers_are_killed_ends_with_the_bits_of_an_undisturbed_one(tmp_path, kills):
    seed, steps = 5, (kills + 2) * STEPS_PER_KILL
    print(f"seed {seed}")
    ((expected, _), *_) = run_workers(undisturbed, WORKERS, tmp_path / "undisturbed", steps)
    os.mkfifo(tmp_path / "progress")
    pipe = os.open(tmp_path / "progress", os.O_RDWR | os.O_NONBLOCK)
    deadline = time.monotonic() + 120 + 90 * kills  # a start takes 10 s, on a busy machine 40: this is against hanging
    environment = {**os.environ, **RESTARTING, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORKERS)]
    command += ["--max-restarts", str(kills), str(TESTS / "restarts.py"), str(tmp_path), str(steps), str(EVERY)]
    with open(tmp_path / "output", "wb") as output:
        job = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        try:
            killed = kill_workers(lambda: job.poll() is not None, pipe, kills, random.Random(seed), deadline)
            status = job.wait(max(1.0, deadline - time.monotonic()))
        finally:
            if job.poll() is None:
                job.terminate()  # torchrun ends its workers
                job.wait(40)
            os.close(pipe)
            print((tmp_path / "output").read_text()[-6000:])
    print(f"killed (rank, step): {killed}")
    assert status == 0 and len(killed) == kills
    result = torch.load(tmp_path / "result.pt", weights_only=True)
    assert result["restarts"] == kills and result["resumed_from"] is not None
    assert all(map(torch.equal, result["parameters"], expected))
    folders = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert folders == [f"step-{step:08d}" for step in range(EVERY, steps + 1, EVERY)][-1:]


def take_local_steps(rank, directory, steps, pipe=None):
    """Go on from the checkpoint that is there; return (weights of the model, common weights, step of that checkpoint)."""
    model = make_model()
    inner = torch.optim.AdamW(model.parameters(), lr=0.01)
    outer = functools.partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)
    local = rt.LocalSteps(model, inner, make_state("regtopk", 0.02), 4, outer, fragments=2, delay=1)
    if (directory / "regtopk.json").is_file():
        rt.load(local, None, directory)
    first = local.steps
    progress = os.open(pipe, os.O_WRONLY) if pipe else None
    for step in range(first, steps):
        if progress is not None:
            os.write(progress, f"0 {rank} {step} {os.getpid()}\n".encode())
        inner.zero_grad()
        loss_of(model, batch(rank, step)).backward()
        inner.step()
        local.step()
        if local.steps % EVERY == 0:
            rt.save(local, None, directory)
    return [weights.detach().clone() for weights in (*model.parameters(), *local.common.values())], first


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.long)])
def test_local_steps_of_workers_that_are_killed_end_with_the_bits_of_an_undisturbed_run(tmp_path, kills):
    seed = 8  # whose first victim is killed in step 5, after a checkpoint
    steps = (kills + 2) * STEPS_PER_KILL
    expected = run_workers(take_local_steps, WORKERS, tmp_path / "undisturbed", steps)
    draw = random.Random(seed)
    os.mkfifo(tmp_path / "progress")
    pipe = os.open(tmp_path / "progress", os.O_RDWR | os.O_NONBLOCK)
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        for _ in range(kills):
            with contextlib.suppress(BlockingIOError):
                os.read(pipe, 1 << 16)  # of the job before
            job = executor.submit(run_workers_and_report, take_local_steps, WORKERS, tmp_path / "checkpoint", steps, tmp_path / "progress")
            ((victim, step),) = kill_workers(job.done, pipe, 1, draw, time.monotonic() + 60)
            outcomes = job.result()
            print(f"killed rank {victim} in step {step}: {outcomes}")
            assert "exit code -9" in outcomes[victim][1] and not any(succeeded for succeeded, _ in outcomes)
    os.close(pipe)
    for (weights, first), (undisturbed, begun) in zip(run_workers(take_local_steps, WORKERS, tmp_path / "checkpoint", steps), expected, strict=True):
        assert first > begun == 0
        assert all(map(torch.equal, weights, undisturbed))


# Stopped

PATIENCE = timedelta(seconds=4)  # what comes before the stop has to be done within it


def stop_rank_1(rank, moment, directory):
    """Rank 1 stops for good at a moment; return rank 0's error and how long it took to come."""
    pids = [None, None]
    dist.all_gather_object(pids, os.getpid())
    group = dist.new_group([0, 1], timeout=PATIENCE)
    model = make_model()
    ddp = DistributedDataParallel(model, bucket_cap_mb=100, process_group=group)
    state = make_state("regtopk", 0.02, process_group=group)
    ddp.register_comm_hook(state, rt.sparse_hook)
    if moment != "first exchange":
        for step in range(2):
            loss_of(ddp, batch(rank, step)).backward()
        rt.save(state, ddp, directory)
    dist.barrier()
    start = time.monotonic()
    try:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        if moment in ("first exchange", "exchange"):
            loss_of(ddp, batch(rank, 2)).backward()
        elif moment == "save":
            rt.save(state, ddp, directory)
        elif moment == "load":
            rt.load(state, ddp, directory)
        else:
            state.flush(ddp)
    except Exception as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - start
    finally:
        os.kill(pids[1], signal.SIGKILL)


@pytest.mark.parametrize(
    "moment, message",
    [
        ("first exchange", "DistBackendError: rank 0: sparse_hook: expected all 2 ranks to use their state within 4 s, got none of rank 1"),
        ("exchange", "DistBackendError: rank 0: sparse_hook: expected the payloads of all 2 ranks of step 2 within 4 s, got "),
        ("save", "CheckpointError: rank 0: save: expected all 2 ranks to begin the checkpoint, got: rank 0: save: expected all 2 ranks to come to rt.save"),
        ("load", "CheckpointError: rank 0: load: expected all 2 ranks to read the checkpoint, got: rank 0: load: expected all 2 ranks to come to rt.load"),
        ("flush", "DistBackendError: rank 0: flush: expected all 2 ranks to come to the flush within 4 s, got "),
    ],
)
def test_when_a_worker_stops_the_other_says_what_it_waited_for(tmp_path, moment, message):
    (succeeded, result), (_, other) = run_workers_and_report(stop_rank_1, 2, moment, tmp_path)
    assert succeeded, result
    error, seconds = result
    assert message in error
    assert PATIENCE.total_seconds() * 0.9 < seconds < PATIENCE.total_seconds() + 20
    assert "exit code -9" in other


def lose_rank_1(rank, moment):
    """The process of rank 1 ends; return what the error of the others says and how long it took to come."""
    model = make_model()
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.001)
    state = make_state("topk", 0.02)
    ddp.register_comm_hook(state, rt.sparse_hook)
    for step in range(2):
        loss_of(ddp, batch(rank, step)).backward()
    dist.barrier()
    if rank == 1 and moment == "having waited":
        signal.setitimer(signal.ITIMER_REAL, 3.5)  # ends the process
    elif rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if moment == "having waited" and rank == 0:
        time.sleep(6)
    if moment == "one is slow" and rank == 2:
        time.sleep(9)
    start = time.monotonic()
    try:
        state.flush(ddp) if moment == "flush" else loss_of(ddp, batch(rank, 2)).backward()
    except Exception as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - start


@pytest.mark.parametrize("moment, ranks", [("exchange", 3), ("flush", 3), ("in a ring", 6), ("having waited", 3), ("one is slow", 3)])
def test_when_a_workers_process_ends_the_others_name_it_within_seconds(moment, ranks):
    survivors = run_workers_and_report(lose_rank_1, ranks, moment)
    _, killed = survivors.pop(1)
    assert f"exit code -{signal.SIGALRM if moment == 'having waited' else signal.SIGKILL}" in killed
    named = "one of ranks 1, 2, which have said nothing since, may have ended" if moment == "one is slow" else "rank 1 has said nothing since and may have ended"
    for succeeded, result in survivors:
        assert succeeded, result
        error, seconds = result
        assert "DistBackendError" in error and named in error, error
        assert seconds < 12, "some seconds for those that are there, once and neither per bucket nor per rank"


def lose_the_store(rank, address):
    """Rank 0, whose process serves the store, ends; the other's error."""
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    state = rt.TopKState(0.1)
    state.average([torch.ones(50)])
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        state.average([torch.ones(50)])
    except Exception as error:
        return str(error)


def test_when_the_process_that_serves_the_store_ends_the_error_says_so():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{found.getsockname()[1]}"
    _, (succeeded, error) = run_workers_and_report(lose_the_store, 2, address)
    assert succeeded and ("rank 0 has said nothing since" in error or "rank 0 as a rule, may have ended" in error), error


STORE_TIMEOUT = timedelta(seconds=5)


def stop_the_store(rank, address, folder):
    """Rank 0, whose process serves the store, stops for as long as the other needs; what the other's calls say, and how long they took."""
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2, timeout=STORE_TIMEOUT)
    state, saved = rt.TopKState(0.1), rt.TopKState(0.1)
    for each in (state, saved):
        each.average([torch.ones(50)])
    if rank == 0:
        subprocess.Popen([sys.executable, "-c", f"import os, time; time.sleep(25); os.kill({os.getpid()}, {signal.SIGCONT})"])
        os.kill(os.getpid(), signal.SIGSTOP)
        return None
    found = [error_of(state.average, [torch.ones(50)]), error_of(rt.save, saved, None, folder)]
    start = time.monotonic()
    state.close()
    return *found, time.monotonic() - start


def test_a_store_that_stopped_answering_holds_nobody_beyond_the_timeout(tmp_path):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{found.getsockname()[1]}"
    _, (succeeded, result) = run_workers_and_report(stop_the_store, 2, address, tmp_path / "checkpoint")
    assert succeeded, result
    *calls, closing = result
    for _, message, seconds in calls:
        assert "rank 0 as a rule, may have ended or stopped" in message and seconds < 9, message
    assert closing < 3


# Again and again


def again_and_again(rank, cycles, folder):
    dist.destroy_process_group()
    return run_cycles(rank, cycles, folder)


@pytest.mark.parametrize("cycles", [40, pytest.param(200, marks=pytest.mark.long)])
def test_created_trained_and_destroyed_again_and_again_a_process_does_not_grow(tmp_path, cycles):
    for measurements in run_workers(again_and_again, 2, cycles, str(tmp_path), seconds=600 + 10 * cycles):
        assert len(measurements) == cycles
        resident, threads, files = zip(*measurements[cycles // 2 :], strict=True)
        print(f"resident MB after half of the cycles and after all: {resident[0] / 1e6:.1f} {resident[-1] / 1e6:.1f}")
        assert max(resident) <= 1.02 * resident[0]
        assert len(set(threads)) == len(set(files)) == 1
