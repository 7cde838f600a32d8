"""N workers that train one model: one per process under DDP, or all in this process on LocalExchange, with the same bits.

The bits are the same for Top-k and RegTop-k in one bucket where every process has as many threads and no scores tie, for DDP
orders the parameters in its bucket differently; a dense all-reduce sums more than two workers in an order of its own. Both
forms take rank 0's BatchNorm statistics, as DDP does.
"""

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import regtopk_torch as rt
from experiments.checkpoints import gather

ONCE = ("steps", "void_steps")  # every worker counts the same; everything else is summed over the workers
SUMMED = ("entries", "sent_entries", "repeated", "displaced", "bytes_sent", "bytes_dense")
SECONDS = ("compress_seconds", "exchange_seconds", "aggregate_seconds")


def add(earlier, later):
    """Return the statistics of two consecutive parts of a run as those of the whole."""
    return {name: earlier[name] + later[name] for name in later} if earlier else later


def compression_of(options):
    """Return the density and the other options that both methods have, as `rt.TopKState` takes them."""
    density = options.density
    if options.warmup_steps:
        density = rt.WarmupDensity(max(0.25, density), density, options.warmup_steps)
    elif options.adaptive_power is not None:
        density = rt.AdaptiveDensity(density, power=options.adaptive_power)
    wire_dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}.get(options.wire_dtype, options.wire_dtype)
    same = {name: getattr(options, name) for name in ("decay", "dense_steps", "index_code", "support", "chunk", "dense", "levels", "mask_momentum", "clip_norm")}
    return density, {**same, "wire_dtype": wire_dtype, "momentum": options.momentum_correction}


class Workers:
    """What both forms share: `model` with its `optimizer`, and how the state of the run is saved. Every method is a collective."""

    _state = _ddp = None

    def __init__(self, options, model):
        self.model, self._count, self._steps = model, options.workers, 0
        if options.optimizer == "adamw":
            self.optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
        else:
            self.optimizer = torch.optim.SGD(model.parameters(), lr=options.learning_rate, momentum=options.momentum)

    def save(self, folders, step, training):
        """Save a step with what the job adds to it."""
        states = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        folders.save(step, {**training, **states}, self._state, self._ddp)

    def load(self, folders):
        """Go on from the newest step; return (step, what had been saved with it), (0, None) where there is none."""
        step, training = folders.load(self._state, self._ddp)
        if training is not None:
            self.model.load_state_dict(training["model"])
            self.optimizer.load_state_dict(training["optimizer"])
        return step, training

    def _dense_statistics(self):
        """Return the statistics of dense exchanges as ring all-reduces, summed over workers."""
        entries = sum(parameter.numel() for parameter in self.model.parameters()) * self._steps
        sent = 2 * (self._count - 1) * entries * 4
        counted = {"entries": entries * self._count, "sent_entries": entries * self._count, "bytes_sent": sent, "bytes_dense": sent}
        return {"steps": self._steps, "void_steps": 0, "repeated": 0, "displaced": 0, **counted, **dict.fromkeys(SECONDS, 0.0)}


class DistributedWorkers(Workers):
    """Train `model`, in place, as one worker of the default process group; `batches` are those of all workers."""

    def __init__(self, options, model, batches):
        super().__init__(options, model)
        self._batches, self._device = batches[dist.get_rank()], options.device
        density, common = compression_of(options)
        if options.method == "topk":
            self._state = rt.TopKState(density, **common)
        elif options.method == "regtopk":
            self._state = rt.RegTopKState(density, mu=options.mu, distortion=options.distortion, **common)
        self._ddp = DistributedDataParallel(model, bucket_cap_mb=options.bucket_cap_mb)
        if self._state is not None:
            self._ddp.register_comm_hook(self._state, rt.sparse_hook)

    def step(self, step):
        """Take step number `step`, counted from 0, and return this worker's training loss, in nats, in a list."""
        images, labels = (tensor.to(self._device) for tensor in self._batches[step])
        self.optimizer.zero_grad()
        loss = cross_entropy(self._ddp(images), labels)
        loss.backward()
        self.optimizer.step()
        self._steps += 1
        return [loss.item()]

    def statistics(self):
        """Return what was exchanged since construction, summed over workers, under the keys of ONCE, SUMMED and SECONDS."""
        if self._state is None:
            return self._dense_statistics()
        ranks = gather(self._state.stats())
        return {name: ranks[0][name] for name in ONCE} | {name: sum(rank[name] for rank in ranks) for name in SUMMED + SECONDS}


