"""The structures of calls.h."""

import ctypes


class Sampling(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("sectors", "rank_high", "rank_low", "list_capacity")]


class Spans(ctypes.Structure):
    _fields_ = [
        ("ends", ctypes.c_void_p), ("count", ctypes.c_int64), ("idle", ctypes.c_void_p), ("verdict", ctypes.c_void_p),
        ("sent_round", ctypes.c_int64), ("applied", ctypes.c_void_p), ("counters", ctypes.c_void_p),
    ]  # fmt: skip


class Measure(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int64), ("numel", ctypes.c_int64), ("k", ctypes.c_int64), ("spans", ctypes.c_int64), ("payloads", ctypes.c_void_p),
        ("workers", ctypes.c_int64), ("gradient", ctypes.c_void_p), ("squared_norm", ctypes.c_void_p), ("workspace", ctypes.c_void_p),
        ("stream", ctypes.c_void_p),
    ]  # fmt: skip


class Settle(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int64), ("numel", ctypes.c_int64), ("sent", ctypes.c_void_p), ("sent_bytes", ctypes.c_int64),
        ("residual", ctypes.c_void_p), ("spans", Spans), ("masks", ctypes.c_int64), ("stream", ctypes.c_void_p),
    ]  # fmt: skip


class Correct(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int64), ("numel", ctypes.c_int64), ("gradient", ctypes.c_void_p), ("given", ctypes.c_void_p), ("velocity", ctypes.c_void_p),
        ("span_ends", ctypes.c_void_p), ("spans", ctypes.c_int64), ("momentum", ctypes.c_double), ("nesterov", ctypes.c_int64),
        ("largest_norm", ctypes.c_double), ("workspace", ctypes.c_void_p), ("stream", ctypes.c_void_p),
    ]  # fmt: skip


class Judge(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int64), ("numel", ctypes.c_int64), ("values", ctypes.c_void_p), ("verdict", ctypes.c_void_p),
        ("round", ctypes.c_int64), ("stream", ctypes.c_void_p),
    ]  # fmt: skip


class Wire(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int64), ("wire_type", ctypes.c_int64), ("elias_fano", ctypes.c_int64), ("numel", ctypes.c_int64), ("k", ctypes.c_int64),
        ("spans", ctypes.c_int64), ("workers", ctypes.c_int64), ("payloads", ctypes.c_void_p), ("residual", ctypes.c_void_p),
        ("wire", ctypes.c_void_p), ("workspace", ctypes.c_void_p), ("stream", ctypes.c_void_p),
    ]  # fmt: skip


class Compress(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int64), ("numel", ctypes.c_int64), ("k", ctypes.c_int64), ("gradient", ctypes.c_void_p),
        ("residual", ctypes.c_void_p), ("payload", ctypes.c_void_p), ("step", ctypes.c_uint64), ("plan", ctypes.c_uint64),
        ("spans", Spans), ("scale", ctypes.c_double), ("deed", ctypes.c_uint64),
        ("sent", ctypes.c_void_p), ("sent_bytes", ctypes.c_int64), ("feedback", ctypes.c_void_p), ("feedback_entries", ctypes.c_int64),
        ("distortion", ctypes.c_int64), ("mu", ctypes.c_double), ("decay", ctypes.c_double), ("sampling", Sampling), ("chunk", ctypes.c_int64), ("chunk_k", ctypes.c_int64),
        ("choose", ctypes.c_int64), ("workspace", ctypes.c_void_p),
        ("stream", ctypes.c_void_p),
    ]  # fmt: skip


class Aggregate(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int64), ("numel", ctypes.c_int64), ("k", ctypes.c_int64), ("payloads", ctypes.c_void_p),
        ("workers", ctypes.c_int64), ("gradient", ctypes.c_void_p), ("feedback", ctypes.c_void_p),
        ("first_feedback_worker", ctypes.c_int64), ("feedback_workers", ctypes.c_int64), ("distortion", ctypes.c_int64),
        ("step", ctypes.c_uint64), ("plan", ctypes.c_uint64), ("span_ends", ctypes.c_void_p),
        ("spans", ctypes.c_int64), ("idle", ctypes.c_void_p), ("verdict", ctypes.c_void_p), ("round", ctypes.c_int64), ("worst_status", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p), ("stream", ctypes.c_void_p),
    ]  # fmt: skip


class Take(ctypes.Structure):
    _fields_ = [
        ("wire", Wire), ("leader", ctypes.c_int64), ("step", ctypes.c_uint64), ("plan", ctypes.c_uint64), ("span_ends", ctypes.c_void_p),
        ("idle", ctypes.c_void_p), ("worst_status", ctypes.c_void_p), ("room", ctypes.c_void_p),
    ]  # fmt: skip


class AverageSlice(ctypes.Structure):
    _fields_ = [
        ("wire", Wire), ("rows", ctypes.c_void_p), ("row_bytes", ctypes.c_int64), ("step", ctypes.c_uint64), ("plan", ctypes.c_uint64),
        ("averages", ctypes.c_void_p), ("averages_bytes", ctypes.c_int64), ("worst_status", ctypes.c_void_p), ("stream", ctypes.c_void_p),
    ]  # fmt: skip


class Spread(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int64), ("numel", ctypes.c_int64), ("k", ctypes.c_int64), ("spans", ctypes.c_int64), ("rows", ctypes.c_void_p),
        ("averages", ctypes.c_void_p), ("workers", ctypes.c_int64), ("row_bytes", ctypes.c_int64), ("averages_bytes", ctypes.c_int64),
        ("step", ctypes.c_uint64), ("payload", ctypes.c_void_p), ("gradient", ctypes.c_void_p), ("span_ends", ctypes.c_void_p),
        ("idle", ctypes.c_void_p), ("verdict", ctypes.c_void_p), ("round", ctypes.c_int64), ("worst_status", ctypes.c_void_p),
        ("distortion", ctypes.c_int64), ("feedback", ctypes.c_void_p), ("workspace", ctypes.c_void_p), ("room", ctypes.c_void_p),
        ("stream", ctypes.c_void_p),
    ]  # fmt: skip


class Parts(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int64), ("numel", ctypes.c_int64), ("ends", ctypes.c_void_p), ("parameters", ctypes.c_int64), ("ranks", ctypes.c_int64),
        ("row_bytes", ctypes.c_int64), ("step", ctypes.c_uint64), ("plan", ctypes.c_uint64), ("scale", ctypes.c_double), ("deed", ctypes.c_uint64),
        ("gradient", ctypes.c_void_p), ("rows", ctypes.c_void_p), ("row", ctypes.c_void_p), ("entries", ctypes.c_int64), ("found", ctypes.c_void_p),
        ("verdict", ctypes.c_void_p), ("round", ctypes.c_int64), ("worst_status", ctypes.c_void_p), ("stream", ctypes.c_void_p),
    ]  # fmt: skip
