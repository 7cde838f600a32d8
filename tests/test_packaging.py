"""What a source distribution holds: all that the build reads, and nothing of what it does not."""

import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
READ_BY_THE_BUILD = ("csrc", "cuda", "regtopk_torch")
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
