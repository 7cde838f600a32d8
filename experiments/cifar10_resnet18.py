"""Train torchvision's ResNet-18 on CIFAR-10 with sparse gradients: torchrun's job, one process per worker.

Every method starts from the same weights and sees the same batches at one seed. The images are normalised and not
augmented. Prints a table and writes runs/NAME/log.jsonl and runs/NAME/curves.png.
"""

import argparse
import os
import sys
from datetime import timedelta
from pathlib import Path

# torchrun puts this file's folder on the path, not the repository.
sys.path.append(str(Path(__file__).resolve().parent.parent))

LAUNCH = "torchrun --standalone --nproc-per-node 2 experiments/cifar10_resnet18.py"
RUNS = Path("runs")


def parse(arguments):
    """Parse the options; exit with a message where one is out of range (the state checks density and mu itself)."""
    parser = argparse.ArgumentParser(
        usage=f"{LAUNCH} [options]", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def add(name, help, **settings):
        parser.add_argument(name, help=help, **settings)

    add("--method", "(%(default)s)", choices=("dense", "topk", "regtopk"), default="regtopk")
    add("--density", "fraction of the gradient entries each worker sends (%(default)s)", type=float, default=0.001)
    add("--mu", "RegTop-k's mu, no unit (%(default)s)", type=float, default=5.0)
    add("--distortion", "RegTop-k's form (%(default)s)", choices=("previous", "current"), default="previous")
    add("--workers", "number of processes: the argument of make, which hands it to torchrun as --nproc-per-node; "
        "here it must equal torchrun's number", type=int, metavar="N")  # fmt: skip
    add("--steps", "training steps (%(default)s)", type=int, default=1000)
    add("--batch-size", "images per step and worker (%(default)s)", type=int, default=20)
    add("--learning-rate", "of SGD, constant (%(default)s)", type=float, default=0.05)
    add("--momentum", "of SGD, applied to the averaged gradient (%(default)s)", type=float, default=0.0)
    add("--seed", "of the start weights and the order of the images (%(default)s)", type=int, default=0)
    add("--evaluate-every", "steps between tests on the first 1,000 test images (%(default)s); the last test uses all",
        type=int, default=50, metavar="STEPS")  # fmt: skip
    add("--data", "folder that holds cifar-10-batches-py, torchvision's layout; 'digits' for scikit-learn's digits, "
        "which need no network (default: download into data/, and the digits where that fails)", metavar="DIR")  # fmt: skip
    add("--name", "run folder below runs/ (METHOD-dDENSITY-nWORKERS-sSEED); a taken name gets -2, -3, ...")
    add("--bucket-cap-mb", "DDP's bucket size in MiB (%(default)g: the whole model is one bucket, so that k counts the "
        "whole model, as in the paper; DDP's own default is 25)", type=float, default=1024.0, metavar="MIB")  # fmt: skip
    add("--checkpoint", "folder for checkpoints, which every worker must see: the job saves a step folder below it every "
        "--checkpoint-every steps, keeps the newest two, and starts from the newest that is complete (default: none)",
        metavar="DIR")  # fmt: skip
    add("--checkpoint-every", "steps between checkpoints (%(default)s)", type=int, default=100, metavar="STEPS")
    add("--threads", "CPU threads per worker (the cores divided by the workers of this host)", type=int)
    add("--timeout", "seconds a worker waits for another before it fails (%(default)g)", type=float, default=120.0)
    options = parser.parse_args(arguments)
    for name, accepted, condition in (
        ("steps", options.steps >= 1, "at least 1"),
        ("batch_size", options.batch_size >= 2, "at least 2, which BatchNorm needs"),
        ("learning_rate", options.learning_rate > 0, "a number above 0"),
        ("momentum", 0 <= options.momentum < 1, "0 <= momentum < 1"),
        ("seed", options.seed >= 0, "at least 0"),
        ("evaluate_every", options.evaluate_every >= 1, "at least 1"),
        ("checkpoint_every", options.checkpoint_every >= 1, "at least 1"),
        ("bucket_cap_mb", options.bucket_cap_mb > 0, "a number above 0"),
        ("threads", options.threads is None or options.threads >= 1, "at least 1"),
        ("timeout", options.timeout > 0, "a number above 0"),
        ("name", options.name is None or options.name == Path(options.name).name, "a folder name without separators"),
    ):
        if not accepted:
            parser.error(f"--{name.replace('_', '-')}: expected {condition}, got {getattr(options, name)}")
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        parser.error(f"cifar10_resnet18: expected torchrun's RANK and WORLD_SIZE, got none; start it with {LAUNCH}")
    if options.workers not in (None, int(os.environ["WORLD_SIZE"])):
        parser.error(
            f"--workers: expected torchrun's number of processes, {os.environ['WORLD_SIZE']}, got {options.workers}; "
            "hand it to torchrun as --nproc-per-node"
        )
    return options


def together(action, group=None):
    """Return this rank's action(); where it fails on any rank, rank 0 prints the first error and all exit 1. Collective."""
    import torch.distributed as dist

    result = error = None
    try:
        result = action()
    except (ValueError, ImportError, OSError) as caught:
        error = f"rank {dist.get_rank()}: {caught}"
    except RuntimeError as caught:  # what the ranks have agreed on already, naming one of them
        error = str(caught)
    errors = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error, group=group)
    if any(errors):
        if dist.get_rank() == 0:
            print(next(filter(None, errors)), file=sys.stderr, flush=True)
        dist.barrier()  # torchrun ends the others when one exits: not before rank 0 has printed
        dist.destroy_process_group()
        sys.exit(1)
    return result


