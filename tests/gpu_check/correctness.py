"""The device's bytes against the CPU's."""

import importlib.util
import os
import subprocess
import sys

import torch
from tests.simt.inputs import brackets_of, hard_inputs

from tests.gpu_check import machine, package_without_extension
from tests.gpu_check.log import ROOT, NotRun

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
MODES = {"topk": None, "previous": "previous", "current": "current"}
PLAN = 77


def kernels(log):
    """pytest's cases of the emulation; on a GPU they run on it, through the library that knows no torch."""
    environment = {**os.environ, "REGTOPK_KERNELS": log.device}
    chosen = []
    if log.emulated:  # a sample of them: the suite runs them all
        chosen = ["-k", "cancel or dense_variant"]
    elif package_without_extension():  # without the CPU's operators
        chosen = ["-k", "not cancel and not cpu and not filled and not only_if"]
    if not log.emulated and importlib.util.find_spec("xdist"):
        chosen += ["-n", str(max(1, min(6, len(os.sched_getaffinity(0)))))]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.gpu_check", "tests/test_cuda_emulation.py", *chosen]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=log.seconds_left())
    print(done.stdout[-6000:], done.stderr[-2000:])
    words = done.stdout.strip().splitlines()[-1:]
    log.write("pytest", words=words)
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    log.check(done.returncode == 0, f"expected every case to pass, got {words}: {failed[:5]}")


class Pair:
    """Workers that take the same steps by the kernels and by the CPU's operators; their bytes are compared after each."""

    def __init__(self, log, kernels, numel, dtype, density, mode, *, workers=2):
        from regtopk_torch import reference

        self.log, self.kernels, self.cpu = log, kernels, machine.Operators()
        self.numel, self.dtype, self.mode = numel, dtype, MODES[mode]
        self.k, self.wide = reference.entries_to_send(density, numel), reference.accumulate_dtype(dtype)
        self.what = f"{numel} entries of {str(dtype).removeprefix('torch.')}, density {density}, {mode}"
        self.bytes = machine.payload_bytes(numel, self.k, dtype)
        self.here = [torch.zeros(numel, dtype=self.wide) for _ in range(workers)]
        self.there = [machine.on_device(log, residual) for residual in self.here]
        self.sent = self.feedback = None
        self.step = 0

    def same(self, what, one, other):
        return self.log.check(machine.same_bytes(one, other), f"{self.what}, step {self.step}: expected the CPU's {what}, got others")

    def take_step(self, gradients, **keywords):
        """Compress one gradient for each worker (CPU tensors), aggregate all of them; `keywords` go to the kernels' compress."""
        workers, distortion = len(gradients), self.mode or "previous"
        payloads = torch.zeros(workers, self.bytes, dtype=torch.uint8)
        moved = machine.on_device(self.log, torch.full_like(payloads, 0xEE))
        options = {"k": self.k, "distortion": distortion, "mu": 0.8, "step": self.step, "plan": PLAN}
        right = True
        for n, gradient in enumerate(gradients):
            sent = None if self.sent is None else (self.sent[0][n], self.sent[1][n])
            row = None if self.feedback is None else (self.feedback[0][n], self.feedback[1][n])
            self.cpu.compress(gradient, self.here[n], payloads[n], sent=sent and sent[0], feedback=row and row[0], **options)
            there = machine.on_device(self.log, gradient)
            self.kernels.compress(there, self.there[n], moved[n], sent=sent and sent[1], feedback=row and row[1], **options, **keywords)
            right &= self.same(f"payload of worker {n}", payloads[n], moved[n])
            right &= self.same(f"residual of worker {n}", self.here[n], self.there[n])
        bucket, average = torch.empty(self.numel, dtype=self.dtype), machine.empty_on_device(self.log, (self.numel,), self.dtype)
        rows = torch.empty(workers, self.k, dtype=self.wide)
        rows_there = machine.empty_on_device(self.log, (workers, self.k), self.wide)
        options = {"k": self.k, "distortion": distortion, "step": self.step, "plan": PLAN}
        self.cpu.aggregate(bucket, payloads, feedback=rows, **options)
        self.kernels.aggregate(average, moved, feedback=rows_there, **options)
        right &= self.same("bucket", bucket, average)
        right &= self.same("feedback", rows, rows_there)
        squared_norm, there = torch.empty(1, dtype=torch.float64), machine.empty_on_device(self.log, (1,), torch.float64)
        self.cpu.measure(bucket, payloads, squared_norm, k=self.k)
        self.kernels.measure(average, moved, there, k=self.k)
        right &= self.same("squared norm", *(found.masked_fill(found.isnan(), torch.nan) for found in (squared_norm, there)))
        self.sent = (payloads, moved)
        self.feedback = (rows, rows_there) if self.mode else None
        self.step += 1
        return right

    def put_back(self):
        self.cpu.put_back(self.here[0], self.sent[0][0], dtype=self.dtype)
        self.kernels.put_back(self.there[0], self.sent[1][0], dtype=self.dtype)
        return self.same("residual after put_back", self.here[0], self.there[0])


