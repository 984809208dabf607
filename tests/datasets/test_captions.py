"""Captioned images: both forms, what is refused, the crops, and latents that are packed once."""

import io
import json
import multiprocessing
import os
import shutil
import signal
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.captions import METADATA, CaptionedFolder, open_captioned
from datasets.crops import crops
from datasets.images import RESAMPLE, resize
from datasets.latents import LatentStore, choose_variant
from utils.errors import DataError, UserError


def shards(folder, source):
    """The same images and captions as two tar files."""
    folder.mkdir()
    lines = [json.loads(line) for line in (source / METADATA).read_text().splitlines()]
    for number, part in enumerate((lines[:10], lines[10:])):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as archive:
            for line in part:
                archive.add(source / line["file_name"], line["file_name"])
                text = line["text"].encode()
                info = tarfile.TarInfo(f"{line['file_name'][:-4]}.txt")
                info.size = len(text)
                archive.addfile(info, io.BytesIO(text))
    return folder


def test_a_folder_and_shards_hold_the_same(captioned, tmp_path):
    folder, tars = open_captioned(captioned, 3), open_captioned(shards(tmp_path / "tars", captioned), 3)
    assert len(folder) == len(tars) == 16 and folder.captions == tars.captions
    assert folder.captions[0] == "a red square on grey"
    for i in (0, 9, 10, 15):
        assert np.array_equal(folder.read(i), tars.read(i))
    assert folder.stamp() != tars.stamp()


@pytest.mark.parametrize(("line", "message"), [
    ('{"file_name": "a.jpg"}', "no caption"), ('{"file_name": "a.jpg", "text": "  "}', "no caption"),
    ('{"file_name": "a.jpg", "text": "half \\ud800"}', "no UTF-8 text"),
    pytest.param('{"file_name": "' + 5000 * "a" + '.jpg", "text": "x"}', "no such file", id="a name too long"),
    ('{"file_name": "a.jpg", "text": 3}', "no caption"), ('{"text": "x"}', "must be"), ("nonsense", "must be"),
    ('{"file_name": "b.jpg", "text": "x"}', "no such file"), ('{"file_name": "../a.jpg", "text": "x"}', "leaves"),
    ('{"file_name": "a.jpg", "text": "x"}\n{"file_name": "a.jpg", "text": "y"}', "twice")])
def test_bad_captions_name_their_line(tmp_path, line, message):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.jpg")
    (tmp_path / METADATA).write_text(f"\n{line}\n")
    with pytest.raises(DataError, match=message) as refused:
        len(open_captioned(tmp_path, 3))
    assert "metadata.jsonl, line" in str(refused.value)


def test_bad_shards_name_their_file(captioned, tmp_path):
    whole = shards(tmp_path / "tars", captioned) / "00000.tar"
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "0.tar").write_bytes(whole.read_bytes()[:3000])
    with pytest.raises(DataError, match="0.tar"):
        len(open_captioned(tmp_path / "cut", 3))
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 1
    (tmp_path / "chain.tar").write_bytes((header.tobuf(tarfile.GNU_FORMAT) + bytes(512)) * 5000)
    with pytest.raises(DataError, match="chain.tar: not a whole, uncompressed tar file"):
        len(open_captioned(tmp_path / "chain.tar", 3))
    (tmp_path / "untold").mkdir()
    with tarfile.open(tmp_path / "untold" / "0.tar", "w") as archive:
        archive.add(captioned / "000.jpg", "000.jpg")
    with pytest.raises(DataError, match="000.txt: missing; every image needs a text"):
        len(open_captioned(tmp_path / "untold", 3))
    with pytest.raises(DataError, match="neither metadata.jsonl nor tar shards"):
        open_captioned(tmp_path / "nothing", 3)


