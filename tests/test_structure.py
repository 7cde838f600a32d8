"""The folders' rules: who may include and import whom, and what the README says about them."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Folder -> project folders whose headers it may include. Arrows point from the network to the arithmetic.
MAY_INCLUDE = {
    "csrc/core": {"csrc/core", "csrc/core/simd"},
    "csrc/core/simd": {"csrc/core", "csrc/core/simd"},
    "csrc/ops": {"csrc/core", "csrc/ops"},
    "csrc/memory": {"csrc/ops", "csrc/memory"},
    "csrc/transport": {"csrc/transport"},
    "csrc/exchange": {"csrc/core", "csrc/ops", "csrc/memory", "csrc/transport", "csrc/exchange"},
    "csrc/frontends": {"csrc/ops", "csrc/transport", "csrc/exchange", "csrc/frontends"},
    "csrc": {"csrc/core", "csrc/ops", "csrc/transport", "csrc/frontends"},  # module.cpp
    "cuda": {"csrc/core", "csrc/ops", "cuda"},
}
FRAMEWORK = re.compile(r"^(torch|ATen|c10|caffe2|pybind11|Python\.h|cuda)")
PYTHON = re.compile(r"^(pybind11|Python\.h|torch/csrc/(utils/pybind|jit/python|autograd/python|Dtype)|torch/extension)")


def sources():
    return [path for folder in ("csrc", "cuda") for path in sorted((ROOT / folder).rglob("*")) if path.suffix in {".h", ".cpp", ".cu", ".cuh"}]


def includes(path):
    return re.findall(r'^\s*#include\s+(["<])([^">]+)[">]', path.read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_includes_follow_the_arrows(path):
    folder = str(path.parent.relative_to(ROOT))
    for quote, name in includes(path):
        if quote == '"':
            target = str((path.parent / name).resolve().parent.relative_to(ROOT))
            assert target in MAY_INCLUDE[folder], f"{folder} must not include {name}"
        elif folder.startswith("csrc/core"):
            assert not FRAMEWORK.match(name), f"core must not include {name}"
        if path.name != "module.cpp":
            assert not PYTHON.match(name), f"only module.cpp sees Python, not {name}"
        if folder != "csrc/frontends":
            assert name != "torch/csrc/distributed/c10d/comm.hpp", "only a front end knows a GradBucket"


def test_a_contract_includes_no_implementation():
    # A header that says what a path computes does not lead to the file that picks one.
    for name in ("compress.h", "aggregate.h", "plain.h"):
        assert not any("simd" in included for _, included in includes(ROOT / "csrc/core" / name)), name


@pytest.mark.parametrize("folder", ["exchange", "frontends"])
def test_the_exchange_never_reads_what_a_tensor_holds(folder):
    for path in sorted((ROOT / "csrc" / folder).iterdir()):
        assert not re.search(r"data_ptr|\.item<", path.read_text()), f"{path.name}: operators read and write tensors, on their device"


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: expected absolute imports"
            yield node.module
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in {"importlib.import_module", "__import__"}:
            yield from (argument.value for argument in node.args if isinstance(argument, ast.Constant))


# Python folder -> project folders from which it may import, also within functions. What is used by two has a place of its own.
MAY_IMPORT = {
    "runlog": {"runlog"},
    "regtopk_torch": {"regtopk_torch"},
    "experiments": {"regtopk_torch", "runlog", "experiments"},
    "benchmarks": {"regtopk_torch", "runlog", "benchmarks", "experiments"},
    "examples": {"regtopk_torch"},
    "cuda": set(),
}
TESTS = {path.stem for path in (ROOT / "tests").glob("*.py")} | {"tests"}


def test_a_kernel_that_comes_early_waits_for_those_before_it():
    early, kernels = set(), {}
    for path in (ROOT / "cuda").glob("*.cu"):
        text = path.read_text()
        early |= {(path.name, name) for name in re.findall(r"REGTOPK_LAUNCH_EARLY\(\(?(\w+)", text)}
        for name, body in re.findall(r"\b(\w+_kernel)\((?:const )?[^{;]*\) \{\n(.*?)\n\}\n", text, flags=re.DOTALL):
            kernels[path.name, name] = body
    assert len(early) > 5
    for kernel in early:
        before = kernels[kernel].partition("  wait_for_stream();\n")
        # Until then there are the block's own memory and arguments alone.
        assert before[1] and not re.search(r"\.(load|store|add|take|set)\w*\(", before[0]), kernel


@pytest.mark.parametrize("path", [path for folder in MAY_IMPORT for path in sorted((ROOT / folder).rglob("*.py"))], ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_arrows(path):
    folder = path.relative_to(ROOT).parts[0]
    for module in imported_modules(path):
        top = module.partition(".")[0]
        assert top in MAY_IMPORT[folder] or top not in MAY_IMPORT.keys() | TESTS, f"{folder} must not import {module}, not even in a function"


@pytest.mark.parametrize("path", sorted((ROOT / "regtopk_torch").glob("*.py")), ids=lambda path: path.name)
def test_the_package_needs_torch_and_the_standard_library_alone(path):
    import sys

    for module in imported_modules(path):
        top = module.partition(".")[0]
        assert top in {"torch", "regtopk_torch"} or top in sys.stdlib_module_names, f"{path.name} must not import {module}"


def test_the_reference_uses_nothing_of_the_package():
    assert not [m for m in imported_modules(ROOT / "regtopk_torch" / "reference.py") if m.startswith("regtopk_torch")]


def test_the_hook_has_no_string_annotations():
    # DDP reads the annotations of a hook and refuses strings.
    assert "from __future__" not in (ROOT / "regtopk_torch" / "hook.py").read_text()


def test_the_build_lists_every_source_once():
    listed = re.findall(r"\b(?:csrc|cuda)/[\w/]+\.(?:cpp|cu)\b", (ROOT / "CMakeLists.txt").read_text())
    core = re.findall(r"\b(?:simd/)?\w+\.cpp\b", (ROOT / "csrc/core/CMakeLists.txt").read_text())
    listed += [f"csrc/core/{name}" for name in core]
    compiled = [str(path.relative_to(ROOT)) for path in sources() if path.suffix in {".cpp", ".cu"}]
    assert sorted(set(listed)) == sorted(compiled)


def test_the_readme_maps_every_folder():
    readme = (ROOT / "README.md").read_text()
    folders = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").iterdir() if path.is_dir()}
    for folder in folders | MAY_IMPORT.keys() | {"tests"}:
        assert f"{folder.rpartition('/')[2]}/" in readme, f"expected {folder} in the README's folder map"
