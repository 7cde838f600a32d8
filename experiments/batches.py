"""Divide the training images among the workers, evenly at random or unevenly by label, and draw their batches."""

import torch

PARTITIONS = ("iid", "dirichlet", "labels")
SHARDS_PER_WORKER = 2


class Batches:
    """Draw one worker's batches, in an order that depends only on the seed; each image once an epoch.

    Args:
        dataset (data.Dataset): what the images are taken from.
        images (int64 tensor or None): the worker's own images; None draws from all, which the workers then share.
        batch_size, seed, rank, world_size (int): of this worker and all of them.

    Raises ValueError where there are fewer images than a batch.
    """

    def __init__(self, dataset, images, batch_size, seed, rank, world_size):
        self._dataset, self._batch_size = dataset, batch_size
        self._images = torch.arange(len(dataset.train_images)) if images is None else images
        # Of a drawing that all workers share each takes its part; of its own it takes all.
        self._seed, self._parts, self._part = 1_000_003 * seed, world_size, rank
        available = f"{len(self._images)} images over all workers, got {batch_size} on each of {world_size}"
        if images is not None:
            self._seed, self._parts, self._part = self._seed + 7_919 * (rank + 1), 1, 0
            available = f"the {len(images)} images of worker {rank}, got {batch_size}; choose another --seed or a larger --concentration"
        self._steps_per_epoch = len(self._images) // (batch_size * self._parts)
        if self._steps_per_epoch == 0:
            raise ValueError(f"--batch-size: expected at most {available}")
        self._epoch = None

    def __getitem__(self, step):
        """Return (images, labels) of `step`, counted from 0: float32 (batch, 3, 32, 32) and int64 (batch,)."""
        epoch, position = divmod(step, self._steps_per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self._seed + epoch)
            self._order = torch.randperm(len(self._images), generator=generator)
            self._epoch = epoch
        start = (position * self._parts + self._part) * self._batch_size
        chosen = self._images[self._order[start : start + self._batch_size]]
        return self._dataset.normalise(self._dataset.train_images[chosen]), self._dataset.train_labels[chosen]


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


def make_batches(dataset, options):
    """Return the batches of every worker, in rank order, as `options.partition` shares the images out."""
    owned = [None] * options.workers
    if options.partition == "labels":
        owned = partition_labels(dataset.train_labels, options.workers)
    elif options.partition == "dirichlet":
        owned = partition_dirichlet(dataset.train_labels, options.workers, options.concentration, options.seed)
    return [Batches(dataset, images, options.batch_size, options.seed, rank, options.workers) for rank, images in enumerate(owned)]
