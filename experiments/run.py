"""Train, test, record and save: one run of experiments.cifar10, which goes on where its newest checkpoint was taken."""

import argparse
import hashlib
import os
import sys
import time
from datetime import timedelta
from statistics import fmean, median

import torch
import torch.distributed as dist
from tqdm import tqdm

from experiments import data
from experiments.batches import make_batches
from experiments.checkpoints import JobError, StepFolders, agree, gather
from experiments.models import make_model, test
from experiments.workers import DistributedWorkers, LocalWorkers, add
from runlog.record import LOG_NAME, Recorder, portable

LOSS_STEPS = 50
COMPARED_STEPS = 20
# What a resumed run may change. LocalExchange checks the number of workers itself; processes may be more or fewer.
CHANGEABLE = ("data", "folder", "steps", "save_every", "checkpoint", "timeout", "threads", "compare", "paper", "workers", "device")


def load_dataset(options):
    """Return the data set that `options.data` names. Collective.

    Only the first process of each host downloads; every rank takes the digits if one host has to.
    """

    def choose():
        return data.prepare(options.data) if int(os.environ.get("LOCAL_RANK", "0")) == 0 else None

    # A download may last longer than the job's own timeout: the wait for it has a group of its own.
    waiting = dist.new_group(timeout=timedelta(seconds=data.DOWNLOAD_LIMIT_SECONDS + options.timeout))
    choices = [choice for choice in gather(agree(choose, waiting)) if choice]
    reasons = [reason for _, reason in choices if reason]
    if reasons and dist.get_rank() == 0:
        print(f"CIFAR-10 could not be downloaded ({reasons[0]}): training on {data.DIGITS_NAME} instead", flush=True)
    folders = {folder for folder, _ in choices}
    return agree(lambda: data.load_digits() if None in folders else data.load_cifar10(folders.pop()))


def evaluate(model, dataset, count):
    """Return the accuracy (0...1) on the first `count` test images; collective, the ranks share the images.

    Every rank first takes rank 0's BatchNorm statistics, in place, as DDP does before each forward pass.
    """
    if dist.get_world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    correct = torch.tensor(test(model, dataset, slice(dist.get_rank(), count, dist.get_world_size()))[0])
    dist.all_reduce(correct)
    return correct.item() / count


def digest(model):
    """Return the SHA-256 of the parameters' bytes, in the model's order, as 64 hexadecimal digits."""
    result = hashlib.sha256()
    for parameter in model.parameters():
        result.update(parameter.detach().cpu().contiguous().numpy().tobytes())
    return result.hexdigest()


