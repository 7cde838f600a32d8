"""Start torchrun so that Ctrl-C ends without its traceback, and restarts find their way: python -m experiments.launch TORCHRUN'S ARGUMENTS."""

import os
import sys


def main(arguments=None):
    # Otherwise a restarted worker may find the address of a dead one in the store that torchrun keeps (pytorch issue 135712).
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # or torchrun warns; the script sets its own number
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException

    try:
        run.main(arguments)
    except SignalException as signal:  # torchrun has handed it to the workers, which have said what there is to say
        sys.exit(128 + signal.sigval)


if __name__ == "__main__":
    main()
