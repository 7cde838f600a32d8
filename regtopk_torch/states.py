"""The state objects that `register_comm_hook` takes: options, residuals and history of one worker."""

import torch
import torch.distributed as dist

from regtopk_torch import _C, checkpoint
from regtopk_torch.options import check_options


class TopKState:
    """Top-k with error feedback: each worker sends the k = density * J largest entries of gradient + residual.

    Constructing a state is a collective: every rank of the group constructs it, with the same arguments. It creates two
    gloo process groups of its own, because gloo matches collectives by the order in which they are issued and DDP issues
    others on its group. Options are fixed from then on.

    Args:
        density (float): fraction of a bucket's entries that is sent, 0 < density <= 1; k = floor(density * J + 0.5), at
            least 1. `DistributedDataParallel(bucket_cap_mb=...)` above the model's size makes it the model's k.
        process_group (ProcessGroup, optional): the model's group; default, as for DDP, the default group.
        grad_scaler (torch.amp.GradScaler, optional): the one whose `scale` the loss goes through, of equal arguments on every
            rank. Its scale is read once per bucket; when it changes, the residuals are multiplied by the ratio, so that
            their unit stays that of the unscaled gradient: exact for powers of two, as GradScaler's defaults are.

    The residual takes 4 bytes per parameter (8 for fp64). The residual and the sum over workers are fp32, or fp64 for
    fp64 gradients; values travel in the gradients' dtype, and what rounding cuts off stays in the residual.

    A parameter whose gradient is zero in all entries on all ranks gets zero, and its residuals wait: whether DDP throws the
    result away (find_unused_parameters, for one that no rank used) or writes it, nothing is lost.

    Raises:
        TypeError, ValueError: an option out of range; a group that this rank is not in.
        RuntimeError: no default process group.
    """

    _method = "topk"

    def __init__(self, density=0.001, *, process_group=None, grad_scaler=None):
        self._open(density=density, mu=1.0, distortion="previous", process_group=process_group, grad_scaler=grad_scaler)

    def _open(self, *, density, mu, distortion, process_group, grad_scaler):
        who = type(self).__name__
        options = check_options(who, method=self._method, density=density, mu=mu, distortion=distortion)
        self._density, self._mu, self._distortion = float(density), float(mu), distortion
        if grad_scaler is not None and not callable(getattr(grad_scaler, "get_scale", None)):
            raise TypeError(f"{who}: expected grad_scaler to be a torch.amp.GradScaler, got {type(grad_scaler).__name__}")
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                f"{who}: expected an initialised default process group, got none; call torch.distributed.init_process_group first"
            )
        group = dist.group.WORLD if process_group is None else process_group
        if group is dist.GroupMember.NON_GROUP_MEMBER or dist.get_rank(group) < 0:
            raise ValueError(
                f"{who}: expected a process group with this rank ({dist.get_rank()}) in it, got one without; "
                "construct the state on the group's ranks only"
            )
        self._ranks = dist.get_process_group_ranks(group)
        timeout = _timeout(group)

        def own_group():
            part = len(self._ranks) < dist.get_world_size()
            return dist.new_group(self._ranks, timeout=timeout, backend="gloo", use_local_synchronization=part)

        self._payload_group = own_group()
        self._exchange = _C.Exchange(
            payload_group=self._payload_group,
            control_group=own_group(),
            options=options,
            timeout_seconds=timeout.total_seconds(),
            scale=None if grad_scaler is None else grad_scaler.get_scale,
        )
        self._history_dropped = 0  # by loading

    @property
    def density(self):
        """Fraction of a bucket's entries that is sent."""
        return self._density

    @property
    def ranks(self):
        """Global ranks of the group."""
        return list(self._ranks)

    def stats(self):
        """Return this rank's sums since construction, as a dict; no collective.

        steps, void_steps (a non-finite gradient on some rank: everything sent returned to the residuals), rebuilds (bucket
        layouts taken apart), history_dropped (entries whose history ended early), dense_buckets, entries (J summed over
        steps), sent_entries, density (their ratio), repeated (entries sent twice running), displaced (entries that plain
        magnitude would have sent and the RegTop-k factor did not), bytes_sent and bytes_dense (what this rank puts on the
        network: (N - 1) payloads, against 2 (N - 1) / N buckets of a ring all-reduce), compress_seconds, exchange_seconds
        (from issuing the all-gather until its payloads are taken up), aggregate_seconds, workers, residual_norm (2-norm
        in fp64, of unscaled gradient; reads every residual).
        """
        statistics = self._exchange.statistics()
        statistics["history_dropped"] += self._history_dropped
        return _with_ratios(statistics, len(self._ranks), self._exchange.residual_norm())

    def state_dict(self, module):
        """Return this rank's residuals, history and step as a dict that `torch.load(weights_only=True)` reads.

        Args:
            module (torch.nn.Module): the model, or the DistributedDataParallel around it. Its parameter names are the keys.

        Call it between steps. No collective; every rank has its own.
        """
        return checkpoint.to_state_dict(
            self._exchange.export_pieces(), _named_keys(module), self._checkpoint_header(), step=self._exchange.step()
        )

    def load_state_dict(self, state_dict, module):
        """Replace residuals, history and step by those of `state_dict`, made on the same rank of a world of the same size.

        A run that saves, loads and goes on equals one that never stopped, bit for bit, where the bucket layout is the same;
        in another layout the residuals are the same and k per bucket follows the layout. Given the list of the state dicts of
        all ranks, in rank order, that world may have had another size: the residuals are redistributed so that the average
        they stand for stays (`checkpoint.shares`), and the history is dropped, which `stats()["history_dropped"]` counts.

        Raises:
            TypeError, ValueError: of another model, shape, rank, world size or version. The state is unchanged then.
        """
        who = f"{type(self).__name__}.load_state_dict"
        if isinstance(state_dict, (list, tuple)):
            self._import(
                *checkpoint.from_state_dicts(
                    lambda rank: (f"{who}: rank {rank}", state_dict[rank]), len(state_dict), _named_keys(module), self._checkpoint_header()
                )
            )
        else:
            self._import(*checkpoint.from_state_dict(who, state_dict, _named_keys(module), self._checkpoint_header()))

    def _import(self, pieces, step, history_dropped=0):
        self._exchange.import_pieces(pieces, step)
        self._history_dropped += history_dropped

    def flush(self, module):
        """Write the unscaled average of all residuals to the parameters' gradients and clear the residuals; a collective.

        Call it on every rank after the last step, then `optimizer.step()`: what was held back is applied. Every parameter
        that requires a gradient gets one, in its own dtype and shape, replacing what `.grad` held; an all-reduce in fp32 (or
        fp64) per parameter.

        Raises:
            torch.distributed.DistBackendError: a rank did not answer within the group's timeout; the residuals stay.
        """
        pieces = self._exchange.export_pieces()
        with torch.no_grad():
            for _, parameter, key in _named_keys(module):
                residual = pieces[key][0] if key in pieces else torch.zeros(parameter.numel(), dtype=checkpoint.accumulate_dtype(parameter.dtype))
                self._sum_over_ranks(residual)
                average = torch.empty_like(parameter)
                average.copy_(checkpoint.in_shape_of(residual.div_(len(self._ranks)), parameter))
                parameter.grad = average
        self.reset()

    def _sum_over_ranks(self, residual):
        try:
            dist.all_reduce(residual, group=self._payload_group)
        except RuntimeError as error:
            raise dist.DistBackendError(
                f"rank {dist.get_rank(self._payload_group)}: flush: expected the residuals of all {len(self._ranks)} ranks within "
                f"{_timeout(self._payload_group).total_seconds():g} s, got: {error}"
            ) from error

    def reset(self):
        """Drop residuals and history: gradient that was held back is lost. The step number stays."""
        self._exchange.import_pieces({}, self._exchange.step())

    def pause(self):
        """Exchange dense gradients from the next bucket on, keeping the residuals; on every rank, or all get an error."""
        self._exchange.set_dense(True)

    def resume(self):
        """Exchange sparse gradients again from the next bucket on; the first such step has no history."""
        self._exchange.set_dense(False)

    def _checkpoint_header(self):
        return {
            "method": self._method,
            "distortion": self._distortion,
            "world_size": len(self._ranks),
            "rank": self._ranks.index(dist.get_rank()),
        }


