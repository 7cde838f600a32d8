"""The native tests compile and run for a moment; make sanitize and make fuzz run them whole, under each sanitizer."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

NATIVE = Path(__file__).resolve().parent / "native"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build(tmp_path_factory.mktemp("native"), "address,undefined", "test_completer")


def build(folder, sanitizers, *targets):
    if shutil.which("cmake") is None or shutil.which("ninja") is None:
        pytest.skip("needs cmake and ninja")
    for command in (
        ["cmake", "-S", NATIVE, "-B", folder, "-G", "Ninja", f"-DSANITIZE={sanitizers}"],
        ["cmake", "--build", folder, "--target", *targets],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


def run(built, *command):
    return subprocess.run([built / command[0], *command[1:]], cwd=built, capture_output=True, text=True, timeout=600)


@pytest.mark.long  # the core is compiled for it, as by make fuzz
def test_two_decoders_agree_on_damaged_payloads_under_address_and_ub_sanitizer(tmp_path):
    done = run(build(tmp_path, "address,undefined", "fuzz_payload"), "fuzz_payload", "4", "1")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    counted = re.search(r"(\d+) inputs, (\d+) accepted, (\d+) rejected, no finding", done.stdout)
    assert counted and min(map(int, counted.groups())) > 100, done.stdout


def test_the_completer_runs_under_address_and_ub_sanitizer(built):
    done = run(built, "test_completer")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


def test_the_completer_runs_under_thread_sanitizer(tmp_path):
    done = run(build(tmp_path, "thread", "test_completer"), "test_completer")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