def test_two_images_of_one_text_in_a_shard_are_refused(captioned, tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for name in ("000.jpg", "000.png"):
            archive.add(captioned / "000.jpg", name)
    with pytest.raises(DataError, match="0.tar/000: 000.jpg and 000.png share its text"):
        len(open_captioned(tmp_path / "0.tar", 3))


def test_grey_pictures_are_refused(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / METADATA).write_text('{"file_name": "a.png", "text": "x"}')
    with pytest.raises(DataError, match="1 channel"):
        CaptionedFolder(tmp_path).read(0)
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="more than 8 bits per channel"):
        CaptionedFolder(tmp_path).read(0)


def test_text_that_is_no_utf8_in_a_shard(captioned, tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        archive.add(captioned / "000.jpg", "000.jpg")
        info = tarfile.TarInfo("000.txt")
        info.size = 1
        archive.addfile(info, io.BytesIO(b"\xff"))
    with pytest.raises(DataError, match="0.tar/000.txt: no UTF-8 text"):
        len(open_captioned(tmp_path / "0.tar", 3))


def test_crops_and_what_sdxl_is_told():
    pixels = np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3)
    windows, ids = crops(pixels, (20, 20), 1, False, True, (0, 0))
    assert np.array_equal(windows[0], pixels[:, 5:25]) and np.array_equal(windows[1], windows[0][:, ::-1])
    assert ids.tolist() == [[20, 30, 0, 5, 20, 20]] * 2
    windows, ids = crops(pixels, (20, 20), 8, True, True, (0, 0))
    lefts = ids[:, 3].astype(int)
    assert len(set(lefts[::2])) > 2 and (lefts[::2] + lefts[1::2] == 10).all()
    for window, left in zip(windows[::2], lefts[::2], strict=True):
        assert np.array_equal(window, pixels[:, left:left + 20])
    for window, left in zip(windows[1::2], lefts[1::2], strict=True):
        assert np.array_equal(window, pixels[:, ::-1][:, left:left + 20])
    assert np.array_equal(crops(pixels, (20, 20), 8, True, True, (0, 0))[0], windows)
    assert crops(pixels[:, :7], (10, 10), 1, False, False, (0, 0))[1].tolist() == [[20, 7, 9, 0, 10, 10]]


# --------------------------------------------------------------------------------------------------------------- packs


def opened(pipeline, data, root, *more):
    from configs.schema import load_config
    from models import make_codec
    from runners.latents import open_latent_images

    config = load_config(pipeline, [f"data.root={data}", *more])
    return open_latent_images(config, make_codec(config), root)


@pytest.fixture(scope="module")
def packed(sdxl, captioned, tmp_path_factory):
    """A folder with the pack of ``opened`` without further settings."""
    root = tmp_path_factory.mktemp("packed")
    opened(sdxl, captioned, root)
    return root


@pytest.fixture
def packed_copy(packed, tmp_path):
    """One that a test may spoil."""
    return shutil.copytree(packed, tmp_path / "packed")


@pytest.mark.parametrize("dtype, cache", [("float16", "ram"), ("bfloat16", "ram"), ("bfloat16", "mmap")])
def test_packed_are_the_moments_and_the_embeddings(sdxl, captioned, tmp_path, dtype, cache):
    from configs.schema import load_config
    from models import make_codec
    from models.text import TextEncoders

    store = opened(sdxl, captioned, tmp_path, f"data.latent_dtype={dtype}", f"data.cache={cache}")
    close = {"float16": 2e-3, "bfloat16": 2e-2}[dtype]
    moments = next(store.batches([torch.tensor([3, 0])]))
    condition = store.condition(torch.tensor([3, 0]))
    if cache == "ram":
        assert store.arrays["moments"].dtype == store.meant                    # CUDA could not index a stand-in for it
    assert moments.shape == (2, 2, 2, 4, 8, 8) and condition["time_ids"].tolist()[0] == [[20, 20, 0, 0, 16, 16]] * 2
    window, _ = crops(open_captioned(captioned, 3).read(3), (16, 16), 1, False, True, (0, 0))
    exact = make_codec(load_config(sdxl)).moments(torch.from_numpy(window).permute(0, 3, 1, 2))
    torch.testing.assert_close(moments[0], exact, atol=close, rtol=close)
    given, empty = TextEncoders(sdxl)(store.captions[3])
    for name, rows in given.items():
        torch.testing.assert_close(condition[name][:1], rows, atol=close, rtol=close)
        torch.testing.assert_close(store.empty[name], empty[name][0])
    chosen, told = choose_variant(moments, condition, torch.Generator().manual_seed(0))
    assert chosen.shape == (2, 2, 4, 8, 8) and told["time_ids"].shape == (2, 6)


