"""State dicts: the pieces of the residual store under parameter names, in the parameters' own shapes.

A piece holds flat tensors in the parameter's memory order, the order of a gradient bucket; a state dict holds logical
(row-major) order, so that it does not depend on the memory format.
"""

import math
from typing import NamedTuple

import torch

from regtopk_torch import _C

FORMAT = "regtopk_torch"
VERSION = 1


class Piece(NamedTuple):
    """What is kept of one parameter, flat and in its memory order; None for what there is not."""

    parameter: torch.Tensor | None
    residual: torch.Tensor  # [numel], accumulate dtype
    sent_index: torch.Tensor | None = None  # [m] int64, ascending
    sent_value: torch.Tensor | None = None  # [m], gradient dtype
    feedback: torch.Tensor | None = None  # [m], accumulate dtype
    idle: bool = False  # zero gradient on all ranks in the last step
    velocity: torch.Tensor | None = None  # as the residual


class Progress(NamedTuple):
    """Where a state is, the same on every rank."""

    step: int  # the last one
    density_state: list  # what an AdaptiveDensity has measured, else empty


def whole_of(piece, numel, place, ranks):
    """A piece of all `numel` entries of its parameter, of which the rank at `place` of a host's `ranks` keeps a part: zero elsewhere."""
    begin, of_part = _C.part_of(numel, place, ranks)
    residual = torch.zeros(numel, dtype=piece.residual.dtype, device="cpu")
    residual[begin : begin + of_part] = piece.residual
    return piece._replace(residual=residual, sent_index=None if piece.sent_index is None else piece.sent_index + begin)


def part_of(who, piece, place, ranks):
    """The reverse; ValueError where something lies elsewhere."""
    begin, numel = _C.part_of(piece.parameter.numel(), place, ranks)
    residual, index = piece.residual[begin : begin + numel].clone(), piece.sent_index
    elsewhere = torch.count_nonzero(piece.residual) - torch.count_nonzero(residual)
    if elsewhere or (index is not None and len(index) and not begin <= index[0] <= index[-1] < begin + numel):
        raise ValueError(
            f"{who}: expected what entries {begin} to {begin + numel} of a parameter of shape {list(piece.parameter.shape)} hold back, got others; "
            "load the same rank's state dict, into a model of the same memory format"
        )
    return piece._replace(residual=residual, sent_index=None if index is None else index - begin)


def plain_name(name):
    """A parameter's name without what torch.compile puts around a module: the compiled model and the plain one are the same."""
    return name.replace("_orig_mod.", "")


