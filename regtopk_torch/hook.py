"""The two ways from DistributedDataParallel into the C++ exchange."""

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from regtopk_torch import groups
from regtopk_torch.states import TopKState


def sparse_hook(state, bucket):
    """Exchange one gradient bucket: pass to `ddp.register_comm_hook(state, sparse_hook)`.

    Args:
        state (TopKState or RegTopKState): options, residuals and history of this worker.
        bucket (torch.distributed.GradBucket): its buffer of shape [J] holds fp64, fp32, bf16 or fp16 gradients on the
            CPU or a GPU and is overwritten with the average over workers of what they sent, Z / N, and with zero for parameters
            whose gradients are zero on all of them. A sparse_coo buffer goes through a plain all-reduce.

    Returns:
        torch.futures.Future: of the bucket's own buffer.

    One all-gather per bucket, issued before this function returns, or of three collectives the first; the first use of a bucket layout also waits for an
    all-gather in which the ranks compare their options.

    A hook cannot see two things. Under `join(divide_by_initial_world_size=False)` the average still divides by N. And what
    was left in `.grad` from an earlier step is given again: clear gradients between steps, or accumulate under `no_sync`.

    Raises:
        TypeError: `bucket` is not a GradBucket, or its dtype is not supported.
        ValueError: options, model, step, calls of the state or the GradScaler's scale differ between ranks; the message names the
            ranks and both values. The state is for another process group than the model.
        torch.distributed.DistBackendError: a rank did not answer within the group's timeout, or waits, as it says within
            seconds, for something else.
    """
    if not isinstance(state, TopKState):
        raise TypeError(f"sparse_hook: expected a TopKState or RegTopKState, got {type(state).__name__}")
    if not isinstance(bucket, dist.GradBucket):
        raise TypeError(
            f"sparse_hook: expected a torch.distributed.GradBucket, got {type(bucket).__name__}; "
            "compiled autograd's Python reducer is not supported, set torch._dynamo.config.optimize_ddp to another mode"
        )
    return state._exchange.run(bucket)


def attach(ddp, state):
    """Register the exchange on `ddp` without Python in the backward pass.

    Equivalent to `ddp.register_comm_hook(state, sparse_hook)`, bit for bit. Of a state with a GradScaler its `get_scale` is
    called once per bucket.

    Args:
        ddp (DistributedDataParallel): a model without a communication hook.
        state (TopKState or RegTopKState): for the same process group.

    Raises:
        TypeError: for other types.
        ValueError: the state's process group has other ranks than the model's.
        RuntimeError: the model has a communication hook already (raised by PyTorch).
    """
    if not isinstance(ddp, DistributedDataParallel):
        raise TypeError(f"attach: expected a DistributedDataParallel, got {type(ddp).__name__}")
    if not isinstance(state, TopKState):
        raise TypeError(f"attach: expected a TopKState or RegTopKState, got {type(state).__name__}")
    groups.check_model("attach", ddp, groups.group_of(state))
    state._exchange.register_on(ddp.reducer)
    groups.attached.add(ddp)
    ddp.logger._set_comm_hook_name(sparse_hook.__qualname__)
    # As register_comm_hook does: DDP keeps the pair, and with it the state, alive.
    ddp._comm_hooks.append((sparse_hook, state))
