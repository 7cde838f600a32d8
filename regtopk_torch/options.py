"""The options of the selection, checked once."""

import difflib
import inspect
import math
import numbers
import os
from collections.abc import Callable
from typing import Any, TypedDict

import torch

from regtopk_torch import _C
from regtopk_torch.schedules import AdaptiveDensity

METHODS = ("topk", "regtopk")
DISTORTIONS = ("previous", "current")
INDEX_CODES = ("elias-fano", "offsets")
SUPPORTS = ("own", "leader")
# Values of less than a byte, by the dtype whose elements of so many bits the extension knows them by.
CODES: dict[Any, torch.dtype] = {"sign": torch.bits1x8, "2bit": torch.bits2x4}
CHUNKS = [2**bits for bits in range(6, 17)]
class Common(TypedDict, total=False):
    """What every method takes, for editors and type checkers; TopKState says what each is."""

    decay: float
    dense_steps: int
    wire_dtype: torch.dtype | str | None
    index_code: str
    support: str
    chunk: int | None
    momentum: float
    nesterov: bool
    mask_momentum: bool
    clip_norm: float | None
    dense: str | Callable[[str, int], bool]
    levels: str | int | None


# The same, and what each is unless it is given.
COMMON: dict[str, Any] = {"decay": 1.0, "dense_steps": 0, "wire_dtype": None, "index_code": "elias-fano", "support": "own", "chunk": None, "momentum": 0.0, "nesterov": False, "mask_momentum": False, "clip_norm": None, "dense": "never", "levels": None}


def lists_common(constructor):
    """A constructor whose signature, as help() and notebooks show it, has each of COMMON in the place of **options."""
    given = inspect.signature(constructor)
    *own, _ = given.parameters.values()
    common = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=usual) for name, usual in COMMON.items()]
    constructor.__signature__ = given.replace(parameters=[*own, *common])
    return constructor


