"""A model whose gradients are what one gives it, and the account of them: sent + kept = given, to the last bit.

Gradients are small integers, so that no sum and no average of two ranks rounds. Parameters begin at zero and SGD has a learning rate
of 1: a parameter is minus the sum of what was applied to it.
"""

import contextlib

import torch
import torch.distributed as dist
import torch.nn as nn

import regtopk_torch as rt

ENTRIES = ("register_comm_hook", "attach")


class Given(nn.Module):
    """Parameters of the given sizes, all zero; forward(gradients) is a loss with these gradients, None where there is none."""

    def __init__(self, *sizes):
        super().__init__()
        self.parts = nn.ParameterList(torch.zeros(size) for size in sizes)

    def forward(self, gradients):
        return sum((part * gradient).sum() for part, gradient in zip(self.parts, gradients, strict=True) if gradient is not None)


def integers(*sizes, seed, largest=50):
    """One gradient per size, of integers from -largest to largest."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(-largest, largest + 1, (size,), generator=generator).float() for size in sizes]


def seed_of(rank, step):
    return 1000 * rank + step


def register(ddp, state, entry):
    if entry == "attach":
        rt.attach(ddp, state)
    else:
        ddp.register_comm_hook(state, rt.sparse_hook)


def unit_sgd(*modules):
    """SGD with a learning rate of 1 for all parameters of the modules."""
    return torch.optim.SGD([parameter for module in modules for parameter in module.parameters()], lr=1.0)


def held(state, module):
    """What this rank holds back of each parameter, by name, in the parameter's shape; zeros where it holds nothing."""
    saved = state.state_dict(module)["parameters"]
    module = getattr(module, "module", module)
    return {name: saved.get(name, {}).get("residual", torch.zeros_like(p)) for name, p in module.named_parameters()}


@contextlib.contextmanager
def broken(operator, when=True, replacement=None, state=None):
    """Meanwhile, `when` it is so, an operator of this package raises on the CPU, or does what a replacement does.

    With a state, until none of its buckets is pending: the error of the first ends a backward while others are under way.
    """

    def fail(*arguments, **options):
        raise RuntimeError("something of this machine")

    if not when:
        yield
        return
    library = torch.library.Library("regtopk", "IMPL")
    library.impl(operator, replacement or fail, "CPU", allow_override=True)
    try:
        yield
    finally:
        if state is not None:
            state._exchange.wait_idle()
        library._destroy()


def finite(gradient):
    """Entries that are not finite count as nothing given."""
    return torch.where(gradient.isfinite(), gradient, 0.0).double()


def missing(state, module, given, group=None):
    """What was given by all ranks less what was applied, times N, and what all ranks hold: the largest error of each parameter.

    `given` has the sum of this rank's gradients of each parameter, fp64. A collective of the group; 0 where nothing was lost or doubled.
    """
    errors = []
    for total, residual, parameter in zip(given, held(state, module).values(), module.parameters(), strict=True):
        sums = torch.stack([total.reshape(parameter.shape), residual.double()])
        dist.all_reduce(sums, group=group)
        applied = -dist.get_world_size(group) * parameter.detach().double()
        errors.append(float((sums[0] - sums[1] - applied).abs().max()))
    return errors