def steady(log, numel, dtype, seed):
    """A gradient that is nearly the same in each step, with heavy tails, made where it is fast."""
    device = "cpu" if log.emulated else "cuda"
    generator = torch.Generator(device).manual_seed(seed)
    base = torch.randn(numel, generator=generator, device=device)
    base *= torch.exp(torch.randn(numel, generator=generator, device=device))
    while True:
        yield (base + 0.3 * torch.randn(numel, generator=generator, device=device)).to(dtype).cpu()


def operators(log):
    """Steps of two workers; then the hard inputs; the large sizes last, as far as the time goes."""
    kernels, cases, done = machine.kernels_of(log), [], 0
    if log.emulated:
        cases = [(5, dtype, mode, 0.3, 2) for dtype in FLOATS[:2] for mode in MODES] + [(9_001, torch.float32, "previous", 0.01, 2)]
    else:
        small = [1, 3, 4, 5, 8191, 8192, 8193, 65535, 65536, 65537, 100_003]
        cases = [(n, dtype, mode, density, 5) for n in small for dtype in FLOATS for mode in MODES for density in (1e-4, 1e-2, 0.3, 1.0)]
        cases += [(11_200_000, dtype, mode, density, 3) for dtype in FLOATS[:3] for density in (1e-3, 0.1) for mode in MODES]
        cases += [(11_200_000, torch.float64, "previous", 1e-3, 2), (200_000_000, torch.float32, "previous", 1e-3, 2), (200_000_000, torch.bfloat16, "topk", 1e-3, 2)]
        small_first = len(small) * len(FLOATS) * len(MODES) * 4
    failed = 0
    for number, (numel, dtype, mode, density, steps) in enumerate(cases):
        if number and not log.emulated and number == small_first:
            failed += hard(log, kernels)
        if log.seconds_left() < (2 if numel < 1_000_000 else 8):
            log.write("left out", cases=len(cases) - number, first=str(cases[number]))
            break
        pair = Pair(log, kernels, numel, dtype, density, mode)
        gradients = [steady(log, numel, dtype, seed) for seed in range(2)]
        right = True
        for _ in range(steps):
            right = right and pair.take_step([next(gradient) for gradient in gradients])
        failed += not (right and pair.put_back())
        done += 1
        if numel >= 1_000_000:
            log.write("equal" if right else "different", case=pair.what)
        if failed > 20:
            log.write("left out", cases=len(cases) - done, reason="20 cases failed")
            break
    if log.emulated:
        hard(log, kernels)
    log.write("compared", cases=done, failed=failed)


def hard(log, kernels):
    numel, failed = 70_001, 0
    for dtype in FLOATS[:1] if log.emulated else FLOATS:
        for name, gradient in hard_inputs(3_001 if log.emulated else numel).items():
            if log.emulated and name not in ("all equal", "some not finite"):
                continue
            for density in (0.01, 0.3):
                pair = Pair(log, kernels, gradient.numel(), dtype, density, "current", workers=2)
                pair.what += f", {name}"
                failed += not all(pair.take_step([gradient.to(dtype), (-gradient).to(dtype)]) for _ in range(2))
    return failed


