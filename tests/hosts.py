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
        self._numels = {}  # of all that was exchanged

    def part(self, tensor, place):
        begin, numel = _C.part_of(tensor.numel(), place, self.ranks)
        return tensor.view(-1)[begin : begin + numel]

    def step(self, gradients, layout, scale=1.0):
        averages = [torch.zeros_like(gradient) for gradient in gradients[0]]
        self._numels.update((index, gradients[0][index].numel()) for index in sum(layout, []))
        for place, exchange in enumerate(self.places):
            means = []
            for host in range(exchange.num_workers):
                rows = [[self.part(g, place) for g in gradients[host * self.ranks + rank]] for rank in range(self.ranks)]
                sums = [functools.reduce(torch.add, map(torch.Tensor.float, parts)) for parts in zip(*rows, strict=True)]
                means.append([(total / self.ranks).to(gradients[0][0].dtype) for total in sums])
            for average, part in zip(averages, exchange.step(means, layout, scale=scale), strict=True):
                if part is not None:  # None of those in no bucket
                    self.part(average, place).copy_(part)
        if not all(average.isfinite().all() for average in averages):
            self.skipped()
        return averages

    def skipped(self):
        for exchange in self.places:
            exchange.skipped()

    def load_state_dict(self, saved):
        """As a LocalExchange's, of the state dicts of all ranks, whose residuals are zero outside of their rank's parts."""
        self._numels = {int(name): entry["residual"].numel() for name, entry in saved["workers"][0]["parameters"].items()}
        for place, exchange in enumerate(self.places):
            exchange.load_state_dict({"workers": [self._of_part(whole, host, place) for host, whole in enumerate(saved["workers"][place :: self.ranks])]})

    def _of_part(self, whole, host, place):
        entries = {}
        for name, entry in whole["parameters"].items():
            begin, numel = _C.part_of(entry["residual"].numel(), place, self.ranks)
            entries[name] = {**entry, "shape": [numel], "residual": self.part(entry["residual"], place)}
            if "sent_index" in entry:
                inside = (entry["sent_index"] >= begin) & (entry["sent_index"] < begin + numel)
                entries[name] |= {key: entry[key][inside] for key in ("sent_value", "feedback") if key in entry}
                entries[name]["sent_index"] = entry["sent_index"][inside] - begin
        header = {key: value for key, value in whole.items() if key != "levels"}
        return {**header, "rank": host, "world_size": self.places[0].num_workers, "parameters": entries}

    def residuals(self, rank):
        """What a rank holds back of each tensor, flat: its part of it, and zeros elsewhere."""
        host, place = divmod(rank, self.ranks)
        of_part = self.places[place].residuals(host)
        found = {index: torch.zeros(numel, dtype=of_part[index].dtype if index in of_part else torch.float32) for index, numel in self._numels.items()}
        for index, residual in of_part.items():
            self.part(found[index], place).copy_(residual)
        return found

    def check_residuals(self, rank, residuals):
        """Assert that a rank holds back what its part of each tensor does here, and zeros elsewhere."""
        simulated = self.residuals(rank)
        for index, residual in enumerate(residuals):
            assert torch.equal(residual.flatten(), simulated[index].to(residual.dtype)), (rank, index)
