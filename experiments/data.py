"""Load CIFAR-10, MNIST, or scikit-learn's digits enlarged to the shape of the first, as tensors in memory."""

import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

CIFAR10_NAME, MNIST_NAME = "CIFAR-10", "MNIST"
CIFAR10_FOLDER = "cifar-10-batches-py"  # torchvision's layout
DIGITS_NAME = "scikit-learn digits, enlarged to 32x32x3"
DIGITS_TEST_IMAGES = 360
PATIENCE_SECONDS = 15.0
PATIENCE_BYTES = 2_000_000
DOWNLOAD_LIMIT_SECONDS = 600.0

# SIGALRM ends an orphan: a killed training process cannot stop its own download.
_DOWNLOAD_COMMAND = """
import signal, sys
signal.alarm(int(sys.argv[3]) + 1)
from torchvision.datasets import CIFAR10
CIFAR10.url = sys.argv[2] or CIFAR10.url
CIFAR10(sys.argv[1], download=True)
"""


@dataclass
class Dataset:
    """Hold one data set for classification into ten classes.

    `name` is what logs and tables print. Images are uint8 of shape (count, 3, 32, 32), of MNIST (count, 1, 28, 28), labels int64 of shape
    (count,), all on the CPU. `mean` and `deviation` are those of the training images, float32 of shape (channels, 1, 1), in
    units of one grey level.
    """

    name: str
    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor

    def __post_init__(self):
        # A thousand images give the mean to 0.01 grey levels of noise per channel at a fraction of the time.
        sample = self.train_images[:: max(1, len(self.train_images) // 1000)].float()
        self.mean = sample.mean(dim=(0, 2, 3)).view(-1, 1, 1)
        self.deviation = sample.std(dim=(0, 2, 3)).view(-1, 1, 1)

    def normalise(self, images):
        """Return uint8 `images` as float32 with zero mean and unit deviation."""
        return (images.float() - self.mean) / self.deviation


def import_torchvision():
    """Import and return torchvision; raise ImportError that names both versions where it does not fit torch."""
    try:
        import torchvision
    except (ImportError, RuntimeError, OSError) as error:  # a torchvision built for another torch: RuntimeError
        raise ImportError(
            f"torchvision: expected a torchvision that fits torch {torch.__version__}, got {error}; "
            "install the matching pair, see https://pytorch.org/get-started"
        ) from error
    return torchvision


def check_cifar10(folder):
    """Raise ValueError unless `folder` holds `cifar-10-batches-py/` with the seven official files (md5 sums)."""
    batches, datasets = Path(folder) / CIFAR10_FOLDER, import_torchvision().datasets
    advice = f"give the folder that holds {CIFAR10_FOLDER}, or leave --data out to download it"
    meta = (datasets.CIFAR10.meta["filename"], datasets.CIFAR10.meta["md5"])
    for name, checksum in (*datasets.CIFAR10.train_list, *datasets.CIFAR10.test_list, meta):
        found = None
        if not batches.is_dir():
            found = "a folder without it" if Path(folder).is_dir() else "no such folder"
        elif not (batches / name).is_file():
            found = f"no file {name}"
        elif not datasets.utils.check_integrity(batches / name, checksum):
            found = f"a damaged {name} of {(batches / name).stat().st_size} bytes with another md5 sum"
        if found:
            raise ValueError(f"--data: expected CIFAR-10 in {batches}, got {found}; {advice}")


def load_cifar10(folder):
    """Load the 50,000 training and 10,000 test images from `folder`/cifar-10-batches-py; checked by `check_cifar10`."""
    check_cifar10(folder)
    datasets = import_torchvision().datasets
    tensors = []
    for train in (True, False):
        part = datasets.CIFAR10(str(folder), train=train, download=False)
        tensors += [torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets)]
    return Dataset(CIFAR10_NAME, *tensors)


def load_mnist(folder):
    """Load the 60,000 training and 10,000 test images from `folder`/MNIST/raw, torchvision's layout; ValueError where they are not there."""
    try:
        parts = [import_torchvision().datasets.MNIST(str(folder), train=train) for train in (True, False)]
    except RuntimeError as error:
        raise ValueError(f"--data: expected the four files of MNIST in {Path(folder) / 'MNIST' / 'raw'}, got others or none; put train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte there") from error
    return Dataset(MNIST_NAME, *(tensor for part in parts for tensor in (part.data.unsqueeze(1), part.targets)))


def load_digits():
    """Load scikit-learn's 1,797 digits: each 8x8 pixel becomes 4x4, grey becomes three channels, 0...16 becomes 0...255.

    The last 360 images are the test set: the first and the last images come from different writers.
    """
    from sklearn.datasets import load_digits as load_bundled_digits

    bundled = load_bundled_digits()
    grey = (torch.from_numpy(bundled.images) * (255 / 16)).to(torch.uint8)
    images = grey.repeat_interleave(4, 1).repeat_interleave(4, 2).unsqueeze(1).repeat(1, 3, 1, 1)
    labels = torch.from_numpy(bundled.target).long()
    train, test = slice(None, -DIGITS_TEST_IMAGES), slice(-DIGITS_TEST_IMAGES, None)
    return Dataset(DIGITS_NAME, images[train], labels[train], images[test], labels[test])


def download_cifar10(folder, url="", patience_seconds=PATIENCE_SECONDS, limit_seconds=DOWNLOAD_LIMIT_SECONDS):
    """Download CIFAR-10 into `folder` through torchvision; return None, or the reason in words why that failed.

    torchvision's download has no time limit, so a child process does it and is killed when fewer than 2 MB arrive in
    `patience_seconds`, or after `limit_seconds`. It writes into a temporary folder whose checked result is moved into
    place at the end, replacing what was there, so a partial file is never mistaken for data. `url` replaces
    torchvision's address.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="cifar-10-partial-", dir=folder) as partial:
        command = [sys.executable, "-c", _DOWNLOAD_COMMAND, partial, url, str(int(limit_seconds))]
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        start = mark = time.monotonic()
        arrived, reason = 0, None
        try:
            while reason is None:
                try:
                    _, messages = child.communicate(timeout=min(1.0, patience_seconds))
                    if child.returncode != 0:
                        reason = (messages.strip().splitlines() or [f"exit status {child.returncode}"])[-1]
                    break
                except subprocess.TimeoutExpired:
                    now, size = time.monotonic(), sum(file.stat().st_size for file in Path(partial).rglob("*") if file.is_file())
                    if size - arrived >= PATIENCE_BYTES:
                        arrived, mark = size, now
                    if now - mark >= patience_seconds:
                        reason = f"fewer than {PATIENCE_BYTES / 1e6:.0f} MB arrived in {patience_seconds:.0f} s"
                    elif now - start >= limit_seconds:
                        reason = f"not complete after {limit_seconds:.0f} s"
        finally:
            child.kill()
            child.communicate()
        if reason is None:
            target = Path(folder) / CIFAR10_FOLDER
            shutil.rmtree(target, ignore_errors=True)
            (Path(partial) / target.name).rename(target)
        return reason


def prepare(folder, download_folder="data"):
    """Settle what this host can train on; return (folder with CIFAR-10, None), or (None, reason) for the digits.

    `folder` is what `--data` says: "digits" (the reason is then empty), a folder that must hold CIFAR-10, else
    ValueError, or None: use `download_folder`, and download into it where it holds no undamaged CIFAR-10. Call it in
    one process per host.
    """
    if folder == "digits":
        return None, ""
    if folder is not None:
        check_cifar10(folder)
        return folder, None
    try:
        check_cifar10(download_folder)
    except ValueError:
        print(f"downloading CIFAR-10 into {download_folder}/", flush=True)
        reason = download_cifar10(download_folder)
        if reason is not None:
            return None, reason
    return download_folder, None
