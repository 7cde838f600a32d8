"""Local steps: workers train by themselves for a while, and average what it did to their weights."""

import numbers

import torch
from torch.nn.parallel import DistributedDataParallel

from regtopk_torch import checkpoint
from regtopk_torch.states import TopKState

BUFFERS = ("keep", "average")
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class LocalSteps:
    """Every `every` optimizer steps, average what they did: `local.step()` behind each `optimizer.step()`.

        local = regtopk_torch.LocalSteps(model, optimizer, regtopk_torch.TopKState(0.01), every=5)
        for batch in batches:
            loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            local.step()

    Between two rounds a worker trains alone. In a round each gives common weights - its own as `state.average` takes tensors: the
    largest entries travel, the rest is held back. The outer optimizer applies the average to the common weights, and all models go
    on from those, with the same bits. At `every=1` that compresses the optimizer's updates. The optimizer's own state stays each
    worker's.

    A round whose average is not finite is void: every worker keeps its own weights, what it gave is held back and not given again, and
    entries of its weights that are not finite wait until they are.

    Args:
        model (torch.nn.Module): not wrapped; of the same weights on every rank. Its parameters that require a gradient now are averaged.
        optimizer (torch.optim.Optimizer): the one that steps them; with or without GradScaler, after any number of backward passes.
        state (TopKState or RegTopKState): of this object alone, without grad_scaler: what is averaged is not scaled.
        every (int): steps from one round to the next, at least 1; the same on every rank.
        outer (str or callable): "sgd": the average is subtracted, learning rate 1. Or what makes a torch optimizer of a list of
            parameters, the common weights, whose gradient is the average: `functools.partial(torch.optim.SGD, lr=0.7, momentum=0.9,
            nesterov=True)`. It is the attribute `outer` then.
        buffers (str): "keep": each worker keeps its own; "average": those of floating point are averaged, all entries, in each round.
            Integer ones are each worker's own.

    Keeps a copy of the parameters, and what the state keeps.

    Raises:
        TypeError, ValueError: an argument out of range.
    """

    def __init__(self, model, optimizer, state, every=1, outer="sgd", *, buffers="keep"):
        who = "LocalSteps"
        if not isinstance(model, torch.nn.Module) or isinstance(model, DistributedDataParallel):
            raise TypeError(f"{who}: expected a torch.nn.Module that nothing averages already, got {type(model).__name__}")
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"{who}: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if not isinstance(state, TopKState):
            raise TypeError(f"{who}: expected a TopKState or RegTopKState, got {type(state).__name__}")
        if state._grad_scaler is not None:
            raise ValueError(f"{who}: expected a state without grad_scaler, got one with it; what is averaged is not scaled")
        if isinstance(every, bool) or not isinstance(every, numbers.Integral) or every < 1:
            raise ValueError(f"{who}: expected every to be an integer of at least 1, got {every!r}")
        if buffers not in BUFFERS:
            raise ValueError(f"{who}: expected buffers 'keep' or 'average', got {buffers!r}")
        named = {checkpoint.plain_name(name): parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        strangers = stepped - {id(parameter) for parameter in model.parameters()}
        if strangers or not named:
            raise ValueError(f"{who}: expected an optimizer of the model's parameters, got one with {len(strangers)} others, of {len(named)}")
        self.every = int(every)
        self._model, self._state, self._buffers = model, state, buffers
        self._names, self._own = list(named), list(named.values())
        self._common = [parameter.detach().clone() for parameter in self._own]
        self._origin = None  # where what was given so far has led, if the last round was void; per worker
        self._steps = self._void_rounds = 0
        self._compared = False  # the ranks have, what must be equal
        if outer != "sgd" and not callable(outer):
            raise TypeError(f"{who}: expected outer to be 'sgd' or what makes an optimizer, got {outer!r}")
        self.outer = None if outer == "sgd" else outer([weights.requires_grad_() for weights in self._common])

    @property
    def void_rounds(self):
        """How many rounds had an average that was not finite."""
        return self._void_rounds

    def step(self):
        """Count a step of the optimizer; every `every`-th is a round, a collective. Return whether the models are equal now.

        Raises:
            ValueError: weights, `every` or other arguments that differ between ranks, in the first round.
            torch.distributed.DistBackendError: as `TopKState.average`.
        """
        self._steps += 1
        return self._steps % self.every == 0 and self._round()

    @torch.no_grad()
    def _round(self):
        origin = self._common if self._origin is None else self._origin
        given = [before - now for before, now in zip(origin, self._own, strict=True)]
        averages = self._state._average(given, self._names, terms=() if self._compared else self._terms()).wait()
        self._compared = True
        if not bool(torch.stack([average.isfinite().all() for average in averages]).all()):
            self._origin = [torch.where(d.isfinite(), now, before) for d, now, before in zip(given, self._own, origin, strict=True)]
            self._void_rounds += 1
            return False
        self._origin = None
        if self.outer is None:
            torch._foreach_sub_(self._common, averages)
        else:
            for weights, average in zip(self._common, averages, strict=True):
                weights.grad = average
            self.outer.step()
            self.outer.zero_grad()
        torch._foreach_copy_(self._own, self._common)
        if self._buffers == "average":
            self._average_buffers()
        return True

    def _average_buffers(self):
        buffers = [buffer for buffer in self._model.buffers() if buffer.is_floating_point()]
        if not buffers:
            return
        exchange = self._state._exchange
        total = torch.cat([buffer.detach().flatten().to("cpu", torch.float64) for buffer in buffers])
        exchange.add_up(total, "average", "the average of buffers")
        for buffer, average in zip(buffers, total.div_(exchange.workers()).split([b.numel() for b in buffers]), strict=True):
            buffer.copy_(average.view_as(buffer))

    def _terms(self):
        """What must be equal on every rank, for the ranks to compare."""
        checksum = 0
        for weights in self._common:
            bits = weights.detach().flatten().view(BITS[weights.element_size()]).long()
            checksum = (31 * checksum + int((bits * torch.arange(1, 2 * len(bits), 2, device=bits.device)).sum())) % 2**63
        outer = "sgd" if self.outer is None else " ".join(repr(self.outer).split())
        return [("every", str(self.every)), ("outer", outer), ("buffers", self._buffers), ("common weights (checksum)", f"{checksum:x}")]

    def state_dict(self):
        """Return this rank's part of the run, for `torch.save` and `torch.load(weights_only=True)`: steps, common weights, the outer
        optimizer and what the state holds back. The model, which is a worker's own between rounds, and its optimizer are saved
        beside it, on each rank. Call it between steps; no collective."""
        origin = None if self._origin is None else dict(zip(self._names, map(torch.clone, self._origin), strict=True))
        return {
            "steps": self._steps,
            "void_rounds": self._void_rounds,
            "common": {name: weights.detach().clone() for name, weights in zip(self._names, self._common, strict=True)},
            "origin": origin,
            "outer": None if self.outer is None else self.outer.state_dict(),
            "state": self._state.state_dict(None),
        }

    def load_state_dict(self, state_dict):
        """Go on from a `state_dict` of the same rank: the bits are those of a run that never stopped.

        Raises:
            TypeError, ValueError: of another model, rank, world size or outer optimizer.
        """
        who = "LocalSteps.load_state_dict"
        if not isinstance(state_dict, dict) or not {"steps", "void_rounds", "common", "origin", "outer", "state"} <= state_dict.keys():
            raise TypeError(f"{who}: expected a state dict of LocalSteps, got {checkpoint._describe(state_dict)}")
        for part in ("common", "origin"):
            weights = state_dict[part]
            if part == "origin" and weights is None:
                continue
            if not isinstance(weights, dict) or list(weights) != self._names:
                raise ValueError(f"{who}: expected {part} weights of the model's {len(self._names)} parameters, got others")
            for name, own in zip(self._names, self._own, strict=True):
                checkpoint._tensor(f"{who}: {part}", weights, name, own.dtype, own.shape)
        if (state_dict["outer"] is None) != (self.outer is None):
            raise ValueError(f"{who}: expected the state of {'no' if self.outer is None else 'an'} outer optimizer, got the opposite")
        self._state.load_state_dict(state_dict["state"], None)
        if self.outer is not None:
            self.outer.load_state_dict(state_dict["outer"])
        with torch.no_grad():
            for name, weights in zip(self._names, self._common, strict=True):
                weights.copy_(state_dict["common"][name])
        origin = state_dict["origin"]
        self._origin = None if origin is None else [origin[name].to(own.device, copy=True) for name, own in zip(self._names, self._own, strict=True)]
        self._steps, self._void_rounds = state_dict["steps"], state_dict["void_rounds"]
        self._compared = False
