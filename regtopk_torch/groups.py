"""The process groups of a state: opened at its first use, on the store of the model's group."""

import gc
import os
import weakref

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from regtopk_torch import _C


_is_ending = False  # the process is
attached: weakref.WeakSet = weakref.WeakSet()  # models on which `attach` has registered a state


def group_of(state):
    """The process group of a state's model.

    Raises:
        RuntimeError: no default process group. ValueError: a group that this rank is not in.
    """
    who = type(state).__name__
    if state._process_group is None and not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            f"{who}: expected an initialised default process group, got none; call torch.distributed.init_process_group first"
        )
    group = dist.group.WORLD if state._process_group is None else state._process_group
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            f"{who}: expected a process group with this rank ({dist.get_rank()}) in it, got one without; "
            "use the state on the group's ranks only"
        )
    return group


def ranks_of(group):
    """Global ranks of a group; of one that torch.distributed does not know, its own."""
    try:
        return dist.get_process_group_ranks(group)
    except KeyError:
        return list(range(group.size()))


def check_model(who, ddp, group):
    """Raise ValueError unless the model's process group has the ranks of `group`."""
    expected, got = ranks_of(ddp.process_group), ranks_of(group)
    if expected != got:
        raise ValueError(f"{who}: expected a state for the model's ranks {expected}, got one for {got}")


