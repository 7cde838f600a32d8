"""A small training job, once under DDP in N processes and once in one process on the LocalExchange."""

import torch
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

import regtopk_torch as rt

WIDTH = 24
BUCKET_CAP_MB = 0.008  # a few thousand parameters: several buckets after DDP has rebuilt them


def make_model(dtype=torch.float32):
    """Convolution, linear layers of unequal size and a scalar: about 4,000 parameters in 9 tensors."""
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution = nn.Conv1d(1, 4, 5, padding=2)
            self.layers = nn.Sequential(nn.Linear(4 * WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.scale * self.layers(torch.tanh(self.convolution(x[:, None])).flatten(1))

    return Model().to(dtype)


def batch(rank, step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1000 * rank + step)
    return torch.randn(8, WIDTH, generator=generator, dtype=torch.float64).to(dtype)


def loss_of(model, x):
    return (model(x) - x.roll(1, 1)).float().square().mean()


def make_optimizer(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def make_state(method, density, **options):
    return rt.TopKState(density, **options) if method == "topk" else rt.RegTopKState(density, mu=1.0, **options)


def recording_hook(recorder, bucket):
    """sparse_hook that notes which parameters each bucket of each step holds."""
    state, indices, layouts = recorder
    layout = [indices[parameter] for parameter in bucket.parameters()]
    if not layouts or layout[0] in {index for known in layouts[-1] for index in known}:
        layouts.append([])
    layouts[-1].append(layout)
    return rt.sparse_hook(state, bucket)


def train_ddp(rank, method, density, steps, entry, dtype=torch.float32, **ddp_options):
    """Return (parameters, residual by name, stats, layouts); layouts[step] lists each bucket's parameter indices."""
    model = make_model(dtype)
    ddp_options.setdefault("bucket_cap_mb", BUCKET_CAP_MB)
    ddp = DistributedDataParallel(model, **ddp_options)
    state = make_state(method, density)
    layouts = []
    if entry == "attach":
        rt.attach(ddp, state)
    else:
        indices = {parameter: index for index, parameter in enumerate(model.parameters())}
        ddp.register_comm_hook((state, indices, layouts), recording_hook)
    optimizer = make_optimizer(model)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(ddp, batch(rank, step, dtype)).backward()
        optimizer.step()
    residuals = {name: entry["residual"] for name, entry in state.state_dict(ddp)["parameters"].items()}
    return [p.detach().clone() for p in model.parameters()], residuals, state.stats(), layouts


def local_gradients(model, rank, step, dtype=torch.float32):
    model.zero_grad()
    loss_of(model, batch(rank, step, dtype)).backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def train_locally(workers, method, density, layouts, dtype=torch.float32):
    """The same job in one process, with the bucket layouts that DDP used; returns (parameters, exchange)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = make_model(dtype)
        optimizer = make_optimizer(model)
        exchange = rt.LocalExchange(workers, density, method=method, mu=1.0)
        for step, layout in enumerate(layouts):
            averages = exchange.step([local_gradients(model, rank, step, dtype) for rank in range(workers)], layout)
            for parameter, average in zip(model.parameters(), averages, strict=True):
                parameter.grad = average
            optimizer.step()
        return [p.detach().clone() for p in model.parameters()], exchange
    finally:
        torch.set_num_threads(threads)
