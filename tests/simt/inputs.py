"""Gradients and brackets that a wrong kernel would stumble over."""

import torch


def hard_inputs(numel):
    """{name: gradient}: what a choice by bracket and histogram might stumble over."""
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(numel, generator=generator)
    ramp = torch.linspace(1e-3, 1e3, numel)
    mostly = torch.where(torch.rand(numel, generator=generator) < 0.99, torch.tensor(0.25), noise)
    some, many = noise.clone(), noise.clone()
    some[5 :: max(1, numel // 7)] = torch.inf
    some[-1] = -torch.inf
    some[numel // 2] = torch.nan
    many[torch.rand(numel, generator=generator) < 0.6] = torch.nan
    many[torch.rand(numel, generator=generator) < 0.5] = -torch.inf
    return {
        "all equal": torch.full((numel,), -0.5),
        "all zero": torch.zeros(numel),
        "one value in 99 %": mostly,
        "one binade": (1 + torch.rand(numel, generator=generator)) * noise.sign(),
        "layers 1e6 apart": noise * torch.logspace(-6, 6, 7).repeat_interleave(-(-numel // 7))[:numel],
        "ascending": ramp,
        "descending": ramp.flip(0),
        "subnormal": noise * 1e-40,
        "some not finite": some,
        "many not finite": many,
        "all nan": torch.full((numel,), torch.nan),
    }


def brackets_of(numel):
    """{name: changes to Sampling}: brackets that hold the k-th score, that miss it, and lists that cannot hold it."""
    sectors = max(1, numel // 8 // 4)
    samples = 8 * sectors
    return {
        "everything": dict(sectors=0, rank_high=0, rank_low=0, list_capacity=numel),
        "wide": dict(sectors=sectors, rank_high=1, rank_low=0, list_capacity=numel),
        "too high": dict(sectors=sectors, rank_high=1, rank_low=1, list_capacity=numel),
        "too low": dict(sectors=sectors, rank_high=samples, rank_low=samples, list_capacity=numel),
        "too low, list too short": dict(sectors=sectors, rank_high=samples, rank_low=samples, list_capacity=numel // 2),
        "list of one": dict(sectors=sectors, rank_high=0, rank_low=samples // 2, list_capacity=1),
    }
