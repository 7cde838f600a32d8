"""Train and test a model with DistributedDataParallel, dense or through a sparse hook, and measure what it cost."""

import hashlib
import sys
import time
from collections import deque

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

LOSS_STEPS = 50
SUBSET_IMAGES = 1000
EVALUATION_BATCH = 250
BAR_STEPS = 10


class Batches:
    """Give each worker its part of every step's images, in an order that depends only on the seed."""

    def __init__(self, dataset, batch_size, seed, rank, world_size):
        self._dataset, self._batch_size, self._seed = dataset, batch_size, seed
        self._rank, self._world_size = rank, world_size
        self._steps_per_epoch = len(dataset.train_images) // (batch_size * world_size)
        if self._steps_per_epoch == 0:
            raise ValueError(
                f"--batch-size: expected at most {len(dataset.train_images)} images over all workers, "
                f"got {batch_size} on each of {world_size}"
            )
        self._epoch = None

    def __getitem__(self, step):
        """Return (images, labels) of `step`, counted from 0: float32 (batch, 3, 32, 32) and int64 (batch,)."""
        epoch, position = divmod(step, self._steps_per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(1_000_003 * self._seed + epoch)
            self._order = torch.randperm(len(self._dataset.train_images), generator=generator)
            self._epoch = epoch
        start = (position * self._world_size + self._rank) * self._batch_size
        chosen = self._order[start : start + self._batch_size]
        return self._dataset.normalise(self._dataset.train_images[chosen]), self._dataset.train_labels[chosen]


def evaluate(model, dataset, count):
    """Return the accuracy (0...1) on the first `count` test images; collective, the ranks share the images.

    Every rank first takes rank 0's BatchNorm statistics, in place, as DDP does before each forward pass.
    """
    for buffer in model.buffers():
        dist.broadcast(buffer, 0)
    share = slice(dist.get_rank(), count, dist.get_world_size())
    images, labels = dataset.test_images[share], dataset.test_labels[share]
    correct = torch.zeros((), dtype=torch.int64)
    model.eval()
    with torch.no_grad():
        for some_images, some_labels in zip(images.split(EVALUATION_BATCH), labels.split(EVALUATION_BATCH)):
            correct += (model(dataset.normalise(some_images)).argmax(dim=1) == some_labels).sum()
    model.train()
    dist.all_reduce(correct)
    return correct.item() / count


def check_replicas(model):
    """Raise RuntimeError unless the parameters have the same bits on every rank; collective."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().contiguous().numpy().tobytes())
    digests = [None] * dist.get_world_size()
    dist.all_gather_object(digests, digest.hexdigest())
    different = [rank for rank, other in enumerate(digests) if other != digests[0]]
    if different:
        raise RuntimeError(
            f"rank {dist.get_rank()}: expected every rank to hold the parameters of rank 0, "
            f"got others on ranks {different}"
        )


def read_statistics(state, model, steps, before=None):
    """Return state.stats(); for dense (`state` None) the bytes of a ring all-reduce per step, under the same keys.

    `before` is what a run that was resumed had counted until then: it is added.
    """
    if state is not None:
        return add_statistics(before or {}, state.stats())
    workers = dist.get_world_size()
    entries = sum(parameter.numel() for parameter in model.parameters()) * steps
    volume = round(2 * (workers - 1) / workers * entries * 4)
    return {"steps": steps, "workers": workers, "entries": entries, "bytes_sent": volume, "bytes_dense": volume}


def add_statistics(before, now):
    """Return `now` with the sums of `before` added; ratios and norms are those of `now`, or follow from the sums."""
    total = dict(now)
    for name in before.keys() - {"workers", "residual_norm", "density"}:
        total[name] = now[name] + before[name]
    total["density"] = total["sent_entries"] / total["entries"] if total["entries"] else 0.0
    return total


def share_of_statistics(ranks, rank, world_size):
    """Return what one rank takes over of the statistics of all ranks of an earlier run: its own, in another world the mean."""
    if len(ranks) == world_size:
        return ranks[rank]
    return {name: sum(statistics[name] for statistics in ranks) / len(ranks) for name in ranks[0]}


def describe_progress(losses, accuracy, statistics):
    """Return one line: mean loss of the last steps, last test accuracy, share of the dense bytes that was not sent."""
    saved = 1 - statistics["bytes_sent"] / max(1, statistics["bytes_dense"])
    return f"loss {sum(losses) / len(losses):.3f}  accuracy {accuracy:.1%}  bytes saved {saved:.2%}"


def train(options, model, state, dataset, recorder, folders=None, resumed=None):
    """Train `model` in place, test it, and return the result as a dict, the same on every rank but for its own times.

    Collective. `recorder` is None except on rank 0: it gets every step's loss (rank 0's batch, nats) and seconds, and
    every test's accuracy and bytes. The seconds leave tests and checkpoints out.

    `folders` (checkpoints.StepFolders), where given, gets a checkpoint every `options.checkpoint_every` steps; `resumed` is what
    such a checkpoint handed back: the run goes on after its step. The state must have been loaded then; the model is here.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    ddp = DistributedDataParallel(model, bucket_cap_mb=options.bucket_cap_mb)
    if state is not None:
        import regtopk_torch as rt

        ddp.register_comm_hook(state, rt.sparse_hook)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=options.learning_rate, momentum=options.momentum)
    before = None
    if resumed is not None:
        model.load_state_dict(resumed["model"])
        optimizer.load_state_dict(resumed["optimizer"])
        if state is not None:
            before = share_of_statistics(resumed["statistics"], rank, world_size)
    batches = Batches(dataset, options.batch_size, options.seed, rank, world_size)
    losses, step_seconds = deque(maxlen=LOSS_STEPS), []
    first_step, accuracy = 1, None
    if resumed is not None:
        first_step, accuracy = resumed["step"] + 1, resumed["accuracy"]
        losses.extend(resumed["losses"])
        step_seconds += resumed["step_seconds"]
    bar = tqdm(total=options.steps, initial=first_step - 1, unit="step", disable=rank != 0 or not sys.stderr.isatty())

    def test(step, count):
        accuracy = evaluate(model, dataset, count)
        statistics = read_statistics(state, model, step, before) if step else {"bytes_sent": 0, "bytes_dense": 0}
        if recorder is not None:
            sent, dense = statistics["bytes_sent"], statistics["bytes_dense"]
            recorder.write("test", step=step, accuracy=accuracy, images=count, bytes_sent=sent, bytes_dense=dense)
            if bar.disable and step:
                print(f"step {step}/{options.steps}  {describe_progress(losses, accuracy, statistics)}", flush=True)
        return accuracy

    def save(step):
        statistics = [None] * world_size
        dist.all_gather_object(statistics, read_statistics(state, model, step, before))
        training = {
            "step": step,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "accuracy": accuracy,
            "losses": list(losses),
            "step_seconds": step_seconds,
            "statistics": statistics,
            "run": None if recorder is None else recorder.path.parent.name,
            "log_position": None if recorder is None else recorder.position(),
        }
        folders.save(step, training, state, ddp)

    subset = min(SUBSET_IMAGES, len(dataset.test_images))
    if resumed is None:
        accuracy = test(0, subset)
    for step in range(first_step, options.steps + 1):
        start = time.perf_counter()
        images, labels = batches[step - 1]
        optimizer.zero_grad(set_to_none=True)
        loss = torch.nn.functional.cross_entropy(ddp(images), labels)
        loss.backward()
        optimizer.step()
        step_seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
        if not torch.isfinite(loss):
            raise RuntimeError(
                f"rank {rank}: expected a finite training loss, got {losses[-1]} at step {step}; lower --learning-rate"
            )
        if recorder is not None:
            recorder.write("step", step=step, loss=losses[-1], seconds=round(step_seconds[-1], 6))
        if step % options.evaluate_every == 0 and step < options.steps:
            accuracy = test(step, subset)
        if folders is not None and step % options.checkpoint_every == 0:
            save(step)
        if not bar.disable:
            if step % BAR_STEPS == 0 or step == options.steps:
                statistics = read_statistics(state, model, step, before)
                bar.set_postfix_str(describe_progress(losses, accuracy, statistics), refresh=False)
            bar.update()
    accuracy = test(options.steps, len(dataset.test_images))
    bar.close()
    check_replicas(model)
    statistics = [None] * world_size
    dist.all_gather_object(statistics, read_statistics(state, model, options.steps, before))
    return {
        "accuracy": accuracy,
        "test_images": len(dataset.test_images),
        "training_loss": sum(losses) / len(losses),
        "training_seconds": sum(step_seconds),
        "median_step_seconds": sorted(step_seconds)[len(step_seconds) // 2],
        "replicas_identical": True,
        "statistics": statistics,
    }
