"""N workers that train one model, in one process on LocalExchange or one per process under DDP, with the same bits.

Both forms keep the parameters in one bucket, in the model's order: selection breaks ties by index, so another order
would be another run. Both take rank 0's BatchNorm statistics, as DDP does. Dense averages are summed in rank order.
"""

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import regtopk_torch as rt

# What describes the run as a whole; everything else in the statistics is summed over workers and over resumed parts.
SHARED_STATISTICS = ("steps", "void_steps")
COUNTED = ("steps", "void_steps", "entries", "sent_entries", "repeated", "displaced", "bytes_sent", "bytes_dense")


def ring_bytes(num_workers, entries):
    """Return the bytes that all workers of a dense ring all-reduce of `entries` fp32 entries send together."""
    return 2 * (num_workers - 1) * entries * 4


class LocalWorkers:
    """Train `model`, in place, as `len(batches)` workers in this process.

    `method` is "dense", "topk" or "regtopk". The model may be on any device; its gradients are exchanged on the CPU.
    With `local_steps` above 1 a worker takes that many steps of its own from the common weights, and what it exchanges
    is the sum of their gradients, so that with one worker the weights end where its own steps led.
    """

    rank = 0

    def __init__(self, model, batches, method, *, density, mu, distortion, learning_rate, local_steps=1):
        self.model, self._batches, self._local_steps = model, batches, local_steps
        self._learning_rate = learning_rate
        self._parameters = list(model.parameters())
        self._optimizer = torch.optim.SGD(self._parameters, lr=learning_rate)
        self._device = self._parameters[0].device
        self._dense_steps = 0
        self._exchange = None
        if method != "dense":
            self._exchange = rt.LocalExchange(len(batches), density, method=method, mu=mu, distortion=distortion)

    def step(self, step):
        """Take step number `step`, counted from 0, and return the mean training loss of all workers, in nats."""
        gradients, losses, buffers = [], [], None
        for batches in self._batches:
            gradients.append(self._gradients(batches, step, losses))
            if buffers is None:
                buffers = [buffer.clone() for buffer in self.model.buffers()]
        for buffer, of_rank_0 in zip(self.model.buffers(), buffers):
            buffer.copy_(of_rank_0)
        for parameter, average in zip(self._parameters, self._average(gradients)):
            parameter.grad = average.to(self._device)
        self._optimizer.step()
        return sum(losses) / len(losses)

    def _gradients(self, batches, step, losses):
        if self._local_steps == 1:
            return [gradient.cpu() for gradient in self._one_gradient(batches, step, losses)]
        common = [parameter.detach().clone() for parameter in self._parameters]
        total = [torch.zeros_like(parameter) for parameter in common]
        for number in range(self._local_steps):
            gradient = self._one_gradient(batches, step * self._local_steps + number, losses)
            with torch.no_grad():
                for parameter, part, entry in zip(self._parameters, gradient, total):
                    parameter.sub_(part, alpha=self._learning_rate)
                    entry.add_(part)
        with torch.no_grad():
            for parameter, value in zip(self._parameters, common):
                parameter.copy_(value)
        return [entry.cpu() for entry in total]

    def _one_gradient(self, batches, step, losses):
        images, labels = batches[step]
        loss = cross_entropy(self.model(images.to(self._device)), labels.to(self._device))
        losses.append(loss.item())
        return torch.autograd.grad(loss, self._parameters)

    def _average(self, gradients):
        if self._exchange is not None:
            return self._exchange.step(gradients)
        self._dense_steps += 1
        averages = []
        for of_workers in zip(*gradients):
            total = torch.zeros_like(of_workers[0])
            for gradient in of_workers:
                total += gradient
            averages.append(total / torch.tensor(float(len(of_workers))))
        return averages

    def statistics(self):
        """Return what was exchanged since construction, summed over workers, under the keys of COUNTED."""
        if self._exchange is not None:
            statistics = self._exchange.stats()
            return {key: statistics[key] for key in COUNTED}
        return dense_statistics(self.model, len(self._batches), self._dense_steps)

    def exchange_state(self):
        """Return the exchange's state of every worker, by parameter name and in rank order; None for dense."""
        if self._exchange is None:
            return None
        return [self._name_parameters(worker) for worker in self._exchange.state_dict()["workers"]]

    def _name_parameters(self, worker):
        """Return one worker's state with names for indices and the parameters' shapes, as DDP's own has them."""
        parameters = {}
        for index, (name, parameter) in enumerate(self.model.named_parameters()):
            entry = worker["parameters"].get(str(index))
            if entry is not None:
                parameters[name] = {**entry, "shape": list(parameter.shape)}
                if "residual" in entry:
                    parameters[name]["residual"] = entry["residual"].view(parameter.shape)
        return {**worker, "parameters": parameters}

    def load_exchange_state(self, workers):
        """Load what `exchange_state` returned, here or under DDP."""
        if self._exchange is not None:
            indices = {name: str(index) for index, (name, _) in enumerate(self.model.named_parameters())}
            renamed = [
                {**worker, "parameters": {indices[name]: entry for name, entry in worker["parameters"].items()}} for worker in workers
            ]
            self._exchange.load_state_dict({"workers": renamed})