def misses(log):
    """Brackets that hold the k-th score, that miss it on either side, and lists that overflow, through the launchers."""
    kernels, failed, done = machine.library_kernels(log), 0, 0
    for numel in [9_001] if log.emulated else [20_003, 1_000_003, 11_200_000]:
        for name, gradient in hard_inputs(numel).items():
            if (log.emulated or numel > 2_000_000) and name not in ("one binade", "some not finite"):
                continue
            for bracket, changes in brackets_of(numel).items():
                if log.seconds_left() < 3:
                    log.write("left out", first=f"{numel} {name} {bracket}")
                    return
                pair = Pair(log, kernels, numel, torch.float32, 0.01, "previous", workers=1)
                pair.what += f", {name}, bracket {bracket}"
                sampling = kernels.sampling(numel, 1).replace(**changes)
                failed += not all(pair.take_step([gradient], sampling=sampling) for _ in range(2))
                done += 1
    log.write("compared", cases=done, failed=failed)


class OnDevice:
    """The device's operators on copies of CPU tensors, which are copied back after each call."""

    def _call(self, operator, *arguments, **options):
        moved = []

        def there(value):
            if not isinstance(value, torch.Tensor):
                return value
            moved.append((value, value.cuda()))
            return moved[-1][1]

        operator(*map(there, arguments), **{name: there(value) for name, value in options.items()})
        for here, tensor in moved:
            here.copy_(tensor)

    def compress(self, gradient, residual, payload, *, sent, feedback, sampling, **options):
        self._call(torch.ops.regtopk.compress_, gradient, residual, payload, sent, feedback, **options)

    def aggregate(self, gradient, payloads, *, feedback, **options):
        status = torch.full((1,), -1)
        self._call(torch.ops.regtopk.aggregate_, gradient, payloads, feedback, status=status, **options)
        return int(status) % 2**64

    def measure(self, *tensors, **options):
        self._call(torch.ops.regtopk.measure_, *tensors, **options)

    def settle(self, *arguments, **options):
        self._call(torch.ops.regtopk.settle_, *arguments, **options)

    def to_wire(self, *tensors, **options):
        self._call(torch.ops.regtopk.to_wire_, *tensors, **options)

    def feedback(self, *tensors, **options):
        self._call(torch.ops.regtopk.feedback_, *tensors, **options)

    def take(self, *tensors, **options):
        return self._with_status(torch.ops.regtopk.take_, *tensors, **options)

    def average_slice(self, *tensors, **options):
        return self._with_status(torch.ops.regtopk.average_slice_, *tensors, **options)

    def spread(self, *tensors, **options):
        return self._with_status(torch.ops.regtopk.spread_, *tensors, **options)

    def split(self, *tensors, **options):
        self._call(torch.ops.regtopk.split_, *tensors, **options)

    def mean(self, *tensors, **options):
        self._call(torch.ops.regtopk.mean_, *tensors, **options)

    def join(self, *tensors, **options):
        return self._with_status(torch.ops.regtopk.join_, *tensors, **options)

    def mark_unfilled(self, *tensors):
        self._call(torch.ops.regtopk.mark_unfilled_, *tensors)

    def _with_status(self, operator, *tensors, **options):
        status = torch.full((1,), -1)
        self._call(operator, *tensors, status=status, **options)
        return int(status) % 2**64


def spans(log):
    """Random steps of buckets with parameters: idle ones, void rounds, what an optimizer applied all the same, settling."""
    if package_without_extension():
        raise NotRun("the extension was not built, and its CPU operators say what is right")
    from tests.simt.with_spans import Pair as PairWithSpans  # it needs the extension

    kernels, failed, done = machine.library_kernels(log), 0, 0
    for numel in [9_001] if log.emulated else [20_003, 140_001, 11_200_000]:
        for dtype in FLOATS[:1] if log.emulated else FLOATS:
            for mode in ("topk", "current") if log.emulated else MODES:
                for density in (0.01, 0.3):
                    if log.seconds_left() < (2 if numel < 1_000_000 else 8):
                        log.write("left out", first=f"{numel} {dtype} {mode} {density}")
                        return
                    pair = PairWithSpans(kernels, numel, dtype, density=density, mu=MODES[mode] and 0.8, distortion=MODES[mode] or "previous")
                    if not log.emulated and machine.extension_has_kernels():
                        pair.there.run = OnDevice()
                    right, words = True, ""
                    try:
                        pair.random_steps(4 if numel > 1_000_000 else 8, kernels, brackets=())
                    except AssertionError as error:
                        right, words = False, str(error)
                    failed += not log.check(right, f"{numel} entries of {dtype}, density {density}, {mode}, with spans: expected the CPU's bytes, got {words}")
                    done += 1
    log.write("compared", cases=done, failed=failed)


