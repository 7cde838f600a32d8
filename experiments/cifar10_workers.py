"""Train N workers on CIFAR-10 in one process: the paper's Fig. 3 and the questions it leaves open.

Every method starts from the same weights and sees the same batches at one seed. The images are normalised and not
augmented. Writes FOLDER/log.jsonl; a run that was killed, at any step, continues from its last save when the same
command is given again, and so does a finished one with more --steps.
"""

import argparse
import hashlib
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

from experiments.models import MODELS
from experiments.partitions import PARTITIONS

LOSS_STEPS = 50
EVALUATION_BATCH = 250
SAVE_NAME = "save.pt"
# What a resumed run may change: where it finds and puts things, how long it goes on, and in how many processes.
CHANGEABLE = ("data", "folder", "steps", "save_every", "distributed", "timeout")


def parse(arguments):
    """Parse the options; exit with a message where one is out of range (the exchange checks density and mu itself)."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.cifar10_workers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def add(name, help, **settings):
        parser.add_argument(name, help=help, **settings)

    add("--method", "(%(default)s)", choices=("dense", "topk", "regtopk"), default="regtopk")
    add("--density", "fraction of the gradient entries each worker sends (%(default)s)", type=float, default=0.001)
    add("--mu", "RegTop-k's mu, no unit (%(default)s)", type=float, default=5.0)
    add("--distortion", "RegTop-k's form (%(default)s)", choices=("previous", "current"), default="previous")
    add("--model", "(%(default)s)", choices=MODELS, default="resnet18")
    add("--workers", "N (%(default)s)", type=int, default=8, metavar="N")
    add("--steps", "exchanges (%(default)s)", type=int, default=1500)
    add("--local-steps", "steps that a worker takes on its own between two exchanges (%(default)s)", type=int, default=1)
    add("--batch-size", "images per step and worker (%(default)s)", type=int, default=20)
    add("--learning-rate", "of SGD, constant (%(default)s)", type=float, default=0.01)
    add("--seed", "of start weights, order of images and partition (%(default)s)", type=int, default=0)
    add("--partition", "how the training images are shared out (%(default)s)", choices=PARTITIONS, default="iid")
    add("--concentration", "of --partition dirichlet: small is uneven (%(default)s)", type=float, default=0.1)
    add("--evaluate-every", "steps between tests on all test images (%(default)s)", type=int, default=100, metavar="STEPS")
    add("--save-every", "steps between saves (%(default)s)", type=int, default=100, metavar="STEPS")
    add("--record-every", "steps whose mean loss makes one line of the log (%(default)s)", type=int, default=10, metavar="STEPS")
    add("--data", "folder that holds cifar-10-batches-py, torchvision's layout; 'digits' for scikit-learn's digits "
        "(default: download into data/)", metavar="DIR")  # fmt: skip
    add("--folder", "where log and save go (default: runs/NAME, named after the options)", type=Path)
    add("--threads", "CPU threads per process (the cores of this host)", type=int)
    add("--device", "where the gradients are computed; the exchange is on the CPU (%(default)s)", default="cpu")
    add("--distributed", "under torchrun, one process per worker with DDP: the same numbers, bit for bit", action="store_true")
    add("--timeout", "seconds a process of --distributed waits for another (%(default)g)", type=float, default=600.0)
    options = parser.parse_args(arguments)
    for name, accepted, condition in (
        ("workers", options.workers >= 1, "at least 1"),
        ("steps", options.steps >= 1, "at least 1"),
        ("local_steps", options.local_steps >= 1, "at least 1"),
        ("batch_size", options.batch_size >= 2, "at least 2, which BatchNorm needs"),
        ("learning_rate", options.learning_rate > 0, "a number above 0"),
        ("seed", options.seed >= 0, "at least 0"),
        ("concentration", options.concentration > 0, "a number above 0"),
        ("evaluate_every", options.evaluate_every >= 1, "at least 1"),
        ("save_every", options.save_every >= 1, "at least 1"),
        ("record_every", options.record_every >= 1, "at least 1"),
        ("threads", options.threads is None or options.threads >= 1, "at least 1"),
        ("timeout", options.timeout > 0, "a number above 0"),
    ):
        if not accepted:
            parser.error(f"--{name.replace('_', '-')}: expected {condition}, got {getattr(options, name)}")
    if options.distributed:
        if "RANK" not in os.environ or os.environ.get("WORLD_SIZE") != str(options.workers):
            found = os.environ.get("WORLD_SIZE", "none")
            parser.error(
                f"--distributed: expected torchrun's WORLD_SIZE of {options.workers}, got {found}; start it with torchrun "
                f"--standalone --nproc-per-node {options.workers} -m experiments.cifar10_workers --distributed"
            )
        if options.local_steps > 1 or options.device != "cpu":
            parser.error("--distributed: expected --local-steps 1 and --device cpu, got others; leave --distributed out")
    options.folder = options.folder or Path("runs") / name_run(options)
    return options


def name_run(options):
    """Return a folder name that tells runs apart, such as resnet18-regtopk-d0.001-mu5-s0."""
    parts = [options.model, options.method]
    if options.method != "dense":
        parts.append(f"d{options.density:g}")
    if options.method == "regtopk":
        parts.append(f"mu{options.mu:g}" + ("" if options.distortion == "previous" else f"-{options.distortion}"))
    if options.partition != "iid":
        parts.append(options.partition + (f"{options.concentration:g}" if options.partition == "dirichlet" else ""))
    if options.local_steps > 1:
        parts.append(f"local{options.local_steps}")
    return "-".join([*parts, f"s{options.seed}"])


def evaluate(model, dataset):
    """Return the accuracy (0...1) on all test images; the model is in training mode before and after."""
    import torch

    device = next(model.parameters()).device
    correct = 0
    model.eval()
    with torch.no_grad():
        for images, labels in zip(dataset.test_images.split(EVALUATION_BATCH), dataset.test_labels.split(EVALUATION_BATCH)):
            predicted = model(dataset.normalise(images).to(device)).argmax(dim=1).cpu()
            correct += (predicted == labels).sum().item()
    model.train()
    return correct / len(dataset.test_labels)


def digest(model):
    """Return the SHA-256 of the parameters' bytes, in the model's order, as 64 hexadecimal digits."""
    result = hashlib.sha256()
    for parameter in model.parameters():
        result.update(parameter.detach().cpu().contiguous().numpy().tobytes())
    return result.hexdigest()


class Run:
    """One training run with its log and its saves: everything that a killed run needs to go on is in `folder`.

    Collective under --distributed; only rank 0 tests, records and saves.
    """

    def __init__(self, options, workers, dataset):
        self._options, self._workers, self._dataset = options, workers, dataset
        self._recorder = None
        self._step, self._earlier, self._losses, self._seconds = 0, None, [], []

    def begin(self, saved):
        """Start the log, or go on from `saved`, what `read_save` returned."""
        from experiments.record import LOG_NAME, Recorder, portable

        options, log = self._options, self._options.folder / LOG_NAME
        if saved is not None:
            self._workers.model.load_state_dict(saved["model"])
            self._workers.load_exchange_state(saved["exchange"])
            self._step, self._earlier = saved["step"], saved["statistics"]
            self._losses, self._seconds = saved["losses"], saved["seconds"]
            if self._workers.rank == 0:
                self._recorder = Recorder.resume(log, saved["log_bytes"], step=self._step, steps=options.steps)
            return
        if self._workers.rank == 0:
            options.folder.mkdir(parents=True, exist_ok=True)
            log.unlink(missing_ok=True)  # of a run that ended before its first save
            settings = {key: portable(str(value)) if key in ("data", "folder") and value else value for key, value in vars(options).items()}
            self._recorder = Recorder(log, options.seed, workers=options.workers, data=self._dataset.name, options=settings)
        self._test()  # on every rank: it gathers statistics

    def train(self):
        """Take the steps that are left, write the result, and return its accuracy (None except on rank 0)."""
        options = self._options
        while self._step < options.steps:
            start = time.perf_counter()
            self._losses.append(self._workers.step(self._step))
            self._seconds.append(time.perf_counter() - start)
            self._step += 1
            if not abs(self._losses[-1]) < float("inf"):
                raise RuntimeError(
                    f"cifar10_workers: expected a finite training loss, got {self._losses[-1]} at step {self._step}; "
                    "lower --learning-rate"
                )
            if self._step % options.record_every == 0 and self._recorder is not None:
                loss = sum(self._losses[-options.record_every :]) / options.record_every
                seconds = sum(self._seconds[-options.record_every :]) / options.record_every
                self._recorder.write("step", step=self._step, loss=round(loss, 6), seconds=round(seconds, 4))
            self._losses, self._seconds = self._losses[-self._kept() :], self._seconds[-self._kept() :]
            if self._step == options.steps:
                break
            if self._step % options.evaluate_every == 0:
                self._test()
            if self._step % options.save_every == 0:
                self._save()
        accuracy = self._test()
        statistics = self._statistics()
        if self._recorder is not None:
            self._recorder.write(
                "result", step=self._step, accuracy=accuracy, test_images=len(self._dataset.test_labels),
                training_loss=sum(self._losses[-LOSS_STEPS:]) / len(self._losses[-LOSS_STEPS:]),
                median_step_seconds=round(sorted(self._seconds)[len(self._seconds) // 2], 4),
                parameters_sha256=digest(self._workers.model), statistics=statistics,
            )  # fmt: skip
        self._save()
        return accuracy

    def _kept(self):
        return max(LOSS_STEPS, self._options.record_every)

    def _statistics(self):
        from experiments.workers import add_statistics

        return add_statistics(self._earlier, self._workers.statistics())

    def _test(self):
        """Record accuracy and, as means over the workers since the start, what was exchanged."""
        statistics = self._statistics()
        if self._recorder is None:
            return None
        accuracy = evaluate(self._workers.model, self._dataset)
        names = ("bytes_sent", "bytes_dense", "sent_entries", "repeated", "displaced")
        per_worker = {name: statistics[name] / self._options.workers for name in names}
        self._recorder.write("test", step=self._step, accuracy=accuracy, images=len(self._dataset.test_labels), **per_worker)
        print(f"step {self._step}/{self._options.steps}  accuracy {accuracy:.2%}", flush=True)
        return accuracy

    def _save(self):
        """Replace the save at once, so that a kill leaves the old one or the new one."""
        import torch

        exchange, statistics = self._workers.exchange_state(), self._statistics()
        if self._recorder is None:
            return
        path = self._options.folder / SAVE_NAME
        content = {
            "options": {key: value for key, value in vars(self._options).items() if key not in CHANGEABLE},
            "step": self._step, "model": self._workers.model.state_dict(), "exchange": exchange, "statistics": statistics,
            "losses": self._losses, "seconds": self._seconds, "log_bytes": self._recorder.position(),
        }  # fmt: skip
        torch.save(content, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)


def read_save(options):
    """Return what the folder's last save holds, or None; raise ValueError where it was made with other options."""
    import torch

    path = options.folder / SAVE_NAME
    if not path.exists():
        return None
    saved = torch.load(path, weights_only=True)
    for name, value in saved["options"].items():
        if getattr(options, name) != value:
            raise ValueError(
                f"--{name.replace('_', '-')}: expected {value}, with which the save in {options.folder} was made, "
                f"got {getattr(options, name)}; name another --folder"
            )
    return saved


