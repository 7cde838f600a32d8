"""Drive CMake, which holds the list of what is compiled, against the torch of the environment that the package is installed into."""

import importlib
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig

import setuptools
from setuptools.command.build_ext import build_ext

ROOT = pathlib.Path(__file__).resolve().parent


def stop(expected, got, command):
    sys.exit(f"regtopk_torch: expected {expected}, got {got}; type: {command}")


def find_torch():
    """Make the torch of the environment importable here and in what is started, which an isolated build hides; return its version.

    The extension must be built against the torch that it will run with, not against one that pip would fetch for the build alone.
    """
    if importlib.util.find_spec("torch") is None:
        packages = sysconfig.get_path("purelib")
        sys.path.append(packages)
        importlib.invalidate_caches()
        if importlib.util.find_spec("torch") is None:
            stop("torch in this environment", "none", "pip install torch, then pip install --no-build-isolation .")
        os.environ["REGTOPK_TORCH_FOLDER"] = packages  # for CMake; pip's isolation takes this folder out of PYTHONPATH again
    import torch

    return torch.__version__


class CMakeBuild(build_ext):
    def build_extension(self, extension):
        version = find_torch()
        for tool in ("cmake", "ninja"):
            if shutil.which(tool) is None:
                stop("cmake 3.22 or newer and ninja on PATH", f"no {tool}", "pip install cmake ninja")
        if not any(map(shutil.which, filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")))):
            stop("a C++20 compiler", "none on PATH", "apt install g++ (or your system's own), or set CXX=...")
        target = pathlib.Path(self.get_ext_fullpath(extension.name)).resolve()
        # One build folder per torch: an object file of another version would link and then fail at run time.
        build = ROOT / "build" / f"torch-{version}"
        build.mkdir(parents=True, exist_ok=True)
        configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"]
        configure.append(f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}")
        for command in (configure, ["cmake", "--build", str(build)]):
            if subprocess.run(command).returncode != 0:
                stop("the build to succeed", "the errors above", "pip install --verbose --no-build-isolation . to see all of them")
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(build / target.name), str(target))


if int(setuptools.__version__.partition(".")[0]) < 77:  # before it reads pyproject.toml, whose licence it would not understand
    stop("setuptools 77 or newer", setuptools.__version__, "pip install 'setuptools>=77'")
setuptools.setup(ext_modules=[setuptools.Extension("regtopk_torch._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