class Run:
    """One training run with its log and its checkpoints; every method is a collective, rank 0 records.

    Raises JobError on every rank where the run cannot begin.
    """

    def __init__(self, options):
        self._options = options
        self._dataset = load_dataset(options)
        self._batches = agree(lambda: make_batches(self._dataset, options))
        model = agree(lambda: make_model(options.model, options.seed).to(options.device))
        self._workers = agree(lambda: (DistributedWorkers if options.distributed else LocalWorkers)(options, model, self._batches))
        self._folders, self._recorder, step, training = None, None, 0, None
        if options.checkpoint is not None:
            job = {"data": self._dataset.name, **{name: value for name, value in vars(options).items() if name not in CHANGEABLE}}
            self._folders = StepFolders(options.checkpoint, job)
            step, training = agree(lambda: self._workers.load(self._folders))
            if step > options.steps:
                raise JobError(f"--steps: expected at least {step}, as in the checkpoint in {options.checkpoint}, got {options.steps}; name another --folder")
        self.step = step
        kept = training or {"statistics": None, "losses": [], "seconds": []}
        # Mean losses of all workers of the last steps; own losses that have not been gathered yet; seconds of all steps.
        self._earlier, self._losses, self._seconds, self._own_losses = kept["statistics"], kept["losses"], kept["seconds"], []
        self._finished = 0 < step == options.steps
        if not self._finished:
            self._recorder = agree(lambda: self._open_log(training) if dist.get_rank() == 0 else None)
        if dist.get_rank() == 0:
            note = "" if step == 0 else f"; finished at step {step} already" if self._finished else f"; goes on from step {step}"
            print(f"data: {self._dataset.name}; log: {options.folder / LOG_NAME}{note}", flush=True)

    def _open_log(self, training):
        options, log = self._options, self._options.folder / LOG_NAME
        if training is not None:
            return Recorder.resume(log, training["log_position"], step=self.step, workers=options.workers, steps=options.steps)
        options.folder.mkdir(parents=True, exist_ok=True)
        log.unlink(missing_ok=True)  # of a run that ended before its first checkpoint
        paths = ("data", "folder", "checkpoint")
        settings = {key: portable(str(value)) if key in paths and value else value for key, value in vars(options).items()}
        return Recorder(log, options.seed, workers=options.workers, data=self._dataset.name, options=settings)

    def train(self):
        """Take the steps that are left and write the result."""
        if self._finished:
            return
        options, hidden = self._options, self._recorder is None or not sys.stderr.isatty()
        self._bar = tqdm(total=options.steps, initial=self.step, unit="step", disable=hidden)
        if self.step == 0:
            self._test(options.test_images)
        while self.step < options.steps:
            start = time.perf_counter()
            self._own_losses.append(self._workers.step(self.step))
            self._seconds.append(time.perf_counter() - start)
            self.step += 1
            self._bar.update()
            if self.step % options.record_every == 0:
                self._record_losses()
            if self.step < options.steps and self.step % options.evaluate_every == 0:
                self._test(options.test_images)
            if self.step < options.steps and self.step % options.save_every == 0:
                self._save()
        self._record_result()
        self._save()
        self._bar.close()

    def _gather_losses(self):
        for of_ranks in zip(*gather(self._own_losses)):
            self._losses.append(fmean(loss for of_rank in of_ranks for loss in of_rank))
            if not abs(self._losses[-1]) < float("inf"):
                raise JobError(f"cifar10: expected a finite training loss, got {self._losses[-1]} by step {self.step}; lower --learning-rate")
        self._own_losses, self._losses = [], self._losses[-max(LOSS_STEPS, self._options.record_every) :]

    def _record_losses(self):
        self._gather_losses()
        if self._recorder is not None:
            loss, seconds = (fmean(values[-self._options.record_every :]) for values in (self._losses, self._seconds))
            self._recorder.write("step", step=self.step, loss=round(loss, 6), seconds=round(seconds, 4))

    def _statistics(self):
        return add(self._earlier, self._workers.statistics())

    def _test(self, count):
        """Record and return the accuracy, and record what was exchanged since the start, as means over the workers."""
        self._gather_losses()
        statistics, count = self._statistics(), min(count, len(self._dataset.test_labels))
        accuracy = evaluate(self._workers.model, self._dataset, count)
        if self._recorder is not None:
            names = ("bytes_sent", "bytes_dense", "sent_entries", "repeated", "displaced")
            per_worker = {name: statistics[name] / self._options.workers for name in names}
            self._recorder.write("test", step=self.step, accuracy=accuracy, images=count, **per_worker)
            line = f"accuracy {accuracy:.1%}"
            if self._losses:
                line = f"loss {fmean(self._losses[-LOSS_STEPS:]):.3f}  {line}"
                if statistics["bytes_dense"] > 0:  # some travel
                    line += f"  bytes saved {1 - statistics['bytes_sent'] / statistics['bytes_dense']:.2%}"
            self._bar.set_postfix_str(line)
            if self._bar.disable:
                print(f"step {self.step}/{self._options.steps}  {line}", flush=True)
        return accuracy

    def _record_result(self):
        digests = gather(digest(self._workers.model))
        different = [rank for rank, other in enumerate(digests) if other != digests[0]]
        if different:
            raise JobError(f"cifar10: expected every rank to hold the parameters of rank 0, got others on ranks {different}")
        accuracy, statistics = self._test(len(self._dataset.test_labels)), self._statistics()
        compared = {"dense_step_seconds": self._time_dense()} if self._options.compare else {}
        if self._recorder is not None:
            self._recorder.write(
                "result", step=self.step, workers=self._options.workers, accuracy=accuracy, test_images=len(self._dataset.test_labels), training_loss=fmean(self._losses[-LOSS_STEPS:]),
                training_seconds=round(sum(self._seconds), 3), median_step_seconds=round(median(self._seconds), 4),
                parameters_sha256=digests[0], statistics=statistics, **compared,
            )  # fmt: skip

    def saved(self):
        """Return the step from which the same command would go on now, 0 without a checkpoint; not a collective."""
        return 0 if self._folders is None else self._folders.newest()

    def _time_dense(self):
        """Return the median seconds of a step with DDP's own all-reduce, of a few steps after two that are thrown away."""
        options = argparse.Namespace(**{**vars(self._options), "method": "dense"})
        workers, seconds = DistributedWorkers(options, make_model(options.model, options.seed).to(options.device), self._batches), []
        for step in range(COMPARED_STEPS + 2):
            start = time.perf_counter()
            workers.step(step)
            seconds.append(time.perf_counter() - start)
        return round(median(seconds[2:]), 4)

    def _save(self):
        if self._folders is None:
            return
        self._gather_losses()
        position = 0 if self._recorder is None else self._recorder.position()
        training = {"losses": self._losses, "seconds": self._seconds, "statistics": self._statistics(), "log_position": position}
        self._workers.save(self._folders, self.step, training)