def accumulate_dtype(dtype):
    """Dtype of the residual, the score and the sum for gradients of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def in_shape_of(flat, parameter):
    """View a flat tensor in the order in which DDP's bucket holds the parameter as a tensor of its shape: the order of its
    memory where that has no gaps and no overlaps, else row-major."""
    return flat.as_strided(parameter.size(), parameter.stride()) if _is_dense(parameter) else flat.view(parameter.size())


def _is_dense(tensor):
    """Whether the strides are those of some order of the dimensions, without gaps."""
    expected = 1
    for stride, size in sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _memory_index(parameter):
    """For each entry in logical order its place in memory order, shape [numel] int64; None where the two are the same."""
    if parameter.is_contiguous():
        return None
    return in_shape_of(torch.arange(parameter.numel(), device="cpu"), parameter).flatten()


def to_state_dict(pieces, named_keys, header, progress):
    """Return {format, version, method, distortion, world_size, rank, step, parameters: {name: entry}}, and density_state, a list of
    float, where the density is an AdaptiveDensity.

    An entry has `shape` (list of int) and, once the parameter has been exchanged, `residual` (the parameter's shape, fp32 or
    fp64), `velocity` (the same, with that option only) and the history of the last step: `sent_index` (int64 [m], flat and ascending), `sent_value` ([m], gradient dtype),
    `feedback` ([m], accumulate dtype; RegTop-k only), and `idle` (True) where its gradient was zero on all ranks in the last step.
    Parameters that require no gradient have an entry only where something is kept of them.
    """
    parameters = {}
    for name, parameter, key in named_keys:
        if key not in pieces and not parameter.requires_grad:
            continue
        entry: dict[str, object] = {"shape": list(parameter.shape)}
        if key in pieces:
            _, residual, sent_index, sent_value, feedback, idle, velocity = pieces[key]
            entry["residual"] = in_shape_of(residual, parameter).contiguous()
            if velocity is not None:
                entry["velocity"] = in_shape_of(velocity, parameter).contiguous()
            if idle:
                entry["idle"] = True
            if sent_index is not None:
                to_memory = _memory_index(parameter)
                order = slice(None)
                if to_memory is not None:
                    sent_index, order = torch.argsort(to_memory)[sent_index].sort()
                entry["sent_index"] = sent_index
                entry["sent_value"] = sent_value[order]
                if feedback is not None:
                    entry["feedback"] = feedback[order]
        parameters[name] = entry
    measured = {"density_state": progress.density_state} if progress.density_state else {}
    return {"format": FORMAT, "version": VERSION, **header, "step": progress.step, **measured, "parameters": parameters}


def from_state_dict(who, state_dict, named_keys, header):
    """Return (pieces, Progress) for the extension; raise without side effects if `state_dict` does not fit.

    `named_keys` is [(name, parameter, key)], or a function of (who, state_dict) that returns it.
    """
    if not isinstance(state_dict, dict) or not _is(state_dict.get("format"), FORMAT):
        raise TypeError(f"{who}: expected a state dict of {FORMAT}, got {_describe(state_dict)}")
    if not _is(state_dict.get("version"), VERSION):
        raise ValueError(f"{who}: expected a state dict of version {VERSION}, got version {state_dict.get('version')}")
    for name in ("world_size", "rank"):
        if not _is(state_dict.get(name), header[name]):
            advice = "; load the list of all its ranks' state dicts to redistribute them" if name == "world_size" else ""
            raise ValueError(f"{who}: expected a state dict of {name} {header[name]}, got {name} {state_dict.get(name)}{advice}")
    levels, expected = state_dict.get("levels", 1), header.get("levels", 1)
    if not _is(levels, expected):
        raise ValueError(f"{who}: expected a state dict of levels of {expected} ranks to a host, got one of {levels}; 1 is without levels")
    step = state_dict.get("step")
    if type(step) is not int or not -1 <= step < 2**62:
        raise ValueError(f"{who}: expected step to be an integer in [-1, 2^62), got {step!r}")
    measured = state_dict.get("density_state", [])
    if not isinstance(measured, list) or len(measured) not in (0, 7) or not all(type(n) is float and math.isfinite(n) for n in measured):
        raise ValueError(f"{who}: expected density_state to be a list of 7 finite numbers, got {str(measured)[:80]}")
    if callable(named_keys):
        named_keys = named_keys(who, state_dict)
    parameters = state_dict.get("parameters")
    known = {name for name, _, _ in named_keys}
    expected = {name for name, parameter, _ in named_keys if parameter.requires_grad}
    if isinstance(parameters, dict):
        parameters = {plain_name(name) if isinstance(name, str) else name: entry for name, entry in parameters.items()}
    names = set(parameters) if isinstance(parameters, dict) else set()
    # What is frozen now may have been frozen then, and may not.
    if not isinstance(parameters, dict) or not expected <= names <= known:
        raise ValueError(
            f"{who}: expected a state dict of this model's {len(expected)} parameters, got {len(names)}; "
            f"missing {sorted(expected - names)[:3]}, unknown {sorted(map(str, names - known))[:3]}"
        )
    # Feedback means something else under another distortion, and nothing without regularisation.
    same_feedback = all(_is(state_dict.get(name), header[name]) for name in ("method", "distortion"))
    pieces = {}
    for name, parameter, key in named_keys:
        if name not in names:
            continue
        entry = parameters[name]
        if not isinstance(entry, dict):
            raise ValueError(f"{who}: expected a dict with what was kept of {name}, got {_describe(entry)}")
        shape = entry.get("shape")
        if not isinstance(shape, list) or len(shape) != parameter.dim() or not all(map(_is, shape, parameter.shape)):
            raise ValueError(f"{who}: expected {name} of shape {list(parameter.shape)}, got {shape}")
        if "residual" in entry:
            pieces[key] = _piece(f"{who}: {name}", entry, parameter, keep_feedback=same_feedback)
    return pieces, Progress(step, list(measured))


def shares(rank, world_size, saved_world_size):
    """Return [(saved rank n, weight w)]: what rank m of M ranks takes over of the residuals of N.

    What is to be conserved is the update that the residuals stand for: an average divides by the number of ranks, so

        sum over m of residual'_m / M  ==  sum over n of residual_n / N.

    The N ranks are laid out on a line and cut into M equal parts: rank m takes r'_m = sum over n of w_mn r_n, where w_mn is the
    part's overlap with rank n, [n / N, (n + 1) / N) with [m / M, (m + 1) / M), times M. The weights of one m add up to 1, so
    that a residual keeps its size against one rank's gradient, and those of one n to M / N, which is the equation. Where M is a
    multiple of N all weights are 1: every rank takes a copy, and no bit changes.
    """
    weights = []
    for saved in range(rank * saved_world_size // world_size, saved_world_size):
        begin = max(rank * saved_world_size, saved * world_size)
        overlap = min((rank + 1) * saved_world_size, (saved + 1) * world_size) - begin
        if overlap <= 0:
            break
        weights.append((saved, overlap / saved_world_size))
    return weights


def from_state_dicts(read, saved_world_size, named_keys, header):
    """Return (pieces, Progress, entries of history that were dropped) from the state dicts of a group of `saved_world_size` ranks.

    Args:
        read (function): of a saved rank, to (how messages name its state dict, the state dict); called once for each rank
            that this one needs, one after the other.

    In a group of the same size that is this rank's own, bit for bit. Otherwise residuals, and velocities likewise, are redistributed (see `shares`): added
    up in fp64 and rounded once, so that in exact arithmetic, per entry, with u = 2**-24 (0 for fp64 gradients),
    |sum_m r'_m / M - sum_n r_n / N| <= u sum_m |r'_m| / M + 2**-50 sum_n |r_n| / N. What a rank sent last has no counterpart in a group of another
    size: the histories are dropped, and those of a saved rank counted on the first rank that takes over its residual.
    """
    rank, world_size = header["rank"], header["world_size"]
    if saved_world_size == world_size:
        who, state_dict = read(rank)
        return *from_state_dict(who, state_dict, named_keys, header), 0
    if header.get("levels", 1) > 1:
        raise ValueError(
            f"expected the state dicts of {world_size} ranks with levels of {header['levels']} ranks to a host, got those of {saved_world_size}; "
            "what a host's ranks hold back is not redistributed yet, load it into as many"
        )
    sums: dict[str, dict[str, torch.Tensor]] = {}  # of each parameter, by name
    parameters = {}
    steps, dropped = set(), 0
    for saved, weight in shares(rank, world_size, saved_world_size):
        who, state_dict = read(saved)
        pieces, progress = from_state_dict(who, state_dict, named_keys, {**header, "world_size": saved_world_size, "rank": saved})
        steps.add(progress.step)
        for key, piece in pieces.items():
            of_key = sums.setdefault(key, {})
            for name in ("residual", "velocity"):
                if (kept := getattr(piece, name)) is not None:
                    share = kept.double() * weight
                    of_key[name] = of_key[name].add_(share) if name in of_key else share
            parameters[key] = piece.parameter
            if piece.sent_index is not None and saved * world_size // saved_world_size == rank:
                dropped += len(piece.sent_index)
    if len(steps) > 1:
        raise ValueError(f"{who}: expected state dicts of one step, got steps {sorted(steps)}")
    loaded = {
        key: Piece(parameters[key], **{name: total.to(accumulate_dtype(parameters[key].dtype)) for name, total in of_key.items()})
        for key, of_key in sums.items()
    }
    return loaded, progress, dropped


def _piece(where, entry, parameter, *, keep_feedback):
    accumulate = accumulate_dtype(parameter.dtype)
    flat = _flat(where, entry, "residual", accumulate, parameter)
    velocity = _flat(where, entry, "velocity", accumulate, parameter) if "velocity" in entry else None
    idle = entry.get("idle", False)
    if type(idle) is not bool:
        raise ValueError(f"{where}: expected idle to be True or False, got {_describe(idle)}")
    if "sent_index" not in entry:
        return Piece(parameter, flat, idle=idle, velocity=velocity)
    count = entry["sent_index"].numel() if isinstance(entry["sent_index"], torch.Tensor) else 0
    index = _tensor(where, entry, "sent_index", torch.int64, (count,))
    value = _tensor(where, entry, "sent_value", parameter.dtype, (count,))
    feedback = _tensor(where, entry, "feedback", accumulate, (count,)) if "feedback" in entry and keep_feedback else None
    if count and not (index[0] >= 0 and index[-1] < parameter.numel() and (index.diff() > 0).all()):
        raise ValueError(f"{where}: expected sent_index strictly ascending in [0, {parameter.numel()}), got others")
    if not torch.isfinite(value).all():
        raise ValueError(f"{where}: expected finite sent_value, got infinities or NaN")
    if feedback is not None and feedback.isnan().any():  # infinity is what an entry without feedback has
        raise ValueError(f"{where}: expected feedback without NaN, got some")
    to_memory = _memory_index(parameter)
    if to_memory is not None:
        index, order = to_memory[index].sort()
        value = value[order]
        feedback = None if feedback is None else feedback[order]
    # Copies: what the caller does with its dict later must not change the state.
    return Piece(parameter, flat, index.clone(), value.clone(), None if feedback is None else feedback.clone(), idle, velocity)


def _flat(where, entry, name, accumulate, parameter):
    """A copy, in memory order, of what has the parameter's shape."""
    kept = _tensor(where, entry, name, accumulate, parameter.shape)
    if not torch.isfinite(kept).all():
        raise ValueError(f"{where}: expected a finite {name}, got infinities or NaN")
    flat = torch.empty(parameter.numel(), dtype=accumulate, device="cpu")
    in_shape_of(flat, parameter).copy_(kept)
    return flat


def _tensor(where, entry, name, dtype, shape):
    tensor = entry.get(name)
    if (
        not isinstance(tensor, torch.Tensor)
        or tensor.dtype != dtype
        or tuple(tensor.shape) != tuple(shape)
        or tensor.layout != torch.strided
        or tensor.is_meta
    ):
        raise ValueError(f"{where}: expected {name} of dtype {dtype} and shape {list(shape)}, got {_describe(tensor)}")
    return tensor.detach().cpu()


def _is(value, expected):
    """Whether a value of any type, a tensor for example, is this number or string."""
    return type(value) is type(expected) and value == expected


def _describe(thing):
    if isinstance(thing, torch.Tensor):
        where = "" if thing.layout == torch.strided and not thing.is_meta else f", {thing.layout} on {thing.device}"
        return f"dtype {thing.dtype} and shape {list(thing.shape)}{where}"
    if isinstance(thing, dict):
        return f"a dict with the keys {sorted(map(str, thing))[:5]}"
    return type(thing).__name__
