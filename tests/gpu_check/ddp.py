"""DDP with the hook on the device, over whatever carries its gradients, against the simulation on the same device: bit for bit.

Gradients are what one gives them, so that no kernel of torch's decides about their bits. Among the steps are parameters that no
rank uses, and one that overflows on one rank and that nobody applies.
"""

import contextlib
import datetime
import os
import signal
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

sys.path.append(str(Path(__file__).resolve().parents[1]))

SIZES = [70_000, 9, 30_000, 1, 4_096]
STEPS, OVERFLOW, UNUSED = 9, 4, (5, 6)
DENSITY = 0.01

# NCCL refuses two ranks on one GPU unless each says that it is a host of its own.
ON_ONE_GPU = {"NCCL_NET": "Socket", "NCCL_SOCKET_IFNAME": "lo", "NCCL_MAX_CTAS": "2", "NCCL_MULTI_RANK_GPU_ENABLE": "1"}


def gradients_of(rank, step, device, dtype=torch.float32):
    """One gradient per parameter; None where the parameter is not used."""
    noise, steady = (torch.Generator().manual_seed(1000 * rank + number) for number in (step, 999))  # entries are sent twice running
    gradients = []
    for size in SIZES:
        # Products and sums alone: the bits of other functions depend on how threads share the work.
        large = torch.randn(size, generator=steady)
        gradients.append((large * large * large * large * large + 0.5 * torch.randn(size, generator=noise)).to(device, dtype))
    if step == OVERFLOW and rank == 0:
        gradients[0][7] = float("inf")
    if step in UNUSED:
        gradients[2] = None
    return gradients


@contextlib.contextmanager
def refusing_to_wait():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextlib.contextmanager
def on_another_stream():
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        yield
        torch.cuda.synchronize()


def finite(tensors):
    return all(bool(tensor.isfinite().all()) for tensor in tensors if tensor is not None)


# What else than the plain exchange is run: options of the state and of the simulation; and how the state comes to the gradients.
WIRE = {"wire_dtype": "2bit", "index_code": "elias-fano", "decay": 0.95}
MOMENTUM = {"momentum": 0.9, "mask_momentum": True, "clip_norm": 5.0, "chunk": 1024}
FORMS = {
    "": ({}, "hook"), "2 bits": (WIRE, "hook"), "momentum, chunks": (MOMENTUM, "hook"), "scaled": ({}, "scaler"), "attached": ({}, "attach"),
    "led": ({"support": "leader"}, "hook"), "adaptive": ({"adaptive": (DENSITY, 2)}, "hook"), "dense in part": ({"dense": lambda name, numel: numel < 40_000}, "hook"),
    "levels": ({"levels": 2}, "hook"), "another stream": ({}, "stream"),
}  # fmt: skip


def density_of(form):
    """(the density, the other options) of a form."""
    import regtopk_torch as rt

    options = dict(FORMS[form][0])
    adaptive = options.pop("adaptive", None)
    return rt.AdaptiveDensity(*adaptive) if adaptive else DENSITY, options


def train(rank, backend, device, method, view, form):
    """Return (parameters, residuals, what was measured, statistics, layouts, of which kind the transport is) of this rank."""
    import regtopk_torch as rt
    from given import Given
    from training import make_state

    if backend == "nccl":
        os.environ.update(ON_ONE_GPU, NCCL_HOSTID=f"host{rank}")
    if device == "cuda":
        torch.cuda.set_device(0)
    group = dist.new_group(backend=backend)
    module = Given(*SIZES).to(device)
    ddp = DistributedDataParallel(module, process_group=group, bucket_cap_mb=0.2, find_unused_parameters=True, gradient_as_bucket_view=view)
    (density, options), entry = density_of(form), FORMS[form][1]
    scaler = torch.amp.GradScaler(device, init_scale=2.0**12, growth_interval=2) if entry == "scaler" else None
    state = make_state(method, density, process_group=group, grad_scaler=scaler, **options)
    places = {parameter: place for place, parameter in enumerate(module.parameters())}
    layouts = []

    def hook(state, bucket):
        layouts[-1].append([places[parameter] for parameter in bucket.parameters()])
        # Buffers and layouts are there by then: nothing may wait for the device.
        settled = backend == "nccl" and len(layouts) > 7 and scaler is None  # a scale that may have changed is waited for
        with refusing_to_wait() if settled else contextlib.nullcontext():
            return rt.sparse_hook(state, bucket)

    if entry == "attach":
        rt.attach(ddp, state)
    else:
        ddp.register_comm_hook(state, hook)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    with on_another_stream() if entry == "stream" and device == "cuda" else contextlib.nullcontext():
        for step in range(STEPS):
            layouts.append([])
            optimizer.zero_grad()
            loss = ddp(gradients_of(rank, step, device))
            (loss if scaler is None else scaler.scale(loss)).backward()
            if step == 2:
                copied = state.state_dict(ddp)
            if step == 3:  # as if it had been stopped: what was saved, loaded and gone on with
                state.load_state_dict(state.state_dict(ddp), ddp)
            if scaler is not None:
                scaler.step(optimizer)
                scaler.update()
            elif finite(parameter.grad for parameter in module.parameters()):
                optimizer.step()
        state.check()
        assert copied["step"] == 2
        saved = state.state_dict(ddp)
    residuals = {name: entry["residual"] for name, entry in saved["parameters"].items()}
    counted = {name: value for name, value in state.stats().items() if not name.endswith("_seconds")}
    parameters, measured = [parameter.detach().cpu() for parameter in module.parameters()], saved.get("density_state", [])
    return parameters, residuals, measured, counted, layouts, rt.groups._stream_of(group) is not None


