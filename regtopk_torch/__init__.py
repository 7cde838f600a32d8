"""Sparsified gradient exchange for DistributedDataParallel: Top-k and RegTop-k with error feedback, in C++.

    state = regtopk_torch.TopKState(density=0.01)  # or RegTopKState
    ddp.register_comm_hook(state, regtopk_torch.sparse_hook)

Source of the method: Bereyhi, Liang, Boudreau, Afana, "Novel Gradient Sparsification Algorithm via Bayesian Inference",
arXiv 2409.14893. `regtopk_torch.reference` states all of it in plain PyTorch with equation numbers.
"""

import atexit
import importlib

import torch

try:
    _C = importlib.import_module("regtopk_torch._C")
except ImportError as error:
    raise ImportError(
        f"regtopk_torch: expected its extension built for torch {torch.__version__}, got: {error}; run `make setup` "
        "or `pip install --no-build-isolation -e .` in the project's folder"
    ) from error

from regtopk_torch import fake, groups, presets  # noqa: F401  (fake registers the fake kernels)
from regtopk_torch.directory import CheckpointError, load, save
from regtopk_torch.hook import attach, sparse_hook
from regtopk_torch.local import LocalExchange
from regtopk_torch.local_steps import LocalSteps
from regtopk_torch.schedules import AdaptiveDensity, WarmupDensity
from regtopk_torch.states import RegTopKState, TopKState

__version__ = "0.1.0"
__all__ = ["AdaptiveDensity", "CheckpointError", "LocalExchange", "LocalSteps", "RegTopKState", "TopKState", "WarmupDensity", "attach", "has_cuda_kernels", "load", "presets", "save", "sparse_hook"]

has_cuda_kernels = _C.has_cuda_kernels

# An instruction set that REGTOPK_CPU names in vain is an error now, not in the middle of a backward pass.
_C.cpu_variant()

atexit.register(groups.close_all)
