"""The state objects that `register_comm_hook` takes: options, residuals and history of one worker."""

import copy
import json
import numbers
import warnings
import weakref
from typing import Unpack

import torch
import torch.distributed as dist
from torch.optim.optimizer import register_optimizer_step_post_hook

from regtopk_torch import _C, checkpoint, groups
from regtopk_torch.average import Averaging
from regtopk_torch.options import COMMON, Common, check_options, lists_common

# States that share a GradScaler share its clock: what one of them finds to be void is void for all.
_clocks: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
_states: weakref.WeakSet = weakref.WeakSet()


class TopKState(Averaging):
    """Top-k with error feedback: each worker sends the k = density * J largest entries of gradient + residual.

    Every rank of the group constructs a state with the same arguments. Constructing one opens nothing and waits for nobody;
    the first bucket, or the first collective such as `rt.save`, opens process groups of the state's own (gloo, because gloo
    matches collectives by the order in which they are issued and DDP issues others on its group), and `close()` or the end of
    the state gives them back. Ranks use their states for the first time in the same order. Options are fixed.

    Example::

        ddp = DistributedDataParallel(model, bucket_cap_mb=1024)
        state = rt.TopKState(0.01, wire_dtype=torch.bfloat16)
        ddp.register_comm_hook(state, rt.sparse_hook)
        ...  # the training loop stays as it is
        print(state.stats())  # bytes_sent, bytes_dense, density, seconds of each stage and more

    Args:
        density (float, callable or AdaptiveDensity): fraction of a bucket's entries that is sent, 0 < density <= 1; k =
            floor(density * J + 0.5), at least 1. A callable takes the number of a step, counted from 0, and returns its density, the
            same on every rank, as `WarmupDensity` does; an `AdaptiveDensity` follows the gradient. `DistributedDataParallel(bucket_cap_mb=...)` above the model's size makes it the model's k.
        process_group (ProcessGroup, optional): the model's group; default, as for DDP, the default group. For averages it may be a
            `torch.distributed.ProcessGroup(store, rank, size)` that torch.distributed does not know; its timeout is the store's.
        grad_scaler (torch.amp.GradScaler, optional): the one whose `scale` the loss goes through, of equal arguments on every
            rank. Its scale is read once per bucket; when it changes, the residuals are multiplied by the ratio, so that
            their unit stays that of the unscaled gradient: exact for powers of two, as GradScaler's defaults are. States of
            several models that it scales share its verdict.
        decay (float): 0 < decay <= 1; what is held back is multiplied by it at the beginning of each step, a = decay * r + g,
            but for idle parameters. Below 1 it forgets: what was sent and kept is then less than what was given.
        dense_steps (int): the first steps go without compression, through a dense all-reduce.
        wire_dtype (torch.dtype, "sign" or "2bit", optional): values travel as torch.float32, torch.bfloat16 or torch.float16 where that
            has fewer bytes than the gradients' dtype, rounded to the nearest, finite ones to finite ones. In fewer bits,
            each 65,536 consecutive gradient entries share two levels. "sign": a bit for each entry, and the mean magnitudes of the
            positive ones sent and of the negative. "2bit": the sign and a bit for each, and the mean magnitudes of those sent that
            are at least as large as their mean, and of the others. A level is at most 7/4 of the smallest value that it stands
            for, and where an entry of 0 is among them one of the levels is 0. So the sign is for values of about the same size: of heavy
            tails, and at densities above a half, it sends less of what there is than "2bit", and near 1 next to nothing; beside zeros, in chunks or
            buckets with fewer than k entries to send, its two sides take turns. What is not sent stays in the residual, and sent + kept is what was given, exactly.
        index_code (str): how the places of the values travel. "elias-fano": about 2 + log2(J / k) bits each where that is less: 12 at
            density 0.001, 8.6 at 0.01. "offsets": 2 bytes each, at most a bit per gradient entry, without the work of the code.
        support (str): who chooses the entries. "own": each rank its own, and sends them to every other: what it sends grows with the
            number of ranks. "leader": in step t rank t mod N chooses by its own score for all, and every rank sends its values there, so
            that each average is over all ranks; a rank sends at most the places and twice the k values, whatever N is, in three
            collectives one after the other instead of one. Values of 16 bits or more. RegTop-k's Z is N times the average in the
            gradients' dtype. Where some rank's gradient is not finite, all entries sent are NaN.
        chunk (int, optional): a power of two from 64 to 65,536: each so many consecutive entries of a bucket send their own
            floor(density * chunk + 0.5) largest, at least 1, and the last, fewer ones likewise, instead of the k largest of the bucket.
            As published settings count: 64 of every 4,096. Of CUDA gradients at most 4,096.
        momentum (float): 0 <= momentum < 1, momentum correction as in Deep Gradient Compression (arXiv 1712.01887): instead of its gradient g a
            rank gives its velocity, u = momentum * u + g, rounded to g's dtype, and the optimizer has none (Adam's beta1 is one). At density 1 that is SGD with momentum
            (weight decay, which the optimizer adds, is not in u). u is one further number per parameter, of the residual's dtype: it goes where
            the residual goes, into state dicts too, and waits while this rank's gradient of its parameter is zero in all entries. Where
            what is given would be too large for g's dtype it counts as not finite.
        nesterov (bool): g + momentum * u is given.
        mask_momentum (bool): factor masking: where an entry was sent and applied, u begins at 0 again. At density 1 that is SGD without
            momentum, at 1 + momentum times its learning rate with nesterov. Deep Gradient Compression masks.
        clip_norm (float, optional): a rank scales a bucket's g, before anything else, down to the 2-norm clip_norm / sqrt(N) where it is
            larger: of unscaled gradient, and of its finite entries. The paper clips the model's gradient as one, as
            `bucket_cap_mb` above the model's size does here.

        dense (str or callable): where all entries travel instead of chosen ones, in the gradients' dtype, whatever `wire_dtype` is, and what was
            held back with them. "never"; a warning says once where that would send less. "auto": of each bucket that would send no less
            with chosen ones, at the step's density, or at the mean of an `AdaptiveDensity`. A callable takes the name of a parameter,
            as in the module or of the average, and its number of entries, once each, and returns whether it is dense, the same on every
            rank: `lambda name, numel: "embedding" in name`. The others of its bucket choose among themselves, k = density * their entries.
            A dense bucket is a reduce-scatter and an all-gather, in rank order, with the bytes of a ring all-reduce and some heads; it returns with a
            void step as any other. Where some rank's gradient in it is not finite, all of it is NaN. Nothing of it is masked by
            `mask_momentum`, and `clip_norm` counts it apart from the others of a bucket.

        levels (str or int, optional): the number L of ranks to a host, which are numbered one after the other; "host" takes it from torchrun's
            LOCAL_WORLD_SIZE, and LOCAL_RANK must agree. The ranks of a host send their mean as one, each a part of every parameter: a
            reduce-scatter in rank order inside the host, the exchange among the ranks of one place on their hosts, and an all-gather inside the host. So a rank sends
            other hosts 1 / L of what a host of one rank would, and holds back a part of each parameter, 1 / L of the memory. The average is over all
            ranks. Gradients, or averages of tensors that every rank gives, and own supports; where the mean of a host is not finite,
            nothing of its ranks is held back there. Of CUDA gradients over NCCL these exchanges are on process groups of that kind, which
            torch.distributed makes at the first bucket and `close()` gives back: it has to know the model's group. All N ranks save and load together, in a world of the same size.

    The residual takes 4 bytes per parameter (8 for fp64), and as much again with momentum. The residual and the sum over workers are fp32, or fp64 for
    fp64 gradients; values travel in the gradients' dtype unless `wire_dtype` narrows it.

    A step is void if any entry of any bucket's average is not finite: what was sent returns with the next step, but for the
    parameters that a torch optimizer has stepped on all the same. `skipped()` says the same of a finite step.

    A parameter whose gradient is zero in all entries on all ranks, and still is, is idle: its residual waits, bit for bit,
    and takes no other entry's place, until its gradient comes back.

    A copy or a pickle takes options and residuals along, the latter with their parameters, but no process group.

    Raises:
        TypeError, ValueError: an option out of range; at the first use, a group that this rank is not in, or that is not the
            model's.
        RuntimeError: no default process group at the first use.
    """

    _method = "topk"

    @lists_common
    def __init__(self, density=0.001, *, process_group=None, grad_scaler=None, **options: Unpack[Common]):
        given = {"density": density, **options}
        for name in ("mu", "distortion"):
            if name in given:
                raise TypeError(f"TopKState: expected no {name}, got {name}={given[name]!r}; RegTopKState takes it")
        self._construct(given, process_group, grad_scaler)

    def _construct(self, given, process_group, grad_scaler):
        who = type(self).__name__
        # The exchange must not keep its state alive: it would never be given back.
        this = weakref.ref(self)
        options = check_options(who, lambda keys: [] if (state := this()) is None else state._names_of(keys), self._method, **given)
        self._host_ranks = options.host_ranks
        self._given = {name: float(value) if name in ("mu", "decay", "density", "momentum", "clip_norm") and isinstance(value, numbers.Real) else value for name, value in given.items()}
        if grad_scaler is not None and not callable(getattr(grad_scaler, "get_scale", None)):
            raise TypeError(f"{who}: expected grad_scaler to be a torch.amp.GradScaler, got {type(grad_scaler).__name__}")
        if process_group is not None and not isinstance(process_group, (dist.ProcessGroup, type(dist.GroupMember.NON_GROUP_MEMBER))):
            raise TypeError(f"{who}: expected process_group to be a ProcessGroup, got {type(process_group).__name__}; of a mesh, mesh.get_group()")
        self._process_group, self._grad_scaler = process_group, grad_scaler
        self._history_dropped = 0  # by loading
        self._stepped: tuple[int, weakref.WeakSet] = (-1, weakref.WeakSet())  # a step, and the optimizers that have stepped since it began
        self._seen_stepping: weakref.WeakSet = weakref.WeakSet()  # optimizers that have been looked at
        clock = _C.Clock() if grad_scaler is None else _clocks.setdefault(grad_scaler, _C.Clock())
        self._exchange = _C.GroupExchange(
            options,
            clock,
            open_groups=lambda caller: groups.open_groups(this(), caller),
            scale=None if grad_scaler is None else _reader_of(grad_scaler),
            applied=lambda: [] if (state := this()) is None else state._applied(),
        )
        self._begin_averaging()
        _states.add(self)

    def __repr__(self):
        options = ", ".join(f"{name}={value!r}" for name, value in self._given.items() if name not in COMMON or COMMON[name] != value)
        return f"{type(self).__name__}({options})"

    @property
    def density(self):
        """Fraction of a bucket's entries that is sent, or what says it for each step."""
        return self._given["density"]

    @property
    def ranks(self):
        """Global ranks of the group."""
        return groups.ranks_of(groups.group_of(self))

    def stats(self):
        """Return this rank's sums since construction, as a dict; no collective, no wait, no pass over a tensor.

        Of CUDA gradients void_steps, history_dropped, repeated and displaced are those that have reached the host, a step or two
        late; seconds are those of the host, and exchange_seconds is 0 where nobody waits for the exchange (NCCL).

        steps, void_steps (the average of some bucket was not finite), rebuilds (bucket layouts taken apart; DDP does it once, after its first step), history_dropped
        (entries whose history ended early), residual_dropped (entries of residuals whose parameter is gone), dense_buckets
        (all entries sent: paused, sparse tensors, `dense_steps`, `dense`), dense (the buckets that `dense` makes so at present: a list of
        {parameters, entries, why}, the parameters by name), entries (J summed over steps, of a sparse tensor those that it has), sent_entries, density (their ratio), repeated (entries sent twice running), displaced
        (entries that plain magnitude would have sent and the RegTop-k factor did not; with a leader both of what this rank chose),
        bytes_sent and bytes_dense (what this rank puts on the network: (N - 1) payloads, or with a leader (N - 1) / N of the places, an
        even share of the broadcasts, and heads and values, against 2 (N - 1) / N buckets of a ring all-reduce; floats, for the shares), compress_seconds,
        exchange_seconds (from issuing the all-gather until its payloads are taken up), aggregate_seconds, workers. With `levels` entries, bytes_sent and bytes_dense are
        those between hosts, and bytes_local is what this rank sends inside its host, else 0.
        """
        statistics = self._exchange.statistics()
        statistics["history_dropped"] += self._history_dropped
        if statistics["dense"]:
            names = self._known_names()
            for bucket in statistics["dense"]:
                bucket["parameters"] = [names.get(key, "of an unknown name") for key in bucket["parameters"]]
        return _with_ratios(statistics, self._exchange.workers() if self._exchange.is_open else None)

    def check(self):
        """Wait for the device and raise what it has found: ValueError where a payload was damaged on its way, naming rank and field.

        Call it between steps. Of CUDA gradients a step's result is NaN then, and without this call the error comes with a later
        step or `stats()`, once it has reached the host. Of CPU gradients the step itself raises.
        """
        self._exchange.check()

    def residual_norm(self):
        """Return the 2-norm of this rank's residuals, in fp64 and of unscaled gradient; reads all of them. Between steps."""
        return self._exchange.residual_norm()

    def state_dict(self, module):
        """Return this rank's residuals, velocities, history and step as a dict that `torch.load(weights_only=True)` reads.

        Args:
            module (torch.nn.Module or None): the model, or the DistributedDataParallel around it. Its parameter names are the keys.
                None for a state that averages tensors: their names, or places, are the keys.

        Call it between steps. No collective; every rank has its own.

        Raises:
            ValueError: something is held back for parameters that the module does not have.
        """
        who = f"{type(self).__name__}.state_dict"
        named_keys = self._named_keys(module)
        pieces = self._whole_pieces(named_keys)
        left = _not_among(pieces, {key for _, _, key in named_keys})
        if left:
            raise ValueError(f"{who}: expected the module whose gradients were exchanged, got one without parameters of shapes {left}")
        progress = checkpoint.Progress(self._exchange.last_step(), self._exchange.density_state())
        return self._with_dtypes(checkpoint.to_state_dict(pieces, named_keys, self._checkpoint_header(), progress))

    def load_state_dict(self, state_dict, module):
        """Replace residuals, velocities, history and step by those of `state_dict`, made on the same rank of a world of the same size.

        A run that saves, loads and goes on equals one that never stopped, bit for bit, where the bucket layout is the same;
        in another layout the residuals are the same and k per bucket follows the layout. Given the list of the state dicts of
        all ranks, in rank order, that world may have had another size: residuals and velocities are redistributed so that the
        average they stand for stays (`checkpoint.shares`), and the history is dropped, which `stats()["history_dropped"]` counts.

        `module` is None for a state that averages tensors: the names and shapes are then those of the dict. Load on every rank: a rank that loads alone is an error at the next bucket, on all ranks, that names it.

        Raises:
            TypeError, ValueError: of another model, shape, rank, world size or version. The state is unchanged then.
        """
        who = f"{type(self).__name__}.load_state_dict"
        if isinstance(state_dict, (list, tuple)):
            self._loader(lambda rank: (f"{who}: rank {rank}", state_dict[rank]), len(state_dict), module)()
        else:
            self._loader(lambda rank: (who, state_dict), self._checkpoint_header()["world_size"], module)()

    def _saved(self, module):
        """What `rt.save` writes of this rank."""
        return self.state_dict(module)

    def _loader(self, read, saved_world_size, module):
        """Check what was saved, `read` as for `checkpoint.from_state_dicts`; return the function that takes it in."""
        named_keys = self._named_keys_to_load(module)
        pieces, *rest = checkpoint.from_state_dicts(read, saved_world_size, named_keys, self._checkpoint_header())
        if self._host_ranks > 1:
            pieces = {key: checkpoint.part_of(f"{type(self).__name__}.load_state_dict", piece, *self._place()) for key, piece in pieces.items()}
        return lambda: self._import(named_keys, pieces, *rest)

    def _place(self):
        """This rank's place on its host, and the number of ranks there."""
        return groups.group_of(self).rank() % self._host_ranks, self._host_ranks

    def _names_of(self, keys):
        """The names of parameters of the model, or of the tensors that are being averaged, by their keys."""
        names = self._known_names()
        unknown = [key for key in keys if key not in names]
        if unknown:
            raise ValueError(f"{type(self).__name__}: expected parameters of a DistributedDataParallel for dense={self._given['dense']!r} to name, got {len(unknown)} of none; after gc.freeze() register the model with rt.attach")
        return [names[key] for key in keys]

    def _known_names(self):
        """{key: name} of the parameters of all models, and of the tensors that were averaged."""
        # A hook of the user's own may be registered with more than the state; where it is not, the names of the state's models win.
        of_models = {key: name for ddp in [*groups.models(), *groups._models_of(self)] for name, _, key in _named_keys(ddp)}
        return of_models | self._names

    def _named_keys(self, module):
        return self._named_tensors(module) if module is None or self._forms else _named_keys(module)

    def _named_keys_to_load(self, module):
        return self._named_tensors_to_load(module) if module is None or self._forms else _named_keys(module)

    def _pieces(self):
        return {key: checkpoint.Piece(*piece) for key, piece in self._exchange.export_pieces().items()}

    def _whole_pieces(self, named_keys):
        """The pieces, with levels of all entries of what `named_keys` names."""
        pieces = self._pieces()
        if self._host_ranks == 1:
            return pieces
        numels = {key: tensor.numel() for _, tensor, key in named_keys}
        return {key: checkpoint.whole_of(piece, numels[key], *self._place()) if key in numels else piece for key, piece in pieces.items()}

    def _import(self, named_keys, pieces, progress, history_dropped):
        self._exchange.import_pieces(self._adopt(named_keys, pieces), *progress)
        self._exchange.did(_C.Deed.LOAD)
        self._history_dropped += history_dropped

    def flush(self, module):
        """Write the unscaled average of the residuals to the parameters' gradients and clear what was written; a collective.

        The velocities of these parameters begin at 0 again.

        Call it on every rank between steps, then `optimizer.step()` (not `scaler.step(optimizer)`: the gradient is unscaled) at
        a learning rate that is not 0: what was held back is applied. It is many steps' worth of gradient at once: at the end of
        training it made no difference to a small network at a learning rate that had fallen to a hundredth, and cost accuracy at
        the first one (docs/findings.md).

        A parameter gets a gradient, in its own dtype and shape and in place of what `.grad` held, where some rank holds a
        residual for it; the others' `.grad` is left alone. Residuals of parameters that require no gradient, or that the module
        does not have, stay, and a UserWarning says so. One all-reduce in fp32 (or fp64) per parameter.

        Raises:
            torch.distributed.DistBackendError: a rank did not answer within the group's timeout; the residuals stay.
        """
        if self._forms:
            raise ValueError("flush: expected a state of a model's gradients, got one that averages tensors; average zeros at density 1 instead")
        pieces = self._whole_pieces(_named_keys(module))
        named = {
            name: (parameter, key)
            for name, parameter, key in _named_keys(module)
            if key in pieces and parameter.requires_grad
        }
        held = {name: [parameter.numel(), str(checkpoint.accumulate_dtype(parameter.dtype))] for name, (parameter, _) in named.items()}
        everywhere: dict[str, list] = {}  # what any rank holds, in an order that is the same on all
        for text in self._exchange.gather_texts(json.dumps(held).encode(), "flush", "the flush"):
            for name, form in json.loads(text).items():
                everywhere.setdefault(name, form)
        flushable = {name: entry for name, entry in ((n, _find(module, n)) for n in everywhere) if entry is not None}
        averages = {}
        for name, (numel, dtype) in everywhere.items():
            residual = torch.zeros(numel, dtype=torch.float64 if dtype == "torch.float64" else torch.float32, device="cpu")
            if name in named and pieces[named[name][1]].residual.numel() == numel:
                residual.copy_(pieces[named[name][1]].residual)
            self._exchange.add_up(residual, "flush", "the flush")
            averages[name] = residual.div_(self._exchange.workers() // self._host_ranks)
        flushed = []
        with torch.no_grad(), torch.inference_mode(False):
            for name, average in averages.items():
                parameter = flushable.get(name)
                if parameter is None or parameter.numel() != average.numel() or not parameter.requires_grad:
                    continue
                gradient = torch.empty_like(parameter)
                gradient.copy_(checkpoint.in_shape_of(average, parameter))
                parameter.grad = gradient
                flushed.append(_C.parameter_key(parameter))
        self._exchange.clear(flushed)
        left = _not_among(pieces, set(flushed))
        if left:
            warnings.warn(
                f"flush: kept the residuals of parameters that require no gradient or that the module does not have, of shapes {left}",
                stacklevel=2,
            )

    def skipped(self):
        """Say that the last step was not applied, on every rank: what was sent in it returns at the next step.

        For scripts that decide so themselves. A step whose average is not finite needs no such call, with a GradScaler or
        without: the state sees which optimizers step.
        """
        self._exchange.skipped()

    def reset(self):
        """Drop residuals, velocities and history, on every rank: gradient that was held back is lost. The step number stays."""
        self._exchange.import_pieces({}, self._exchange.last_step())
        self._begin_averaging()
        self._exchange.did(_C.Deed.RESET)

    def pause(self):
        """Exchange dense gradients from the next bucket on, keeping the residuals; on every rank, or all get an error."""
        self._exchange.set_dense(True)

    def resume(self):
        """Exchange sparse gradients again from the next bucket on; the first such step has no history."""
        self._exchange.set_dense(False)

    def close(self):
        """Give the state's process groups and its thread back. What it holds can still be saved on this rank; a bucket, or a
        collective, is an error from then on."""
        self._exchange.close()

    def regroup(self, process_group, step=0):
        """Go on in another process group, of any size and members; for a state that averages tensors. What this rank holds back stays, and
        its history ends.

        Every rank of that group calls this, or constructs a state for it, and averages next; until then nothing is opened and nobody
        waited for. The groups of before are given back, whoever is left in them. `stats()` begins anew.

        Args:
            process_group (ProcessGroup): as for the constructor.
            step (int): the number of the next step, the same on every rank.

        Raises:
            ValueError: the state serves a model's gradients, or has levels.
        """
        self._exchange.use("average")
        if self._host_ranks > 1:
            raise ValueError(f"regroup: expected a state without levels, got levels={self._given['levels']!r}, which holds back the part of this rank's place on its host; construct another state")
        pieces = {key: checkpoint.Piece(None, piece.residual, velocity=piece.velocity) for key, piece in self._pieces().items()}
        forms = self._forms
        self._exchange.close()
        self._construct(self._given, process_group, self._grad_scaler)
        self._exchange.import_pieces(pieces, step - 1)
        self._take_forms(forms)

    def __getstate__(self):
        pieces = [(key, *piece) for key, piece in self._pieces().items() if piece.parameter is not None or self._forms]
        if pieces and self._host_ranks > 1:
            raise TypeError(f"{type(self).__name__}: expected a state without levels to copy, got one that holds back its rank's part; save its state_dict and load that")
        kept = {"step": self._exchange.last_step(), "density_state": self._exchange.density_state(), "pieces": pieces, "forms": self._forms}
        return {"options": self._given, "grad_scaler": self._grad_scaler, **kept}

    def __deepcopy__(self, memo):
        memo[id(self._grad_scaler)] = self._grad_scaler  # the loss of the copied model goes through the same one
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied

    def __setstate__(self, copied):
        self._construct(copied["options"], None, copied["grad_scaler"])
        pieces = {key if piece[0] is None else _C.parameter_key(piece[0]): checkpoint.Piece(*piece) for key, *piece in copied["pieces"]}
        self._exchange.import_pieces(pieces, copied["step"], copied.get("density_state", []))
        self._take_forms(copied.get("forms", {}))

    def _note(self, optimizer):
        """An optimizer has stepped: remember it until the next step begins."""
        step, optimizers = self._stepped
        if step != self._exchange.last_step():
            optimizers = weakref.WeakSet()
            self._stepped = (self._exchange.last_step(), optimizers)
        optimizers.add(optimizer)
        if self._given.get("momentum", 0.0) > 0 and self._exchange.last_step() >= 0 and not self._forms and optimizer not in self._seen_stepping:
            self._seen_stepping.add(optimizer)
            self._warn_of_second_momentum(optimizer)

    def _warn_of_second_momentum(self, optimizer):
        """Where the optimizer of the gradients that this state averages has a momentum too, or Adam's beta1."""
        own = {key for ddp in groups._models_of(self) for _, _, key in _named_keys(ddp)}
        for group in optimizer.param_groups:
            name, value = ("momentum", group["momentum"]) if group.get("momentum") else ("beta1", group.get("betas", (0.0,))[0])
            if value and any(_C.parameter_key(parameter) in own for parameter in group["params"]):
                warnings.warn(
                    f"{type(self).__name__}: expected an optimizer without momentum beside momentum={self._given['momentum']}, got one with "
                    f"{name}={value}; together they are a momentum of a momentum", stacklevel=2,
                )  # fmt: skip
                return

    def _applied(self):
        """The keys of the parameters that optimizers have stepped on since the last step began."""
        step, optimizers = self._stepped
        if step != self._exchange.last_step():
            return []
        return [
            _C.parameter_key(parameter)
            for optimizer in list(optimizers)
            for group in optimizer.param_groups
            for parameter in group["params"]
        ]

    def _checkpoint_header(self):
        group = groups.group_of(self)
        return {
            "method": self._method,
            "distortion": self._given.get("distortion", "previous"),
            "world_size": group.size(),
            "rank": group.rank(),
            **({"levels": self._host_ranks} if self._host_ranks > 1 else {}),
        }


class RegTopKState(TopKState):
    """RegTop-k (arXiv 2409.14893): Top-k in which an entry sent last step scores |a| tanh(rho / mu).

    rho measures how much of what this worker sent survived the sum over workers: 0 where the workers cancelled each other,
    so that such an entry is not sent again, and 1 where this worker was the only one.

    Args:
        density, process_group, grad_scaler, decay, dense_steps, wire_dtype, index_code, support, chunk, momentum, nesterov, mask_momentum, clip_norm,
            dense, levels: as for TopKState.
        mu (float): > 0; the limit 0 is Top-k. The authors' scripts use 4 (regression), 5 (ResNet-18) and 1 (toy).
        distortion (str): "previous": rho = |Z| / |v| of the last step, which reproduces the paper's Fig. 2; "current":
            rho = |a + (Z - v)| / |a|, as printed in the paper's Algorithm 1, line 5.

    Adds one number per sent entry to the state.
    """

    _method = "regtopk"

    @lists_common
    def __init__(self, density=0.001, mu=5.0, distortion="previous", *, process_group=None, grad_scaler=None, **options: Unpack[Common]):
        self._construct({"density": density, "mu": mu, "distortion": distortion, **options}, process_group, grad_scaler)

    @property
    def mu(self):
        """Scale of rho in tanh(rho / mu)."""
        return self._given["mu"]

    @property
    def distortion(self):
        """Which rho: "previous" or "current"."""
        return self._given["distortion"]


def _after_step(optimizer, args, kwargs):
    """Every optimizer's step, torch's own hook: what counts is what was applied, not what should have been."""
    if not _states:
        return
    found_inf = getattr(optimizer, "found_inf", None)  # set around the step of an optimizer that skips by itself
    if found_inf is not None and bool(found_inf):
        return
    for state in list(_states):
        state._note(optimizer)


register_optimizer_step_post_hook(_after_step)


def _reader_of(grad_scaler):
    """A function that returns its scale, and waits for a device that has it only where it may have changed."""
    known: dict[str, object] = {}

    def read():
        scale = getattr(grad_scaler, "_scale", None)
        if scale is None or scale.device.type == "cpu":
            return grad_scaler.get_scale()
        version = (id(scale), scale._version)
        if known.get("version") != version:
            known.update(version=version, scale=grad_scaler.get_scale())
        return known["scale"]

    return read


def _with_ratios(statistics, workers):
    statistics["density"] = statistics["sent_entries"] / statistics["entries"] if statistics["entries"] else 0.0
    statistics["workers"] = workers
    return statistics


def _bare(module):
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(module).__name__}")
    return module.module if isinstance(module, torch.nn.parallel.DistributedDataParallel) else module


def _named_keys(module):
    """(name, parameter, key) of every parameter, without DDP's and torch.compile's prefixes."""
    return [(checkpoint.plain_name(name), parameter, _C.parameter_key(parameter)) for name, parameter in _bare(module).named_parameters()]


def _find(module, wanted):
    return next((parameter for name, parameter, _ in _named_keys(module) if name == wanted), None)


def _not_among(pieces, keys):
    """The shapes of the parameters of those pieces whose key is not among `keys`."""
    return [list(piece.parameter.shape) for key, piece in pieces.items() if key not in keys and piece.parameter is not None]
