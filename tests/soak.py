"""Train while modes, layouts, scales, world sizes and kills vary at random, and check all the time that nothing is lost.

    python tests/soak.py --workers 4 --minutes 15 --seed 0

The run is a chain of legs, each a group of gloo processes that goes on from the checkpoint of the leg before, under options
of its own; some end by the death of a worker and are resumed. After every leg: were the replicas equal after every step, did
every bucket and residual equal the simulation on one process bit for bit, was what all ranks were given either applied or
kept, did each residual come through the checkpoint, and did a resumed leg repeat the bits of the one that was killed? Prints
what was counted; the exit status is 1 if anything was violated.
"""

import argparse
import contextlib
import copy
import dataclasses
import faulthandler
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

sys.path.append(str(Path(__file__).resolve().parent.parent))  # experiments is not installed

import books as booking  # noqa: E402
from books import Books, add_gradients, booked_hook, digest, nothing_applied, residuals_of  # noqa: E402
from processes import GROUP_TIMEOUT, run_workers_and_report  # noqa: E402
from training import BUCKET_CAP_MB, WIDTH, batch, loss_of, make_model, make_optimizer  # noqa: E402

import regtopk_torch as rt  # noqa: E402
from experiments.checkpoints import StepFolders  # noqa: E402

SECONDS_PER_LEG = 90
CHAIN_LEGS = 12  # a chain keeps its method; then another begins, from nothing
ONE_BUCKET_MB = 100
KINDS = {
    "plain": {},
    "bucket view": {"gradient_as_bucket_view": True},
    "batched grad copy": {"batched_grad_copy": True},
    "static graph": {"static_graph": True},
    "no_sync": {},
    "join": {},
    "unused now and then": {"find_unused_parameters": True},
    "unused now and then, bucket view": {"find_unused_parameters": True, "gradient_as_bucket_view": True},
    "unused by all, skipped": {"find_unused_parameters": True, "skip_all_reduce_unused_params": True},
}


@dataclasses.dataclass
class Leg:
    """What one group of processes does; decided by the seed alone, but for the moment at which a kill strikes."""

    number: int
    world_size: int
    first_step: int
    steps: int
    method: str
    distortion: str
    density: float
    entry: str
    kind: str
    bucket_cap_mb: float
    set_to_none: bool
    regroup_at: int | None  # this step begins in another process group
    autocast: torch.dtype | None
    growth: float | None  # of a GradScaler; None: there is none
    overflows: dict  # step: (rank, index of the parameter whose gradient overflows)
    save_every: int
    kill: tuple | None  # (rank, seconds after its start)

    def takers(self, step):
        """The ranks that use the branch."""
        everyone = set(range(self.world_size))
        if self.kind == "unused by all, skipped":
            return everyone if step % 3 == 0 else set()
        if self.kind.startswith("unused"):
            return [everyone, set(), {1}, {0}][step % 4]
        return everyone


class Model(nn.Module):
    """The tests' model behind a branch that some ranks take in some steps."""

    def __init__(self, rank, takers):
        super().__init__()
        self.model, self.branch = make_model(), nn.Linear(WIDTH, WIDTH)
        self.rank, self.takers, self.step = rank, takers, 0

    def forward(self, x):
        return self.model(self.branch(x) if self.rank in self.takers(self.step) else x)


ALWAYS_USED = len(list(make_model().parameters()))  # the first parameters of Model


def draw_leg(draw, number, workers, first_step, before):
    """Return the next leg; `before` is the one whose checkpoint it goes on from, None at the start of a chain."""
    kind = draw.choice(list(KINDS))
    world_size = draw.randint(2, workers) if before is None or draw.random() < 0.3 else before.world_size
    steps = draw.randint(6, 12)
    growth = None if kind == "join" else draw.choice([None, 2.0, 2.0, 1.7])
    first, last = first_step, first_step + steps - 1
    overflows = {}
    if growth is not None:
        overflows = {
            draw.randint(first, last): (draw.randrange(world_size), draw.randrange(ALWAYS_USED)) for _ in range(draw.randint(0, 3))
        }
    return Leg(
        number=number, world_size=world_size, first_step=first, steps=steps,
        method=before.method if before else draw.choice(["topk", "regtopk", "regtopk"]),
        distortion=before.distortion if before else draw.choice(["previous", "current"]),
        density=draw.choice([0.002, 0.01, 0.05, 0.3]), entry=draw.choice(["register_comm_hook"] * 3 + ["attach"]), kind=kind,
        bucket_cap_mb=draw.choice([BUCKET_CAP_MB / 4, BUCKET_CAP_MB, ONE_BUCKET_MB, ONE_BUCKET_MB]),
        set_to_none=draw.random() < 0.7,
        regroup_at=draw.randint(first + 1, last) if kind != "join" and draw.random() < 0.15 else None,
        autocast=draw.choice([None, None, torch.bfloat16, torch.float16]), growth=growth, overflows=overflows,
        save_every=draw.randint(2, 4),
        kill=(draw.randrange(world_size), draw.uniform(0.05, 0.6)) if draw.random() < 0.3 else None,
    )  # fmt: skip


