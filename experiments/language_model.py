"""Train a byte-level GPT with N workers that may exchange a given number of bytes per step, in one of many ways.

    dense          the average of the gradients, all entries
    topk, regtopk  Top-k and RegTop-k of the gradients, for one AdamW
    h1, h5, ...    every worker takes H steps of its own AdamW; Top-k of what they did to the weights is averaged
    diloco15       the same with all entries and Nesterov momentum outside, each 15 steps

A row is one of these and, behind hyphens, how entries travel: bf16, 2bit or sign, each with Elias-Fano's code of the places; d95, a decay
of 0.95 of what is held back; chunk, where each 4,096 entries send their own share; leader, where one worker after the other chooses for all; and regtopk, whose score then chooses. All but dense and diloco may send
equal bytes: 6 for each of the entries of which --budget is the fraction, per step, and less where that is enough for all entries.

Text is Python's own standard library, or --text. Alone it simulates the workers of every row, a sweep; under torchrun each process is a
worker, of one row. Options that take several values make the sweep; with --out one that was killed goes on when the same command is given again.
"""

import copy
import functools
import hashlib
import math
import os
import sys
import sysconfig
import time
from pathlib import Path

from experiments import sweeps
from runlog.command import check, make_parser

SIZES = {"0.4M": (104, 4, 3, 64), "10M": (384, 6, 6, 256)}  # width, heads, layers, context
BLOCK = 8192  # bytes
WARM_UP = 20  # steps
LAST_RATE = 0.1  # of the first
VALIDATION_WINDOWS = 256
ROWS = (
    "dense", "topk", "regtopk", "topk-d95", "topk-2bit", "topk-leader", "h1", "h5", "h15", "h40", "h1-2bit-d95", "h5-2bit-d95", "h15-2bit-d95", "h40-2bit-d95",
    "h5-bf16-d95", "h5-2bit-d95-regtopk", "diloco15",
)  # fmt: skip


class Row:
    """What a row's name says."""

    def __init__(self, name):
        kind, *forms = name.split("-")
        digits = kind.lstrip("abcdefghijklmnopqrstuvwxyz")
        self.name, self.kind, self.every = name, kind[: len(kind) - len(digits)], int(digits or 0)  # every 0: gradients
        self.wire = next((form for form in forms if form in ("bf16", "2bit", "sign")), None)
        self.decay = 0.95 if "d95" in forms else 1.0
        self.support, self.chunk = "leader" if "leader" in forms else "own", 4096 if "chunk" in forms else None
        self.method = "regtopk" if "regtopk" in (kind, *forms) else "topk"
        known = {"bf16", "2bit", "sign", "d95", "leader", "chunk", "regtopk"}.issuperset(forms) and (self.every > 0) == (self.kind in ("h", "diloco"))
        fits = not (self.sends_all and forms) and ("regtopk" not in forms or self.kind == "h")
        if not known or not fits or self.kind not in ("dense", "topk", "regtopk", "h", "diloco"):
            raise ValueError(f"expected a row such as {', '.join(ROWS)}, got {name}")

    @property
    def sends_all(self):
        return self.kind in ("dense", "diloco")

    def options(self, numel, workers, budget):
        """Return (density, the exchange's other options): the largest density whose messages keep to the budget."""
        allowed, low, high = 6 * budget * numel * max(1, self.every), 1, numel
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if wire_bytes_of(self, numel, workers, middle) <= allowed else (low, middle - 1)
        given = {"decay": self.decay, "wire_dtype": _wire_dtype(self.wire), "support": self.support, "chunk": self.chunk}
        return low / numel, {**given, "index_code": "offsets" if self.wire is None else "elias-fano"}


def _wire_dtype(wire):
    import torch

    return torch.bfloat16 if wire == "bf16" else wire


def wire_bytes_of(row, numel, workers, k):
    """Return the bytes that a worker sends to each other one for k entries; where one leads in turn, on average and without heads."""
    import torch

    from regtopk_torch import _C
    from regtopk_torch.options import CODES

    wire_dtype = {None: torch.float32, "bf16": torch.bfloat16, **CODES}[row.wire]
    message = _C.wire_bytes(numel, k, torch.float32, 0, wire_dtype, row.wire is not None)
    if row.support == "own":
        return message
    value_bytes = wire_dtype.itemsize
    return (message - k * value_bytes + k * (value_bytes + torch.float32.itemsize)) / workers  # places, a slice, its averages


