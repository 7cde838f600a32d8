"""Build tests/native/late_backend.cpp, and put it where a model's group has its NCCL: `with served_late(way)`."""

import hashlib
import importlib.util
import itertools
import os
import pathlib
import subprocess
import sysconfig
from contextlib import contextmanager

import torch
import torch.distributed as dist

from regtopk_torch import groups

ROOT = pathlib.Path(__file__).resolve().parents[1]
SOURCE = ROOT / "tests/native/late_backend.cpp"
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-shared", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"]


def build():
    """Return the path of the module; compile it (about a minute) if the source or torch has changed."""
    digest = hashlib.sha256(SOURCE.read_bytes() + " ".join([*FLAGS, torch.__version__]).encode()).hexdigest()[:16]
    folder = ROOT / "build" / "late" / digest
    library = folder / "late_backend.so"
    if not library.exists():
        from torch.utils.cpp_extension import include_paths, library_paths

        folder.mkdir(parents=True, exist_ok=True)
        includes = [f"-I{path}" for path in (*include_paths(), sysconfig.get_path("include"))]
        libraries = [*(f"-L{path}" for path in library_paths()), "-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"]
        unfinished = folder / f"{os.getpid()}.so"
        subprocess.run([os.environ.get("CXX", "g++"), *FLAGS, *includes, str(SOURCE), "-o", str(unfinished), *libraries], check=True)
        unfinished.rename(library)  # another process never sees half of it
    return library


def load(path):
    spec = importlib.util.spec_from_file_location("late_backend", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def served_late(path, way, failing=-1):
    """Inside, CPU buckets of states that open their groups go through such a backend, as CUDA ones through NCCL."""
    late_backend, numbers = load(path), itertools.count()

    def stream_of(group):
        store = dist.PrefixStore(f"late/{next(numbers)}", group.get_group_store())
        inner = dist.ProcessGroupGloo(store, group.rank(), group.size(), groups._options(groups.timeout_of(group), threads=2))
        return late_backend.make(inner, way, failing), "cpu"

    def new_group(model, ranks, device, limit, name):
        group, inner = of_any_kind(model, ranks, device, limit, name)
        return group, late_backend.make(inner, way, failing)

    before, of_any_kind = groups._stream_of, groups._new_group
    groups._stream_of, groups._new_group = stream_of, new_group
    try:
        yield
    finally:
        groups._stream_of, groups._new_group = before, of_any_kind
