"""Which device a process trains on, and what carries its gradients."""

import os

import torch


def choose(wanted, distributed):
    """Return (device, backend of the default group, a line that says so) for this process.

    Args:
        wanted (str): auto, cpu or cuda. distributed (bool): whether torchrun has started this process.

    Raises SystemExit where CUDA is wanted and there is none.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cuda" and gpus == 0:
        raise SystemExit("--device: expected a GPU that torch can use, got none; choose cpu")
    if wanted == "cpu" or gpus == 0:
        return "cpu", "gloo", "device: CPU; gradients go over gloo" if distributed else "device: CPU"
    if not distributed:
        return "cuda:0", "gloo", f"device: {torch.cuda.get_device_name(0)}, for all workers"
    here, local = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    device = f"cuda:{local % gpus}"
    torch.cuda.set_device(device)
    name = torch.cuda.get_device_name(device)
    if here <= gpus:
        return device, "cpu:gloo,cuda:nccl", f"device: a GPU for each worker ({name}); gradients go over NCCL"
    # NCCL refuses two ranks on one GPU.
    return device, "gloo", f"device: {gpus} GPU for {here} workers of this host ({name}); gradients go over gloo"