def load_dataset(options):
    """Return the data set that `options.data` names; raise ValueError where there is none."""
    from experiments import data

    folder, reason = data.prepare(options.data)
    if folder is None and reason:
        raise ValueError(f"--data: expected CIFAR-10, got none, it could not be downloaded ({reason}); name its folder, or digits")
    return data.load_digits() if folder is None else data.load_cifar10(folder)


def share_save(saved):
    """Give every rank what rank 0 read, but the exchange's state, which stays on rank 0 until it is loaded. Collective."""
    import torch.distributed as dist

    shared = [None if saved is None else {**saved, "exchange": None}]
    dist.broadcast_object_list(shared, src=0)
    return saved if dist.get_rank() == 0 else shared[0]


def main(arguments=None):
    options = parse(arguments)
    import torch

    from experiments.models import make_model
    from experiments.partitions import make_batches
    from experiments.record import count_cores
    from experiments.workers import DistributedWorkers, LocalWorkers

    options.threads = options.threads or count_cores()
    torch.set_num_threads(options.threads)
    settings = {"density": options.density, "mu": options.mu, "distortion": options.distortion, "learning_rate": options.learning_rate}
    if options.distributed:
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=options.timeout))
    try:
        rank = torch.distributed.get_rank() if options.distributed else 0
        saved = read_save(options) if rank == 0 else None
        if options.distributed:
            saved = share_save(saved)
        if saved is not None and saved["step"] >= options.steps:
            print(f"finished at step {saved['step']} already: {options.folder}")
            return
        dataset = load_dataset(options)
        model = make_model(options.model, options.seed).to(options.device)
        batches = make_batches(dataset, options.batch_size, options.seed, options.workers, options.partition, options.concentration)
        if options.distributed:
            workers = DistributedWorkers(model, batches, options.method, **settings)
        else:
            workers = LocalWorkers(model, batches, options.method, local_steps=options.local_steps, **settings)
        run = Run(options, workers, dataset)
        run.begin(saved)
    except (ValueError, ImportError, OSError) as error:
        sys.exit(str(error))
    accuracy = run.train()
    if rank == 0:
        print(f"log={options.folder}/log.jsonl")
        print(f"accuracy={accuracy:.4f}")
    if options.distributed:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
