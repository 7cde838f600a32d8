"""The options of the selection, checked once."""

import math
import numbers

from regtopk_torch import _C

METHODS = ("topk", "regtopk")
DISTORTIONS = ("previous", "current")


def check_options(who, *, method, density, mu, distortion):
    """Return the options in the form of the extension; raise ValueError or TypeError that names `who` otherwise."""
    if method not in METHODS:
        raise ValueError(f"{who}: expected method 'topk' or 'regtopk', got {method!r}")
    for name, value in (("density", density), ("mu", mu)):
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{who}: expected {name} to be a number, got {value!r}")
    if not 0 < density <= 1:
        raise ValueError(
            f"{who}: expected 0 < density <= 1, got density={density}; pass a fraction, 0.001 keeps one entry in 1000"
        )
    if not (math.isfinite(mu) and mu > 0):
        raise ValueError(f"{who}: expected a finite mu > 0, got mu={mu}; TopKState is the limit mu -> 0")
    if distortion not in DISTORTIONS:
        raise ValueError(f"{who}: expected distortion 'previous' or 'current', got {distortion!r}")
    return _C.Options(regularised=method == "regtopk", density=float(density), mu=float(mu), distortion=distortion)
