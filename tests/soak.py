"""Train while modes, layouts, scales, world sizes, kills and more vary at random, and check all the time that nothing is lost.

    python tests/soak.py --workers 4 --minutes 15 --seed 0

The run is a chain of legs, each a group of gloo processes that goes on from the checkpoint of the leg before, under options
of its own; some end by the death of a worker and are resumed, some by a call that one rank makes alone. Some train a second
model under the same GradScaler, with optimizers of which one may step while another skips; some replace a layer by a fresh
one. After every leg: were the replicas equal after every step, did every bucket and residual equal the simulation on one
process bit for bit, was what all ranks were given either applied or kept, did the residual of what nobody used wait, did each
residual come through the checkpoint, and did a resumed leg repeat the bits of the one that was killed? Prints what was
counted; the exit status is 1 if anything was violated.
"""

import argparse
import contextlib
import copy
import dataclasses
import faulthandler
import gc
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
from books import Books, booked_hook, digest, finite, in_memory_order, residuals_of  # noqa: E402
from buckets import same_bits  # noqa: E402
from hosts import Twin  # noqa: E402
from processes import GROUP_TIMEOUT, run_workers_and_report  # noqa: E402
from training import BUCKET_CAP_MB, WIDTH, batch, loss_of, make_model, make_optimizer  # noqa: E402

import regtopk_torch as rt  # noqa: E402
from experiments.checkpoints import StepFolders  # noqa: E402

SECONDS_PER_LEG = 240  # on a machine that does other things as well
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
    "idle for a while": {"find_unused_parameters": True},
    "idle for a while, bucket view": {"find_unused_parameters": True, "gradient_as_bucket_view": True},
}
PLACES = ("branch", "model.layers.4")  # layers that may be replaced by fresh ones
SMALL = 40  # entries of a parameter
ALONE_SECONDS = 15  # until every rank knows what one of them has called alone


@dataclasses.dataclass
class Leg:
    """What one group of processes does; decided by the seed alone, but for the moment at which a kill strikes."""

    number: int
    world_size: int
    first_step: int
    steps: int
    method: str
    distortion: str
    density: float | rt.WarmupDensity
    entry: str
    kind: str
    bucket_cap_mb: float
    set_to_none: bool
    regroup_at: int | None  # this step begins in another process group
    autocast: torch.dtype | None
    growth: float | None  # of a GradScaler; None: there is none
    overflows: dict  # step: (rank, member, position of the parameter whose gradient overflows)
    save_every: int
    kill: tuple | None  # (rank, seconds after its start)
    side: bool = False  # a second model, under the same GradScaler
    optimizers: str = "one"  # or "by model", or "across": two, of which each has parameters of every model
    fresh: dict = dataclasses.field(default_factory=dict)  # step: the place whose layer is replaced before it
    alone: tuple | None = None  # (step, rank, the call that this rank makes alone before it)
    reads: bool = False  # residuals are read between steps, which settles at once what the next step would
    options: dict = dataclasses.field(default_factory=dict)  # of the state: its parts

    def density_at(self, step):
        return self.density(step) if callable(self.density) else self.density

    def entries_kept_of(self, numel, rank):
        ranks = self.options.get("levels", 1)
        return rt._C.part_of(numel, rank % ranks, ranks)[1]

    def takers(self, step):
        """The ranks that use the branch."""
        everyone = set(range(self.world_size))
        if self.kind == "unused by all, skipped":
            return everyone if step % 3 == 0 else set()
        if self.kind.startswith("idle"):
            return everyone if step % 7 < 2 else set()
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


def make_side():
    """The second model."""
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))


ALWAYS_USED = [len(list(module.parameters())) for module in (make_model(), make_side())]  # the first parameters of each member


def is_small(name, numel):
    """A rule for `dense=`."""
    return numel < SMALL


