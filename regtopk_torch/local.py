"""N workers in one process, on the kernels and in the order of N processes under DDP."""

import numbers
from typing import Unpack

import torch

from regtopk_torch import _C, checkpoint
from regtopk_torch.options import Common, check_options, lists_common


class LocalExchange:
    """Simulate the exchange of N workers: `aggregate = exchange.step([gradient_0, ..., gradient_{N-1}])`.

    For simulations of many workers, and as the twin that a distributed run equals bit for bit.

    Args:
        num_workers (int): N >= 1.
        density (float, callable or AdaptiveDensity), decay, dense_steps, wire_dtype, index_code, support, chunk, momentum, nesterov,
            mask_momentum, clip_norm, dense: as for TopKState; a parameter's name is its place, "0", "1", ...
        method (str): "regtopk" or "topk".
        mu, distortion: as for RegTopKState; Top-k ignores them.

    Raises:
        TypeError, ValueError: an option out of range.
    """

    @lists_common
    def __init__(self, num_workers, density=0.001, *, method="regtopk", mu=5.0, distortion="previous", **common: Unpack[Common]):
        if common.get("levels") is not None:
            raise ValueError(f"LocalExchange: expected no levels of workers in one process, got levels={common['levels']!r}; give it the means of the hosts")
        options = check_options("LocalExchange", lambda keys: map(str, keys), method, density=density, mu=mu, distortion=distortion, **common)
        if isinstance(num_workers, bool) or not isinstance(num_workers, numbers.Integral) or num_workers < 1:
            raise ValueError(f"LocalExchange: expected num_workers to be an integer of at least 1, got {num_workers!r}")
        num_workers = int(num_workers)
        self._header = {"method": method, "distortion": distortion, "world_size": num_workers}
        self._num_workers = num_workers
        self._exchange = _C.LocalExchange(options, num_workers)

    @property
    def num_workers(self):
        """N."""
        return self._num_workers

    def step(self, gradients, buckets=None, *, scale=1.0):
        """Exchange one step and return the average of what the workers sent, Z / N.

        Args:
            gradients (list): one per worker, in rank order: a tensor of any shape, or a list of tensors, one per parameter;
                fp64, fp32, bf16 or fp16, on the CPU, of equal shapes and dtypes for all workers. Only read.
            buckets (list of list of int, optional): the parameters of each bucket, in the order in which DDP lays them
                out; default, all parameters in one bucket. May change from step to step: residuals follow their parameters.
            scale (float): what all gradients were multiplied by, as by a GradScaler; the averages are multiples by it too,
                the residuals that this class returns are not.

        Returns:
            A new tensor, or list of tensors, in the shape of one worker's gradients; None for parameters in no bucket, zero
            for parameters whose gradients are zero in all entries on all workers: their residuals wait.
        """
        _check_gradients(gradients)
        single = all(isinstance(gradient, torch.Tensor) for gradient in gradients)
        per_worker = [[gradient] for gradient in gradients] if single else [list(gradient) for gradient in gradients]
        if buckets is None:
            buckets = [list(range(len(per_worker[0])))] if per_worker else []
        averages = self._exchange.step([[g.detach() for g in worker] for worker in per_worker], buckets, float(scale))
        return averages[0] if single else averages

    def stats(self, rank=None):
        """Return the sums since construction of one worker, or of all (steps and void_steps are those of one worker).

        The keys are those of `TopKState.stats`. No collective.
        """
        if rank is not None:
            result = self._exchange.statistics(rank)
        else:
            ranks = [self.stats(rank) for rank in range(self._num_workers)]
            once = ("steps", "void_steps", "density", "workers", "dense")
            result = {name: ranks[0][name] if name in once else sum(r[name] for r in ranks) for name in ranks[0]}
        result["density"] = result["sent_entries"] / result["entries"] if result["entries"] else 0.0
        result["workers"] = self._num_workers
        for bucket in result["dense"]:
            bucket["parameters"] = [str(key) for key in bucket["parameters"]]
        return result

    def residual_norm(self, rank=None):
        """Return the 2-norm of one worker's residuals, or of all, in fp64 and of unscaled gradient."""
        ranks = range(self._num_workers) if rank is None else [rank]
        return sum(self._exchange.residual_norm(rank) ** 2 for rank in ranks) ** 0.5

    def reset(self):
        """Drop residuals, velocities and histories of all workers: gradient that was held back is lost. The step number stays."""
        for rank in range(self._num_workers):
            self._exchange.import_pieces(rank, {}, self._exchange.last_step(rank))

    def skipped(self):
        """Say that the last step was not applied: what was sent in it returns at the next step."""
        self._exchange.skipped()

    def _pieces(self, rank):
        return {key: checkpoint.Piece(*piece) for key, piece in self._exchange.export_pieces(rank).items()}

    def residuals(self, rank):
        """Return {parameter index: residual, flat} of one worker, as copies; fp32, or fp64 for fp64 gradients."""
        return {key: piece.residual for key, piece in self._pieces(rank).items()}

    def state_dict(self):
        """Return residuals, histories and steps of all workers, as a dict that `torch.load(weights_only=True)` reads."""
        workers = []
        for rank in range(self._num_workers):
            pieces = self._pieces(rank)
            named = [(str(key), pieces[key].residual, key) for key in sorted(pieces)]
            header = {**self._header, "rank": rank}
            progress = checkpoint.Progress(self._exchange.last_step(rank), self._exchange.density_state(rank))
            workers.append(checkpoint.to_state_dict(pieces, named, header, progress))
        return {"workers": workers}

    def load_state_dict(self, state_dict):
        """Replace residuals, histories and steps; raises TypeError or ValueError, and changes nothing, if they do not fit."""
        who = "LocalExchange.load_state_dict"
        workers = state_dict.get("workers") if isinstance(state_dict, dict) else None
        if not isinstance(workers, list) or len(workers) != self._num_workers:
            found = len(workers) if isinstance(workers, list) else type(state_dict).__name__
            raise ValueError(f"{who}: expected the state of {self._num_workers} workers, got {found}")
        loaded = []
        for rank, worker in enumerate(workers):
            parameters = worker.get("parameters") if isinstance(worker, dict) else None
            if not isinstance(parameters, dict):
                raise TypeError(f"{who}: expected a state dict of worker {rank}, got {type(worker).__name__}")
            named = [_like_a_gradient(f"{who}: worker {rank}", name, entry) for name, entry in parameters.items()]
            loaded.append(checkpoint.from_state_dict(who, worker, named, {**self._header, "rank": rank}))
        for rank, (pieces, progress) in enumerate(loaded):
            # The workers of a simulation know their parameters by index alone.
            self._exchange.import_pieces(rank, {key: piece._replace(parameter=None) for key, piece in pieces.items()}, *progress)