def led(log):
    """Random steps of buckets whose support a leader has chosen, or all of whose entries are sent."""
    if package_without_extension():
        raise NotRun("the extension was not built, and its CPU operators say what is right")
    from tests.simt.with_leader import Led  # it needs the extension

    kernels, failed, done = machine.library_kernels(log), 0, 0
    forms = [{"dense": True}, {"density": 0.01, "elias_fano": True, "wire_dtype": torch.bfloat16}, {"density": 0.2, "distortion": "current"}]
    for numel in [9_001] if log.emulated else [20_003, 140_001, 11_200_000]:
        for dtype in FLOATS[:1] if log.emulated else FLOATS:
            for form in forms:
                if log.seconds_left() < (2 if numel < 1_000_000 else 10):
                    log.write("left out", first=f"{numel} {dtype} {form}")
                    return
                led = Led(kernels, numel, dtype, **form | ({"wire_dtype": dtype} if dtype.itemsize < 4 else {}))
                if not log.emulated and machine.extension_has_kernels():
                    led.there.run = OnDevice()
                right, words = True, ""
                try:
                    led.random_steps(4 if numel > 1_000_000 else 8)
                except AssertionError as error:
                    right, words = False, str(error)
                failed += not log.check(right, f"{numel} entries of {dtype}, {form}: expected the CPU's bytes, got {words}")
                done += 1
    log.write("compared", cases=done, failed=failed)


