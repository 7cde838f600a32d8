"""Averages of any list of tensors: what a state can do beside serving a model's gradients."""

import hashlib
import math
from typing import Any, NamedTuple

import torch

from regtopk_torch import _C

DTYPES = {str(dtype): dtype for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}


class Form(NamedTuple):
    """What a name stood for the last time."""

    key: int  # the same on every rank and in every run
    shape: tuple
    dtype: torch.dtype


class Averaging:
    """The part of a state that averages tensors."""

    _exchange: Any  # the state's
    _given: dict[str, Any]  # its options

    def _begin_averaging(self):
        self._tensors = _C.TensorsExchange(self._exchange)
        self._forms: dict[str, Form] = {}  # name -> Form, of all tensors for which something may be kept
        self._lists: set[tuple] = set()  # the names of each list that was averaged
        self._last = None  # names and device of the last average
        self._names: dict[int, str] = {}  # key -> name, of all tensors that were given; replaced as a whole, for other threads read it
        self._decided = True  # whether the last average is final, or was put back

    def average(self, tensors, names=None, *, out=None, async_op=False):
        """Return the average over ranks of what each sends of its tensors: a collective, one step of the state.

        Of each rank's tensors plus what it has held back of them, the k = density * J largest entries travel, and the rest is held
        back for the next average: for pseudo-gradients of local steps, an optimizer's updates, gradients without DDP. All options of
        the state hold. All tensors of one dtype are one bucket, J its entries. A state serves either this or a model's hook.

        Args:
            tensors (list of torch.Tensor): dense, fp64, fp32, bf16 or fp16, of any shapes and strides, all on the CPU or on one GPU;
                only read, and read when this returns. The same shapes and dtypes on every rank. None: this rank contributes nothing
                this time, to a list that it has averaged before; what it has held back waits, and the average, over the ranks that do
                contribute, is returned to it too. Not with levels.
            names (list of str, optional): one for each, distinct, the same on every rank; default, their places "0", "1", ... What is
                held back belongs to a name. Lists of other names may take turns, as long as they share none.
            out (list of torch.Tensor, optional): tensors that take the averages, in the shapes and dtypes of `tensors` and on their
                device; written when the average is there, at the latest by `wait()`, and of no defined content before and where it
                raises. They may be `tensors`, or overlap those, but not each other.
            async_op (bool): return at once an object whose `wait()` returns the list and raises what is to be raised, whose
                `is_void()` waits and says whether the step is void, and whose `is_completed()` says whether either would wait. Averages
                begin in the same order on every rank.

        Returns:
            list of torch.Tensor: `out`, or new ones in the tensors' shapes, dtypes and order of strides, without gradient; with the same
            bits on every rank.

        Nothing is copied, and no memory is made, where the tensors of each dtype, and likewise those of `out`, lie one after the other
        in one storage: views of one buffer, `buffer.split(sizes)`. In place, `out=tensors`, that is the work of the hook.

        Where an entry of an average is not finite, the step is void on every rank: the caller sees it in the average, and everything
        finite that was given is held back. With a `grad_scaler`, tensors are multiples by its scale, as gradients are.

        Raises:
            TypeError, ValueError: other things than dense tensors, or other names, shapes, dtypes, options or calls than on another
                rank, or than the last time; the message names the ranks and both values.
            torch.distributed.DistBackendError: a rank did not answer within the group's timeout, or waits for something else.
        """
        work = self._average(tensors, names, out)
        return work if async_op else work.wait()

    def _average(self, tensors, names, out):
        exchange = self._exchange
        exchange.use("average")
        who = f"rank {exchange.rank()}: average"
        try:
            if absent := tensors is None:
                names, tensors = self._zeros(who, names)
            forms = self._checked(who, tensors, names)
            _check_out(who, tensors, out)
        except (TypeError, ValueError) as error:
            exchange.announce_failure(str(error))  # the others wait in vain
            raise
        self._decided = True  # of the one before
        if not all(form.key in self._names for form in forms.values()):
            self._names = self._names | {form.key: name for name, form in forms.items()}
        given = exchange.times_given()
        try:
            work = self._tensors.average(list(tensors), [form.key for form in forms.values()], list(forms), list(out or ()), absent)
        except BaseException:
            if exchange.times_given() != given:  # of some of them something is held back now
                self._note_forms(forms)
            raise
        self._note_forms(forms)
        self._last = tuple(forms), tensors[0].device
        self._decided = False
        return work

    def _take_forms(self, forms):
        self._forms, self._names = dict(forms), {form.key: name for name, form in forms.items()}

    def _note_forms(self, forms):
        self._forms.update(forms)
        self._lists.add(tuple(forms))

    def commit(self):
        """Say that the last average counts: `abort` is an error from then on, until the next one. The next average says it too.

        Raises:
            RuntimeError: no average since the last `commit` or `abort`.
        """
        self._decide("commit")

    def abort(self):
        """Say, on every rank, that the last average was not used: what each rank sent in it is held back again. Waits for it.

        What went dense, in `dense_steps` or while paused, is in no rank's keeping and does not return.

        Raises:
            RuntimeError: no average since the last `commit` or `abort`.
        """
        self._decide("abort")
        self._exchange.abort()

    def _decide(self, what):
        if self._decided:
            raise RuntimeError(f"{what}: expected an average that is neither committed nor aborted, got none")
        self._decided = True

    def _checked(self, who, tensors, names):
        """{name: Form} in the order of the tensors."""
        if not isinstance(tensors, (list, tuple)):
            raise TypeError(f"{who}: expected a list of tensors, got {type(tensors).__name__}")
        if not tensors:
            raise ValueError(f"{who}: expected at least one tensor, got none")
        for place, tensor in enumerate(tensors):
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(f"{who}: expected tensors, got {type(tensor).__name__} at place {place}")
            if tensor.layout != torch.strided:
                raise TypeError(f"{who}: expected dense tensors, got one of layout {tensor.layout} at place {place}")
            if tensor.dtype not in DTYPES.values():
                raise TypeError(f"{who}: expected tensors of dtype {', '.join(DTYPES)}, got {tensor.dtype} at place {place}")
            if tensor.device != tensors[0].device:
                raise ValueError(f"{who}: expected all tensors on {tensors[0].device}, got one on {tensor.device} at place {place}")
        if names is None:
            names = [str(place) for place in range(len(tensors))]
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"{who}: expected names to be a list of strings, got {names!r:.80}")
        if len(names) != len(tensors) or len(set(names)) != len(names):
            raise ValueError(f"{who}: expected {len(tensors)} distinct names, got {len(set(names))} distinct ones of {len(names)}")
        self._check_names(who, tuple(names))
        forms = {}
        for name, tensor in zip(names, tensors, strict=True):
            known = self._forms.get(name)
            form = Form(_key_of(name) if known is None else known.key, tuple(tensor.shape), tensor.dtype)
            _check_form(who, name, known, form)
            forms[name] = form
        return forms

    def _zeros(self, who, names):
        """(names, tensors) of a rank that contributes nothing."""
        if self._given.get("levels") is not None:
            raise ValueError(f"{who}: expected tensors of every rank with levels, whose hosts are added up as if they had given as many, got None")
        if self._last is None or (names is not None and tuple(names) not in self._lists):
            raise ValueError(f"{who}: expected tensors, or None where this rank has averaged tensors of these names before, got None")
        last, device = self._last
        names = list(last if names is None else names)
        return names, [torch.zeros(self._forms[name].shape, dtype=self._forms[name].dtype, device=device) for name in names]

    def _check_names(self, who, names):
        """A list is averaged as a whole or not at all: a name too few or another one is a slip, not a new list."""
        if names in self._lists:
            return
        averaged = {name for each in self._lists for name in each}
        known = [name for name in names if name in self._forms]
        if averaged.intersection(names) or len(known) not in (0, len(names)):
            others = [name for name in names if name not in self._forms]
            raise ValueError(
                f"{who}: expected the same names in the same order as before, or none of those, got {len(names)} names, "
                f"{len(known)} of which are known{f' and {others[0]!r} is not' if others else ''}; call reset() to begin with other tensors"
            )

    def _named_tensors(self, module):
        _check_no_module(module)
        return [(name, _like(form), form.key) for name, form in self._forms.items()]

    def _named_tensors_to_load(self, module):
        _check_no_module(module)
        self._exchange.use("average")
        return _Names(self._forms)

    def _with_dtypes(self, state_dict):
        for name, form in self._forms.items():
            state_dict["parameters"][name]["dtype"] = str(form.dtype)
        return state_dict

    def _adopt(self, named_keys, pieces):
        """The pieces as the exchange takes them in; of averaged tensors, with their names."""
        if not isinstance(named_keys, _Names):
            return pieces
        self._begin_averaging()
        self._take_forms(named_keys.found)
        return {key: piece._replace(parameter=None) for key, piece in pieces.items()}


