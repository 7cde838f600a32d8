"""Books of a run under DDP: what each bucket was given and handed out, to be compared with the simulation and summed up."""

import hashlib
import math

import torch
from buckets import same_bits

import regtopk_torch as rt
from regtopk_torch.checkpoint import plain_name


class Books:
    """What each bucket of each step was given and handed out: by index of the parameter, flat, in memory order."""

    def __init__(self, module, grad_scaler=None):
        self.indices = {parameter: index for index, parameter in enumerate(module.parameters())}
        self.count = len(self.indices)
        self.grad_scaler = grad_scaler
        self.steps, self.last_index = [], math.inf

    def begin_bucket(self, bucket):
        layout = [self.indices[parameter] for parameter in bucket.parameters()]
        # DDP may skip buckets, so that neither a first one nor a parameter of the last step is sure to come; in the first step
        # of a static graph all say index 0.
        begins = bucket.index() < self.last_index or layout[0] in self.steps[-1]["given"]
        self.last_index = bucket.index()
        if begins:
            scale = 1.0 if self.grad_scaler is None else self.grad_scaler.get_scale()
            self.steps.append({"layouts": [], "given": {}, "handed_out": {}, "scale": scale})
        step = self.steps[-1]
        step["layouts"].append(layout)
        self.enter(step["given"], layout, bucket)
        return step["handed_out"], layout

    def replace(self, old, new):
        """`new` takes the place of the parameter `old`, under an index of its own."""
        del self.indices[old]
        self.indices[new] = self.count
        self.count += 1

    @staticmethod
    def enter(page, layout, bucket):
        # A bucket holds each gradient in its parameter's memory order, whatever shape it shows.
        page.update((index, gradient.flatten().clone()) for index, gradient in zip(layout, bucket.gradients(), strict=True))


def booked_hook(state_and_books, bucket):
    """sparse_hook that enters the bucket in the books before and after."""
    state, books = state_and_books
    page, layout = books.begin_bucket(bucket)

    def book(done):
        books.enter(page, layout, bucket)  # the result is the bucket's own buffer
        return done.value()

    return rt.sparse_hook(state, bucket).then(book)


def in_memory_order(tensor, like):
    """A tensor's entries in the memory order of the parameter `like`, flat."""
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype)
    flat.as_strided(like.size(), like.stride()).copy_(tensor)
    return flat


def residuals_of(state, module):
    """{parameter index: residual, flat, in memory order} of the parameters that were exchanged."""
    saved = state.state_dict(module)["parameters"]
    return {
        index: in_memory_order(saved[name]["residual"], parameter)
        for index, (name, parameter) in enumerate((plain_name(name), parameter) for name, parameter in module.named_parameters())
        if "residual" in saved.get(name, {})
    }


def nothing_applied(module):
    """The sums to which add_gradients adds, fp64."""
    return [torch.zeros(parameter.numel(), dtype=torch.float64) for parameter in module.parameters()]


def add_gradients(applied, module):
    for total, parameter in zip(applied, module.parameters(), strict=True):
        if parameter.grad is not None:
            total += in_memory_order(parameter.grad, parameter).double()


def digest(module):
    """A hash of all parameters' bits."""
    hashed = hashlib.sha256()
    for parameter in module.parameters():
        hashed.update(parameter.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return hashed.hexdigest()


def check_against_simulation(books, method, exchange=None):
    """Feed the simulation what the ranks' buckets held; its averages must be what DDP was handed, bit for bit.

    `books` holds the steps of every rank. A step may say "skipped": not applied for a reason that lies outside these books; "unknown":
    applied in part, so that nothing is compared until a step that has a "restart", a state to go on from. Returns the
    LocalExchange: `exchange`, or a new one of density 0.05 and mu 1; None where it knows nothing at the end.
    """
    exchange = exchange or rt.LocalExchange(len(books), 0.05, method=method, mu=1.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    known = True
    try:
        for steps in zip(*books, strict=True):
            assert all(step["layouts"] == steps[0]["layouts"] and step["scale"] == steps[0]["scale"] for step in steps)
            if known:
                parameters = 1 + max(max(layout) for layout in steps[0]["layouts"])
                gradients = [[step["given"].get(index, torch.empty(0)) for index in range(parameters)] for step in steps]
                averages = exchange.step(gradients, steps[0]["layouts"], scale=steps[0]["scale"])
                for step in steps:
                    check_equal(step["handed_out"], {index: averages[index] for index in step["handed_out"]})
                if steps[0].get("skipped"):
                    exchange.skipped()
            known = known and not steps[0].get("unknown") or "restart" in steps[0]
            if "restart" in steps[0]:
                exchange.load_state_dict({"workers": [step["restart"] for step in steps]})
    finally:
        torch.set_num_threads(threads)
    return exchange if known else None


def check_equal(left, right):
    assert left.keys() == right.keys()
    assert all(same_bits(left[key], right[key]) for key in left)


def check_mass(books, kept, applied, *, rounding=1e-5):
    """What all ranks gave equals N times what reached the optimizer on one rank plus what all ranks keep, unscaled.

    Non-finite entries count as nothing given. `rounding` is relative, per entry, to the magnitudes that were applied.
    """
    for index, total in enumerate(applied):
        given = sum(finite(step["given"][index]) / step["scale"] for steps in books for step in steps if index in step["given"])
        held = sum(residuals[index].double() for residuals in kept if index in residuals)
        torch.testing.assert_close(len(books) * total + held, torch.zeros_like(total) + given, rtol=rounding, atol=rounding / 10)


def finite(gradient):
    return torch.where(gradient.isfinite(), gradient, 0.0).double()
