"""Parts of parameters between the ranks of a host, by the CPU operators and by the kernels."""

import torch

from regtopk_torch import _C
from tests.simt.host import PAYLOADS_VALID, aligned, copied
from tests.simt.with_spans import ROUNDS

HEAD_BYTES = 80
STAMP = {"step": 3, "plan": 77}
SCALE_AND_DEED = {"scale": 2.0, "deed": 513}


class PartsOperators:
    """The CPU operators, called as the kernels are."""

    def split(self, *tensors, **options):
        torch.ops.regtopk.split_(*tensors, **options)

    def mean(self, *tensors, **options):
        torch.ops.regtopk.mean_(*tensors, **options)

    def join(self, *tensors, **options):
        torch.ops.regtopk.join_(*tensors, **options)
        return PAYLOADS_VALID

    def mark_unfilled(self, *tensors):
        torch.ops.regtopk.mark_unfilled_(*tensors)


class Host:
    """One bucket of a host's ranks: each gives its gradient, each takes the mean of its part, all take the means of all."""

    def __init__(self, numels, ranks, dtype):
        self.numels, self.ranks, self.dtype, self.numel = numels, ranks, dtype, sum(numels)
        entries = [[_C.part_of(numel, rank, ranks)[1] for numel in numels] for rank in range(ranks)]
        self.parts = copied(torch.cat([torch.zeros(1 + ranks, 1, dtype=torch.int64), torch.tensor([numels, *entries]).cumsum(1)], 1))
        self.entries = [sum(of_rank) for of_rank in entries]
        self.row_bytes = HEAD_BYTES + -(-max(self.entries) * dtype.itemsize // 16) * 16

    def rows(self):
        return aligned(self.ranks * self.row_bytes, torch.uint8).fill_(0xEE).view(self.ranks, -1)

    def split(self, run, gradient):
        rows = self.rows()
        run.split(copied(gradient), rows, self.parts, **STAMP, **SCALE_AND_DEED)
        return rows

    def mean(self, run, rows, rank):
        """(row, found)."""
        row, found = aligned(self.row_bytes, torch.uint8).fill_(0xEE), aligned(2, torch.int64).fill_(5)
        run.mean(rows, row, found, entries=self.entries[rank], dtype=self.dtype, **STAMP, **SCALE_AND_DEED)
        return row, found

    def join(self, run, rows):
        """(bucket, verdict, status)."""
        bucket, verdict = aligned(self.numel, self.dtype), aligned(ROUNDS, torch.int64).fill_(-1)
        bucket.view(torch.uint8).fill_(0xEE)
        status = run.join(rows, bucket, self.parts, verdict, round=9, **STAMP)
        return bucket, verdict, status

    def all_of_it(self, run, gradients):
        """All that is written, by name; `gradients` are the ranks'."""
        sent = [self.split(run, gradient) for gradient in gradients]
        received = [copied(torch.stack([rows[rank] for rows in sent])) for rank in range(self.ranks)]
        means = [self.mean(run, rows, rank) for rank, rows in enumerate(received)]
        bucket, verdict, status = self.join(run, copied(torch.stack([row for row, _ in means])))
        assert status == PAYLOADS_VALID
        named = {f"rows of {rank}": rows for rank, rows in enumerate(sent)} | {f"mean of {rank}": row for rank, (row, _) in enumerate(means)}
        return named | {f"found by {rank}": found for rank, (_, found) in enumerate(means)} | {"bucket": bucket, "verdict": verdict}
