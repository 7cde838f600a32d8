"""Gradients that selection finds hard, by name and seed."""

import math

import torch

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

KINDS = (
    "normal", "all equal", "all zero", "signed zeros", "few values", "mostly one value", "one binade", "denormal", "huge",
    "two scales", "ascending", "descending", "some NaN", "some infinite", "all NaN",
)  # fmt: skip


def gradient(kind, numel, dtype, seed):
    """A flat gradient of shape [numel] of one of KINDS; equal arguments give equal bits."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(numel, generator=generator, dtype=torch.float64)
    uniform = torch.rand(numel, generator=generator, dtype=torch.float64)
    limits = torch.finfo(dtype)
    if kind == "normal":
        values = normal
    elif kind == "all equal":
        values = torch.full_like(normal, 0.375)
    elif kind == "all zero":
        values = torch.zeros_like(normal)
    elif kind == "signed zeros":
        values = torch.where(uniform < 0.5, -0.0, 0.0)
    elif kind == "few values":
        values = (normal * 2).round() / 4
    elif kind == "mostly one value":
        values = torch.where(uniform < 0.99, 0.25, normal)
    elif kind == "one binade":
        values = torch.where(normal < 0, -1.0, 1.0) * (1 + uniform * 0.999)
    elif kind == "denormal":
        values = normal * (limits.tiny / 4)
    elif kind == "huge":
        values = normal.clamp(-4, 4) * (limits.max / 5)
    elif kind == "two scales":
        values = torch.where(torch.arange(numel) < numel // 2, normal, normal * (1e6 if dtype != torch.float16 else 1e3))
    elif kind == "ascending":
        values = normal.sort().values
    elif kind == "descending":
        values = normal.sort(descending=True).values
    elif kind == "some NaN":
        values = torch.where(uniform < 0.01, math.nan, normal)
    elif kind == "some infinite":
        values = torch.where(uniform < 0.01, math.copysign(math.inf, seed % 2 - 0.5), normal)
    else:
        values = torch.full_like(normal, math.nan)
    return values.to(dtype)


def same_bits(left, right):
    """Whether two floating tensors have equal dtype, shape and bits, NaN equal to any NaN."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16}[left.element_size()]
    both_nan = left.isnan() & right.isnan()
    return bool((both_nan | (left.view(integers) == right.view(integers))).all())