def test_a_pack_is_made_once_and_anew_for_another_model(sdxl, sdxl_copy, captioned, packed_copy, monkeypatch):
    first = opened(sdxl, captioned, packed_copy)
    monkeypatch.setattr("models.vae.VAE.moments", lambda *args: pytest.fail("encoded again"))
    assert opened(sdxl_copy, captioned, packed_copy).fingerprint == first.fingerprint      # the same files elsewhere
    monkeypatch.undo()
    with open(sdxl_copy / "tokenizer" / "tokenizer_config.json", "a") as file:
        file.write("\n")
    assert opened(sdxl_copy, captioned, packed_copy).fingerprint != first.fingerprint


def killed_at_the_sixth(*args) -> None:
    import models.vae

    encode, calls = models.vae.VAE.moments, []

    def moments(self, images):
        calls.append(1)
        if len(calls) == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(self, images)

    models.vae.VAE.moments = moments
    torch.set_num_threads(1)                                 # those of the parent do not exist here
    opened(*args)


def test_packing_goes_on_where_it_was_killed(sdxl, captioned, packed, tmp_path, monkeypatch):
    fork = multiprocessing.get_context("fork")               # which has diffusers and transformers imported
    killed = fork.Process(target=killed_at_the_sixth, args=(sdxl, captioned, tmp_path / "a"))
    killed.start()
    killed.join(60)
    assert killed.exitcode == -signal.SIGKILL
    import models.vae

    encode, calls = models.vae.VAE.moments, []
    monkeypatch.setattr(models.vae.VAE, "moments", lambda self, images: calls.append(1) or encode(self, images))
    resumed = opened(sdxl, captioned, tmp_path / "a")
    assert len(calls) == 16 - 5
    whole = opened(sdxl, captioned, packed)
    everything = torch.arange(16)
    assert torch.equal(next(resumed.batches([everything])), next(whole.batches([everything])))
    for name, rows in whole.condition(everything).items():
        assert torch.equal(resumed.condition(everything)[name], rows)
    assert not list((tmp_path / "a").rglob("*.partial"))