def draw_leg(draw, number, workers, first_step, before):
    """Return the next leg; `before` is the one whose checkpoint it goes on from, None at the start of a chain."""
    kind = draw.choice(list(KINDS))
    world_size = draw.randint(2, workers) if before is None or draw.random() < 0.3 else before.world_size
    steps = draw.randint(6, 12)
    growth = None if kind == "join" else draw.choice([None, 2.0, 2.0, 1.7])
    first, last = first_step, first_step + steps - 1
    side = growth is not None and draw.random() < 0.5
    overflows = {}
    for _ in range(draw.randint(0, 4 if side else 3) if growth is not None else 0):
        member = draw.randrange(1 + side)
        overflows[draw.randint(first, last)] = (draw.randrange(world_size), member, draw.randrange(ALWAYS_USED[member]))
    later = range(first + 1, last + 1) if kind != "join" else ()
    density = draw.choice([0.002, 0.01, 0.05, 0.3, 0.8])
    options = {
        "wire_dtype": draw.choice([None, None, None, torch.bfloat16, torch.float16, "sign", "2bit"]),
        "index_code": draw.choice(["offsets", "elias-fano"]), "decay": draw.choice([1.0, 1.0, 1.0, 0.9]),
        "chunk": draw.choice([None, None, None, 256]), "dense": draw.choice(["never", "never", "auto", is_small]),
        "momentum": draw.choice([0.0, 0.0, 0.0, 0.9]), "clip_norm": draw.choice([None, None, None, None, 0.05]),
    }  # fmt: skip
    options["mask_momentum"] = options["momentum"] > 0 and draw.random() < 0.5
    options["support"] = draw.choice(["own", "own", "leader"]) if options["wire_dtype"] not in ("sign", "2bit") else "own"
    if draw.random() < 0.15 if before is None else "levels" in before.options:  # its checkpoints are for as many ranks and hosts
        world_size = (4 * (workers // 4) or 2) if before is None else before.world_size
        options.update(levels=2, momentum=0.0, mask_momentum=False, clip_norm=None, support="own", dense="never")
    alone = (draw.choice(later), draw.randrange(world_size), draw.choice(["reset", "pause"])) if later and "levels" not in options and draw.random() < 0.12 else None
    return Leg(
        number=number, world_size=world_size, first_step=first, steps=steps,
        method=before.method if before else draw.choice(["topk", "regtopk", "regtopk"]),
        distortion=before.distortion if before else draw.choice(["previous", "current"]),
        density=rt.WarmupDensity(0.5, density, max(1, last)) if draw.random() < 0.2 else density, entry=draw.choice(["register_comm_hook"] * 3 + ["attach"]), kind=kind,
        bucket_cap_mb=draw.choice([BUCKET_CAP_MB / 4, BUCKET_CAP_MB, ONE_BUCKET_MB, ONE_BUCKET_MB]),
        set_to_none=draw.random() < 0.7,
        regroup_at=draw.choice(later) if later and draw.random() < 0.15 else None,
        autocast=draw.choice([None, None, torch.bfloat16, torch.float16]), growth=growth, overflows=overflows,
        save_every=draw.randint(2, 4),
        kill=(draw.randrange(world_size), draw.uniform(0.05, 0.6)) if alone is None and draw.random() < 0.3 else None,
        side=side, optimizers=draw.choice(["one", "by model", "across"]) if growth is not None else "one",
        fresh={step: draw.choice(PLACES) for step in draw.sample(later, draw.choice([0, 0, 1, 2]))} if later else {},
        alone=alone, reads=draw.random() < 0.5, options=options,
    )  # fmt: skip


class Member:
    """One of a leg's models, the DDP and the state around it, and the account of what was given, applied and dropped."""

    def __init__(self, leg, module, scaler, spoil, **ddp_options):
        self.module, self._leg, self._ddp_options = module, leg, ddp_options
        if leg.method == "topk":
            self.state = rt.TopKState(leg.density, grad_scaler=scaler, **leg.options)
        else:
            self.state = rt.RegTopKState(leg.density, mu=1.0, distortion=leg.distortion, grad_scaler=scaler, **leg.options)
        self.books = Books(module, scaler)
        self._spoil = spoil  # what a parameter's gradient is to be, of the gradient and the parameter's position
        self._given_now, self._unknown = {}, False
        self.given, self.applied, self.dropped = {}, {}, {}
        for position, parameter in enumerate(module.parameters()):
            self._watch(parameter, position)
        self.wrap()

    def wrap(self):
        self.ddp = DistributedDataParallel(self.module, **self._ddp_options)
        if self._leg.entry == "attach":
            rt.attach(self.ddp, self.state)
        elif self._leg.alone:  # no books: the error is to come as a user sees it
            self.ddp.register_comm_hook(self.state, rt.sparse_hook)
        else:
            self.ddp.register_comm_hook((self.state, self.books), booked_hook)

    def _watch(self, parameter, position):
        index, like = self.books.indices[parameter], torch.empty_like(parameter, device="meta")  # does not keep it alive
        self.applied[index] = torch.zeros(parameter.numel(), dtype=torch.float64)

        def enter(gradient):
            gradient = self._spoil(gradient, position)
            flat = in_memory_order(gradient, like).double()
            self._given_now[index] = self._given_now[index] + flat if index in self._given_now else flat
            return gradient

        parameter.register_hook(enter)  # before DDP's own sees the gradient

    def end_step(self, scale):
        for index, gradient in self._given_now.items():
            self.given[index] = self.given.get(index, 0) + finite(gradient) / scale
        self._given_now.clear()

    def note_verdict(self, void, applied):
        """Enter in the books what the simulation can't know: the verdict of another model's buckets, and what was applied all the same."""
        if not self.books.steps:
            return
        page, unknown = self.books.steps[-1], self._unknown
        self._unknown = void and applied
        if void:
            page["unknown" if applied else "skipped"] = True
        # With other factors than 2 a restart would round where the run did not.
        if self._leg.growth == 2.0 and (self._leg.reads and self._unknown or unknown and not self._unknown):
            page["restart"], self._unknown = self.state_dict(), False

    def note_applied(self, optimizer):
        """An optimizer has stepped: what counts as applied is what it has stepped on."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter in self.books.indices:
                    self.applied[self.books.indices[parameter]] += in_memory_order(parameter.grad, parameter).double()

    def replace(self, place, optimizers):
        """Put a fresh layer in the place of one, and a new DDP around the model, for the same state."""
        old = self.module.get_submodule(place)
        new = nn.Linear(old.in_features, old.out_features)
        held, positions = self.residuals(), {parameter: position for position, parameter in enumerate(self.module.parameters())}
        for before, after in zip(old.parameters(), new.parameters(), strict=True):
            index = self.books.indices[before]
            self.dropped.update({index: held[index]} if index in held else {})
            self.books.replace(before, after)
            self._watch(after, positions[before])
            for optimizer in optimizers:
                optimizer.state.pop(before, None)
                for group in optimizer.param_groups:
                    group["params"] = [after if parameter is before else parameter for parameter in group["params"]]
        self.module.set_submodule(place, new)
        del old, before, positions, self.ddp
        gc.collect()
        self.wrap()

    def residuals(self):
        order = [self.books.indices[parameter] for parameter in self.module.parameters()]
        return {order[position]: residual for position, residual in residuals_of(self.state, self.module).items()}

    def state_dict(self):
        """The state's dict with the names of a LocalExchange: the parameters' indices; those that have been exchanged."""
        saved = copy.deepcopy(self.state.state_dict(self.module))
        named = zip(self.module.parameters(), saved["parameters"].values(), strict=True)
        saved["parameters"] = {str(self.books.indices[parameter]): entry for parameter, entry in named if "residual" in entry}
        return saved

    def report(self):
        return {
            "books": self.books.steps, "given": self.given, "applied": list(self.applied.values()), "dropped": self.dropped,
            "residuals": self.residuals(), "stats": self.state.stats(),
        }  # fmt: skip


def make_optimizers(leg, members):
    parameters = [list(member.module.parameters()) for member in members]
    if leg.optimizers != "by model":
        parameters = [sum(parameters, [])]
    if leg.optimizers == "across":
        parameters = [parameters[0][::2], parameters[0][1::2]]
    return [make_optimizer(nn.ParameterList(some)) for some in parameters]


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
    scaler = None
    if leg.growth is not None:
        scaler = torch.amp.GradScaler(
            "cpu", init_scale=2.0**10, growth_factor=leg.growth, backoff_factor=1 / leg.growth, growth_interval=3
        )
    injected, overflowed = set(), set()

    def spoil(gradient, member, position):
        # Besides the injected overflows there are those of fp16 under a scale that has grown for a while.
        if (member, position) in injected:
            gradient = torch.full_like(gradient, math.inf)
        if not gradient.isfinite().all():
            overflowed.add(step)
        return gradient

    module = Model(rank, leg.takers)
    modules, options = [module], [KINDS[leg.kind]]
    if leg.side:
        modules, options = [module, make_side()], [KINDS[leg.kind], {}]
    members = [
        Member(leg, each, scaler, lambda gradient, position, member=member: spoil(gradient, member, position),
               bucket_cap_mb=leg.bucket_cap_mb, **ddp_options)
        for member, (each, ddp_options) in enumerate(zip(modules, options, strict=True))
    ]  # fmt: skip
    main = members[0]
    optimizers = make_optimizers(leg, members)
    stepped = []

    def after_step(optimizer, *_):
        stepped.append(optimizer)
        for member in members:
            member.note_applied(optimizer)

    for optimizer in optimizers:
        optimizer.register_step_post_hook(after_step)

    def named_parameters():
        """{name: (parameter, its optimizer's state of it)} of all members."""
        states = {parameter: optimizer.state[parameter] for optimizer in optimizers for parameter in optimizer.param_groups[0]["params"]}
        named = ((f"{index}.{name}", p) for index, each in enumerate(modules) for name, p in each.named_parameters())
        return {name: (parameter, states[parameter]) for name, parameter in named}

    folders = StepFolders(folder, {"job": "soak"})
    step, training = folders.load(main.state, main.ddp)
    side_folder = folder / f"step-{step:08d}" / "side"

    def restore(parameter, state_of_it, value, momentum, had_gradient):
        parameter.detach().copy_(value)
        state_of_it["momentum_buffer"] = momentum
        if had_gradient and not leg.set_to_none:
            parameter.grad = torch.zeros_like(parameter)

    if training is not None:
        for name, saved_of_it in training["parameters"].items():
            if name in named_parameters():  # else of a member that this leg does not have
                restore(*named_parameters()[name], *saved_of_it)
        if scaler is not None and training["scaler"].get("growth_factor") == leg.growth:
            kept = {name: training["scaler"][name] for name in ("scale", "_growth_tracker")}
            scaler.load_state_dict({**scaler.state_dict(), **kept})
    if leg.side and side_folder.is_dir():
        rt.load(members[1].state, members[1].ddp, side_folder)
    resumed_at, end, saved = step, leg.first_step + leg.steps, None
    digests, held, applied_in_part = {}, {}, set()
    initial = [member.state_dict() for member in members]

    def save():
        training = {
            # Momentum moves a parameter whose gradient is 0 and leaves one whose gradient is None: where no rank uses one in
            # the first step after a load, the optimizer would not do what it does in a process that never stopped.
            "parameters": {
                name: [parameter.detach(), state_of_it.get("momentum_buffer"), parameter.grad is not None]
                for name, (parameter, state_of_it) in named_parameters().items()
            },
            "scaler": scaler.state_dict() if scaler is not None else {},
        }  # fmt: skip
        if leg.side:
            rt.save(members[1].state, members[1].ddp, folder / f"step-{step:08d}" / "side")
        folders.save(step, training, main.state, main.ddp)
        return step, [residuals_of(member.state, member.module) for member in members]

    def backward(data):
        with torch.autocast("cpu", dtype=leg.autocast) if leg.autocast else contextlib.nullcontext():
            loss = sum(loss_of(member.ddp, data) for member in members)
        (loss if scaler is None else scaler.scale(loss)).backward()

    with (
        main.ddp.join() if leg.kind == "join" else contextlib.nullcontext(),
        open(folder / f"digests-{leg.number}-{rank}", "a") as told,
    ):
        # Under join the ranks have inputs for fewer and fewer steps.
        while step < (end - rank if leg.kind == "join" else end):
            module.step = step
            if step == leg.regroup_at:
                main.ddp._update_process_group(dist.new_group(timeout=GROUP_TIMEOUT))
            if step in leg.fresh:
                torch.manual_seed(step)
                main.replace(leg.fresh[step], optimizers)
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=leg.set_to_none)
            if leg.kind == "no_sync":
                with contextlib.ExitStack() as stack:
                    for member in members:
                        stack.enter_context(member.ddp.no_sync())
                    backward(batch(rank, step + 100_000))
            bad_rank, *bad = leg.overflows.get(step, (None, None, None))
            injected.update({tuple(bad)} if rank == bad_rank else ())
            if leg.alone is not None and step == leg.alone[0]:
                started = time.monotonic()
                try:
                    if rank == leg.alone[1]:
                        getattr(main.state, leg.alone[2])()
                    backward(batch(rank, step))
                    error = "no error"
                except Exception as caught:
                    error = str(caught)
                if leg.kind == "unused by all, skipped" and not error.startswith(f"rank {rank}: "):
                    # There DDP waits for an all-reduce of its own, until the other rank is gone, before it asks the hook's futures;
                    # the state knows why, and says so at its next use.
                    try:
                        main.state.flush(main.ddp)
                    except Exception as caught:
                        error = str(caught)
                return {"alone": error, "seconds": time.monotonic() - started, "digests": digests, "saved": saved}
            backward(batch(rank, step))
            injected.clear()
            scale = 1.0 if scaler is None else scaler.get_scale()
            void = not all(parameter.grad is None or parameter.grad.isfinite().all() for each in modules for parameter in each.parameters())
            stepped.clear()
            for optimizer in optimizers:
                if scaler is None:
                    optimizer.step()
                else:
                    scaler.step(optimizer)
            if scaler is not None:
                scaler.update()
            if void and stepped:
                applied_in_part.add(step)
            for member in members:
                member.end_step(scale)
                member.note_verdict(void, bool(stepped))
            if leg.reads and not leg.takers(step):
                residuals = main.residuals()
                branch = [main.books.indices[parameter] for parameter in module.branch.parameters()]
                idle = {index: residuals.pop(index) for index in branch if index in residuals}
                # What a worker sends it no longer holds.
                held[step] = idle, sum(int((residual == 0).sum()) for residual in residuals.values()), sum(map(len, residuals.values()))
            digests[step] = "".join(map(digest, modules))
            print(step, digests[step], file=told, flush=True)
            step += 1
            if leg.kind != "join" and step % leg.save_every == 0 and step < end:
                saved = save()
    step = end
    saved = save()
    signal.setitimer(signal.ITIMER_REAL, 0)
    return {
        "resumed_at": resumed_at, "overflowed": overflowed, "applied in part": applied_in_part, "digests": digests,
        "final_digest": "".join(map(digest, modules)), "held": held, "saved": saved,
        "members": [{"initial": first, **member.report()} for first, member in zip(initial, members, strict=True)],
    }  # fmt: skip


class Soak:
    """The chain of legs, what was counted, and what was violated."""

    def __init__(self, workers, seed, folder):
        self._workers, self._draw, self._folder = workers, random.Random(seed), Path(folder)
        self.counts = dict.fromkeys(
            ["legs", "steps", "rebuilds", "overflows", "overflows, shared scaler", "overflows applied in part", "idle steps",
             "narrow values", "coded indices", "decaying steps", "scheduled steps", "led steps", "steps of chunks", "steps with momentum", "clipped steps", "dense buckets", "steps of two levels", "layers replaced", "calls on one rank", "kills", "resumes", "steps repeated after a kill", "world sizes changed",
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
                reports = (f"rank {rank}: {report}" for rank, (succeeded, report) in enumerate(outcomes) if not succeeded)
                self._report(leg, "\n".join((*reports, self._stacks())))
                self._before = None  # the chain is broken
                self._number += -self._number % CHAIN_LEGS
                return
            for rank, (succeeded, report) in enumerate(outcomes):
                if not succeeded and "did not end" in str(report) or "before the deadline" in str(report):
                    self._report(leg, f"rank {rank} hung after rank {leg.kill[0]} was killed: {report}\n{self._stacks()}")
            self.counts["kills"] += 1
            self.counts["resumes"] += 1
            again = (self._draw.randrange(leg.world_size), self._draw.uniform(0.05, 0.6)) if self._draw.random() < 0.3 else None
            leg = dataclasses.replace(leg, kill=again)
            outcomes = run_workers_and_report(train_leg, leg.world_size, leg, self._folder, seconds=SECONDS_PER_LEG)
        results = [result for _, result in outcomes]
        whole = (self._check_ends, self._check_repeats, self._check_loaded, self._check_idle, self._check_books, self._check_mass)
        for check in (self._check_replicas, *((self._check_alone,) if leg.alone else whole)):
            try:
                check(leg, results)
            except AssertionError as violation:
                self._report(leg, f"{check.__name__}: {violation}")
        if leg.alone:
            self.counts["calls on one rank"] += 1
            if results[0]["saved"] is None:
                return  # the next leg goes on from where this one did
        else:
            self._count(leg, results[0])
        if self._before is not None and self._before.world_size != leg.world_size:
            self.counts["world sizes changed"] += 1
        end = results[0]["saved"][0]
        self._before, self._kept = dataclasses.replace(leg, steps=end - leg.first_step), [result["saved"][1] for result in results]

    def _count(self, leg, result):
        stats = result["members"][0]["stats"]
        self.counts["steps"] += stats["steps"]
        self.counts["rebuilds"] += stats["rebuilds"]
        self.counts["overflows"] += stats["void_steps"]
        self.counts["overflows, shared scaler"] += stats["void_steps"] if leg.side else 0
        self.counts["overflows applied in part"] += len(result["applied in part"])
        self.counts["idle steps"] += sum(not leg.takers(step) and not leg.takers(step - 1) for step in result["digests"])
        self.counts["narrow values"] += stats["sent_entries"] if leg.options.get("wire_dtype") else 0
        self.counts["coded indices"] += stats["sent_entries"] if leg.options.get("index_code") == "elias-fano" else 0
        self.counts["decaying steps"] += stats["steps"] if leg.options.get("decay", 1.0) < 1 else 0
        self.counts["led steps"] += stats["steps"] if leg.options.get("support") == "leader" else 0
        self.counts["steps of chunks"] += stats["steps"] if leg.options.get("chunk") else 0
        self.counts["steps with momentum"] += stats["steps"] if leg.options.get("momentum") else 0
        self.counts["clipped steps"] += stats["steps"] if leg.options.get("clip_norm") else 0
        self.counts["steps of two levels"] += stats["steps"] if leg.options.get("levels") else 0
        self.counts["dense buckets"] += stats["dense_buckets"]
        self.counts["scheduled steps"] += stats["steps"] if callable(leg.density) else 0
        self.counts["layers replaced"] += sum(step >= result["resumed_at"] for step in leg.fresh)

    def _stacks(self):
        file = self._folder / "stderr"
        return file.read_text(errors="replace")[-4000:] if file.exists() else ""

    def _report(self, leg, text):
        self.counts["violations"] += 1
        print(f"violation in {leg}:\n{text}", flush=True)

    def _check_replicas(self, leg, results):
        for step in results[-1]["digests"]:  # under join the last rank has the fewest
            assert len({result["digests"][step] for result in results}) == 1, f"replicas differ after step {step}"

    def _check_alone(self, leg, results):
        """A call on one rank alone is soon an error on all that names both."""
        _, caller, call = leg.alone
        for rank, result in enumerate(results):
            error, seconds = result.get("alone", "no error"), result.get("seconds", 0.0)
            named = error.startswith(f"rank {rank}: sparse_hook: expected ") and f"rank {caller}" in error and call in error
            assert named and seconds < ALONE_SECONDS, f"rank {rank}, {seconds:.1f} s after rank {caller} called {call}(): {error}"

    def _check_ends(self, leg, results):
        assert len({result["final_digest"] for result in results}) == 1, "replicas differ at the end"
        due = set().union(*(result["overflowed"] for result in results))
        for rank, result in enumerate(results):
            assert due >= {step for step in leg.overflows if step >= result["resumed_at"]}, "an overflow went unseen"
            for member in result["members"]:
                stats, gone = member["stats"], sum(leg.entries_kept_of(residual.numel(), rank) for residual in member["dropped"].values())
                assert stats["void_steps"] == len(due), f"expected {len(due)} void steps, got {stats['void_steps']}"
                assert stats["residual_dropped"] == gone, f"expected {gone} entries dropped, got {stats['residual_dropped']}"
                assert all(residual.isfinite().all() for residual in member["residuals"].values()), "a residual is not finite"

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
        for member in range(min(1 + leg.side, len(self._kept[0]))):
            for name in results[0]["members"][member]["initial"]["parameters"]:
                loaded = [result["members"][member]["initial"]["parameters"][name]["residual"] for result in results]
                kept = [residuals[member][int(name)] for residuals in self._kept]
                if len(kept) == len(loaded):
                    same = all(torch.equal(now.flatten(), then) for now, then in zip(loaded, kept))
                    assert same, f"{name} of model {member} came back with other bits"
                else:
                    now, then = (torch.stack([t.flatten().double() for t in tensors]).mean(0) for tensors in (loaded, kept))
                    torch.testing.assert_close(now, then, rtol=1e-6, atol=1e-7, msg=lambda text: f"{name} in {leg.world_size} ranks: {text}")
                self.counts["bytes checked"] += sum(tensor.nbytes for tensor in loaded)

    def _check_idle(self, leg, results):
        """What nobody uses waits: its residual keeps every bit, and takes no other entry's place in the message."""
        due = set().union(*(result["overflowed"] for result in results))
        for result in results:
            for step, (idle, sent, live) in result["held"].items():
                before = result["held"].get(step - 1, [{}])[0]
                if before.keys() != idle.keys() or not idle:
                    continue  # no idle step, or none that could be known to be one
                self.counts["bytes checked"] += sum(residual.nbytes for residual in idle.values())
                if leg.growth in (None, 2.0):
                    assert all(same_bits(idle[index], before[index]) for index in idle), f"an idle residual changed in step {step}"
                # What rounding took from a value that was sent stays.
                others = ("wire_dtype", "chunk", "momentum", "levels")  # by which an entry that was sent may be another, or not 0 then
                plain = not any(map(leg.options.get, others)) and leg.options.get("support", "own") == "own" and leg.options.get("dense", "never") == "never"
                if leg.bucket_cap_mb == ONE_BUCKET_MB and step not in due and plain:
                    k = max(1, math.floor(leg.density_at(step) * (live + sum(residual.numel() for residual in idle.values())) + 0.5))
                    assert sent >= min(k, live), f"{sent} entries sent of what is in use, of {k}, in step {step}"

    def _check_books(self, leg, results):
        """Every bucket and residual equals the simulation."""
        if leg.entry == "attach":  # calls no Python that could keep books
            return
        for member in range(1 + leg.side):
            reports = [result["members"][member] for result in results]
            options = {**leg.options, "density": leg.density, "method": leg.method, "mu": 1.0, "distortion": leg.distortion}
            ranks = options.pop("levels", 1)
            exchange = rt.LocalExchange(leg.world_size, **options) if ranks == 1 else Twin(leg.world_size // ranks, ranks, **options)
            exchange.load_state_dict({"workers": [report["initial"] for report in reports]})
            books = [report["books"] for report in reports]
            if booking.check_against_simulation(books, leg.method, exchange) is None:
                continue
            for rank, report in enumerate(reports):
                simulated = {index: residual for index, residual in exchange.residuals(rank).items() if index not in report["dropped"]}
                booking.check_equal(report["residuals"], simulated)
            for report in reports:
                handed_out = sum(bucket.nbytes for step in report["books"] for bucket in step["handed_out"].values())
                self.counts["bytes checked"] += handed_out + sum(residual.nbytes for residual in report["residuals"].values())

    def _check_mass(self, leg, results):
        """What was given is applied, kept, or was dropped with its parameter."""
        if leg.options.get("decay", 1.0) < 1 or leg.options.get("momentum") or leg.options.get("clip_norm"):
            return  # or it was forgotten, is in velocities, which the simulation counts on, or was clipped
        ranks = leg.options.get("levels", 1)
        if ranks > 1 and set().union(*(result["overflowed"] for result in results)):
            return  # what the other ranks of a host gave in the place of an overflow has gone with it
        for member in range(1 + leg.side):
            reports = [result["members"][member] for result in results]
            pages = [
                [
                    {"given": {int(name): ranks * entry["residual"].flatten() for name, entry in report["initial"]["parameters"].items()}, "scale": 1.0},
                    {"given": report["given"], "scale": 1.0},
                ]
                for report in reports
            ]
            kept = [{**report["residuals"], **report["dropped"]} for report in reports]
            booking.check_mass(pages, [{index: ranks * residual for index, residual in of_rank.items()} for of_rank in kept], reports[0]["applied"])


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