def train_leg(rank, leg, folder):
    """In one of the processes: train from the newest checkpoint in `folder` to the leg's end and return what there is to check."""
    # Warnings of torch and of gloo about those who died; what fails is in the report.
    with open(folder / "stderr", "ab") as file:
        os.dup2(file.fileno(), 2)
    faulthandler.dump_traceback_later(SECONDS_PER_LEG / 2)
    if leg.kill is not None and leg.kill[0] == rank:
        # Ends the process wherever it is, as SIGKILL does: nothing catches this signal.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, leg.kill[1])
    torch.manual_seed(0)
    module = Model(rank, leg.takers)
    ddp = DistributedDataParallel(module, bucket_cap_mb=leg.bucket_cap_mb, **KINDS[leg.kind])
    scaler = None
    if leg.growth is not None:
        scaler = torch.amp.GradScaler(
            "cpu", init_scale=2.0**10, growth_factor=leg.growth, backoff_factor=1 / leg.growth, growth_interval=3
        )
    if leg.method == "topk":
        state = rt.TopKState(leg.density, grad_scaler=scaler)
    else:
        state = rt.RegTopKState(leg.density, mu=1.0, distortion=leg.distortion, grad_scaler=scaler)
    books = Books(module, scaler)
    if leg.entry == "attach":
        rt.attach(ddp, state)
    else:
        ddp.register_comm_hook((state, books), booked_hook)
    optimizer = make_optimizer(module)
    folders = StepFolders(folder, {"job": "soak"})
    step, training = folders.load(state, ddp)
    if training is not None:
        module.load_state_dict(training["model"])
        optimizer.load_state_dict(training["optimizer"])
        for parameter, had_gradient in zip(module.parameters(), training["had_gradient"], strict=True):
            if had_gradient and not leg.set_to_none:
                parameter.grad = torch.zeros_like(parameter)
        if scaler is not None and training["scaler"].get("growth_factor") == leg.growth:
            kept = {name: training["scaler"][name] for name in ("scale", "_growth_tracker")}
            scaler.load_state_dict({**scaler.state_dict(), **kept})
    resumed_at, end = step, leg.first_step + leg.steps
    initial = copy.deepcopy(state.state_dict(ddp))
    injected, overflowed = set(), set()

    def local_gradient(gradient, index):
        # Besides the injected overflows there are those of fp16 under a scale that has grown for a while.
        if index in injected:
            gradient = torch.full_like(gradient, math.inf)
        if not gradient.isfinite().all():
            overflowed.add(step)
        return gradient

    for index, parameter in enumerate(module.parameters()):
        # Before DDP's own hook sees the gradient.
        parameter.register_hook(lambda gradient, index=index: local_gradient(gradient, index))
    applied, digests = nothing_applied(module), {}

    def save():
        training = {
            "model": module.state_dict(), "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else {},
            # Momentum moves a parameter whose gradient is 0 and leaves one whose gradient is None: where no rank uses one in
            # the first step after a load, the optimizer would not do what it does in a process that never stopped.
            "had_gradient": [parameter.grad is not None for parameter in module.parameters()],
        }  # fmt: skip
        folders.save(step, training, state, ddp)

    def backward(data):
        with torch.autocast("cpu", dtype=leg.autocast) if leg.autocast else contextlib.nullcontext():
            loss = loss_of(ddp, data)
        (loss if scaler is None else scaler.scale(loss)).backward()

    with (
        ddp.join() if leg.kind == "join" else contextlib.nullcontext(),
        open(folder / f"digests-{leg.number}-{rank}", "a") as told,
    ):
        # Under join the ranks have inputs for fewer and fewer steps.
        while step < (end - rank if leg.kind == "join" else end):
            module.step = step
            if step == leg.regroup_at:
                ddp._update_process_group(dist.new_group(timeout=GROUP_TIMEOUT))
            optimizer.zero_grad(set_to_none=leg.set_to_none)
            if leg.kind == "no_sync":
                with ddp.no_sync():
                    backward(batch(rank, step + 100_000))
            bad_rank, bad_parameter = leg.overflows.get(step, (None, None))
            injected.update({bad_parameter} if rank == bad_rank else ())
            backward(batch(rank, step))
            injected.clear()
            if scaler is not None:
                scaler.unscale_(optimizer)
            if all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in module.parameters()):
                add_gradients(applied, module)
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            digests[step] = digest(module)
            print(step, digests[step], file=told, flush=True)
            step += 1
            if leg.kind != "join" and step % leg.save_every == 0 and step < end:
                save()
    step = end
    save()
    signal.setitimer(signal.ITIMER_REAL, 0)
    return {
        "resumed_at": resumed_at, "overflowed": overflowed, "initial": initial, "books": books.steps, "digests": digests,
        "final_digest": digest(module), "applied": applied, "residuals": residuals_of(state, ddp.module), "stats": state.stats(),
    }  # fmt: skip


