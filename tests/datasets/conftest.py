import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.schema import Config


@pytest.fixture
def make_config():
    """``make_config("ZIP", 8, root=...)`` -> a configuration with the smallest possible model."""
    def make(dataset, image_size, channels=3, **data):
        data = {"num_workers": 0, **{k: str(v) if isinstance(v, Path) else v for k, v in data.items()}}
        return Config(data={"dataset": dataset, "image_size": image_size, "channels": channels, **data},
                      model={"in_channels": channels, "out_ch": channels, "ch": 32, "ch_mult": (1,)})
    return make


@pytest.fixture
def noise():
    """``noise(n, h, w, c)`` -> uint8 (n, h, w, c), the same on every call."""
    return lambda *shape: np.random.RandomState(7).randint(0, 256, shape, np.uint8)


@pytest.fixture
def png():
    def encode(pixels, kind="PNG", **options):
        file = io.BytesIO()
        Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, kind, **options)
        return file.getvalue()
    return encode


@pytest.fixture
def write_tree(tmp_path, png):
    """``write_tree({"a/0.png": pixels or bytes})`` -> the folder."""
    def write(files, folder="tree"):
        for name, content in files.items():
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else png(content))
        return tmp_path / folder
    return write


@pytest.fixture
def write_zip(tmp_path, png):
    import zipfile

    def write(files, name="set.zip"):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for member, content in files.items():
                archive.writestr(member, content if isinstance(content, bytes | str) else png(content))
        return tmp_path / name
    return write


@pytest.fixture
def write_lmdb(tmp_path):
    import lmdb

    def write(records, folder):
        path = tmp_path / folder
        path.mkdir(parents=True)
        with lmdb.open(str(path), map_size=1 << 26) as environment, environment.begin(write=True) as transaction:
            for key, value in records.items():
                transaction.put(key.encode(), value)
        return path
    return write


@pytest.fixture
def cifar_zip():
    path = Path(__file__).parents[3] / "shared" / "data" / "cifar10-32x32.zip"
    if not path.exists():
        pytest.skip(f"{path} is not on this machine")
    return path
