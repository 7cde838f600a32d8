"""Densities that change while training."""

import numbers
from dataclasses import dataclass


@dataclass(frozen=True)
class WarmupDensity:
    """A density that goes from `start` to `end` over the first `steps` steps, by the same factor each step, and then stays.

    As the warm-up of Deep Gradient Compression (arXiv 1712.01887, section 3.3) has it, in steps instead of epochs. For
    `TopKState(density=...)` and its kind. Where the density changes from one step to the next, the ranks compare it before they
    send: the first bucket of such a step waits for one round trip.

    Args:
        start, end (float): fractions of the entries, in (0, 1].
        steps (int): at least 1; the density of step `steps`, counted from 0, is the first that is `end`.

    Raises:
        ValueError: an argument out of range.
    """

    start: float
    end: float
    steps: int

    def __post_init__(self):
        for name in ("start", "end"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < float(value) <= 1:
                raise ValueError(f"WarmupDensity: expected 0 < {name} <= 1, got {value!r}")
        if isinstance(self.steps, bool) or not isinstance(self.steps, numbers.Integral) or int(self.steps) < 1:
            raise ValueError(f"WarmupDensity: expected steps to be an integer of at least 1, got {self.steps!r}")

    def __call__(self, step):
        """The density of a step, counted from 0."""
        if step >= self.steps:
            return float(self.end)
        return float(self.start) * (float(self.end) / float(self.start)) ** (step / self.steps)
