"""Torch is all that a training job needs: in an environment without NumPy it trains, saves, loads and flushes."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

JOB = textwrap.dedent("""
    import os
    import sys

    sys.modules["numpy"] = None  # every import of it fails

    import datetime
    import torch
    import torch.distributed as dist
    import torch._dynamo  # DDP imports it, here once for both
    from torch.nn.parallel import DistributedDataParallel

    import regtopk_torch as rt

    # Two processes, of one that has imported all this; both ends of the job are waited for.
    rank, folder = 0 if (other := os.fork()) else 1, sys.argv[1]
    torch.set_num_threads(1)
    store = dist.FileStore(folder + "/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60))
    try:
        torch.zeros(1).numpy()
    except RuntimeError as error:
        assert "Numpy is not available" in str(error)
    else:
        raise AssertionError("expected an environment without NumPy")

    torch.manual_seed(0)
    model = torch.nn.Linear(20, 20)
    ddp = DistributedDataParallel(model)
    state = rt.RegTopKState(0.1, mu=1.0)
    ddp.register_comm_hook(state, rt.sparse_hook)
    generator = torch.Generator().manual_seed(rank)


    def step():
        ddp(torch.randn(4, 20, generator=generator)).square().mean().backward()


    step()
    step()
    rt.save(state, ddp, folder + "/checkpoint")
    kept = state.state_dict(ddp)["parameters"]["weight"]["residual"]
    step()
    rt.load(state, ddp, folder + "/checkpoint")
    assert torch.equal(kept, state.state_dict(ddp)["parameters"]["weight"]["residual"]) and kept.any()
    step()
    state.flush(ddp)
    assert state.stats()["steps"] == 4
    dist.barrier()
    dist.destroy_process_group()
    if other:
        assert os.waitpid(other, 0)[1] == 0
        print("done")
""")


def test_without_numpy_a_job_trains_saves_loads_and_flushes(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run([sys.executable, "-c", JOB, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr[-3000:]