class RegTopKState(TopKState):
    """RegTop-k (arXiv 2409.14893): Top-k in which an entry sent last step scores |a| tanh(rho / mu).

    rho measures how much of what this worker sent survived the sum over workers: 0 where the workers cancelled each other,
    so that such an entry is not sent again, and 1 where this worker was the only one.

    Args:
        density, process_group, grad_scaler: as for TopKState.
        mu (float): > 0; the limit 0 is Top-k. The authors' scripts use 4 (regression), 5 (ResNet-18) and 1 (toy).
        distortion (str): "previous": rho = |Z| / |v| of the last step, which reproduces the paper's Fig. 2; "current":
            rho = |a + (Z - v)| / |a|, as printed in the paper's Algorithm 1, line 5.

    Adds one number per sent entry to the state.
    """

    _method = "regtopk"

    def __init__(self, density=0.001, mu=5.0, distortion="previous", *, process_group=None, grad_scaler=None):
        self._open(density=density, mu=mu, distortion=distortion, process_group=process_group, grad_scaler=grad_scaler)

    @property
    def mu(self):
        """Scale of rho in tanh(rho / mu)."""
        return self._mu

    @property
    def distortion(self):
        """Which rho: "previous" or "current"."""
        return self._distortion


def _timeout(group):
    """The timeout of a group's own collectives; the groups of a state take it over."""
    try:
        return group._get_backend(torch.device("cpu")).options._timeout
    except (AttributeError, RuntimeError):  # no CPU backend, or one without options
        return dist.constants.default_pg_timeout


def _with_ratios(statistics, workers, residual_norm):
    statistics["density"] = statistics["sent_entries"] / statistics["entries"] if statistics["entries"] else 0.0
    statistics["workers"] = workers
    statistics["residual_norm"] = residual_norm
    return statistics


def _named_keys(module):
    """(name, parameter, key) of every parameter that requires a gradient, without DDP's prefix."""
    if isinstance(module, torch.nn.parallel.DistributedDataParallel):
        module = module.module
    return [(name, parameter, _C.parameter_key(parameter)) for name, parameter in module.named_parameters() if parameter.requires_grad]