def simulate(world, device, method, layouts, form):
    """Return (parameters, residuals of each rank by place, what each has measured) of the same job on LocalExchange; with levels on one for each place on a host."""
    import regtopk_torch as rt
    from hosts import Twin

    parameters = [torch.zeros(size, device=device) for size in SIZES]
    density, options = density_of(form)
    options = {"density": density, "method": method, "mu": 1.0, **options}
    levels = options.pop("levels", 1)
    exchange = Twin(world // levels, levels, **options) if levels > 1 else rt.LocalExchange(world, **options)
    for step in range(STEPS):
        given = [
            [torch.zeros_like(parameter) if gradient is None else gradient for parameter, gradient in zip(parameters, gradients_of(rank, step, device), strict=True)]
            for rank in range(world)
        ]  # fmt: skip
        averages = exchange.step(given, layouts[step])
        if finite(averages):
            for place, (parameter, average) in enumerate(zip(parameters, averages, strict=True)):
                if not (step in UNUSED and place == 2):
                    parameter.add_(average, alpha=-0.1)
    kept = [{place: residual.cpu() for place, residual in exchange.residuals(rank).items()} for rank in range(world)]
    measured = [[]] * world if levels > 1 else [worker.get("density_state", []) for worker in exchange.state_dict()["workers"]]
    return [parameter.cpu() for parameter in parameters], kept, measured


def compare(log, world, backend, method, view, form="", layouts=None):
    """Return the layouts of a run, which one with a state that is attached needs, as it cannot see them."""
    from processes import run_workers_and_report

    device = "cpu" if log.emulated else "cuda"
    name = f"{world} ranks, {backend}, {method}{', bucket view' if view else ''}{form and ', '}{form}"
    started = time.monotonic()
    outcomes = run_workers_and_report(train, world, backend, device, method, view, form, seconds=60)
    if not log.check(all(succeeded for succeeded, _ in outcomes), f"{name}: expected a result of every rank, got {outcomes}"):
        return layouts
    results = [result for _, result in outcomes]
    parameters, _, _, counted, seen, on_stream = results[0]
    layouts = layouts or seen
    for rank, other in enumerate(results):
        same = all(torch.equal(one, two) for one, two in zip(parameters, other[0], strict=True))
        log.check(same, f"{name}: expected the parameters of rank 0 on rank {rank}, got others")
    simulated, all_kept, all_measured = simulate(world, device, method, layouts, form)
    for rank, (kept, simulated_norms, (_, residuals, measured, *_)) in enumerate(zip(all_kept, all_measured, results, strict=True)):
        log.check(measured == simulated_norms, f"{name}: expected the norms of the simulation on rank {rank}, got others")
        same = len(kept) == len(residuals) and all(torch.equal(residual, kept[int(name.rpartition(".")[2])]) for name, residual in residuals.items())
        log.check(same, f"{name}: expected the residuals of the simulation on rank {rank}, got others")
    differing = [place for place, (one, two) in enumerate(zip(parameters, simulated, strict=True)) if not torch.equal(one, two)]
    log.check(not differing, f"{name}: expected the parameters of the simulation, got others in {differing}")
    if form != "led":  # what a leader chooses is not counted
        log.check(counted["repeated"] > 0, f"{name}: expected entries that are sent twice running, got none")
    log.check(counted["void_steps"] == 1, f"{name}: expected 1 void step, got {counted['void_steps']}")
    log.check(on_stream == (backend == "nccl"), f"{name}: expected the transport of {backend}, got the other")
    log.write("trained", name=name, world=world, backend=backend, method=method, seconds=round(time.monotonic() - started, 1), statistics=counted)
    return layouts


def gloo(log):
    for world, method, view in [(2, "regtopk", True)] if log.emulated else [(2, "topk", False), (2, "regtopk", True), (4, "regtopk", False)]:
        layouts = compare(log, world, "gloo", method, view)
    for form in FORMS:
        if form:
            compare(log, world, "gloo", method, view, form, layouts)


def nccl(log):
    for world, method, view in [(1, "regtopk", False), (1, "topk", True), (2, "regtopk", False), (2, "topk", True), (4, "regtopk", True)]:
        layouts = compare(log, world, "nccl", method, view)
    for form in FORMS:
        if form:
            compare(log, world, "nccl", method, view, form, layouts)


LOST_AT, PATIENCE = 3, 10  # the step in which rank 1 is gone, and the group's timeout in seconds


def go_on_alone(rank, backend, device):
    """What rank 0 hears of it, with which it can save what it holds."""
    import regtopk_torch as rt
    from given import Given

    if backend == "nccl":
        os.environ.update(ON_ONE_GPU, NCCL_HOSTID=f"host{rank}")
    if device == "cuda":
        torch.cuda.set_device(0)
    group = dist.new_group(backend=backend, timeout=datetime.timedelta(seconds=PATIENCE))
    ddp = DistributedDataParallel(Given(*SIZES).to(device), process_group=group)
    state = rt.RegTopKState(DENSITY, process_group=group)
    ddp.register_comm_hook(state, rt.sparse_hook)
    try:
        for step in range(LOST_AT + 2):
            if rank == 1 and step == LOST_AT:
                os.kill(os.getpid(), signal.SIGKILL)
            ddp.zero_grad()
            ddp(gradients_of(rank, 0, device)).backward()
            if device == "cuda":
                torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def lost(log):
    """A rank is killed: the other has an error, or over NCCL is ended by that library, and does not hang."""
    from processes import run_workers_and_report

    for backend in ("gloo",) if log.emulated else ("gloo", "nccl"):
        started = time.monotonic()
        (succeeded, heard), _ = run_workers_and_report(go_on_alone, 2, backend, "cpu" if log.emulated else "cuda", seconds=6 * PATIENCE)
        seconds = time.monotonic() - started
        log.write("lost", backend=backend, seconds=round(seconds, 1), heard=str(heard)[:500])
        log.check(seconds < 5 * PATIENCE, f"{backend}: expected rank 0 to hear of the loss within {5 * PATIENCE} s, got {heard} after {seconds:.0f} s")
        log.check(backend == "nccl" or (succeeded and "Error: " in heard), f"{backend}: expected an error on rank 0, got {heard}")


WARM, TIMED = 8, 25


class RandomBatches:
    def __init__(self, device, batch):
        generator = torch.Generator().manual_seed(0)
        self._batch = torch.randn(batch, 3, 32, 32, generator=generator).to(device), torch.randint(10, (batch,), generator=generator).to(device)

    def __getitem__(self, step):
        return self._batch


def workers(log):
    """Steps a second of 8 workers of the experiments' network in one process."""
    from experiments import cifar10
    from experiments.models import make_model
    from experiments.workers import LocalWorkers

    device, network, steps = ("cpu", "tiny", 2) if log.emulated else ("cuda", "resnet18", TIMED)
    for method in ("dense", "topk", "regtopk"):
        options = cifar10.parse(["--workers", "8", "--method", method, "--device", device])
        job = LocalWorkers(options, make_model(network, 0).to(device), [RandomBatches(device, 20)] * 8)
        for step in range(1 if log.emulated else WARM):
            job.step(step)
        started = time.perf_counter()
        for step in range(steps):  # each ends with reading the losses
            job.step(step)
        log.write("workers", method=method, network=network, workers=8, steps_per_second=round(steps / (time.perf_counter() - started), 2))
        log.check(method == "dense" or job.statistics()["sent_entries"] > 0, f"{method}: expected entries to be sent, got none")


def trainer(network, device, group, register):
    """A function that takes a training step of that network under DDP: ResNet-50 with batches of 64 in bf16 autocast, or the experiments' small one."""
    if network == "resnet50":
        import torchvision

        torch.manual_seed(0)
        model, images, classes = torchvision.models.resnet50(), torch.randn(64, 3, 224, 224, device=device), 1000
    else:
        from experiments.models import make_model

        model, images, classes = make_model(network, 0), torch.randn(20, 3, 32, 32, device=device), 10
    ddp = DistributedDataParallel(model.to(device), process_group=group)
    register(ddp)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.01)
    labels = torch.randint(classes, (len(images),), device=device)

    def step():
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(ddp(images), labels)
        loss.backward()
        optimizer.step()

    return step