def test_bad_images_are_left_out_where_that_is_allowed(sdxl, captioned, packed, tmp_path):
    data = shutil.copytree(captioned, tmp_path / "data")
    (data / "004.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match="004.jpg.*set data.skip_bad to tolerate some"):
        opened(sdxl, data, tmp_path)
    store = opened(sdxl, data, tmp_path, "data.skip_bad=1")
    assert store.num_images == 15 and isinstance(store, LatentStore)
    assert store.captions[4] == CaptionedFolder(data).captions[5]
    torch.testing.assert_close(next(store.batches([torch.tensor([4])]))[0, 0],
                               next(opened(sdxl, captioned, packed).batches([torch.tensor([5])]))[0, 0])


def test_what_was_left_out_is_listed_at_every_start_and_counted_again(sdxl, captioned, tmp_path, caplog):
    data = shutil.copytree(captioned, tmp_path / "data")
    (data / "004.jpg").write_bytes(b"no picture")
    opened(sdxl, data, tmp_path, "data.skip_bad=1")
    caplog.clear()
    opened(sdxl, data, tmp_path, "data.skip_bad=1")
    assert "left out" in caplog.text and "004.jpg" in caplog.text
    with pytest.raises(DataError, match="004.jpg.*1 unreadable so far; set data.skip_bad"):
        opened(sdxl, data, tmp_path)


@pytest.mark.parametrize("about", [
    b"", b"null", b"[]", b"{}", b"[" * 100_000, {"kept": 3}, {"kept": [0, 99]}, {"kept": ["0"]}, {"kept": []},
    {"arrays": ["time_ids"]}, {"arrays": [1]}, {"dtype": "float8"}, {"dtype": []}, {"captions": ["a"]}, {"bad": 1}])
def test_a_damaged_store_is_named(sdxl, captioned, packed_copy, about):
    file = next(packed_copy.glob(".packed/*.latents/about.json"))
    damaged = json.dumps(json.loads(file.read_text()) | about).encode() if isinstance(about, dict) else about
    file.write_bytes(damaged)
    with pytest.raises(DataError, match=r"latents: damaged .*; remove it, and it is made again"):
        opened(sdxl, captioned, packed_copy)


@pytest.mark.parametrize("content", [lambda size: bytes(size), lambda size: None], ids=["zeros", "cut"])
def test_damaged_remains_are_made_again(sdxl, captioned, packed, packed_copy, content):
    """After a power cut a file may be there without its content, or without its end."""
    everything = torch.arange(16)
    whole = next(opened(sdxl, captioned, packed).batches([everything]))
    (target,) = packed_copy.glob(".packed/*.latents")
    partial = target.with_name(f".{target.name}.partial")
    target.rename(partial)
    (partial / "about.json").unlink()
    np.save(partial / "done.npy", np.ones(16, np.uint8))
    moments = (partial / "moments.npy").read_bytes()
    (partial / "moments.npy").write_bytes(content(len(moments)) or moments[:-1000])
    assert torch.equal(next(opened(sdxl, captioned, packed_copy).batches([everything])), whole)


def test_remains_that_lack_an_array_are_named(sdxl, captioned, packed_copy):
    (target,) = packed_copy.glob(".packed/*.latents")
    partial = target.with_name(f".{target.name}.partial")
    target.rename(partial)
    (partial / "about.json").unlink()
    (partial / "time_ids.npy").unlink()
    np.save(partial / "done.npy", (np.arange(16) % 2).astype(np.uint8))
    with pytest.raises(DataError, match=r"partial: damaged \(no time_ids\); remove it"):
        opened(sdxl, captioned, packed_copy)


def test_data_without_captions_and_stores_that_are_not_kept_are_refused(sdxl, captioned, tmp_path):
    with pytest.raises(UserError, match="FOLDER has no captions"):
        opened(sdxl, captioned, tmp_path, "data.dataset=FOLDER")
    with pytest.raises(UserError, match="data.cache off"):
        opened(sdxl, captioned, tmp_path, "data.cache=off")


def test_latents_are_of_what_the_data_set_makes_of_its_images(noise, write_tree, write_zip, tmp_path):
    from configs.schema import load_config
    from models import make_codec
    from tests.pipelines import latent_pipeline

    folder, pixels = latent_pipeline(tmp_path / "latent"), noise(20, 30, 3)
    tree = write_tree({"afhq/cat/0.png": pixels})
    store = opened(folder, tree, tmp_path, "data.dataset=AFHQ", "data.random_flip=true")
    shown = resize(pixels, (16, 16), "", RESAMPLE["bilinear"])                           # squeezed, not cut
    both = torch.from_numpy(np.stack([shown, shown[:, ::-1]])).permute(0, 3, 1, 2)
    exact = make_codec(load_config(folder)).moments(both)
    torch.testing.assert_close(next(store.batches([torch.tensor([0])]))[0], exact, atol=2e-2, rtol=2e-2)
    for key in ("data.variants=2", "data.random_crop=true"):
        with pytest.raises(UserError, match="AFHQ has a cut of its own"):
            opened(folder, tree, tmp_path, "data.dataset=AFHQ", key)
    with pytest.raises(DataError, match="the image is 20x30, data.image_size asks for 16x16"):
        opened(folder, write_zip({"0.png": pixels}), tmp_path, "data.dataset=ZIP")
