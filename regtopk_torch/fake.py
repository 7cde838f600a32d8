"""Fake kernels: shapes and dtypes of the operators' results, for torch.compile and FakeTensorMode."""

import torch

from regtopk_torch import _C


@torch.library.register_fake("regtopk::compress_")
def _(gradient, residual, payload, sent, feedback, spans=None, idle=None, verdict=None, applied=None, counters=None, **options):
    return None


@torch.library.register_fake("regtopk::aggregate_")
def _(gradient, payloads, feedback, spans=None, idle=None, verdict=None, status=None, **options):
    return None


@torch.library.register_fake("regtopk::measure_")
def _(gradient, payloads, squared_norm, *, k, spans=0):
    return None


@torch.library.register_fake("regtopk::correct_")
def _(gradient, given, velocity, spans, **options):
    return None


@torch.library.register_fake("regtopk::mask_")
def _(velocity, sent, spans, idle, verdict, applied, *, dtype, sent_round):
    return None


@torch.library.register_fake("regtopk::judge_")
def _(tensor, verdict, *, round):
    return None


@torch.library.register_fake("regtopk::settle_")
def _(residual, sent, spans, idle, verdict, applied, counters, *, dtype, sent_round):
    return None


@torch.library.register_fake("regtopk::put_back_")
def _(residual, payload, *, dtype):
    return None


@torch.library.register_fake("regtopk::encode")
def _(indices, values, *, numel, step=0, plan=0, spans=0):
    return indices.new_empty(_C.payload_bytes(numel, values.shape[0], values.dtype, spans), dtype=torch.uint8)


@torch.library.register_fake("regtopk::decode")
def _(payload, *, numel, k, dtype):
    return payload.new_empty(k, dtype=torch.int64), payload.new_empty(k, dtype=dtype)


@torch.library.register_fake("regtopk::to_wire_")
def _(residual, payload, wire, **options):
    return None


@torch.library.register_fake("regtopk::from_wire_")
def _(wire, payloads, **options):
    return None


@torch.library.register_fake("regtopk::take_")
def _(residual, payload, lead, spans, idle, status=None, **options):
    return None


@torch.library.register_fake("regtopk::average_slice_")
def _(rows, averages, status=None, **options):
    return None


@torch.library.register_fake("regtopk::spread_")
def _(gradient, payload, rows, averages, spans, idle, verdict, status=None, **options):
    return None


@torch.library.register_fake("regtopk::feedback_")
def _(feedback, payload, rows, averages, spans, idle, **options):
    return None


@torch.library.register_fake("regtopk::split_")
def _(gradient, rows, parts, **options):
    return None


@torch.library.register_fake("regtopk::mean_")
def _(rows, row, found, **options):
    return None


@torch.library.register_fake("regtopk::join_")
def _(rows, gradient, parts, verdict, status=None, **options):
    return None


@torch.library.register_fake("regtopk::mark_unfilled_")
def _(message, found, status=None):
    return None
