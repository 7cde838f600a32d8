"""Divide the training images among the workers, evenly at random or unevenly by label, and draw their batches."""

import torch

from experiments.train import Batches

PARTITIONS = ("iid", "dirichlet", "labels")
SHARDS_PER_WORKER = 2


def partition_labels(labels, num_workers):
    """Return one int64 tensor of image indices per worker: the images sorted by label, cut into 2 shards per worker.

    Worker n holds shards n and n + num_workers, so that most workers see two labels only. Every image has one owner.
    """
    shards = torch.argsort(labels, stable=True).tensor_split(SHARDS_PER_WORKER * num_workers)
    return [torch.cat(shards[rank::num_workers]) for rank in range(num_workers)]


def partition_dirichlet(labels, num_workers, concentration, seed):
    """Return one int64 tensor of image indices per worker: each label is shared out by its own Dirichlet draw.

    The smaller `concentration` (> 0), the fewer workers hold a label. Every image has one owner; workers hold unequal
    numbers of images.
    """
    import numpy

    generator = numpy.random.default_rng(seed)
    owned = [[] for _ in range(num_workers)]
    for label in labels.unique().tolist():
        images = (labels == label).nonzero().flatten()
        shares = generator.dirichlet([concentration] * num_workers)
        cuts = torch.from_numpy((shares.cumsum()[:-1] * len(images)).round().astype("int64"))
        for rank, part in enumerate(images.tensor_split(cuts)):
            owned[rank].append(part)
    return [torch.cat(parts) for parts in owned]


class OwnBatches:
    """Draw one worker's batches from its own images: a new order each time they are used up, decided by the seed."""

    def __init__(self, dataset, images, batch_size, seed, rank):
        if len(images) < batch_size:
            raise ValueError(
                f"--batch-size: expected at most the images of a worker, {len(images)} on rank {rank}, got {batch_size}; "
                "choose another --seed or a larger --concentration"
            )
        self._dataset, self._images, self._batch_size = dataset, images, batch_size
        self._seed, self._rank, self._epoch = seed, rank, None

    def __getitem__(self, step):
        """Return (images, labels) of `step`, counted from 0: float32 (batch, 3, 32, 32) and int64 (batch,)."""
        epoch, position = divmod(step, len(self._images) // self._batch_size)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(1_000_003 * self._seed + 7_919 * (self._rank + 1) + epoch)
            self._order = torch.randperm(len(self._images), generator=generator)
            self._epoch = epoch
        chosen = self._images[self._order[position * self._batch_size : (position + 1) * self._batch_size]]
        return self._dataset.normalise(self._dataset.train_images[chosen]), self._dataset.train_labels[chosen]


def make_batches(dataset, batch_size, seed, num_workers, partition, concentration):
    """Return the batches of every worker, in rank order; `partition` is one of PARTITIONS.

    Raises ValueError where a worker has fewer images than a batch.
    """
    if partition == "iid":
        return [Batches(dataset, batch_size, seed, rank, num_workers) for rank in range(num_workers)]
    if partition == "labels":
        owned = partition_labels(dataset.train_labels, num_workers)
    else:
        owned = partition_dirichlet(dataset.train_labels, num_workers, concentration, seed)
    return [OwnBatches(dataset, images, batch_size, seed, rank) for rank, images in enumerate(owned)]
