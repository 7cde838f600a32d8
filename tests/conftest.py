"""What holds for every test, set before anything imports torch."""

import os

# Most tests run several processes on few cores: a thread that waits must not spin away the time of those it waits for.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Those that take longest come first: two files are run at a time, and neither should be left for the end.
LONGEST = ("test_gpu_check", "test_cuda_emulation", "test_cifar10", "test_device_path", "test_modes", "test_cuda_build", "test_faults")


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))
