"""Time steps that workers of a GPT take by themselves, with what they did exchanged after every 5, over the network between hosts:

    torchrun --nnodes 4 --node-rank R --nproc-per-node 1 --master-addr HOST0 --master-port 29500 -m benchmarks.local_steps --out 1gbit.jsonl

Rank 0 writes the log; `python -m benchmarks.hosts --of local-steps` makes the table of those in benchmarks/results/local_steps.
Every round takes 5 steps of every method, one method after the other, on the same random bytes; the first round is not recorded.
"""

import copy

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import regtopk_torch as rt
from benchmarks.hosts import LOCAL_METHODS
from benchmarks.network import add_common, begin, measure
from experiments.language_model import SIZES, Row, make_adamw, make_model, wire_bytes_of
from runlog.command import make_parser

EVERY = 5
ROW = Row(f"h{EVERY}-2bit-d95")  # at which budget, and that it learns: experiments/README.md#language-3000
BUDGET = 0.005


class ByHand:
    """What each worker did since the last round, averaged in torch calls; the model goes on from that."""

    def __init__(self, model, density=None):
        self.parameters, self.density, self.steps = list(model.parameters()), density, 0
        self.common = [parameter.detach().clone() for parameter in self.parameters]
        self.residuals = [torch.zeros_like(weights) for weights in self.common]

    def step(self):
        self.steps += 1
        if self.steps % EVERY:
            return
        with torch.no_grad():
            given = [weights - parameter for weights, parameter in zip(self.common, self.parameters, strict=True)]
            averages = self.all_entries(given) if self.density is None else list(map(self.largest, given, self.residuals))
            for weights, average, parameter in zip(self.common, averages, self.parameters, strict=True):
                parameter.copy_(weights.sub_(average))

    def all_entries(self, given):
        flat = torch.cat([each.flatten() for each in given])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        return [part.view_as(each) for part, each in zip(flat.split([each.numel() for each in given]), given, strict=True)]

    def largest(self, given, residual):
        """Of one tensor: 4 bytes for a place, and 2 for a value, of which what they cut off stays here too."""
        residual.mul_(ROW.decay).add_(given)
        flat = residual.view(-1)
        places = flat.abs().topk(max(1, round(self.density * flat.numel())), sorted=False).indices
        values = flat[places].bfloat16()
        flat[places] -= values.float()
        every_place, every_value = ([torch.empty_like(sent) for _ in range(dist.get_world_size())] for sent in (places.int(), values))
        dist.all_gather(every_place, places.int())
        dist.all_gather(every_value, values)
        average = torch.zeros_like(flat)
        for where, what in zip(every_place, every_value, strict=True):
            average.index_add_(0, where, what.float(), alpha=1 / dist.get_world_size())
        return average.view_as(given)


def make_rounds(size, batch_size):
    """Return {method: a round of it}."""
    first, context = make_model(size, 0), SIZES[size][3]
    numel = sum(parameter.numel() for parameter in first.parameters())
    windows = torch.randint(256, (batch_size, context + 1))
    density, given = ROW.options(numel, dist.get_world_size(), BUDGET)
    equal = wire_bytes_of(ROW, numel, dist.get_world_size(), round(density * numel)) / 6 / numel

    def rounds_of(method):
        model = copy.deepcopy(first)
        trained, optimizer = DistributedDataParallel(model, bucket_cap_mb=1024) if method == "ddp" else model, make_adamw(model)
        if method == "ours":
            after = rt.LocalSteps(model, optimizer, rt.TopKState(density, **given), every=EVERY).step
        elif method in ("none", "ddp"):
            after = int
        else:
            after = ByHand(model, equal if method == "chain" else None).step

        def take():
            for _ in range(EVERY):
                optimizer.zero_grad()
                trained(windows).backward()
                optimizer.step()
                after()

        return take

    return {method: rounds_of(method) for method in LOCAL_METHODS}


def main(arguments=None):
    parser = make_parser("benchmarks.local_steps", __doc__)
    add_common(parser, 7)
    parser.add_argument("--size", choices=SIZES, default="10M", help="parameters of the model (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=1, metavar="WINDOWS", help="per host and step (%(default)s)")
    options = parser.parse_args(arguments)
    begin(parser, options)
    measure(options, make_rounds(options.size, options.batch_size), warm_up=1, steps=EVERY)


if __name__ == "__main__":
    main()
