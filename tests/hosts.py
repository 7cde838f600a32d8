"""Two levels in one process: what the tests hold the ranks of several hosts against."""

import functools

import torch

import regtopk_torch as rt
from regtopk_torch import _C


class Twin:
    """The exchange of hosts with `ranks` ranks each, in one process."""

    def __init__(self, hosts, ranks, **options):
        self.ranks = ranks
        self.places = [rt.LocalExchange(hosts, **options) for _ in range(ranks)]

    def part(self, tensor, place):
        begin, numel = _C.part_of(tensor.numel(), place, self.ranks)
        return tensor.view(-1)[begin : begin + numel]

    def step(self, gradients, layout, scale=1.0):
        averages = [torch.zeros_like(gradient) for gradient in gradients[0]]
        for place, exchange in enumerate(self.places):
            means = []
            for host in range(exchange.num_workers):
                rows = [[self.part(g, place) for g in gradients[host * self.ranks + rank]] for rank in range(self.ranks)]
                sums = [functools.reduce(torch.add, map(torch.Tensor.float, parts)) for parts in zip(*rows, strict=True)]
                means.append([(total / self.ranks).to(gradients[0][0].dtype) for total in sums])
            for average, part in zip(averages, exchange.step(means, layout, scale=scale), strict=True):
                self.part(average, place).copy_(part)
        if not all(average.isfinite().all() for average in averages):
            for exchange in self.places:
                exchange.skipped()
        return averages

    def check_residuals(self, rank, residuals):
        """Assert that a rank holds back what its part of each tensor does here, and zeros elsewhere."""
        host, place = divmod(rank, self.ranks)
        of_part = self.places[place].residuals(host)
        for index, residual in enumerate(residuals):
            whole = torch.zeros_like(residual)
            if index in of_part:
                self.part(whole, place).copy_(of_part[index])
            assert torch.equal(residual, whole), (rank, index)
