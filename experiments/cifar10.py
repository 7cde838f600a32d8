"""Train on CIFAR-10 with sparse gradients, and write a table, a log and curves that say what was learned and what was sent.

    torchrun --standalone --nproc-per-node 2 experiments/cifar10.py     one process per worker with DDP
    python -m experiments.cifar10 --workers 2                           both workers in this process, with the same bits

Every method starts from the same weights and sees the same batches at one seed. The images are normalised and not augmented.
A run that was stopped goes on from its last checkpoint when the same command is given again, a finished one with more --steps.
Where torchrun is to restart workers that died (--max-restarts), set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for it: without that
the new workers may find the address of a dead one.
"""

import os
import signal
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

# torchrun puts this file's folder on the path, not the repository.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from experiments.batches import PARTITIONS  # noqa: E402
from experiments.models import MODELS  # noqa: E402
from runlog.command import check, make_parser  # noqa: E402
from runlog.record import count_cores  # noqa: E402

# The paper's Fig. 3, and how the committed logs were made.
PAPER = {"workers": 8, "learning_rate": 0.01, "steps": 1500, "test_images": 10_000, "evaluate_every": 100}
# Parts of the exchange that the paper's does not have, as they are unless an option says otherwise.
USUAL = {
    "decay": 1.0, "dense_steps": 0, "warmup_steps": 0, "wire_dtype": "fp32", "index_code": "elias-fano", "support": "own", "chunk": None,
    "adaptive_power": None, "dense": "never", "levels": None, "momentum_correction": 0.0, "mask_momentum": False, "clip_norm": None,
}  # fmt: skip