class Soak:
    """The chain of legs, what was counted, and what was violated."""

    def __init__(self, workers, seed, folder):
        self._workers, self._draw, self._folder = workers, random.Random(seed), Path(folder)
        self.counts = dict.fromkeys(
            ["legs", "steps", "rebuilds", "overflows", "kills", "resumes", "steps repeated after a kill", "world sizes changed",
             "bytes checked", "violations"], 0
        )  # fmt: skip
        self._number, self._before, self._kept = 0, None, None

    def run_leg(self):
        if self._number % CHAIN_LEGS == 0:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir(parents=True)
            self._before, self._kept = None, None
        first_step = 0 if self._before is None else self._before.first_step + self._before.steps
        leg = draw_leg(self._draw, self._number, self._workers, first_step, self._before)
        self._number += 1
        self.counts["legs"] += 1
        outcomes = run_workers_and_report(train_leg, leg.world_size, leg, self._folder, seconds=SECONDS_PER_LEG)
        while not all(succeeded for succeeded, _ in outcomes):
            killed = f"exit code {-signal.SIGALRM}"
            if leg.kill is None or killed not in str(outcomes[leg.kill[0]][1]):
                self._report(leg, "\n".join(str(report) for succeeded, report in outcomes if not succeeded))
                self._before = None  # the chain is broken
                self._number += -self._number % CHAIN_LEGS
                return
            for rank, (succeeded, report) in enumerate(outcomes):
                if not succeeded and "did not end" in str(report) or "before the deadline" in str(report):
                    stacks = (self._folder / "stderr").read_text(errors="replace")[-4000:]
                    self._report(leg, f"rank {rank} hung after rank {leg.kill[0]} was killed: {report}\n{stacks}")
            self.counts["kills"] += 1
            self.counts["resumes"] += 1
            again = (self._draw.randrange(leg.world_size), self._draw.uniform(0.05, 0.6)) if self._draw.random() < 0.3 else None
            leg = dataclasses.replace(leg, kill=again)
            outcomes = run_workers_and_report(train_leg, leg.world_size, leg, self._folder, seconds=SECONDS_PER_LEG)
        results = [result for _, result in outcomes]
        for check in (self._check_replicas, self._check_repeats, self._check_loaded, self._check_books):
            try:
                check(leg, results)
            except AssertionError as violation:
                self._report(leg, f"{check.__name__}: {violation}")
        stats = results[0]["stats"]
        self.counts["steps"] += stats["steps"]
        self.counts["rebuilds"] += stats["rebuilds"]
        self.counts["overflows"] += stats["void_steps"]
        if self._before is not None and self._before.world_size != leg.world_size:
            self.counts["world sizes changed"] += 1
        self._before, self._kept = leg, [result["residuals"] for result in results]

    def _report(self, leg, text):
        self.counts["violations"] += 1
        print(f"violation in {leg}:\n{text}", flush=True)

    def _check_replicas(self, leg, results):
        for step in results[-1]["digests"]:  # under join the last rank has the fewest
            assert len({result["digests"][step] for result in results}) == 1, f"replicas differ after step {step}"
        assert len({result["final_digest"] for result in results}) == 1, "replicas differ at the end"
        due = set().union(*(result["overflowed"] for result in results))
        for result in results:
            assert due >= {step for step in leg.overflows if step >= result["resumed_at"]}, "an overflow went unseen"
            assert result["stats"]["void_steps"] == len(due), f"expected {len(due)} void steps, got {result['stats']['void_steps']}"
            assert all(residual.isfinite().all() for residual in result["residuals"].values()), "a residual is not finite"

    def _check_repeats(self, leg, results):
        """A step that was taken before a kill and again after it gave the same bits, where that is promised: the layout was the
        same, and the scale a power of two."""
        if leg.bucket_cap_mb != ONE_BUCKET_MB or leg.growth not in (None, 2.0):
            return
        for rank in range(leg.world_size):
            seen = {}
            for line in (self._folder / f"digests-{leg.number}-{rank}").read_text().splitlines():
                step, of_step = line.split()
                if step in seen:
                    self.counts["steps repeated after a kill"] += 1
                    assert seen[step] == of_step, f"rank {rank} ended step {step} with other bits after the kill"
                seen[step] = of_step

    def _check_loaded(self, leg, results):
        """What the leg began with is what the one before ended with."""
        if self._kept is None or results[0]["resumed_at"] != leg.first_step:
            return
        for index, name in enumerate(results[0]["initial"]["parameters"]):
            loaded = [result["initial"]["parameters"][name].get("residual") for result in results]
            if loaded[0] is None:
                continue
            kept = [residuals[index] for residuals in self._kept]
            if len(kept) == len(loaded):
                assert all(torch.equal(now.flatten(), then) for now, then in zip(loaded, kept)), f"{name} came back with other bits"
            else:
                now, then = (torch.stack([t.flatten().double() for t in tensors]).mean(0) for tensors in (loaded, kept))
                torch.testing.assert_close(now, then, rtol=1e-6, atol=1e-7, msg=lambda text: f"{name} in {leg.world_size} ranks: {text}")
            self.counts["bytes checked"] += sum(tensor.nbytes for tensor in loaded)

    def _check_books(self, leg, results):
        """Every bucket and residual equals the simulation; what was given is applied or kept."""
        if leg.entry == "attach":  # calls no Python that could keep books
            return
        books = [result["books"] for result in results]
        exchange = rt.LocalExchange(leg.world_size, leg.density, method=leg.method, mu=1.0, distortion=leg.distortion)
        exchange.load_state_dict({"workers": [by_index(result["initial"]) for result in results]})
        booking.check_against_simulation(books, leg.method, exchange)
        for rank, result in enumerate(results):
            booking.check_equal(result["residuals"], exchange.residuals(rank))
        loaded = [
            {int(index): entry["residual"].flatten() for index, entry in by_index(result["initial"])["parameters"].items()}
            for result in results
        ]
        pages = [[{"given": residuals, "scale": 1.0}, *steps] for residuals, steps in zip(loaded, books, strict=True)]
        booking.check_mass(pages, [result["residuals"] for result in results], results[0]["applied"])
        for result in results:
            handed_out = sum(bucket.nbytes for step in result["books"] for bucket in step["handed_out"].values())
            self.counts["bytes checked"] += handed_out + sum(residual.nbytes for residual in result["residuals"].values())


