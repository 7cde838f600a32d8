"""What holds for every test, set before anything imports torch."""

import os

# Most tests run several processes on few cores: a thread that waits must not spin away the time of those it waits for.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Those that take longest come first: two files are run at a time, and neither should be left for the end.
# The first compiles the emulation; nothing that would wait for it comes second.
LONGEST = (
    "test_device_path", "test_modes", "test_cuda_emulation", "test_cifar10", "test_faults", "test_selection", "test_gpu_check", "test_exits",
    "test_stream_transport", "test_report", "test_cpu_variants", "test_soak", "test_mixed_precision",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))