def check_options(who, names_of, method, /, *, density, mu=1.0, distortion="previous", **common):
    """Return the options in the form of the extension; raise ValueError or TypeError that names `who` otherwise.

    `names_of` gives the names of parameters that the extension knows by keys.
    """
    unknown = [name for name in common if name not in COMMON]
    if unknown:
        close = difflib.get_close_matches(unknown[0], [*COMMON, "density", "mu", "distortion", "process_group", "grad_scaler"], 1)
        meant = f"; did you mean {close[0]!r}?" if close else ""
        raise TypeError(f"{who}: expected options of {', '.join(COMMON)}, got {unknown[0]!r}{meant}")
    decay, dense_steps, wire_dtype, index_code, support, chunk, momentum, nesterov, mask_momentum, clip_norm, dense, levels = (common.get(name, usual) for name, usual in COMMON.items())
    if method not in METHODS:
        raise ValueError(f"{who}: expected method 'topk' or 'regtopk', got {method!r}")
    adaptive = isinstance(density, AdaptiveDensity)
    numbers_given = [("mu", mu), ("decay", decay), ("momentum", momentum)] + ([] if clip_norm is None else [("clip_norm", clip_norm)]) + ([] if callable(density) or adaptive else [("density", density)])
    for name, value in numbers_given:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{who}: expected {name} to be a number, got {value!r}")
    if not (callable(density) or adaptive) and not 0 < density <= 1:
        raise ValueError(
            f"{who}: expected 0 < density <= 1, got density={density}; pass a fraction, 0.001 keeps one entry in 1000"
        )
    if not (math.isfinite(mu) and mu > 0):
        raise ValueError(f"{who}: expected a finite mu > 0, got mu={mu}; TopKState is the limit mu -> 0")
    if distortion not in DISTORTIONS:
        raise ValueError(f"{who}: expected distortion 'previous' or 'current', got {distortion!r}")
    if not 0 < decay <= 1:
        raise ValueError(f"{who}: expected 0 < decay <= 1, got decay={decay}; 1 forgets nothing")
    if isinstance(dense_steps, bool) or not isinstance(dense_steps, numbers.Integral) or not 0 <= int(dense_steps) < 2**63:
        raise ValueError(f"{who}: expected dense_steps to be a number of steps, 0 or more, got {dense_steps!r}")
    if not (wire_dtype is None or isinstance(wire_dtype, (str, torch.dtype)) and wire_dtype in (torch.float32, torch.bfloat16, torch.float16, *CODES)):
        raise ValueError(f"{who}: expected wire_dtype to be None, torch.float32, torch.bfloat16, torch.float16, 'sign' or '2bit', got {wire_dtype!r}")
    if index_code not in INDEX_CODES:
        raise ValueError(f"{who}: expected index_code {' or '.join(map(repr, INDEX_CODES))}, got {index_code!r}")
    if support not in SUPPORTS:
        raise ValueError(f"{who}: expected support {' or '.join(map(repr, SUPPORTS))}, got {support!r}")
    if support == "leader" and wire_dtype in CODES:
        raise ValueError(f"{who}: expected values of 16 bits or more with support='leader', got wire_dtype={wire_dtype!r}, whose levels a slice of the values lacks")
    if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, numbers.Integral) or int(chunk) not in CHUNKS):
        raise ValueError(f"{who}: expected chunk to be None or a power of two from {CHUNKS[0]} to {CHUNKS[-1]}, got {chunk!r}")
    if not 0 <= momentum < 1:
        raise ValueError(f"{who}: expected 0 <= momentum < 1, got momentum={momentum}; 0 gives gradients as they are")
    for name, value in (("nesterov", nesterov), ("mask_momentum", mask_momentum)):
        if not isinstance(value, bool):
            raise TypeError(f"{who}: expected {name} to be True or False, got {value!r}")
        if value and momentum == 0:
            raise ValueError(f"{who}: expected momentum > 0 with {name}=True, got momentum={momentum}; pass momentum=0.9")
    if clip_norm is not None and not (math.isfinite(clip_norm) and clip_norm > 0):
        raise ValueError(f"{who}: expected clip_norm to be None or a finite number > 0, got clip_norm={clip_norm}")
    if not (callable(dense) or isinstance(dense, str) and dense in ("never", "auto")):
        raise ValueError(f"{who}: expected dense to be 'never', 'auto' or a function of a parameter's name and its number of entries, got {dense!r}")
    host_ranks, local_rank = _ranks_of_a_host(who, levels)
    for name, excluded in (("support='leader'", support == "leader"), ("an AdaptiveDensity", adaptive), ("momentum=", momentum > 0), ("clip_norm=", clip_norm is not None), ("dense=", dense != "never")):
        if excluded and host_ranks > 1:
            raise ValueError(f"{who}: expected levels=None with {name}, got levels={levels!r}; between hosts go entries of each place's own choice, at a density that all ranks know, of gradients as they are")
    return _C.Options(
        regularised=method == "regtopk", density=1.0 if callable(density) or adaptive else float(density), mu=float(mu), distortion=distortion,
        decay=float(decay), dense_steps=int(dense_steps), wire_dtype=CODES.get(wire_dtype, wire_dtype), elias_fano=index_code == "elias-fano", leader=support == "leader", chunk=int(chunk or 0), schedule=_checked(who, density) if callable(density) else None,
        momentum=float(momentum), nesterov=nesterov, mask_momentum=mask_momentum, clip_norm=float(clip_norm or 0), adaptive=(float(density.mean), float(density.power), *map(float, density.limits())) if adaptive else None,
        dense_auto=dense == "auto", dense_rule=_asking(who, dense, names_of) if callable(dense) else None, host_ranks=host_ranks, local_rank=local_rank,
    )  # fmt: skip


def _ranks_of_a_host(who, levels):
    """(how many, this one's place among them; -1 where it follows from the rank)."""
    if levels is None:
        return 1, -1
    if isinstance(levels, str) and levels == "host":
        found = {name: os.environ.get(name, "") for name in ("LOCAL_WORLD_SIZE", "LOCAL_RANK")}
        if not all(value.isdecimal() for value in found.values()) or int(found["LOCAL_WORLD_SIZE"]) < 1:
            raise ValueError(f"{who}: expected LOCAL_WORLD_SIZE and LOCAL_RANK in the environment with levels='host', as torchrun sets them, got {found}; pass the number of ranks to a host")
        return int(found["LOCAL_WORLD_SIZE"]), int(found["LOCAL_RANK"])
    if isinstance(levels, bool) or not isinstance(levels, numbers.Integral) or not 1 <= int(levels) < 2**31:
        raise ValueError(f"{who}: expected levels to be None, 'host' or the number of ranks to a host, got {levels!r}")
    return int(levels), -1


def _checked(who, density):
    def density_of(step):
        value = density(step)
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{who}: expected density({step}) to return a number, got {value!r}")
        return float(value)

    return density_of


def _asking(who, dense, names_of):
    def answers(keys, numels):
        found = []
        for name, numel in zip(names_of(keys), numels, strict=True):
            found.append(dense(name, numel))
            if not isinstance(found[-1], bool):
                raise TypeError(f"{who}: expected dense({name!r}, {numel}) to return True or False, got {found[-1]!r}")
        return found

    return answers
