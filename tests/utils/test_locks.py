import pytest

from utils.errors import DataError
from utils.locks import exclusive, lock_folder


@pytest.mark.parametrize("lock", [lambda path: lock_folder(path.with_name("run")),
                                  lambda path: exclusive(path, "testing")])
def test_a_lock_neither_follows_links_nor_empties_files(tmp_path, lock):
    path, target = tmp_path / ".run.lock", tmp_path / "precious"
    target.write_text("kept")
    path.symlink_to(target)
    with pytest.raises(DataError, match="is a link"), lock(path):
        pass
    path.unlink()
    path.write_text("kept")
    with lock(path):
        pass
    assert path.read_text() == target.read_text() == "kept"
