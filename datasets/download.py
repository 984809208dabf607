"""The one data set that is fetched when it is absent."""

import shutil
import tempfile
from pathlib import Path

from utils.errors import DataError
from utils.locks import exclusive

CIFAR10_FOLDER = "cifar-10-batches-py"


def download_cifar10(root: Path) -> None:
    """Put CIFAR-10 into ``root/cifar10/``; one process does it, others wait; whole or not at all.

    Raises:
        DataError: No network, a wrong hash, or no space.
    """
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import download_and_extract_archive

    target = root / "cifar10" / CIFAR10_FOLDER
    try:
        with exclusive(root / ".cifar10.lock", "downloading CIFAR-10"):
            for left_over in root.glob(".cifar10-download-*"):            # of a killed download: we hold the lock
                shutil.rmtree(left_over, ignore_errors=True)
            if target.is_dir():
                return
            with tempfile.TemporaryDirectory(prefix=".cifar10-download-", dir=root) as folder:
                download_and_extract_archive(CIFAR10.url, folder, filename=CIFAR10.filename, md5=CIFAR10.tgz_md5)
                target.parent.mkdir(exist_ok=True)
                (Path(folder) / CIFAR10_FOLDER).rename(target)
    except (OSError, RuntimeError, EOFError) as error:                    # URLError is an OSError
        raise DataError(f"CIFAR10 is not in {root} and cannot be downloaded ({error}); put cifar-10-python.tar.gz's "
                        f"folder {CIFAR10_FOLDER} into {target.parent}") from None
