"""The Makefile where something is missing or new: what it says, and what it hands on."""

import os
import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(*arguments, folder=ROOT):
    return subprocess.run(["make", *arguments], cwd=folder, capture_output=True, text=True, timeout=600)


def test_train_without_torchrun_says_what_to_do(tmp_path):
    # -o: the set-up counts as done, in an environment that holds nothing.
    result = make("train", f"VENV={tmp_path}", "-o", "setup")
    assert result.returncode != 0
    assert f"make train: expected torchrun in {tmp_path}/bin, got none; run make clean, then make train" in result.stdout


def test_setup_refuses_an_old_python(tmp_path):
    for name in ("Makefile", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "csrc").mkdir()
    old = tmp_path / "old-python"
    old.write_text('#!/bin/sh\ncase "$1" in --version) echo "Python 3.9.1";; *) exit 1;; esac\n')
    old.chmod(0o755)
    result = make("setup", f"PYTHON={old}", folder=tmp_path)
    assert result.returncode != 0
    assert "make: expected Python 3.11 or newer, got Python 3.9.1; set PYTHON=..." in result.stdout


@pytest.mark.parametrize(
    "goal, gpu, expected", [("train", "exit 1", "off"), ("setup", "exit 1", "off"), ("train", "echo GPU 0", "auto"), ("test", "exit 1", "auto"), ("train test", "exit 1", "auto")]
)
def test_kernels_that_nothing_here_can_run_are_built_for_the_tests_alone(tmp_path, goal, gpu, expected):
    for name in ("Makefile", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("CMakeLists.txt", "setup.py", "pyproject.toml"):
        (tmp_path / name).touch()
    for folder in ("csrc", "cuda"):
        (tmp_path / folder).mkdir()
    asked = tmp_path / "nvidia-smi"
    asked.write_text(f"#!/bin/sh\n{gpu}\n")
    asked.chmod(0o755)
    environment = {key: value for key, value in os.environ.items() if key != "REGTOPK_CUDA"} | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    result = subprocess.run(["make", "--dry-run", *goal.split()], cwd=tmp_path, capture_output=True, text=True, timeout=600, env=environment)
    assert f"(REGTOPK_CUDA={expected})" in result.stdout
    result = subprocess.run(["make", "--dry-run", goal.split()[0], "REGTOPK_CUDA=on"], cwd=tmp_path, capture_output=True, text=True, timeout=600, env=environment)
    assert "(REGTOPK_CUDA=on)" in result.stdout


@pytest.mark.parametrize(
    "arguments, workers", [("", 2), ("--workers 4 --steps 9", 4), ("--method topk --workers=3", 3), ("--steps 500", 2)]
)
def test_workers_become_torchruns_processes(arguments, workers):
    result = make("--dry-run", "train", "-o", "setup", f"ARGS={arguments}")
    assert f"--nproc-per-node {workers} experiments/cifar10.py {arguments}".rstrip() in result.stdout
