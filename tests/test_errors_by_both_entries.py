"""An error has its documented type and text on every rank, whether the hook is registered with DDP or attached."""

import datetime

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from given import ENTRIES, Given, integers, register
from processes import run_workers
from torch.nn.parallel import DistributedDataParallel

import regtopk_torch as rt

PATIENCE = datetime.timedelta(seconds=4)


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(5, dtype=torch.complex64))

    def forward(self, gradients):
        return (self.weight * gradients[0][:5]).abs().sum()


def fail(rank, entry, case):
    """Train until something is wrong on rank 1, in the step that `case` names; return the error's type and text, and the step."""
    group = dist.new_group(timeout=PATIENCE if case == "late" else None)
    odd = rank == 1
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0 if odd and case == "scale" else 4.0)
    state = rt.TopKState(0.2 if odd and case == "density" else 0.1, process_group=group, grad_scaler=scaler)
    ddp = DistributedDataParallel(Complex() if case == "dtype" else Given(40), process_group=group)
    register(ddp, state, entry)
    try:
        for step in range(4):
            if case == "late" and odd and step == 3:
                break
            if case == "later scale" and odd and step == 3:
                scaler.update(2.0)
            if case == "tiny scale" and step == 3:
                scaler.update(2.0**-80)
            scaler.scale(ddp(integers(40, seed=step))).backward()
    except Exception as error:
        return type(error), str(error), step
    finally:
        dist.barrier()
    return None, "", step


SAME = "rank {rank}: sparse_hook: expected the same "


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(
    ("case", "kind", "text", "step"),
    [
        ("density", ValueError, SAME + "density on every rank, got 0.1 on rank 0 and 0.2 on rank 1", 0),
        ("scale", ValueError, SAME + "gradient scale on every rank, got 4 on rank 0 and 8 on rank 1", 0),
        ("later scale", ValueError, SAME + "gradient scale on every rank, got 4 on rank 0 and 2 on rank 1", 3),
        ("tiny scale", ValueError, "rank {rank}: sparse_hook: expected a gradient scale between 2^-64 and 2^64, got ", 3),
        ("dtype", TypeError, "rank {rank}: sparse_hook: expected gradients of dtype float64, float32, bfloat16 or float16, got ComplexFloat", 0),
    ],
)
def test_what_is_wrong_is_an_error_of_its_type_and_text(case, kind, text, step, entry):
    for rank, (got, message, at) in enumerate(run_workers(fail, 2, entry, case)):
        assert (got, at) == (kind, step), message
        assert message.startswith(text.format(rank=rank)), message


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_rank_that_does_not_answer_is_a_distributed_error(entry):
    (got, message, step), _ = run_workers(fail, 2, entry, "late")
    assert (got, step) == (dist.DistBackendError, 3), message
    assert message.startswith("rank 0: sparse_hook: expected the payloads of all 2 ranks of step 3 within 4 s, got ")