class Text:
    """Bytes in blocks of BLOCK, of which every twentieth is for validation."""

    def __init__(self, path, context, device="cpu"):
        import torch

        if path is None:
            folder = Path(sysconfig.get_paths()["stdlib"])
            files = sorted(file for file in folder.rglob("*.py") if not {"site-packages", "test", "tests", "encodings"} & set(file.relative_to(folder).parts))
            content, self.name = b"".join(file.read_bytes() for file in files), f"the standard library of Python {sys.version.split()[0]}"
        else:
            content, self.name = Path(path).read_bytes(), Path(path).name
        self.digest = hashlib.sha256(content).hexdigest()[:16]
        values = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        if len(values) < 20 * BLOCK:
            raise ValueError(f"language_model: expected a text of at least {20 * BLOCK} bytes, got {len(values)}")
        blocks = values[: len(values) // BLOCK * BLOCK].view(-1, BLOCK)
        validation = torch.arange(len(blocks)) % 20 == 19
        self._train, self._validation = blocks[~validation].flatten().to(device), blocks[validation].flatten().to(device)
        self._context, self._device = context, device

    def batch(self, seed, rank, step, windows):
        """Return [windows, context + 1] bytes as int64."""
        import torch

        # A generator takes 32 bits of its seed.
        digest = hashlib.sha256(f"{seed} {rank} {step}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
        return self._windows(self._train, torch.randint(len(self._train) - self._context - 1, (windows,), generator=generator))

    def validation(self):
        import torch

        return self._windows(self._validation, torch.linspace(0, len(self._validation) - self._context - 2, VALIDATION_WINDOWS).long())

    def _windows(self, values, starts):
        import torch

        return values[(starts[:, None] + torch.arange(self._context + 1)).to(self._device)].long()


def make_model(size, seed):
    """Return a decoder in the form of GPT-2: embedding and output share their weights. Start weights are those of a narrow network."""
    import torch
    import torch.nn as nn
    from torch.nn.functional import cross_entropy, scaled_dot_product_attention

    width, heads, layers, context = SIZES[size]

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.attention, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

        def forward(self, x):
            parts = self.attention(self.norm_1(x)).view(*x.shape[:2], 3, heads, width // heads).permute(2, 0, 3, 1, 4)
            x = x + self.out(scaled_dot_product_attention(*parts, is_causal=True).transpose(1, 2).reshape(x.shape))
            return x + self.feed(self.norm_2(x))

    class Gpt(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.positions = nn.Embedding(256, width), nn.Parameter(torch.zeros(context, width))
            self.blocks, self.norm = nn.Sequential(*(Block() for _ in range(layers))), nn.LayerNorm(width)
            for name, parameter in self.named_parameters():
                if name == "positions":
                    nn.init.normal_(parameter, std=0.02)
                elif parameter.dim() == 2:
                    ends_a_part = name.endswith(("out.weight", "feed.2.weight"))
                    nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5 / ((2 * layers) ** 0.5 if ends_a_part else 1))
                elif name.endswith("bias"):
                    nn.init.zeros_(parameter)

        def forward(self, windows):
            """Return the mean loss in nats per byte of [windows, context + 1] bytes."""
            hidden = self.norm(self.blocks(self.embedding(windows[:, :-1]) + self.positions))
            return cross_entropy((hidden @ self.embedding.weight.T).flatten(0, 1), windows[:, 1:].flatten())

    torch.manual_seed(seed)
    return Gpt()


def take_step(model, optimizer, rate, step, steps):
    """Step with the gradients of the model, clipped as is usual for transformers."""
    import torch

    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    done = min(1.0, step / max(1, steps - 1))
    rate *= min(1.0, (step + 1) / WARM_UP) * (LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * done)) / 2)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()


def make_adamw(model):
    import torch

    return torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)


OUTER = {"lr": 0.7, "momentum": 0.9, "nesterov": True}  # of DiLoCo, as published (arXiv 2311.08105)


def bytes_of(row, numel, workers, state_bytes, steps):
    """What a worker puts on the network per step, on average: payloads to all others, or a ring all-reduce."""
    if row.sends_all:
        return 2 * (workers - 1) / workers * 4 * numel / max(1, row.every)
    return state_bytes / steps


def validation_loss(model, windows):
    import torch

    with torch.no_grad():
        return sum(float(model(part)) for part in windows.split(64)) / len(windows.split(64))