class DistributedWorkers:
    """Train `model`, in place, as one worker of the default process group; `batches` are those of all workers.

    Equals LocalWorkers bit for bit where every process has as many threads as that one. Every method but `rank` is a
    collective.
    """

    def __init__(self, model, batches, method, *, density, mu, distortion, learning_rate):
        self.model, self.rank = model, dist.get_rank()
        self._batches, self._method = batches[self.rank], method
        # Looking for unused parameters keeps DDP from rebuilding its bucket in another order after the first step.
        self._ddp = DistributedDataParallel(model, bucket_cap_mb=4096.0, find_unused_parameters=True)
        if method == "regtopk":
            self._state = rt.RegTopKState(density, mu=mu, distortion=distortion)
        else:
            # At density 1 the exchange sums in rank order what an all-reduce would sum in another.
            self._state = rt.TopKState(1.0 if method == "dense" else density)
        self._ddp.register_comm_hook(self._state, rt.sparse_hook)
        self._optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)

    def step(self, step):
        """Take step number `step`, counted from 0, and return the mean training loss of all workers, in nats."""
        images, labels = self._batches[step]
        self._optimizer.zero_grad()
        loss = cross_entropy(self._ddp(images), labels)
        loss.backward()
        self._optimizer.step()
        losses = [None] * dist.get_world_size()
        dist.all_gather_object(losses, loss.item())
        return sum(losses) / len(losses)

    def statistics(self):
        """Return what was exchanged since construction, summed over workers, under the keys of COUNTED."""
        own = self._state.stats()
        ranks = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, own)
        if self._method == "dense":
            return dense_statistics(self.model, len(ranks), own["steps"])
        return {key: own[key] if key in SHARED_STATISTICS else sum(rank[key] for rank in ranks) for key in COUNTED}

    def exchange_state(self):
        """Return the exchange's state of every worker, in rank order, on rank 0; None for dense and on other ranks."""
        if self._method == "dense":
            return None
        workers = [None] * dist.get_world_size() if self.rank == 0 else None
        dist.gather_object(self._state.state_dict(self.model), workers)
        return workers

    def load_exchange_state(self, workers):
        """Load what `exchange_state` returned, here or in one process; `workers` is read on rank 0 alone."""
        if self._method != "dense":
            own = [None]
            dist.scatter_object_list(own, workers if self.rank == 0 else None, src=0)
            self._state.load_state_dict(own[0], self.model)


def dense_statistics(model, num_workers, steps):
    """Return the statistics of `steps` dense exchanges as ring all-reduces, summed over workers."""
    entries = sum(parameter.numel() for parameter in model.parameters()) * steps
    sent = ring_bytes(num_workers, entries)
    return {
        "steps": steps, "void_steps": 0, "entries": entries * num_workers, "sent_entries": entries * num_workers,
        "repeated": 0, "displaced": 0, "bytes_sent": sent, "bytes_dense": sent,
    }  # fmt: skip


def add_statistics(earlier, later):
    """Return the statistics of two consecutive parts of a run as those of the whole."""
    return {key: earlier[key] + later[key] for key in COUNTED} if earlier else later
