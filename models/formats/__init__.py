"""Weight files of every program of this family: one module for each, none executes what a file contains.

A format is a recogniser ``(path, content) -> bool`` and a reader ``(path, content, ema) -> StoredWeights``; content is
what ``load_torch`` gave, None for a folder and for EDM's pickles. The first recogniser that says yes decides: keys and
lengths tell the formats apart, for bare state dicts the name.
"""

from collections.abc import Callable

from models.formats.adm import is_adm, read_adm
from models.formats.common import StoredWeights, bare_name, is_state
from models.formats.ddim import is_ddim, is_sa_dpm, read_ddim, read_sa_dpm
from models.formats.diffusers import diffusers_folder, read_diffusers
from models.formats.edm import is_snapshot, read_edm
from models.formats.ours import EMA_FILE, is_ours, read_bare, read_ema_file, read_ours
from models.formats.plain import is_edm_state, read_edm_state

__all__ = ["FORMATS", "StoredWeights", "bare_name", "is_snapshot"]

FORMATS: dict[str, tuple[Callable, Callable]] = {
    "edm": (
        lambda path, content: content is None and not path.is_dir(), read_edm),
    "diffusers": (
        lambda path, content: content is None and (diffusers_folder(path) / "config.json").is_file(), read_diffusers),
    "sa-ddim": (
        lambda path, content: is_ours(content), read_ours),
    "sa-dpm": (
        lambda path, content: is_sa_dpm(content), read_sa_dpm),
    "ddim": (
        lambda path, content: is_ddim(content), read_ddim),
    "sa-dpm-ema": (
        lambda path, content: is_state(content) and EMA_FILE.fullmatch(path.name)
        and all(name.startswith("module.") for name in content), read_ema_file),
    "sa-ddim-ema": (
        lambda path, content: is_state(content) and EMA_FILE.fullmatch(path.name), read_ema_file),
    "adm": (
        is_adm, read_adm),
    "edm-state": (
        is_edm_state, read_edm_state),
    "state-dict": (
        lambda path, content: is_state(content), read_bare),
}