class _Names:
    """Reads names, shapes and dtypes from a state dict: [(name, tensor without data, key)]."""

    def __init__(self, known):
        self._known, self.found = dict(known), {}

    def __call__(self, who, state_dict):
        parameters = state_dict.get("parameters")
        if not isinstance(parameters, dict) or not all(isinstance(entry, dict) for entry in parameters.values()):
            raise ValueError(f"{who}: expected a state dict of averaged tensors, got one without them")
        found = {}
        for name, entry in parameters.items():
            shape, dtype = entry.get("shape"), entry.get("dtype")
            sizes = isinstance(shape, list) and all(type(size) is int and 0 <= size < 2**48 for size in shape) and math.prod(shape) < 2**48
            if not (isinstance(name, str) and sizes and isinstance(dtype, str) and dtype in DTYPES):
                raise ValueError(f"{who}: expected the shape and the dtype of an averaged tensor, got others under {name!r}")
            found[name] = Form(_key_of(name), tuple(shape), DTYPES[dtype])
        for known in (self._known, self.found):
            if known and known.keys() != found.keys():
                raise ValueError(f"{who}: expected the names {sorted(known)[:3]}, got {sorted(found)[:3]}, of {len(known)} and {len(found)}")
            for name, form in found.items():
                _check_form(who, name, known.get(name), form)
        self.found = found
        return [(name, _like(form), form.key) for name, form in found.items()]