def by_index(state_dict):
    """A state's dict with the names of a LocalExchange: the parameters' indices; those that have been exchanged."""
    entries = {str(index): entry for index, entry in enumerate(state_dict["parameters"].values()) if "residual" in entry}
    return {**state_dict, "parameters": entries}


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python tests/soak.py", usage="%(prog)s [options]", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=4, help="most processes of a leg, at least 2 (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=15.0, help="how long legs are started (default: %(default)g)")
    parser.add_argument("--seed", type=int, default=0, help="of everything but the machine's timing (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.workers < 2:
        parser.error(f"--workers: expected at least 2, got {options.workers}")
    if not options.minutes > 0:
        parser.error(f"--minutes: expected a number above 0, got {options.minutes}")
    deadline = time.monotonic() + 60 * options.minutes
    next_line = time.monotonic() + 60
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(options.workers, options.seed, Path(folder) / "chain")
        while time.monotonic() < deadline:
            soak.run_leg()
            if time.monotonic() > next_line:
                print(", ".join(f"{name} {count:,}" for name, count in soak.counts.items()), flush=True)
                next_line += 60
    print(f"workers {options.workers}, minutes {options.minutes:g}, seed {options.seed}, torch {torch.__version__}, {os.cpu_count()} cores")
    for name, count in soak.counts.items():
        print(f"{name:28} {count:>16,}")
    sys.exit(1 if soak.counts["violations"] else 0)


if __name__ == "__main__":
    main()