def open_groups(state, caller="sparse_hook"):
    """Return (group for payloads, group for control, store, timeout in seconds, stream, open_stage); waits for the other ranks.

    `caller` is who messages are from. `stream` is, where the model's group has a backend of another kind than gloo for its GPU, (backend, device type, open_among, close), else None:
    open_among(among) opens another backend of that kind, as all ranks do together, and close() gives those back.

    open_stage(number, among) opens the group of another stage of the exchange, as all ranks do together: of all ranks, of those of a host,
    or of those of one place on their hosts (0, 1, 2).

    The groups, but those of open_among, are no business of torch.distributed's: they are not in its lists, and do not depend on how many groups which
    rank has made. Ranks open their states in the same order, so the n-th of one rank belongs to the n-th of the others.

    Raises:
        torch.distributed.DistBackendError: a rank did not use its state within the group's timeout.
    """
    group = group_of(state)
    registered = _models_of(state)
    for ddp in registered:
        check_model(caller, ddp, group)
    rank, size, limit = group.rank(), group.size(), timeout_of(group)
    shared = _own_client(group.get_group_store())
    number = shared.add(f"regtopk/opened/{rank}", 1)
    store = dist.PrefixStore(f"regtopk/{number}", shared)
    store.set(f"here/{rank}", "yes")
    try:
        store.wait([f"here/{other}" for other in range(size)], limit)
    except RuntimeError as error:
        missing = [other for other in range(size) if not store.check([f"here/{other}"])]
        # As if it had not been tried: the next try of this rank meets the others' first.
        store.delete_key(f"here/{rank}")
        shared.add(f"regtopk/opened/{rank}", -1)
        raise dist.DistBackendError(
            f"rank {rank}: {caller}: expected all {size} ranks to use their state within {limit.total_seconds():g} s, got none of "
            f"rank {', '.join(map(str, missing))}; {'construct and register it' if caller == 'sparse_hook' else 'call it'} on every rank of the group"
        ) from error

    def open_group(name, threads, rank_among=rank, among=size):
        try:
            connected = dist.ProcessGroupGloo(dist.PrefixStore(name, store), rank_among, among, _options(limit, threads=threads))
            # A rank is through before those it connects to, and may end at once, by an error that all ranks have: theirs would be of a lost connection.
            connected.barrier().wait()
            return connected
        except RuntimeError as error:
            raise dist.DistBackendError(
                f"rank {rank}: {caller}: expected to connect to the other {among - 1} ranks within {limit.total_seconds():g} s, got: {error}; "
                "the address is that of this host's name, or of the network interface that GLOO_SOCKET_IFNAME names"
            ) from error

    payloads, control = open_group("payloads", 4), open_group("control", 1)
    model = registered[0].process_group if registered else group
    stream = _stream_of(model)
    levels = state._host_ranks
    host, place = divmod(rank, levels)
    members = ("", rank, size), (f" of host {host}", place, levels), (f" of place {place}", host, size // levels)

    def open_stage(stage, among):
        name, rank_among, count = members[among]
        return open_group(f"stage {stage}{name}", 2, rank_among, count)

    opened = []

    def open_among(among):
        ranks = known_ranks_of(model, f"rank {rank}: {caller}")
        mine = (ranks, ranks[host * levels : (host + 1) * levels], ranks[place::levels])[among]
        try:
            opened.append(_new_group(model, mine, stream[1], limit, f"regtopk/{model.group_name}/{number}"))
        except RuntimeError as error:
            raise dist.DistBackendError(
                f"rank {rank}: {caller}: expected to open a group of the ranks {mine} within {limit.total_seconds():g} s, got: {error}"
            ) from error
        return opened[-1][1]

    def close():
        while opened and not _is_ending:
            _give_back(opened.pop()[0])

    return payloads, control, store, limit.total_seconds(), stream and (*stream, open_among, close), open_stage


def known_ranks_of(group, who):
    """Global ranks of a group, for groups of some of them. ValueError where torch.distributed can make none."""
    try:
        ranks = dist.get_process_group_ranks(group)
    except KeyError:
        raise ValueError(
            f"{who}: expected a process group of torch.distributed's with levels= on a GPU, got one that it does not know; make it with "
            "torch.distributed.new_group, or take levels=None"
        ) from None
    if ranks != sorted(ranks):  # a new group has its ranks in ascending order
        raise ValueError(f"{who}: expected a process group of ascending ranks with levels= on a GPU, got {ranks}; make it without sort_ranks=False")
    if len(ranks) < dist.get_world_size() and getattr(dist.group.WORLD, "bound_device_id", None) is not None:  # all ranks would have to split theirs
        raise ValueError(f"{who}: expected a process group of all ranks with levels= on a GPU and a device_id in init_process_group, got one of {ranks}; leave device_id out")
    return ranks


def _new_group(model, ranks, device, limit, name):
    """(group, its backend for that type of device) of these global ranks, of the model's kind. Each rank opens that of its host before that
    of its place, so that none waits for one that waits for it; ranks that are in neither take no part.

    Not by torch.distributed.new_group: it names groups by how many this rank has made, and members of one may have made different numbers.
    """
    c10d, kinds = dist.distributed_c10d, dict(kind.split(":") for kind in dist.get_backend_config(model).split(","))
    world = c10d._get_default_group()
    store = c10d._world.pg_map[world][1]
    own = f"{name} of ranks {','.join(map(str, ranks))}"
    group, _ = c10d._new_process_group_helper(
        len(ranks), ranks.index(dist.get_rank()), ranks, kinds[device], store, own, timeout=limit, device_id=getattr(world, "bound_device_id", None),
        group_desc="regtopk_levels",
    )
    c10d._world.pg_group_ranks[group] = {global_rank: rank for rank, global_rank in enumerate(ranks)}
    return group, group._get_backend(torch.device(device))


def _give_back(group):
    """As this rank does alone. Of NCCL's, which alone has it, by an abort: to destroy one waits for the other ranks on the host."""
    try:
        is_nccl = dist.get_backend(group).startswith("nccl")
        (dist.distributed_c10d._abort_process_group if is_nccl else dist.destroy_process_group)(group)
    except (AssertionError, RuntimeError, ValueError):  # with all the others, before the state was closed
        pass


def close_all():
    """Close every exchange before the interpreter ends: a pending future with a Python callback would hang it. Groups end with the process."""
    global _is_ending
    _is_ending = True
    _C.close_all()


def _stream_of(group):
    """(backend, device type) of the group's collectives that are work of a stream, as NCCL's, or None."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return None
    try:
        backend = group._get_backend(torch.device(accelerator.type))
    except RuntimeError:  # a group without a backend for such tensors
        return None
    return None if backend.name() == "gloo" else (backend, accelerator.type)


def _own_client(store):
    """A connection of one's own to the store, where it can have several: who asks must not wait behind who waits."""
    try:
        return store.clone()
    except (AttributeError, NotImplementedError, RuntimeError):
        return store


def _options(limit, *, threads):
    """gloo does as many collectives at once as it has threads; those of small buckets wait for the network, not for the processor."""
    names = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
    options = dist.ProcessGroupGloo._Options()
    options._timeout, options._threads = limit, threads
    options._devices = [dist.ProcessGroupGloo.create_device(interface=name) for name in names] or [
        dist.ProcessGroupGloo.create_default_device()
    ]
    return options


def timeout_of(group):
    """The timeout of a group's own collectives, or else of its store; the groups of a state take it over."""
    for device in ("cpu", "cuda"):
        try:
            return group._get_backend(torch.device(device)).options._timeout
        except (AttributeError, RuntimeError):  # no backend for that device, or one without options
            continue
    return group.get_group_store().timeout


def _models_of(state):
    """The DistributedDataParallel models on which the state is registered. DDP keeps (hook, state) in a list of its own and does
    not tell the hook who is asking."""
    return [model for model in models() if any(registered is state for _, registered in getattr(model, "_comm_hooks", []))]


def models():
    """All DistributedDataParallel models of this process: an object refers to its class."""
    kinds = [DistributedDataParallel, *_subclasses_of(DistributedDataParallel)]
    found = [thing for thing in gc.get_referrers(*kinds) if type(thing) in kinds]
    return found + [model for model in attached if not any(model is other for other in found)]  # the collector does not see frozen ones


def _subclasses_of(kind):
    for subclass in kind.__subclasses__():
        yield subclass
        yield from _subclasses_of(subclass)