def _check_gradients(gradients):
    if not isinstance(gradients, (list, tuple)):
        raise TypeError(f"LocalExchange: expected a list with the gradients of each worker, got {type(gradients).__name__}")
    for rank, worker in enumerate(gradients):
        parts = [worker] if isinstance(worker, torch.Tensor) else worker
        if not isinstance(parts, (list, tuple)):
            raise TypeError(f"LocalExchange: expected a tensor or a list of tensors of worker {rank}, got {type(worker).__name__}")
        for index, part in enumerate(parts):
            if not isinstance(part, torch.Tensor):
                raise TypeError(f"LocalExchange: expected a tensor as gradient {index} of worker {rank}, got {type(part).__name__}")


def _like_a_gradient(where, name, entry):
    """(name, tensor without data of the shape and gradient dtype that a saved entry has, key): no module says it here."""
    shape = entry.get("shape") if isinstance(entry, dict) else None
    value = entry.get("sent_value", entry.get("residual")) if isinstance(entry, dict) else None
    sizes = isinstance(shape, list) and all(type(size) is int and 0 <= size < 2**31 for size in shape)
    if not (isinstance(name, str) and name.isdecimal() and int(name) < 2**63 and sizes and isinstance(value, torch.Tensor)):
        raise ValueError(f"{where}: expected the shape and the residual of a parameter by its index, got others under {name!r}")
    return name, torch.empty(shape, dtype=value.dtype, device="meta"), int(name)
