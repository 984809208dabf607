"""CelebA's aligned faces with their official split."""

from functools import cached_property
from pathlib import Path

from datasets.files import ImageFiles, file_stamp
from utils.errors import DataError
from utils.files import MIB, read_regular

PARTITION = {"train": "0", "test": "2"}                    # 1, the validation part, is not used, as in DDIM
PARTITION_LIMIT = 64 * MIB                                 # CelebA's has 3 MB


class CelebA(ImageFiles):
    """``img_align_celeba/*.jpg``; ``list_eval_partition.txt`` (lines ``000001.jpg 0``) names the images of a split."""

    def __init__(self, folder: Path, split: str, channels: int):
        super().__init__(folder / "img_align_celeba", channels, label_rule="none")
        self.partition, self.split = folder / "list_eval_partition.txt", split

    @cached_property
    def _listing(self) -> tuple[list[str], list[str]]:
        present, ignored = super()._listing
        try:
            text = read_regular(self.partition, PARTITION_LIMIT, "list of images").decode()
            rows = [line.split() for line in text.splitlines() if line.strip()]
            names = sorted(name for name, part in rows if part == PARTITION[self.split])
        except ValueError as error:                        # UnicodeDecodeError is one
            raise DataError(f"{self.partition}: must hold lines like '000001.jpg 0': {error}") from None
        if missing := set(names) - set(present):
            raise DataError(f"{self.partition}: names {min(missing)}, which is not in {self.path} "
                            f"({len(missing)} such names in all)")
        return names, ignored

    def stamp(self) -> str:
        return super().stamp() + file_stamp(self.partition)
