"""Whether torchvision can be imported here, beside this torch: tests that need it say so and are counted as skipped."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent))  # experiments is not installed; an installed package comes first

from experiments.data import import_torchvision  # noqa: E402

try:
    import_torchvision()
    TORCHVISION_PROBLEM = ""
except ImportError as error:
    TORCHVISION_PROBLEM = str(error)
needs_torchvision = pytest.mark.skipif(bool(TORCHVISION_PROBLEM), reason=TORCHVISION_PROBLEM or "torchvision")
