"""Densities that change while training."""

import math
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


@dataclass(frozen=True)
class AdaptiveDensity:
    """A density that follows the size of the gradient, on a budget of bytes. For `TopKState(density=...)` and its kind.

    The rule is a derivation of this project's for arXiv 2210.13532, which chooses k per step to minimise the error under a budget:

        density_t = mean * (|G_{t-1}| / its moving average) ** power, clipped to [minimum, maximum], times a gain, clipped again

    |G| is the 2-norm of the average of all buckets of a step, and its moving average goes over the last 100. The gain, an integral
    controller, pays back what has been spent beyond the bytes of `mean` or spends what has been saved: with the default limits less
    than 2 % of the bytes at any step from the 1,000th on. The mean holds in the first step, and in one after a dense or a void step.

    No power that was tried, 1 and 2, at 0.001 and 0.0001, made a difference to a small network on MNIST or to ResNet-18 on CIFAR-10, and on MNIST neither did the
    threshold that is the optimum of that error (docs/findings.md): reasons to use it have yet to be found.

    Every rank has the same average and so computes the same k, without a collective; only what k needs travels. What was measured is
    part of `state_dict` and `rt.save`, and `reset()` ends it. Of CUDA gradients the host waits, where a step begins, for the exchange of the
    step before, and not for what the device was given since.

    Args:
        mean (float): in (0, 1], the density whose bytes are the budget; dense steps are not part of it.
        power (float): 0 to 8, a multiple of 0.25, so that square roots and products give every machine the same bits.
        minimum, maximum (float, optional): 0 < minimum <= mean <= maximum <= 1; default mean / 4 and 4 * mean. With wider ones, a larger
            part of the bytes may be owed for a time.

    Raises:
        ValueError: an argument out of range.
    """

    mean: float
    power: float = 1.0
    minimum: float | None = None
    maximum: float | None = None

    def __post_init__(self):
        optional = [(name, value) for name, value in (("minimum", self.minimum), ("maximum", self.maximum)) if value is not None]
        for name, value in (("mean", self.mean), ("power", self.power), *optional):
            if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
                raise ValueError(f"AdaptiveDensity: expected {name} to be a finite number, got {value!r}")
        if not 0 <= self.power <= 8 or self.power % 0.25:
            raise ValueError(f"AdaptiveDensity: expected power from 0 to 8, a multiple of 0.25, got {self.power!r}")
        minimum, maximum = self.limits()
        if not 0 < minimum <= self.mean <= maximum <= 1:
            raise ValueError(
                f"AdaptiveDensity: expected 0 < minimum <= mean <= maximum <= 1, got minimum={minimum}, mean={self.mean}, maximum={maximum}"
            )

    def limits(self):
        """(minimum, maximum), the given ones or those of the mean."""
        minimum = self.mean / 4 if self.minimum is None else self.minimum
        return minimum, min(4 * self.mean, 1.0) if self.maximum is None else self.maximum