def simulate(options, text, row, rate, seed):
    """Train with all workers in this process and return what came of it."""
    import torch

    import regtopk_torch as rt

    model = make_model(options.size, seed).to(options.device)
    parameters = list(model.parameters())  # the common weights
    numel = sum(parameter.numel() for parameter in parameters)
    exchange = None
    if not row.sends_all:
        density, given = row.options(numel, options.workers, options.budget)
        exchange = rt.LocalExchange(options.workers, density, method=row.method, mu=5.0, **given)
    replicas = [copy.deepcopy(model) for _ in range(options.workers)] if row.every else [model]
    optimizers = [make_adamw(replica) for replica in replicas]
    outer = torch.optim.SGD(parameters, **OUTER) if row.kind == "diloco" else None
    validation, losses, computed = text.validation(), [], 0.0
    for step in range(options.steps):
        started = time.perf_counter()
        given = []
        for rank in range(options.workers):
            replica = replicas[rank if row.every else 0]
            replica.zero_grad()
            replica(text.batch(seed, rank, step, options.batch_size)).backward()
            if row.every:
                take_step(replica, optimizers[rank], rate, step, options.steps)
            else:
                given.append([parameter.grad for parameter in parameters])
                replica.zero_grad(set_to_none=True)
        computed += time.perf_counter() - started
        if row.every and (step + 1) % row.every == 0:
            given = [[p.detach() - own.detach() for p, own in zip(parameters, replica.parameters(), strict=True)] for replica in replicas]
        if given:
            averages = exchange.step(given) if exchange else [torch.stack(each).mean(0) for each in zip(*given, strict=True)]
            if row.every and outer is None:
                with torch.no_grad():
                    torch._foreach_sub_(parameters, averages)
            else:
                for parameter, average in zip(parameters, averages, strict=True):
                    parameter.grad = average
                if outer is None:
                    take_step(model, optimizers[0], rate, step, options.steps)
                else:
                    outer.step()
                model.zero_grad(set_to_none=True)
            if row.every:
                for replica in replicas:
                    replica.load_state_dict(model.state_dict())
        if (step + 1) % options.evaluate_every == 0 or step + 1 == options.steps:
            losses.append([step + 1, round(validation_loss(model, validation), 5)])
            if not math.isfinite(losses[-1][1]):
                raise ValueError(f"language_model: expected a finite loss, got {losses[-1][1]} of {row.name} at rate {rate} in step {step}")
    sent = exchange.stats(0)["bytes_sent"] if exchange else 0
    return result_of(options, row, numel, bytes_of(row, numel, options.workers, sent, options.steps), losses, computed / options.workers / options.steps)


def train(options, text, row, rate, seed):
    """Train as one worker of the process group and return what came of it; rank 0 says how it goes."""
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    import regtopk_torch as rt

    rank, model = dist.get_rank(), make_model(options.size, seed)
    numel = sum(parameter.numel() for parameter in model.parameters())
    density, given = (1.0, {}) if row.sends_all else row.options(numel, options.workers, options.budget)
    state = None if row.kind == "dense" else (rt.RegTopKState if row.method == "regtopk" else rt.TopKState)(density, **given)
    optimizer, trained, local = make_adamw(model), model, None
    if row.every:
        outer = functools.partial(torch.optim.SGD, **OUTER) if row.kind == "diloco" else "sgd"
        local = rt.LocalSteps(model, optimizer, state, every=row.every, outer=outer)
    else:
        trained = DistributedDataParallel(model, bucket_cap_mb=1024)  # one bucket: k counts the whole model
        if state is not None:
            trained.register_comm_hook(state, rt.sparse_hook)
    validation, losses, started = text.validation(), [], time.perf_counter()
    for step in range(options.steps):
        optimizer.zero_grad()
        trained(text.batch(seed, rank, step, options.batch_size)).backward()
        take_step(model, optimizer, rate, step, options.steps)
        if local is not None:
            local.step()
        if (step + 1) % options.evaluate_every == 0 or step + 1 == options.steps:
            losses.append([step + 1, round(validation_loss(model, validation), 5)])  # of local steps in between, this worker's own
            if rank == 0:
                print(f"step {step + 1}: validation loss {losses[-1][1]:.3f} nats per byte", flush=True)
    seconds = (time.perf_counter() - started) / options.steps
    sent = bytes_of(row, numel, options.workers, state.stats()["bytes_sent"] if state else 0, options.steps)
    return {"loss": losses[-1][1], "bytes_per_step": round(sent), "of_dense": share_of_dense(options, numel, sent), "seconds_per_step": round(seconds, 4)}