def make_state(options):
    """Return the hook's state for the method, None for dense; the state checks its own options. Collective."""
    if options.method == "dense":
        return None
    import regtopk_torch as rt

    if options.method == "topk":
        return rt.TopKState(density=options.density)
    return rt.RegTopKState(density=options.density, mu=options.mu, distortion=options.distortion)


def prepare(options):
    """Return (model, state, dataset), or exit on every rank with one message. Collective.

    Only the first process of each host downloads; every rank takes the digits if one host has to. The model is on the
    CPU, its start weights depend only on the seed; the state is None for dense.
    """
    import torch
    import torch.distributed as dist

    from experiments import data
    from experiments.train import Batches

    def import_packages():
        if options.method != "dense":
            import regtopk_torch  # noqa: F401  (before the state's collectives, which a rank without it would miss)
        return data.import_torchvision().models.resnet18

    def choose_data():
        return data.prepare(options.data) if int(os.environ.get("LOCAL_RANK", "0")) == 0 else None

    def load_data():
        dataset = data.load_digits() if None in folders else data.load_cifar10(folders.pop())
        Batches(dataset, options.batch_size, options.seed, dist.get_rank(), dist.get_world_size())
        return dataset

    resnet18 = together(import_packages)
    state = together(lambda: make_state(options))
    # A download may last longer than the job's own timeout: the wait for it has a group of its own.
    waiting = dist.new_group(timeout=timedelta(seconds=data.DOWNLOAD_LIMIT_SECONDS + options.timeout))
    choice = together(choose_data, waiting)
    choices = [None] * dist.get_world_size()
    dist.all_gather_object(choices, choice)
    folders = {choice[0] for choice in choices if choice}
    reasons = [choice[1] for choice in choices if choice and choice[1]]
    if reasons and dist.get_rank() == 0:
        print(f"CIFAR-10 could not be downloaded ({reasons[0]}): training on {data.DIGITS_NAME} instead", flush=True)
    dataset = together(load_data)
    torch.manual_seed(options.seed)
    return resnet18(num_classes=10), state, dataset


def resume(options, model, state, data_name):
    """Return (step folders, what the newest complete one handed back or None); (None, None) without --checkpoint. Collective.

    The state, where there is one, is loaded.
    """
    if options.checkpoint is None:
        return None, None
    import torch.distributed as dist

    from experiments.checkpoints import StepFolders

    names = ["method", "batch_size", "learning_rate", "momentum", "seed"]
    names += {"dense": [], "topk": ["density"], "regtopk": ["density", "mu", "distortion"]}[options.method]
    folders = StepFolders(options.checkpoint, {"data": data_name, **{name: getattr(options, name) for name in names}})
    newest = folders.newest()
    if newest is None:
        return folders, None
    step, folder = newest
    if step > options.steps:
        raise ValueError(f"--steps: expected at least the {step} steps of the checkpoint {folder}, got {options.steps}")
    resumed = folders.load(folder, state, model)
    if dist.get_rank() == 0:
        print(f"resumed from {folder}", flush=True)
    return folders, resumed


def open_log(options, data_name, resumed):
    """Return a recorder on rank 0, None elsewhere: of a new run folder, or of the log of the run that is resumed, cut off
    where its checkpoint was taken."""
    import torch.distributed as dist

    from experiments.record import LOG_NAME, Recorder, create_run_folder, portable

    if dist.get_rank() != 0:
        return None
    workers = dist.get_world_size()
    if resumed is not None:
        path = RUNS / resumed["run"] / LOG_NAME
        return Recorder.resume(path, resumed["log_position"], step=resumed["step"], workers=workers)
    density = "" if options.method == "dense" else f"-d{options.density:g}"
    folder = create_run_folder(options.name or f"{options.method}{density}-n{workers}-s{options.seed}", RUNS)
    settings = {key: portable(value) if isinstance(value, str) else value for key, value in vars(options).items()}
    return Recorder(folder / LOG_NAME, options.seed, workers=workers, data=data_name, options=settings)


def main():
    options = parse(sys.argv[1:])
    import torch
    import torch.distributed as dist

    from experiments.plot_curves import draw
    from experiments.record import count_cores
    from experiments.table import format_table
    from experiments.train import train

    local_workers = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    options.threads = options.threads or max(1, count_cores() // local_workers)
    torch.set_num_threads(options.threads)
    dist.init_process_group("gloo", timeout=timedelta(seconds=options.timeout))
    model, state, dataset = prepare(options)
    folders, resumed = together(lambda: resume(options, model, state, dataset.name))
    recorder = together(lambda: open_log(options, dataset.name, resumed))
    if recorder is not None:
        print(f"data: {dataset.name}; log: {recorder.path}", flush=True)
    result = train(options, model, state, dataset, recorder, folders, resumed)
    if recorder is not None:
        recorder.write("result", **result)
        recorder.close()
        folder = recorder.path.parent
        print(format_table(folder))
        print(f"figure: {draw([folder], folder / 'curves.png')}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