def parse(arguments):
    """Parse the options; exit with a message where one is out of range (the exchange checks mu itself)."""
    parser = make_parser("experiments.cifar10", __doc__)

    def add(name, help, **settings):
        parser.add_argument(name, help=help, **settings)

    add("--method", "(%(default)s)", choices=("dense", "topk", "regtopk"), default="regtopk")
    add("--density", "fraction of the gradient entries each worker sends (%(default)s)", type=float, default=0.001)
    add("--mu", "RegTop-k's mu, no unit (%(default)s)", type=float, default=5.0)
    add("--distortion", "RegTop-k's form (%(default)s)", choices=("previous", "current"), default="previous")
    add("--decay", "of what is held back, each step (%(default)g: it is kept)", type=float, default=1.0)
    add("--dense-steps", "first steps, without compression (%(default)s)", type=int, default=0, metavar="STEPS")
    add("--warmup-steps", "first steps, in which the density falls from 0.25 to --density (%(default)s)", type=int, default=0, metavar="STEPS")
    add("--wire-dtype", "in which the values travel (%(default)s, the gradients' own)", choices=("fp32", "bf16", "fp16", "sign", "2bit"), default="fp32")
    add("--index-code", "of the places of the values (%(default)s)", choices=("elias-fano", "offsets"), default="elias-fano")
    add("--support", "who chooses the entries: each worker its own, or one for all (%(default)s)", choices=("own", "leader"), default="own")
    add("--chunk", "consecutive entries that each send their own share (the whole bucket)", type=int, metavar="ENTRIES")
    add("--adaptive-power", "density follows the norm of the average to this power, around --density (fixed)", type=float, metavar="POWER")
    add("--dense", "auto: buckets that would send no less otherwise send all (%(default)s)", choices=("never", "auto"), default="never")
    add("--levels", "ranks to a host, or host, as torchrun numbers them: dense inside it, sparse between hosts (none)", type=ranks, metavar="RANKS")
    add("--momentum-correction", "of what each worker gives, instead of --momentum (%(default)s)", type=float, default=0.0, metavar="MOMENTUM")
    add("--mask-momentum", "where an entry was sent its corrected momentum begins anew", action="store_true")
    add("--clip-norm", "of a bucket's gradient, over the root of the number of workers (no limit)", type=float, metavar="NORM")
    add("--model", "(%(default)s)", choices=MODELS, default="resnet18")
    add("--workers", "in this process (2), or what torchrun has started; make hands it to torchrun as --nproc-per-node", type=int, metavar="N")
    add("--steps", "exchanges (%(default)s)", type=int, default=1000)
    add("--local-steps", "steps that a worker takes on its own between two exchanges (%(default)s)", type=int, default=1, metavar="STEPS")
    add("--batch-size", "images per step and worker (%(default)s)", type=int, default=20, metavar="IMAGES")
    add("--learning-rate", "constant (%(default)s)", type=float, default=0.05, metavar="RATE")
    add("--optimizer", "takes the averaged gradient (%(default)s)", choices=("sgd", "adamw"), default="sgd")
    add("--momentum", "of SGD, applied to the averaged gradient (%(default)s)", type=float, default=0.0)
    add("--seed", "of start weights, order of images and partition (%(default)s)", type=int, default=0)
    add("--partition", "how the training images are shared out (%(default)s)", choices=PARTITIONS, default="iid")
    add("--concentration", "of --partition dirichlet: small is uneven (%(default)s)", type=float, default=0.1)
    add("--evaluate-every", "steps between tests (%(default)s)", type=int, default=50, metavar="STEPS")
    add("--test-images", "of the tests on the way; the last test uses all (%(default)s)", type=int, default=1000, metavar="IMAGES")
    add("--record-every", "steps whose mean loss makes one line of the log (%(default)s)", type=int, default=10, metavar="STEPS")
    add("--save-every", "steps between checkpoints; the newest is kept (%(default)s)", type=int, default=100, metavar="STEPS")
    add("--paper", "the setting of the paper's Fig. 3 where no option says otherwise: 8 workers, learning rate 0.01, 1,500 steps, "
        "tests on all images every 100", action="store_true")  # fmt: skip
    add("--compare", "after training, time a few steps of DDP's dense all-reduce for the table (under torchrun)", action="store_true")
    add("--data", "folder that holds cifar-10-batches-py, torchvision's layout; 'digits' for scikit-learn's digits, "
        "which need no network (default: download into data/, and the digits where that fails)", metavar="DIR")  # fmt: skip
    add("--folder", "where the log and the figure go (default: runs/NAME, named after the options)", type=Path)
    add("--checkpoint", "folder for checkpoints, which every worker must see (default: in the run's folder; on several hosts none)",
        type=Path, metavar="DIR")  # fmt: skip
    add("--bucket-cap-mb", "DDP's bucket size in MiB (%(default)g: the whole model is one bucket, so that k counts the whole model, "
        "as in the paper; DDP's own default is 25)", type=float, default=1024.0, metavar="MIB")  # fmt: skip
    add("--threads", "CPU threads per process (the cores divided by the processes of this host)", type=int)
    add("--device", "what trains, and exchanges where it can: auto is the GPUs where there are any (%(default)s)",
        choices=("auto", "cpu", "cuda"), default="auto")  # fmt: skip
    add("--timeout", "seconds a process waits for another before it fails (%(default)g)", type=float, default=120.0)
    if "--paper" in arguments:
        parser.set_defaults(**PAPER)
    options = parser.parse_args(arguments)
    counts = ("workers", "steps", "local_steps", "evaluate_every", "test_images", "record_every", "save_every", "threads")
    check(
        parser, options, *((name, lambda value: value >= 1, "at least 1") for name in counts),
        *((name, lambda value: value > 0, "a number above 0") for name in ("learning_rate", "concentration", "bucket_cap_mb", "timeout")),
        *((name, lambda value: value >= 0, "at least 0") for name in ("dense_steps", "warmup_steps")),
        ("density", lambda value: 0 < value <= 1, "0 < density <= 1, such as 0.001, which keeps one entry in 1000"),
        ("decay", lambda value: 0 < value <= 1, "0 < decay <= 1"),
        ("batch_size", lambda value: value >= 2, "at least 2, which BatchNorm needs"),
        *((name, lambda value: 0 <= value < 1, f"0 <= {name} < 1") for name in ("momentum", "momentum_correction")),
        ("clip_norm", lambda value: value > 0, "a number above 0"),
        ("seed", lambda value: value >= 0, "at least 0"),
    )  # fmt: skip
    options.distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if options.distributed:
        processes = int(os.environ["WORLD_SIZE"])
        if options.workers not in (None, processes) and "--paper" not in arguments:
            parser.error(f"--workers: expected torchrun's number of processes, {processes}, got {options.workers}; "
                         "hand it to torchrun as --nproc-per-node")  # fmt: skip
        options.workers = processes
        if options.local_steps > 1:
            parser.error(f"--local-steps: expected 1 under torchrun, got {options.local_steps}; run all workers in one process")
    elif options.levels is not None:
        parser.error(f"--levels: expected a job under torchrun, got {options.levels} without; workers in one process have no hosts")
    elif options.compare:
        parser.error("--compare: expected torchrun, got none: workers in one process wait for no network; start it with torchrun "
                     "--standalone --nproc-per-node 2 experiments/cifar10.py --compare")  # fmt: skip
    for name, excludes in (("momentum_correction", "momentum"), ("adaptive_power", "warmup_steps")):
        if getattr(options, name) and getattr(options, excludes):
            parser.error(f"--{name.replace('_', '-')}: expected no --{excludes.replace('_', '-')} beside it, got {getattr(options, excludes)}")
    options.workers = options.workers or 2
    options.folder = options.folder or Path("runs") / name_run(options)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", options.workers)) if options.distributed else 1
    options.threads = options.threads or max(1, count_cores() // local)
    if options.checkpoint is None and (not options.distributed or local == options.workers):
        options.checkpoint = options.folder / "checkpoints"
    return options


def ranks(text):
    return text if text == "host" else int(text)


def unusual(options):
    """Return, of a dict of options, those about what travels that are not as in the paper."""
    return {name: options[name] for name, usual in USUAL.items() if options.get(name, usual) != usual}


def name_run(options):
    """Return a folder name that tells runs apart, such as resnet18-regtopk-d0.001-mu5-n2-s0."""
    parts = [options.model, options.method]
    if options.method != "dense":
        parts.append(f"d{options.density:g}")
    if options.method == "regtopk":
        parts.append(f"mu{options.mu:g}" + ("" if options.distortion == "previous" else f"-{options.distortion}"))
    if options.method != "dense":
        for name, value in unusual(vars(options)).items():
            named = isinstance(value, str) and name not in ("dense", "levels")
            told = "" if value is True else value if isinstance(value, str) else f"{value:g}"
            parts.append(value if named else name.split("_")[0] + told)
    if options.partition != "iid":
        parts.append(options.partition + (f"{options.concentration:g}" if options.partition == "dirichlet" else ""))
    if options.local_steps > 1:
        parts.append(f"local{options.local_steps}")
    if options.optimizer != "sgd":
        parts.append(options.optimizer)
    return "-".join([*parts, f"n{options.workers}", f"s{options.seed}"])


class Interrupt:
    """End this process at Ctrl-C, which torchrun hands to all processes of the job, and say how to go on.

    A thread does it: the main thread hears a signal only between two operations, and a long one would outlive the other processes.
    """

    def __init__(self):
        self.run = None
        heard, pipe = os.pipe()
        os.set_blocking(pipe, False)
        signal.set_wakeup_fd(pipe)
        signal.signal(signal.SIGINT, lambda *_: None)  # with a handler, Python writes each signal's number into the pipe
        threading.Thread(target=self._stop, args=(heard,), daemon=True).start()

    def _stop(self, heard):
        while os.read(heard, 1)[0] != signal.SIGINT:
            pass
        try:
            if os.environ.get("RANK", "0") == "0":
                saved = "its last checkpoint, if there is one" if self.run is None else f"step {self.run.saved()}"
                print(f"\nstopped; the same command goes on from {saved}", flush=True)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what now fails does so because another process has ended
            if os.environ.get("RANK") == "0":
                # The store of the job ends with this process: the others shall have heard the signal before. The system's alarm ends it,
                # for a main thread that meets their end may hold the interpreter for seconds.
                signal.setitimer(signal.ITIMER_REAL, 1)
                time.sleep(10)
        finally:  # the output may be closed, or the folder gone
            os._exit(128 + signal.SIGINT)  # at once: another rank may wait for this one, or this one for another


def main(arguments=None):
    options = parse(sys.argv[1:] if arguments is None else arguments)
    interrupt = Interrupt()
    import torch
    import torch.distributed as dist

    from experiments.checkpoints import JobError
    from experiments.devices import choose
    from experiments.report.figures import draw_runs, save
    from experiments.report.logs import read_run
    from experiments.report.table import format_table
    from experiments.run import Run

    torch.set_num_threads(options.threads)
    # One process is a group of one: everything else is the same for both forms.
    alone = {} if options.distributed else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    options.device, backend, said = choose(options.device, options.distributed)
    dist.init_process_group(backend, timeout=timedelta(seconds=options.timeout), **alone)
    rank = dist.get_rank()
    if rank == 0:
        print(said, flush=True)
    if rank == 0 and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0" and "TORCH_DISABLE_SHARE_RDZV_TCP_STORE" not in os.environ:
        print("cifar10: expected TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 with --max-restarts, got none; a restart may fail", file=sys.stderr)
    try:
        interrupt.run = Run(options)
        interrupt.run.train()
        if rank == 0:
            result = read_run(options.folder)
            print(format_table(result))
            print(f"figure: {save(draw_runs([result]), options.folder / 'curves.svg')}")
        dist.barrier()
    except JobError as error:
        if rank == 0:
            print(error, file=sys.stderr, flush=True)
        dist.barrier()  # torchrun ends the others when one exits: not before rank 0 has printed
        sys.exit(1)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
