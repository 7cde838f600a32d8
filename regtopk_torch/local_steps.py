"""Local steps: workers train by themselves for a while, and average what they did to their weights."""

import collections
import hashlib
import itertools
import numbers
import warnings
import weakref

import torch
from torch.nn.parallel import DistributedDataParallel

from regtopk_torch import checkpoint
from regtopk_torch.average import _check_no_module
from regtopk_torch.states import TopKState

BUFFERS = ("keep", "average")
VOID_ROUNDS = 3  # running, of a fragment, are more than an accident
_served: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # state: the last LocalSteps made for it
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

NOT_APPLIED = (
    "expected the round before to be applied on this rank as on the others, got one that an exception ended, in the outer optimizer or while it was waited for; "
    "load a checkpoint on every rank, or construct other LocalSteps"
)


class LocalSteps:
    """Every `every` optimizer steps, average what they did: `local.step()` behind each `optimizer.step()`.

        local = regtopk_torch.LocalSteps(model, optimizer, regtopk_torch.TopKState(0.01), every=5)
        for batch in batches:
            loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            local.step()

    Between two rounds a worker trains alone. In a round each gives common weights - its own as `state.average` takes tensors: the
    largest entries travel, the rest is held back. The outer optimizer applies the average to the common weights, which have the same
    bits on every rank, and all models go on from those. At `every=1` that compresses the optimizer's updates. The optimizer's own state
    stays each worker's.

    With `fragments=F` the parameters are cut into F fragments (Streaming DiLoCo, arXiv 2501.18512), and each has rounds of its own:
    fragment f at the steps t with t mod every = (f + 1) every / F mod every, so that no step sends more than about a fragment. With
    `delay=D` a round that begins at step t is applied at step t + D, and travels while the worker trains on. Of the fragment's own
    weights w and common weights c,

        c  <-  outer(c, average over ranks of c - w(t))
        w(t + D)  <-  c + (w(t + D) - w(t))

    keeps what the worker has done since; with D = 0 that is w <- c. The paper mixes instead, w(t + D) <- alpha w(t + D) + (1 - alpha) c:
    it drops the share 1 - alpha of what was done since, and keeps the share alpha of what was done before and is in c already.

    A round whose average is not finite is void: every worker keeps its own weights, what it gave is held back and not given again, and
    entries of its weights that are not finite wait until they are.

    Args:
        model (torch.nn.Module): not wrapped; of the same weights on every rank. Its parameters that require a gradient now are averaged.
        optimizer (torch.optim.Optimizer): the one that steps them; with or without GradScaler, after any number of backward passes.
        state (TopKState or RegTopKState): of this object alone, without grad_scaler: what is averaged is not scaled. A fragment is a
            bucket, and each of its rounds a step of the state.
        every (int): steps from one round of a fragment to the next, at least 1; the same on every rank.
        outer (str or callable): "sgd": the average is subtracted, learning rate 1. Or what makes a torch optimizer of a list of
            parameters, the common weights, whose gradient is the average: `functools.partial(torch.optim.SGD, lr=0.7, momentum=0.9,
            nesterov=True)`. It is the attribute `outer` then. It steps in every round, on the round's fragment.
        buffers (str): "keep": each worker keeps its own; "average": those of floating point are averaged, all entries whose average is finite, with the last
            fragment, unless that round is void. Integer ones are each worker's own.
        fragments (int): F, by which `every` can be divided, at most one for each parameter: whole parameters in the model's order,
            about equal in entries.
        delay (int): D, 0 <= D < every / F; the same on every rank.

    Keeps a copy of the parameters, memory for the differences of the largest fragment, twice where there is a delay, and what the state
    keeps.

    Raises:
        TypeError, ValueError: an argument out of range.
    """

    def __init__(self, model, optimizer, state, every=1, outer="sgd", *, buffers="keep", fragments=1, delay=0):
        who = "LocalSteps"
        if not isinstance(model, torch.nn.Module) or isinstance(model, DistributedDataParallel):
            raise TypeError(f"{who}: expected a torch.nn.Module that nothing averages already, got {type(model).__name__}; pass the model itself, and train without a wrapper")
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"{who}: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if not isinstance(state, TopKState):
            raise TypeError(f"{who}: expected a TopKState or RegTopKState, got {type(state).__name__}")
        if state._grad_scaler is not None:
            raise ValueError(f"{who}: expected a state without grad_scaler, got one with it; what is averaged is not scaled")
        for name, value, least in (("every", every, 1), ("fragments", fragments, 1), ("delay", delay, 0)):
            if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
                raise ValueError(f"{who}: expected {name} to be an integer of at least {least}, got {value!r}")
        if every % fragments:
            raise ValueError(f"{who}: expected every to be a multiple of fragments, got every={every} and fragments={fragments}")
        if delay >= every // fragments:
            raise ValueError(f"{who}: expected delay < every / fragments = {every // fragments}, got {delay}")
        if buffers not in BUFFERS:
            raise ValueError(f"{who}: expected buffers 'keep' or 'average', got {buffers!r}")
        named = {checkpoint.plain_name(name): parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        strangers = stepped - {id(parameter) for parameter in model.parameters()}
        if strangers or not named:
            raise ValueError(f"{who}: expected an optimizer of the model's parameters, got one with {len(strangers)} others, of {len(named)}")
        if fragments > len(named):
            raise ValueError(f"{who}: expected at most one fragment for each of {len(named)} parameters, got fragments={fragments}")
        _served[state] = weakref.ref(self)
        self.every, self.fragments, self.delay = int(every), int(fragments), int(delay)
        self._model, self._optimizer, self._state, self._buffers = model, optimizer, state, buffers
        self._names, self._own = list(named), list(named.values())
        self._common = [parameter.detach().clone() for parameter in self._own]
        self._steps = self._void_rounds = 0
        self._compared = False  # the ranks have, what must be equal
        self._half_applied = False  # a round is, and common weights are not those of the other ranks
        self._pending: _Round | None = None  # the round that is not applied yet; the memory of the differences is its own
        if outer != "sgd" and not callable(outer):
            found = repr(outer) if isinstance(outer, str) else type(outer).__name__
            raise TypeError(f"{who}: expected outer to be 'sgd' or what makes an optimizer, got {found}; pass for example functools.partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)")
        self.outer = None if outer == "sgd" else outer([weights.requires_grad_() for weights in self._common])
        ends = _cut([parameter.numel() for parameter in self._own], self.fragments)
        runs = [slice(*run) for run in itertools.pairwise(ends)]
        given = _views(self._own, runs)
        start = _views(self._own, runs) if self.delay else [None] * self.fragments
        self._fragments = [
            _Fragment(self._names[run], self._own[run], self._common[run], *memory) for run, *memory in zip(runs, given, start, strict=True)
        ]

    @property
    def steps(self):
        """How many steps were counted, those before a load included."""
        return self._steps

    @property
    def void_rounds(self):
        """How many rounds had an average that was not finite."""
        return self._void_rounds

    @property
    def common(self):
        """{name: common weights}, with the same bits on every rank, and without what was done since the last rounds; only to be read."""
        return dict(zip(self._names, self._common, strict=True))

    def step(self):
        """Count a step of the optimizer; begin the round that is due, a collective, and apply the one that is due.

        Returns:
            bool: whether a round was applied. Without delay the weights of its fragment, of the model where there is one, have the same
            bits on every rank now.

        Raises:
            ValueError: weights, `every` or other arguments that differ between ranks, on every rank in the first step, a collective too;
                a model with other parameters than this object was made for.
            torch.distributed.DistBackendError: as `TopKState.average`.
        """
        with torch.inference_mode(False):  # what is kept outlives the caller's mode
            return self._step()

    def _step(self):
        if _served[self._state]() is not self:
            self._fail("LocalSteps: expected a state of its own, got one for which other LocalSteps were made since; construct a state for each")
        self._check_applied()
        if not self._compared:
            self._exchange.use("average")
            self._exchange.agree(self._terms(), "LocalSteps")
            self._compared = True
        self._steps += 1
        applied = self._pending is not None and self._steps == self._pending.due and self._apply(self._pending)
        round_, left = divmod(self._steps, self.every // self.fragments)
        if left == 0:
            self._pending = self._begin(self._fragments[round_ % self.fragments - 1])
            if self.delay == 0:
                applied = self._apply(self._pending)
        return applied

    @torch.no_grad()
    def _begin(self, fragment):
        self._check_model()
        now = fragment.own
        if self.delay:
            torch._foreach_copy_(fragment.start, now)
            now = fragment.start
        for before, here, given in zip(fragment.before, now, fragment.given, strict=True):
            torch.sub(before, here, out=given)
        given_before = self._exchange.times_given()
        try:
            work = self._state._average(fragment.given, fragment.names, fragment.given)
        except BaseException:
            self._return(fragment, given_before)
            raise
        return _Round(fragment, self._steps + self.delay, work, given_before=given_before)

    def _check_model(self):
        """What took a parameter's place, or takes part since, would train by itself."""
        here = {checkpoint.plain_name(name): parameter for name, parameter in self._model.named_parameters()}
        for name, own, weights in zip(self._names, self._own, self._common, strict=True):
            if name not in here or here[name] is not own or own.shape != weights.shape:
                self._fail(
                    f"LocalSteps: expected {name} to be the parameter that was there at first, of shape {list(weights.shape)}, got another or none; "
                    "construct other LocalSteps for a model that has changed"
                )
        added = sorted({name for name, parameter in here.items() if parameter.requires_grad} - set(self._names))
        if added:
            self._fail(f"LocalSteps: expected {added[0]} to require no gradient, as at first, got one that does; construct other LocalSteps for a model that has changed")

    def _check_applied(self):
        if self._half_applied:
            self._fail(f"LocalSteps: {NOT_APPLIED}")

    def _fail(self, why):
        """Raise ValueError, and tell the ranks that wait for this one."""
        self._exchange.use("average")
        message = f"rank {self._exchange.rank()}: {why}"
        self._exchange.announce_failure(message)
        raise ValueError(message)

    @torch.no_grad()
    def _apply(self, pending):
        self._pending, fragment = None, pending.fragment
        self._half_applied = True
        try:
            is_void = pending.wait()
        except Exception:
            self._return(fragment, pending.given_before)
            self._half_applied = False
            raise
        start = fragment.start if self.delay else fragment.own
        if is_void:
            self._move_origin(fragment)
            self._void_rounds += 1
            self._half_applied = False
            self._say_what_does_not_end(fragment)
            return False
        fragment.origin, fragment.void_in_a_row = None, 0
        if self.outer is None:
            torch._foreach_sub_(fragment.common, fragment.given)
        else:
            for weights, average in zip(fragment.common, fragment.given, strict=True):
                weights.grad = average
            self.outer.step()
            self.outer.zero_grad()
        if self.delay:
            torch._foreach_sub_(fragment.own, start)
            torch._foreach_add_(fragment.own, fragment.common)
        else:
            torch._foreach_copy_(fragment.own, fragment.common)
        self._half_applied = False
        if self._buffers == "average" and fragment is self._fragments[-1]:
            self._average_buffers()
        return True

    def _move_origin(self, fragment, names=None):
        """What was given, of all parameters or these, is held back by the state: the next round gives what comes from here on. But for what is not finite, which nothing holds."""
        start, origin = fragment.start if self.delay else fragment.own, []
        for name, here, before in zip(fragment.names, start, fragment.before, strict=True):
            is_held = names is None or name in names
            origin.append(torch.where((before - here).isfinite(), here, before) if is_held else before.clone())
        fragment.origin = origin

    def _return(self, fragment, given_before):
        """After an error, whose round comes to nobody: what the state had taken by then it holds, else it is still to be given."""
        now, forms = self._exchange.times_given(), self._state._forms
        held = {name for name in fragment.names if name in forms and now.get(forms[name].key, 0) != given_before.get(forms[name].key, 0)}
        if held:
            self._move_origin(fragment, held)

    def _say_what_does_not_end(self, fragment):
        """One that is not finite in a worker's weights makes its rounds void until they are: no average would bring that to an end."""
        fragment.void_in_a_row += 1
        if fragment.void_in_a_row != VOID_ROUNDS:
            return
        own = [name for name, weights in zip(fragment.names, fragment.own, strict=True) if not weights.isfinite().all()]
        whose = f"{own[0]} is not finite on this rank" if own else "what is not finite is on another rank, which says so"
        warnings.warn(
            f"rank {self._exchange.rank()}: LocalSteps: expected finite weights, got {VOID_ROUNDS} rounds running that are void, in which every worker trains "
            f"alone: {whose}; copy `common` into its model, or load a checkpoint on all ranks",
            stacklevel=4,
        )

    def _average_buffers(self):
        buffers = [buffer for buffer in self._model.buffers() if buffer.is_floating_point()]
        if not buffers:
            return
        exchange = self._state._exchange
        total = torch.cat([buffer.detach().flatten().to("cpu", torch.float64) for buffer in buffers])
        exchange.add_up(total, "average", "the average of buffers")
        for buffer, average in zip(buffers, total.div_(exchange.workers()).split([b.numel() for b in buffers]), strict=True):
            average = average.view_as(buffer).to(buffer)
            buffer.copy_(torch.where(average.isfinite(), average, buffer))  # one worker's that is not finite stays its own

    def _terms(self):
        """What must be equal on every rank, for the ranks to compare."""
        checksum, forms = 0, hashlib.sha256()
        for name, weights in self.common.items():
            forms.update(f"{name} {list(weights.shape)} {weights.dtype};".encode())
            bits = weights.detach().flatten().view(BITS[weights.element_size()]).long()
            checksum = (31 * checksum + int((bits * (2 * torch.arange(len(bits), device=bits.device) + 1)).sum())) % 2**63
        outer = "sgd" if self.outer is None else " ".join(repr(self.outer).split())
        counts = [(name, str(getattr(self, name))) for name in ("every", "fragments", "delay", "steps")]
        of_parameters = f"{len(self._common)} (checksum of names, shapes and dtypes {forms.hexdigest()[:16]})"
        common = ("common weights (checksum); begin with one seed, file or broadcast on every rank", f"{checksum:x}")
        return [*counts, ("outer", outer), ("buffers", self._buffers), ("parameters", of_parameters), common]

    def state_dict(self):
        """Return this rank's part of the run, for `torch.save` and `torch.load(weights_only=True)`: steps, common weights, the outer
        optimizer, what the state holds back, and a round that has begun and is not applied yet: it waits for its average, and the run
        that loads it applies it.

        The model, which is a worker's own between rounds, and its optimizer are saved beside it, on each rank; or
        `rt.save(local, None, directory)` saves all of that for all ranks. Call it between steps, on every rank; no collective.
        """
        if self._half_applied:
            raise ValueError(f"LocalSteps: {NOT_APPLIED}")
        pending = None
        if self._pending is not None:
            try:
                pending = self._pending.state_dict()
            except Exception as error:  # its round came to nobody: what there is can be saved all the same
                warnings.warn(f"rank {self._exchange.rank()}: LocalSteps: expected the averages of the round under way, got none, and saved without them: {error}", stacklevel=2)
                self._return(self._pending.fragment, self._pending.given_before)
                self._pending = None
        origins: dict[str, torch.Tensor] = {}
        for fragment in self._fragments:
            if fragment.origin is not None:
                origins.update(_clones(fragment.names, fragment.origin))
        return {
            "step": self._steps,
            "void_rounds": self._void_rounds,
            "common": _clones(self._names, self._common),
            "origin": origins,
            "pending": pending,
            "outer": None if self.outer is None else self.outer.state_dict(),
            "outer_kind": _kind(self.outer),
            "state": self._state.state_dict(None),
        }

    def load_state_dict(self, state_dict):
        """Go on from a `state_dict` of the same rank: the bits are those of a run that never stopped.

        Raises:
            TypeError, ValueError: of another model, rank, world size or kind of optimizer, or, with a round that is not applied yet, of
                other fragments or another delay. Nothing is changed then.
        """
        self._loader(lambda rank: ("LocalSteps.load_state_dict", state_dict), self._state._checkpoint_header()["world_size"], None)()

    @property
    def _exchange(self):
        return self._state._exchange

    def _saved(self, module):
        """What `rt.save` writes of this rank: all that a worker has."""
        _check_no_module(module)
        return self.state_dict() | {"model": self._model.state_dict(), "optimizer": self._optimizer.state_dict(), "optimizer_kind": _kind(self._optimizer)}

    def _loader(self, read, saved_world_size, module):
        """As `TopKState._loader`."""
        _check_no_module(module)
        header = self._state._checkpoint_header()
        if saved_world_size != header["world_size"]:
            raise ValueError(f"expected LocalSteps of {header['world_size']} ranks, as there are now, got those of {saved_world_size}")
        who, saved = read(header["rank"])
        if not isinstance(saved, dict) or not {"step", "void_rounds", "common", "origin", "pending", "outer", "state"} <= saved.keys():
            raise TypeError(f"{who}: expected a state dict of LocalSteps, got {checkpoint._describe(saved)}")
        common, origins, pending = saved["common"], saved["origin"], saved["pending"]
        _check_weights(f"{who}: common", common, self._names, self._own)
        void = [fragment for fragment in self._fragments if not origins.keys().isdisjoint(fragment.names)]
        for fragment in void:
            _check_weights(f"{who}: origin", {name: origins.get(name) for name in fragment.names}, fragment.names, fragment.own)
        begun = None
        if pending is not None:
            begun = next((fragment for fragment in self._fragments if fragment.names == list(pending["average"])), None)
            if begun is None or not saved["step"] < pending["due"] <= saved["step"] + self.delay:
                raise ValueError(f"{who}: expected the fragments and the delay of the round that is not applied yet, got others")
            for part in ("average", "start"):
                _check_weights(f"{who}: {part}", pending[part], begun.names, begun.own)
        if (saved["outer"] is None) != (self.outer is None):
            here, there = (f"{'without' if outer is None else 'with'} an outer optimizer" for outer in (self.outer, saved["outer"]))
            raise ValueError(f"{who}: expected LocalSteps {here}, got those of one {there}; construct it as it was when it was saved")
        optimizers = [(self.outer, saved["outer"]), (self._optimizer, saved.get("optimizer"))]
        for optimizer, state in optimizers:
            if state is not None and _group_sizes(state) != _group_sizes(optimizer.state_dict()):
                raise ValueError(f"{who}: expected an optimizer of groups of {_group_sizes(optimizer.state_dict())} parameters, got {_group_sizes(state)}")
        for optimizer, kind in [(self.outer, saved.get("outer_kind")), (self._optimizer, saved.get("optimizer_kind"))]:
            if kind not in (None, _kind(optimizer)):
                raise ValueError(f"{who}: expected the state of an optimizer of the kind {_kind(optimizer)}, got that of {kind}; construct the optimizer that was saved")
        model = saved.get("model")
        if model is not None and _shapes(model) != _shapes(self._model.state_dict()):
            raise ValueError(f"{who}: expected a model of the same parameters and buffers, got another")
        load_state = self._state._loader(lambda rank: (who, saved["state"]), saved_world_size, None)

        @torch.no_grad()
        def take_in():
            load_state()
            for optimizer, state in optimizers:
                if state is not None:
                    optimizer.load_state_dict(state)
            if model is not None:
                self._model.load_state_dict(model)
            for name, weights in zip(self._names, self._common, strict=True):
                weights.copy_(common[name])
            for fragment in self._fragments:
                fragment.origin = None
            for fragment in void:
                fragment.origin = [origins[name].to(own.device, copy=True) for name, own in zip(fragment.names, fragment.own, strict=True)]
            self._steps, self._void_rounds = saved["step"], saved["void_rounds"]
            self._compared, self._pending, self._half_applied = False, None, False
            if begun is not None:
                for part, memory in (("average", begun.given), ("start", begun.start)):
                    torch._foreach_copy_(memory, list(pending[part].values()))
                self._pending = _Round(begun, pending["due"], None, pending["void"])

        return take_in


class _Fragment:
    """A run of the model's parameters, whose differences are averaged at once."""

    def __init__(self, names, own, common, given, start):
        self.names, self.own, self.common = names, own, common
        self.given = given  # memory for the differences, and then their averages
        self.start = start  # and for the weights at the beginning of a round, where it is applied later
        self.void_in_a_row = 0  # rounds
        self.origin = None  # where what was given so far has led, if the last round was void; per worker

    @property
    def before(self):
        return self.common if self.origin is None else self.origin


class _Round:
    """A round that has begun."""

    def __init__(self, fragment, due, work, is_void=None, given_before=None):
        self.fragment, self.due, self.given_before = fragment, due, given_before
        self._work, self._is_void = work, is_void

    def wait(self):
        """Wait for the averages, which lie in `given` then; return whether the round is void."""
        if self._work is not None:
            self._work.wait()
            self._is_void, self._work = self._work.is_void(), None
        return self._is_void

    def state_dict(self):
        is_void, fragment = self.wait(), self.fragment
        average, start = (_clones(fragment.names, tensors) for tensors in (fragment.given, fragment.start))
        return {"due": self.due, "void": is_void, "average": average, "start": start}


def _cut(sizes, parts):
    """Where `parts` runs begin and end, none of them empty, each end as near to its share of the entries as whole parameters allow."""
    sums = list(itertools.accumulate(sizes))
    ends = [0]
    for part in range(1, parts):
        possible = range(ends[-1] + 1, len(sizes) - (parts - part) + 1)
        ends.append(min(possible, key=lambda end: abs(sums[end - 1] - sums[-1] * part / parts)))  # noqa: B023 (used at once)
    return [*ends, len(sizes)]


def _views(tensors, runs):
    """For each run a list of tensors of its shapes, one after the other in a buffer for each dtype, the same one for all runs."""
    places: list[int] = []
    needed: collections.Counter = collections.Counter()
    for run in runs:
        used: collections.Counter = collections.Counter()
        for tensor in tensors[run]:
            places.append(used[tensor.dtype])
            used[tensor.dtype] += tensor.numel()
        needed |= used  # the larger one of each
    buffers = {dtype: torch.empty(needed[dtype], dtype=dtype, device=tensors[0].device) for dtype in {tensor.dtype for tensor in tensors}}
    views = [buffers[tensor.dtype][place : place + tensor.numel()].view(tensor.shape) for tensor, place in zip(tensors, places, strict=True)]
    return [views[run] for run in runs]


def _clones(names, tensors):
    return {name: tensor.detach().clone() for name, tensor in zip(names, tensors, strict=True)}


def _check_weights(who, weights, names, own):
    if not isinstance(weights, dict) or list(weights) != names:
        raise ValueError(f"{who}: expected weights of the model's {len(names)} parameters, got others")
    for name, parameter in zip(names, own, strict=True):
        checkpoint._tensor(who, weights, name, parameter.dtype, parameter.shape)


def _group_sizes(state):
    return [len(group["params"]) for group in state["param_groups"]]


def _kind(optimizer):
    return None if optimizer is None else type(optimizer).__name__


def _shapes(model):
    return {name: value.shape if isinstance(value, torch.Tensor) else None for name, value in model.items()}