class LocalWorkers(Workers):
    """Train `model`, in place, as `len(batches)` workers in this process, on `options.device`.

    With `options.local_steps` above 1 a worker takes that many steps of its own from the common weights, and what it exchanges
    is the sum of their gradients, so that with one worker the weights end where its own steps led. Otherwise as the above.
    `exchange` is the LocalExchange, None for dense.
    """

    def __init__(self, options, model, batches):
        super().__init__(options, model)
        self._batches, self._options, self.exchange = batches, options, None
        self._parameters = list(model.parameters())
        # Gradients stay where they are, unless this build cannot exchange them there.
        self._exchanged_on = options.device if rt.has_cuda_kernels() else "cpu"
        if options.method != "dense":
            density, common = compression_of(options)
            settings = {"method": options.method, "mu": options.mu, "distortion": options.distortion, **common}
            self.exchange = rt.LocalExchange(len(batches), density, **settings)

    def step(self, step):
        """Take step number `step`, counted from 0, and return the training losses of all workers, in nats."""
        gradients, losses, buffers = [], [], None
        for batches in self._batches:
            gradients.append(self._gradients(batches, step, losses))
            if buffers is None:
                buffers = [buffer.clone() for buffer in self.model.buffers()]
        for buffer, of_rank_0 in zip(self.model.buffers(), buffers):
            buffer.copy_(of_rank_0)
        for parameter, average in zip(self._parameters, self._average(gradients)):
            parameter.grad = average.to(parameter.device)
        self.optimizer.step()
        return [loss.item() for loss in losses]

    def _gradients(self, batches, step, losses):
        if self._options.local_steps == 1:
            return [gradient.to(self._exchanged_on) for gradient in self._one_gradient(batches, step, losses)]
        common = [parameter.detach().clone() for parameter in self._parameters]
        total = [torch.zeros_like(parameter) for parameter in common]
        with torch.no_grad():
            for number in range(self._options.local_steps):
                gradient = self._one_gradient(batches, step * self._options.local_steps + number, losses)
                for parameter, part, entry in zip(self._parameters, gradient, total):
                    parameter.sub_(part, alpha=self._options.learning_rate)
                    entry.add_(part)
            for parameter, value in zip(self._parameters, common):
                parameter.copy_(value)
        return [entry.to(self._exchanged_on) for entry in total]

    @torch.enable_grad()
    def _one_gradient(self, batches, step, losses):
        images, labels = (tensor.to(self._options.device) for tensor in batches[step])
        loss = cross_entropy(self.model(images), labels)
        losses.append(loss.detach())  # its number would be a wait for a GPU, once for each worker
        return torch.autograd.grad(loss, self._parameters)

    def _average(self, gradients):
        self._steps += 1
        if self.exchange is not None:
            return self.exchange.step(gradients)
        return [sum(of_workers) / torch.tensor(float(len(of_workers))) for of_workers in zip(*gradients)]  # in rank order

    def statistics(self):
        """Return what was exchanged since construction, summed over workers."""
        if self.exchange is None:
            return self._dense_statistics()
        statistics = self.exchange.stats()
        return {name: statistics[name] for name in ONCE + SUMMED + SECONDS}

    def save(self, folders, step, training):
        super().save(folders, step, {**training, "exchange": self.exchange and self.exchange.state_dict()})

    def load(self, folders):
        step, training = super().load(folders)
        if training is not None and self.exchange is not None:
            self.exchange.load_state_dict(training["exchange"])
        return step, training