def time_steps(rank, hook_name):
    """(seconds of each step on the device, of the host for each, and of that in the hook) of ResNet-50 with that hook, on one rank over NCCL."""
    import regtopk_torch as rt

    torch.cuda.set_device(0)
    group, in_hook = dist.new_group(backend="nccl"), []

    def timed(state, bucket):
        started = time.perf_counter()
        future = rt.sparse_hook(state, bucket)
        in_hook[-1] += time.perf_counter() - started
        return future

    def nothing(state, bucket):
        future = torch.futures.Future(devices=["cuda:0"])
        future.set_result(bucket.buffer())
        return future

    def register(ddp):
        if hook_name == "nothing":
            return ddp.register_comm_hook(None, nothing)
        if hook_name == "all-reduce":
            return ddp.register_comm_hook(group, default_hooks.allreduce_hook)
        state = (rt.RegTopKState if "RegTop-k" in hook_name else rt.TopKState)(0.001, process_group=group)
        return rt.attach(ddp, state) if hook_name.startswith("attached") else ddp.register_comm_hook(state, timed)

    step = trainer("resnet50", "cuda", group, register)
    events, host = [], []
    for _ in range(WARM + TIMED):
        started = time.perf_counter()
        in_hook.append(0.0)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        step()
        end.record()
        events.append((begin, end))
        host.append(time.perf_counter() - started)
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1000 for begin, end in events[WARM:]], host[WARM:], in_hook[WARM:]


