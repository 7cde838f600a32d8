"""State dicts: the pieces of the residual store under parameter names, in the parameters' own shapes.

A piece holds flat tensors in the parameter's memory order, the order of a gradient bucket; a state dict holds logical
(row-major) order, so that it does not depend on the memory format.
"""

import torch

FORMAT = "regtopk_torch"
VERSION = 1


def accumulate_dtype(dtype):
    """Dtype of the residual, the score and the sum for gradients of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def in_shape_of(flat, parameter):
    """View a flat tensor in the parameter's memory order as a tensor of its shape."""
    return flat.as_strided(parameter.size(), parameter.stride())


def _memory_index(parameter):
    """For each entry in logical order its place in memory order, shape [numel] int64; None where the two are the same."""
    if parameter.is_contiguous():
        return None
    return in_shape_of(torch.arange(parameter.numel()), parameter).flatten()


def to_state_dict(pieces, named_keys, header, *, step):
    """Return {format, version, method, distortion, world_size, rank, step, parameters: {name: entry}}.

    An entry has `shape` (list of int) and, once the parameter has been exchanged, `residual` (the parameter's shape, fp32 or
    fp64) and the history of the last step: `sent_index` (int64 [m], flat and ascending), `sent_value` ([m], gradient dtype),
    `feedback` ([m], accumulate dtype; RegTop-k only).
    """
    parameters = {}
    for name, parameter, key in named_keys:
        entry = {"shape": list(parameter.shape)}
        if key in pieces:
            residual, sent_index, sent_value, feedback = pieces[key]
            entry["residual"] = in_shape_of(residual, parameter).contiguous()
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
    return {"format": FORMAT, "version": VERSION, **header, "step": step, "parameters": parameters}


def from_state_dict(who, state_dict, named_keys, header):
    """Return (pieces, step) for the extension; raise without side effects if `state_dict` does not fit."""
    if not isinstance(state_dict, dict) or state_dict.get("format") != FORMAT:
        raise TypeError(f"{who}: expected a state dict of {FORMAT}, got {_describe(state_dict)}")
    if state_dict.get("version") != VERSION:
        raise ValueError(f"{who}: expected a state dict of version {VERSION}, got version {state_dict.get('version')}")
    for name in ("world_size", "rank"):
        if state_dict.get(name) != header[name]:
            raise ValueError(f"{who}: expected a state dict of {name} {header[name]}, got {name} {state_dict.get(name)}")
    step = state_dict.get("step")
    if not isinstance(step, int) or step < -1:
        raise ValueError(f"{who}: expected step to be an integer of at least -1, got {step!r}")
    parameters = state_dict.get("parameters")
    expected = {name for name, _, _ in named_keys}
    if not isinstance(parameters, dict) or set(parameters) != expected:
        names = set(parameters) if isinstance(parameters, dict) else set()
        raise ValueError(
            f"{who}: expected a state dict of this model's {len(expected)} parameters, got {len(names)}; "
            f"missing {sorted(expected - names)[:3]}, unknown {sorted(names - expected)[:3]}"
        )
    # Feedback means something else under another distortion, and nothing without regularisation.
    same_feedback = (state_dict.get("method"), state_dict.get("distortion")) == (header["method"], header["distortion"])
    pieces = {}
    for name, parameter, key in named_keys:
        entry = parameters[name]
        if entry.get("shape") != list(parameter.shape):
            raise ValueError(f"{who}: expected {name} of shape {list(parameter.shape)}, got {entry.get('shape')}")
        if "residual" in entry:
            pieces[key] = _piece(f"{who}: {name}", entry, parameter, keep_feedback=same_feedback)
    return pieces, step


def _piece(where, entry, parameter, *, keep_feedback):
    accumulate = accumulate_dtype(parameter.dtype)
    residual = _tensor(where, entry, "residual", accumulate, parameter.shape)
    if not torch.isfinite(residual).all():
        raise ValueError(f"{where}: expected a finite residual, got infinities or NaN")
    flat = torch.empty(parameter.numel(), dtype=accumulate)
    in_shape_of(flat, parameter).copy_(residual)
    if "sent_index" not in entry:
        return flat, None, None, None
    count = len(entry["sent_index"])
    index = _tensor(where, entry, "sent_index", torch.int64, (count,))
    value = _tensor(where, entry, "sent_value", parameter.dtype, (count,))
    feedback = _tensor(where, entry, "feedback", accumulate, (count,)) if "feedback" in entry and keep_feedback else None
    if count and not (index[0] >= 0 and index[-1] < parameter.numel() and (index.diff() > 0).all()):
        raise ValueError(f"{where}: expected sent_index strictly ascending in [0, {parameter.numel()}), got others")
    to_memory = _memory_index(parameter)
    if to_memory is not None:
        index, order = to_memory[index].sort()
        value = value[order]
        feedback = None if feedback is None else feedback[order]
    # Copies: what the caller does with its dict later must not change the state.
    return flat, index.clone(), value.clone(), None if feedback is None else feedback.clone()


def _tensor(where, entry, name, dtype, shape):
    tensor = entry.get(name)
    if not isinstance(tensor, torch.Tensor) or tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{where}: expected {name} of dtype {dtype} and shape {list(shape)}, got {_describe(tensor)}")
    return tensor


def _describe(thing):
    if isinstance(thing, torch.Tensor):
        return f"dtype {thing.dtype} and shape {list(thing.shape)}"
    if isinstance(thing, dict):
        return f"a dict with the keys {sorted(map(str, thing))[:5]}"
    return type(thing).__name__
