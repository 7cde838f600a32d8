"""See __main__.py. Also a plugin of pytest for the part `kernels`: pytest -p tests.gpu_check."""

import pathlib
import sys
import types

ROOT = pathlib.Path(__file__).resolve().parents[2]


def _folder_as_package(name, folder):
    """Import `name` from a folder of this checkout, without its __init__.py and before any installed package of that name."""
    package = types.ModuleType(name)
    package.__path__ = [str(folder)]
    sys.modules.setdefault(name, package)


# tests/ has no __init__.py, so that a package `tests` that somebody has installed would come before it.
_folder_as_package("tests", ROOT / "tests")


def package_without_extension():
    """Make regtopk_torch's plain Python (reference.py) importable where the extension could not be built; True if it could not."""
    try:
        import regtopk_torch  # noqa: F401
    except ImportError:
        sys.modules.pop("regtopk_torch", None)
        _folder_as_package("regtopk_torch", ROOT / "regtopk_torch")
    return not hasattr(sys.modules["regtopk_torch"], "__file__")


def pytest_configure(config):
    package_without_extension()