def hosts(log):
    """Parts of parameters between the ranks of a host: there and back, and a head that is none."""
    if package_without_extension():
        raise NotRun("the extension was not built, and its CPU operators say what is right")
    from tests.simt.with_parts import Host, PartsOperators  # it needs the extension

    kernels, done = machine.library_kernels(log), 0
    run = OnDevice() if not log.emulated and machine.extension_has_kernels() else kernels
    layouts = [[1], [1, 2, 0, 3], [5, 4_097, 3, 7_001, 2], [64] * 40]
    for numels in layouts if log.emulated else [*layouts, [70_001, 3] * 5, [11_200_000], [size % 3_000 for size in range(10_000)]]:
        for dtype in FLOATS[:2] if log.emulated else FLOATS:
            for ranks in (2, 3) if log.emulated else (1, 2, 4, 8):
                if log.seconds_left() < 2:
                    log.write("left out", first=f"{len(numels)} parameters of {dtype}, {ranks} ranks")
                    return
                host, what = Host(numels, ranks, dtype), f"{len(numels)} parameters with {sum(numels)} entries of {dtype}, {ranks} ranks"
                generator = torch.Generator().manual_seed(ranks)
                gradients = [torch.randn(host.numel, generator=generator).to(dtype) for _ in range(ranks)]
                gradients[0][host.numel // 2] = torch.nan
                there = host.all_of_it(run, gradients)
                wrong = [name for name, tensor in host.all_of_it(PartsOperators(), gradients).items() if not machine.same_bytes(tensor, there[name])]
                log.check(not wrong, f"{what}: expected the CPU's bytes, got other {wrong}")
                rows = host.split(PartsOperators(), gradients[0])
                rows[ranks - 1].zero_()
                bucket, verdict, status = host.join(run, rows)
                log.check(status == (ranks - 1) << 8 | 1 and bool(bucket.isnan().all()) and int(verdict[9]) == 9, f"{what}: expected NaN where a head is none, got status {status}")
                done += 1
    log.write("compared", cases=done)


def graph(log):
    """No synchronisation in a call; two steps captured once and replayed, eager calls between, give the CPU's bytes."""
    if not machine.extension_has_kernels():
        raise NotRun("the extension was built without the kernels")
    kernels, cpu, numel, density = machine.Operators(), machine.Operators(), 1_000_003, 0.001
    from regtopk_torch import reference

    k = reference.entries_to_send(density, numel)
    gradient = next(steady(log, numel, torch.float32, 1))
    residual = torch.zeros(numel, device="cuda")
    count, ends = 7, torch.linspace(0, numel, 8, dtype=torch.float64).long()
    gradient[ends[2] : ends[3]] = 0  # an idle parameter from the second step on
    there = gradient.cuda()
    payloads = [torch.zeros(1, machine.payload_bytes(numel, k, torch.float32, count), dtype=torch.uint8, device="cuda") for _ in range(2)]
    feedback, bucket = torch.zeros(1, k, device="cuda"), torch.empty(numel, device="cuda")

    def shared_on(device):
        """What the stages of a bucket share, and the counters."""
        verdict = torch.full((4096,), -1, device=device)
        return {"spans": ends.to(device), "idle": torch.zeros(count, dtype=torch.uint8, device=device), "verdict": verdict}, torch.zeros(3, dtype=torch.int64, device=device)

    def two_steps(kernels, gradient, residual, payloads, feedback, bucket, shared, counters):
        # Of a graph the step is fixed, so there are two of them; the last payload of step 0 is that of step 1.
        for step in range(2):
            kernels.compress(gradient, residual, payloads[step][0], k=k, sent=payloads[1 - step][0], feedback=feedback[0], mu=0.8, step=step, plan=PLAN, counters=counters, sent_round=1 - step, **shared)
            kernels.aggregate(bucket, payloads[step], k=k, feedback=feedback, step=step, plan=PLAN, round=step, **shared)

    # A payload before the first step, of nothing.
    shared, counters = shared_on("cuda")
    kernels.compress(torch.zeros_like(there), residual, payloads[1][0], k=k, step=1, plan=PLAN, counters=counters, **shared)
    on_cpu = [gradient, residual.cpu(), [payload.cpu() for payload in payloads], feedback.cpu(), bucket.cpu(), *shared_on("cpu")]
    operands = (there, residual, payloads, feedback, bucket, shared, counters)
    torch.cuda.set_sync_debug_mode("error")
    two_steps(kernels, *operands)  # eager, and it loads the kernels
    torch.cuda.set_sync_debug_mode("default")
    two_steps(cpu, *on_cpu)

    def compare(when):
        pairs = [("residual", residual, on_cpu[1]), ("payload", payloads[1], on_cpu[2][1]), ("bucket", bucket, on_cpu[4])]
        pairs += [("idle", shared["idle"], on_cpu[5]["idle"]), ("counters", counters, on_cpu[6])]
        for what, mine, theirs in pairs:
            log.check(machine.same_bytes(theirs, mine), f"{when}: expected the CPU's {what}, got another")

    compare("eager")
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        two_steps(kernels, *operands)
    compare("captured, not replayed")
    for replay in range(20):
        recorded.replay()
        if replay == 10:  # an eager call between, on the same stream, with the stream's own workspace
            two_steps(kernels, *operands)
            two_steps(cpu, *on_cpu)
        two_steps(cpu, *on_cpu)
        compare(f"replay {replay}")
    log.write("replayed", replays=20)


def races(log):
    """From one state, many times, beside a stream that keeps memory and multiprocessors busy; comparisons wait until the end."""
    kernels = machine.kernels_of(log)
    from regtopk_torch import reference

    numel, calls = (3_001, 2) if log.emulated else (11_200_000, 300)
    k = reference.entries_to_send(1e-3, numel)
    gradient, before = (machine.on_device(log, next(steady(log, numel, torch.float32, seed))) for seed in range(2))
    residual, bucket = machine.empty_on_device(log, (numel,), torch.float32), machine.empty_on_device(log, (numel,), torch.float32)
    payloads = machine.empty_on_device(log, (2, machine.payload_bytes(numel, k, torch.float32)), torch.uint8)
    own = [machine.empty_on_device(log, (payloads.shape[1],), torch.uint8) for _ in range(2)]  # two slices of one tensor would be refused
    if payloads[1].data_ptr() % 16:
        raise RuntimeError("expected payloads of a multiple of 16 bytes, got others")
    feedback = machine.empty_on_device(log, (2, k), torch.float32)

    def call(into, step_feedback=None):
        residual.copy_(before)
        kernels.compress(gradient, residual, own[into], k=k, sent=own[0] if into else None, feedback=step_feedback, step=0)
        payloads[into].copy_(own[into])
        if into:
            kernels.aggregate(bucket, payloads, k=k, feedback=feedback, step=0)

    call(0)
    feedback.fill_(0.5)
    row = machine.on_device(log, feedback[0].cpu())
    call(1, row)
    expected = [payloads[1].clone(), residual.clone(), bucket.clone()]
    for load in ("nothing",) if log.emulated else ("copies", "matrix products"):
        wrong = torch.zeros(3, dtype=torch.int64, device=gradient.device)
        if not log.emulated:
            torch.cuda.synchronize()
            other = torch.cuda.Stream()
            source = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
            target, product = torch.empty_like(source), torch.empty_like(source)
        done = 0
        for done in range(1, calls + 1):
            if not log.emulated:
                with torch.cuda.stream(other):
                    if load == "copies":
                        target.copy_(source)
                    elif done % 4 == 0:  # a product takes about as long as four calls
                        torch.mm(source, source, out=product)
            call(1, row)
            for i, (now, then) in enumerate(zip((payloads[1], residual, bucket), expected, strict=True)):
                wrong[i] += (now.view(torch.uint8) != then.view(torch.uint8)).any()
            if log.seconds_left() < 3:
                break
        counts = wrong.tolist()
        log.write("repeated", beside=load, calls=done, different=counts)
        log.check(counts == [0, 0, 0], f"beside {load}: expected one payload, residual and bucket in {done} calls, got {counts} others")


def large(log):
    """Near the largest bucket, in bf16: what is sent is the largest, and the residual is the rest."""
    if not log.emulated and torch.cuda.mem_get_info()[0] < 60e9:
        raise NotRun(f"expected 60 GB free on the GPU, got {torch.cuda.mem_get_info()[0] / 1e9:.0f}")
    kernels = machine.kernels_of(log)
    device = "cpu" if log.emulated else "cuda"
    chunk = 1 << 28
    for numel in [70_001] if log.emulated else [2**31 + 5, 2**32 - 1]:
        if log.seconds_left() < 5:
            log.write("left out", numel=numel)
            return
        k = numel // 10_000
        gradient = machine.empty_on_device(log, (numel,), torch.bfloat16)
        for begin in range(0, numel, chunk):
            part = gradient[begin : begin + chunk]
            part.copy_(torch.randn(part.numel(), device=device, dtype=torch.bfloat16))
        residual = machine.empty_on_device(log, (numel,), torch.float32).zero_()
        payload = machine.empty_on_device(log, (machine.payload_bytes(numel, k, torch.bfloat16),), torch.uint8)
        kernels.compress(gradient, residual, payload, k=k)
        index, value = (tensor.to(device) for tensor in torch.ops.regtopk.decode(payload, numel=numel, k=k, dtype=torch.bfloat16))
        log.check(bool((index.diff() > 0).all()) and int(index[-1]) < numel, f"{numel} entries: expected ascending indices, got others")
        log.check(torch.equal(gradient[index], value), f"{numel} entries: expected the gradient's values sent, got others")
        smallest = value.abs().min()
        above = at_least = kept = 0
        for begin in range(0, numel, chunk):
            part, rest = gradient[begin : begin + chunk], residual[begin : begin + chunk]
            magnitude = part.abs()
            above += int((magnitude > smallest).sum())
            at_least += int((magnitude >= smallest).sum())
            kept += int((rest == part).sum())
        log.check(above < k <= at_least, f"{numel} entries: expected fewer than {k} above the smallest sent and as many at least, got {above} and {at_least}")
        log.check(kept == numel - k and bool((residual[index] == 0).all()), f"{numel} entries: expected {numel - k} kept as they were, got {kept}")
        log.check(bool(value.all()), f"{numel} entries: expected no zero sent")
        kernels.aggregate(gradient, payload.view(1, -1), k=k)
        sent = sum(int((gradient[begin : begin + chunk] != 0).sum()) for begin in range(0, numel, chunk))
        log.check(sent == k and torch.equal(gradient[index], value), f"{numel} entries: expected {k} averages, got {sent}")
        log.write("large", numel=numel, k=k)
        del gradient, residual