def share_of_dense(options, numel, sent):
    """Return those bytes as a fraction of what a ring all-reduce of fp32 gradients sends; of one worker, which sends nothing, 0."""
    return round(sent / max(1, 2 * (options.workers - 1) / options.workers * 4 * numel), 6)


def result_of(options, row, numel, sent, losses, seconds):
    modelled = {f"seconds_{name}": round(seconds + sent * 8 / rate, 5) for name, rate in (("100mbit", 1e8), ("1gbit", 1e9))}
    return {"loss": losses[-1][1], "bytes_per_step": round(sent), "of_dense": share_of_dense(options, numel, sent), "compute_seconds": round(seconds, 5), **modelled, "losses": losses}


def parse(arguments):
    parser = make_parser("experiments.language_model", __doc__)

    def add(name, help, **settings):
        parser.add_argument(name, help=help, **settings)

    add("--row", "(all that the above names)", nargs="+", default=list(ROWS), metavar="ROW")
    add("--learning-rate", "AdamW's largest (0.003)", nargs="+", type=float, default=[0.003], metavar="RATE")
    add("--seed", "of start weights and order of text (0)", nargs="+", type=int, default=[0], metavar="SEED")
    add("--size", "parameters (%(default)s)", choices=SIZES, default="0.4M")
    add("--workers", "N (4), or what torchrun has started", type=int, metavar="N")
    add("--steps", "of each worker (%(default)s)", type=int, default=800)
    add("--batch-size", "windows of text per step and worker (%(default)s)", type=int, default=8, metavar="WINDOWS")
    add("--budget", "entries per step whose 6 bytes each are what may be sent, as a fraction (%(default)s)", type=float, default=0.005)
    add("--evaluate-every", "steps between validations (%(default)s)", type=int, default=100, metavar="STEPS")
    add("--text", "a file (the standard library's sources)", type=Path, metavar="FILE")
    add("--out", "log to write, or to go on with", type=Path, metavar="FILE.jsonl")
    add("--device", "of a simulation (%(default)s)", choices=("cpu", "cuda"), default="cpu")
    add("--threads", "CPU threads of each process (%(default)s)", type=int, default=1)
    options = parser.parse_args(arguments)
    check(
        parser, options, *((name, lambda value: value >= 1, "at least 1") for name in ("workers", "steps", "batch_size", "evaluate_every", "threads")),
        ("budget", lambda value: 0 < value <= 1, "0 < budget <= 1"), ("learning_rate", lambda values: all(v > 0 for v in values), "numbers above 0"),
    )  # fmt: skip
    try:
        options.rows = {name: Row(name) for name in options.row}
    except ValueError as error:
        parser.error(f"--row: {error}")
    return options


def main(arguments=None):
    options = parse(arguments)
    import torch

    torch.set_num_threads(options.threads)
    text = Text(options.text, SIZES[options.size][3], options.device)
    if "RANK" in os.environ:
        return run_as_worker(options, text)
    options.workers = options.workers or 4
    runs = [
        {"row": name, "learning_rate": rate, "seed": seed}
        for seed in options.seed for rate in options.learning_rate for name in options.rows
    ]  # fmt: skip
    settings = {name: getattr(options, name) for name in ("size", "workers", "steps", "batch_size", "budget", "evaluate_every")}
    if options.device == "cuda":
        settings["device"] = torch.cuda.get_device_name()
    compute = functools.partial(_compute, options, text)
    try:
        for result in sweeps.complete(options.out, {**settings, "text": text.name, "text_sha256": text.digest}, runs, compute):
            print(" ".join(f"{key}={value}" for key, value in result.items() if key != "losses"), flush=True)
    except ValueError as error:
        sys.exit(str(error))


def run_as_worker(options, text):
    import torch.distributed as dist

    if options.device != "cpu":
        sys.exit(f"language_model: expected --device cpu under torchrun, got {options.device}")
    if len(options.rows) * len(options.learning_rate) * len(options.seed) > 1 or options.out is not None:
        sys.exit("language_model: expected one --row, --learning-rate and --seed and no --out under torchrun, got more")
    dist.init_process_group("gloo")
    try:
        options.workers = dist.get_world_size()
        (row,) = options.rows.values()
        result = train(options, text, row, options.learning_rate[0], options.seed[0])
        if dist.get_rank() == 0:
            print(" ".join(f"{key}={value}" for key, value in result.items()), flush=True)
    finally:
        dist.destroy_process_group()


def _compute(options, text, run):
    return simulate(options, text, options.rows[run["row"]], run["learning_rate"], run["seed"])


if __name__ == "__main__":
    main()