def profile_hook(rank, network, device):
    """({name: [calls, microseconds of the host in them alone]} of what the hook of one bucket does, buckets) by torch's profiler, Top-k on one rank."""
    import regtopk_torch as rt

    group = dist.new_group(backend="nccl") if device == "cuda" else None

    def named(state, bucket):
        with torch.profiler.record_function("hook"):
            return rt.sparse_hook(state, bucket)

    step = trainer(network, device, group, lambda ddp: ddp.register_comm_hook(rt.TopKState(0.001, process_group=group), named))
    for _ in range(WARM):
        step()
    activities = [torch.profiler.ProfilerActivity.CPU] + ([torch.profiler.ProfilerActivity.CUDA] if device == "cuda" else [])
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(3):
            step()
    found = {}

    def add(event):
        calls, microseconds = found.get(event.name, (0, 0.0))
        found[event.name] = calls + 1, microseconds + event.self_cpu_time_total
        for child in event.cpu_children:
            add(child)

    buckets = [event for event in profiler.events() if event.name == "hook"]
    for event in buckets:
        add(event)
    return {name: [calls / len(buckets), microseconds / len(buckets)] for name, (calls, microseconds) in found.items()}, len(buckets)


def host(log):
    """Where the host's time in the hook goes."""
    from processes import run_workers_and_report

    network, device = ("tiny", "cpu") if log.emulated else ("resnet50", "cuda")
    ((succeeded, found),) = run_workers_and_report(profile_hook, 1, network, device, seconds=60)
    if not log.check(succeeded, f"{network}: expected a profile, got {found}"):
        return
    calls, buckets = found
    log.check(buckets > 0 and "regtopk::compress_" in calls, f"expected the profile of buckets that are compressed, got {buckets} and {list(calls)}")
    for name, (count, microseconds) in sorted(calls.items(), key=lambda item: -item[1][1])[:30]:
        log.write("in the hook", name=name[:100], calls=round(count, 2), us=round(microseconds, 1))
    log.write("hook", network=network, buckets=buckets, us=round(sum(microseconds for _, microseconds in calls.values()), 1))


def share_of_a_step(log):
    """What the hook adds to a step of ResNet-50, against a hook that does nothing: each twice, in turn. DDP's all-reduce tells what of it
    any call of a collective adds."""
    from processes import run_workers_and_report

    names = ("nothing", "all-reduce", "Top-k", "RegTop-k", "attached RegTop-k")
    medians, of_host, of_hook = ({name: [] for name in names} for _ in range(3))
    for name in (*names, *reversed(names)):
        ((succeeded, seconds),) = run_workers_and_report(time_steps, 1, name, seconds=60)
        if not log.check(succeeded, f"ResNet-50 with {name}: expected step times, got {seconds}"):
            return
        for found, values in zip((medians, of_host, of_hook), seconds, strict=True):
            found[name].append(statistics.median(values))
    alone = statistics.mean(medians["nothing"])
    for name in names[1:]:
        share = statistics.mean(medians[name]) / alone - 1
        log.write(
            "share", network="resnet50", batch=64, method=name, step_seconds=medians[name], alone_seconds=medians["nothing"], share=share, target=None if name == "all-reduce" else 0.05,
            host_seconds=of_host[name], alone_host_seconds=of_host["nothing"], hook_seconds=of_hook[name],  # 0 where it is not ours, or attached
        )  # fmt: skip