def _key_of(name):
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


def _like(form):
    return torch.empty(form.shape, dtype=form.dtype, device="meta", requires_grad=True)


def _check_form(who, name, known, form):
    if known is not None and known[1:] != form[1:]:
        raise ValueError(
            f"{who}: expected {name!r} of shape {list(known.shape)} and dtype {known.dtype}, as before, got {list(form.shape)} and {form.dtype}; "
            "call reset() to begin with other tensors"
        )


def _check_out(who, tensors, out):
    if out is None:
        return
    if not isinstance(out, (list, tuple)) or not all(isinstance(tensor, torch.Tensor) for tensor in out):
        raise TypeError(f"{who}: expected out to be a list of tensors, got {type(out).__name__}")
    if len({id(tensor) for tensor in out}) != len(tensors) or len(out) != len(tensors):
        raise ValueError(f"{who}: expected {len(tensors)} distinct tensors in out, got {len({id(tensor) for tensor in out})} of {len(out)}")
    for place, (tensor, taking) in enumerate(zip(tensors, out, strict=True)):
        if taking is tensor:
            continue
        form, found = ((tuple(each.shape), each.dtype, each.device, each.layout) for each in (tensor, taking))
        if found != form:
            raise ValueError(f"{who}: expected out at place {place} of shape, dtype, device and layout {form}, got {found}")


def _check_no_module(module):
    if module is not None:
        raise ValueError(f"expected None in place of a module, for a state that averages tensors, got {type(module).__name__}")
