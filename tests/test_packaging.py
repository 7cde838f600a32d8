"""What a source distribution holds, all that the build reads and nothing of what it does not, and whether pip can build from it."""

import os
import shutil
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
READ_BY_THE_BUILD = ("csrc", "cuda", "regtopk_torch")
# The tools that come with the environment first.
TOOLS = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
SOURCES = {".cpp", ".h", ".cu", ".cuh", ".cmake", ".py", ".pyi", ".txt", ".typed"}


def test_a_source_distribution_has_what_the_build_reads_and_no_tests_or_experiments(tmp_path):
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path), "sdist", "--dist-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("regtopk*.tar.gz")
    with tarfile.open(archive) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    needed = {path.relative_to(ROOT).as_posix() for folder in READ_BY_THE_BUILD for path in (ROOT / folder).rglob("*") if path.suffix in SOURCES}
    needed = {name for name in needed if "__pycache__" not in name} | {"CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "LICENSE"}
    assert len(needed) > 100 and needed <= names, needed - names
    assert not {name for name in names if name.split("/")[0] in ("tests", "experiments", "benchmarks", "docs", "build", "runs")}
    assert not {name for name in names if name.endswith(".so")}


@pytest.mark.skipif(None in (shutil.which("cmake", path=TOOLS), shutil.which("ninja", path=TOOLS)), reason="cmake and ninja are not installed")
@pytest.mark.parametrize("told", [True, False])
def test_cmake_finds_torch_where_setup_py_found_it_though_the_interpreter_does_not_see_it(tmp_path, told):
    """pip builds in an environment in which the torch that is installed is hidden, and setup.py looks for it."""
    venv.create(tmp_path / "bare")
    environment = {**os.environ, "PATH": TOOLS, "REGTOPK_CUDA": "off", "REGTOPK_TORCH_FOLDER": str(Path(torch.__file__).parent.parent) if told else ""}
    environment.pop("PYTHONPATH", None)
    command = [shutil.which("cmake", path=TOOLS), "-S", str(ROOT), "-B", str(tmp_path / "build"), "-G", "Ninja", f"-DPython_EXECUTABLE={tmp_path / 'bare' / 'bin' / 'python'}"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode == 0) == told, done.stdout + done.stderr
    if told:
        assert f"building for torch {torch.__version__}" in done.stdout
    else:
        assert "No module named 'torch'" in done.stderr
