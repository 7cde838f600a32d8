"""Drive CMake, which holds the list of what is compiled, for `pip install --no-build-isolation .` or `-e .`."""

import pathlib
import subprocess
import sys

import torch
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = pathlib.Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    def build_extension(self, extension):
        target = pathlib.Path(self.get_ext_fullpath(extension.name)).resolve()
        # One build folder per torch: an object file of another version would link and then fail at run time.
        build = ROOT / "build" / f"torch-{torch.__version__}"
        build.mkdir(parents=True, exist_ok=True)
        configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"]
        configure.append(f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}")
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(build / target.name), str(target))


setup(ext_modules=[Extension("regtopk_torch._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
