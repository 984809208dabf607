"""What users get wrong: (what, command line, exit code, part of the message). docs/reliability.md shows this list.

``{tmp}`` is the folder that ``make_files`` fills; every command also gets ``--exp {tmp}/exp`` and ``--device cpu``.
"""

import json
import os
import pickle
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

TRAIN = "train_ddp.py --config digits.yml"
FOLDER = f"{TRAIN} --data.dataset FOLDER --data.image_size 8 --model.ch_mult [1] --data.root {{tmp}}"
ZIP = f"{TRAIN} --data.dataset ZIP --data.image_size 8 --model.ch_mult [1] --data.root {{tmp}}"
GENERATE = "generate.py --doc run --no-fid"

CASES = [
    # configuration
    ("unknown section", f"{TRAIN} --optimizer.lr 1", 2, "optimizer: unknown key"),
    ("configuration without sections", "train_ddp.py --config {tmp}/list.yml", 2, "must hold sections"),
    ("empty configuration", "train_ddp.py --config {tmp}/empty.yml", 2, "must hold sections"),
    ("duplicate key", "train_ddp.py --config {tmp}/twice.yml", 2, "duplicate key 'lr'"),
    ("binary file as configuration", "train_ddp.py --config {tmp}/evil.pth", 2, "cannot be read"),
    ("python tag in a configuration", "train_ddp.py --config {tmp}/evil.yml", 2, "not usable YAML"),
    ("dropout of 1", f"{TRAIN} --model.dropout 1.0", 2, "less than 1"),
    ("negative seed", f"{TRAIN} --seed -1", 2, "training.seed"),
    ("learning rate that is no number", f"{TRAIN} --optim.lr nan", 2, "optim.lr"),
    ("channels that differ", f"{TRAIN} --data.channels 3", 2, "must equal data.channels"),
    ("image size that cannot be halved", f"{TRAIN} --data.image_size 9", 2, "nearest valid"),
    # command line
    ("unknown precision", f"{TRAIN} --amp fp8", 2, "invalid choice"),
    ("run name that is a folder itself", f"{TRAIN} --doc .", 2, "must be a relative name"),
    ("node beyond the last", f"{TRAIN} --num_proc_node 2 --node_rank 2", 2, "below --num_proc_node"),
    ("negative restarts", f"{TRAIN} --max_restarts -1", 2, "at least 0"),
    ("no such port", f"{TRAIN} --master_port 70000", 2, "[0, 65535]"),
    ("--exp is a file", f"{TRAIN} --exp {{tmp}}/list.yml", 2, "Not a directory"),
    ("runs where nothing can be written", f"{TRAIN} --exp /proc/here", 2, "no file can be made in /proc"),
    ("images where nothing can be written", f"{GENERATE} -i /proc/here/images", 2, "no file can be made in /proc"),
    ("images in no folder", f"{GENERATE} -i /", 2, "-i /: name a folder"),
    ("a log where nothing can be written", "generate.py --doc run --fid_log /proc/here/fid.txt", 2,
     "no file can be made in /proc"),
    ("an export where nothing can be written", "generate.py --doc run --export /proc/here", 2,
     "no file can be made in /proc"),
    ("a study where nothing can be written", "study.py --study digits.yml --exp /proc/here", 2,
     "no file can be made in /proc"),
    ("statistics where nothing can be written", "fid.py ref --images {tmp}/images --out /proc/here/o.npz", 2,
     "no file can be made in /proc"),
    ("a conversion where nothing can be written", "dataset_tool.py convert --source {tmp}/images --dest /proc/o.zip", 2,
     "no file can be made in /proc"),
    ("weights that are not there", "generate.py --weights nosuch.pkl", 2, "--weights nosuch.pkl: no such file"),
    ("images that are not there", f"{FOLDER}/nowhere", 3, "there is no such file or folder"),
    ("an archive for a data set of files", "train_ddp.py --config cifar10.yml --data.root {tmp}/escape.zip", 3,
     "data.dataset ZIP"),
    ("the same, rehearsed", "train_ddp.py --config cifar10.yml --data.root {tmp}/escape.zip --dry_run", 3,
     "data.dataset ZIP"),
    ("no run to resume, no configuration", "train_ddp.py --doc new --resume_training", 2, "--config is required"),
    ("neither run nor configuration", "generate.py", 2, "--doc is required"),
    ("eta that is no number", f"{GENERATE} --eta nan", 2, "--eta nan"),
    ("eps_scaler of zero", f"{GENERATE} --eps_scaler 0", 2, "greater than 0"),
    ("churn for a sampler without it", f"{GENERATE} --churn 10", 2, "heun and euler"),
    ("interpolation of one seed", f"{GENERATE} --interpolation --seeds 1", 2, "two seeds"),
    ("subset larger than the set", "fid.py ref --images {tmp}/images --num 9 --out {tmp}/o.npz", 2, "--num 9"),
    ("conversion to an existing file", "dataset_tool.py convert --source {tmp}/images --dest {tmp}/twice.yml --format "
     "zip", 2, "twice.yml"),
    ("conversion of nothing", "dataset_tool.py convert --source {tmp}/nowhere --dest {tmp}/o.zip", 3, "no such file"),
    ("crop without a size", "dataset_tool.py convert --source {tmp}/images --dest {tmp}/o.zip --transform center-crop",
     2, "--resolution"),
    ("diagnosis of no run", "diagnose.py exposure --doc nothing", 2, "no configuration"),
    ("unknown diagnosis", "diagnose.py everything --doc run", 2, "invalid choice"),
    # files from strangers
    ("malicious checkpoint to start from", f"{TRAIN} --init_from {{tmp}}/evil.pth", 3, "only tensors and plain values"),
    ("malicious checkpoint to resume", "train_ddp.py --doc run --resume_training", 3, "none of the 1 checkpoints"),
    ("malicious checkpoint to sample", GENERATE, 3, "only tensors and plain values"),
    ("malicious statistics, .npy", "fid.py calc --images {tmp}/images --ref {tmp}/evil.npy", 3, "evil.npy"),
    ("malicious statistics, .pkl", "fid.py calc --images {tmp}/images --ref {tmp}/evil.pkl", 3, "evil.pkl"),
    ("malicious statistics, .npz", "fid.py calc --images {tmp}/images --ref {tmp}/evil.npz", 3, "evil.npz"),
    ("malicious CIFAR-10 batch", "dataset_tool.py verify --config cifar10.yml --data.root {tmp}/cifar10", 3,
     "data_batch_1"),
    ("zip that leaves its folder", f"{ZIP}/escape.zip", 3, "leaves its folder"),
    ("zip that leaves its folder, converted", "dataset_tool.py convert --source {tmp}/escape.zip --dest {tmp}/o", 3,
     "leaves its folder"),
    ("image bomb", f"{FOLDER}/bomb", 3, "decompression bomb"),
    ("image bomb, converted", "dataset_tool.py convert --source {tmp}/bomb --dest {tmp}/o.zip", 3,
     "decompression bomb"),
    ("array of pointers as statistics", "fid.py calc --images {tmp}/images --ref {tmp}/pointers.npy", 3,
     "calls numpy.ndarray"),
    ("weights that are a pipe", f"{TRAIN} --init_from {{tmp}}/pipe/0.png", 3, "is not a file but a pipe"),
    ("web page instead of weights", f"{TRAIN} --init_from {{tmp}}/page.pth", 3, "a web page, not weights"),
    ("pointer of Git LFS instead of weights", f"{TRAIN} --init_from {{tmp}}/lfs.pth", 3, "git lfs pull"),
    ("flipped bit in weights", f"{TRAIN} --init_from {{tmp}}/flipped.pth", 3, "CRC-32"),
    ("category that leaves its folder", f"{TRAIN} --data.dataset LSUN --data.category ../../x", 2, "data.category"),
    ("aliases that write out to billions", "train_ddp.py --config {tmp}/laughs.yml", 2, "aliases write out"),
    ("picture that is a pipe", f"{FOLDER}/pipe", 3, "is not a file"),
    ("picture that never ends", f"{FOLDER}/zero", 3, "is not a file"),
    ("array that claims 80 TB", f"{FOLDER}/claim.npz", 3, "it claims"),
    ("seeds beyond the last", f"{GENERATE} --seeds 0-99999999999", 2, "the last seed, 4294967295"),
    ("more images than seeds", f"{GENERATE} --num_samples 99999999999", 2, "at most 4294967296"),
    ("picture of billions of rows", f"{GENERATE} --sequence --seeds 0-4294967295", 2, "at most 256"),
    ("log that never ends", "fid.py compare {tmp}/zero/0.png", 3, "is not a file but a device"),
    ("statistics that never end", "fid.py calc --images {tmp}/images --ref {tmp}/zero/0.png", 3,
     "is not a file but a device"),
    ("study that never ends", "study.py --study {tmp}/zero/0.png", 2, "is not a file but a device"),
    ("study that is a pipe", "study.py --study {tmp}/pipe/0.png", 2, "is not a file but a pipe"),
    ("folder without pictures, converted", "dataset_tool.py convert --source {tmp}/exp --dest {tmp}/o.zip", 3,
     "1 x .yml"),
    # broken files
    ("weights that are a text", f"{TRAIN} --init_from {{tmp}}/list.yml", 3, "truncated, or no torch file"),
    ("weights of another network", f"{TRAIN} --init_from {{tmp}}/other.pth", 3, "missing"),
    ("truncated image", f"{FOLDER}/truncated", 3, "unreadable image"),
    ("fewer images than a batch", f"{FOLDER}/images --training.batch_size 64", 3, "fewer than one global batch"),
    ("log that is no log", "fid.py compare {tmp}/list.yml", 3, "list.yml"),
]


class Payload:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def bomb_png(side: int = 60_000) -> bytes:
    """A small file that claims to be a picture of side x side pixels."""
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def make_files(tmp: Path) -> Path:
    """Everything that the commands above name. Returns the mark that no payload may leave."""
    mark = tmp / "owned"
    payload = Payload(mark)
    for name in ("images", "bomb", "truncated", "pipe", "zero", "exp/logs/run", "exp/datasets",
                 "cifar10/cifar-10-batches-py"):
        (tmp / name).mkdir(parents=True)
    for i in range(4):
        Image.fromarray(np.full((8, 8), 50 * i, np.uint8)).save(tmp / "images" / f"{i}.png")
    (tmp / "bomb/0.png").write_bytes(bomb_png())
    (tmp / "truncated/0.png").write_bytes((tmp / "images/1.png").read_bytes()[:40])
    (tmp / "list.yml").write_text("- a\n- b\n")
    (tmp / "empty.yml").write_text("")
    (tmp / "twice.yml").write_text("optim:\n  lr: 1\n  lr: 2\n")
    (tmp / "evil.yml").write_text(f"data: !!python/object/apply:os.mkdir [{json.dumps(str(mark))}]\n")
    torch.save({"w": payload}, tmp / "evil.pth")
    torch.save({"conv.weight": torch.zeros(3)}, tmp / "other.pth")
    (tmp / "evil.pkl").write_bytes(pickle.dumps({"mu": payload}))
    np.save(tmp / "evil.npy", np.array(payload, dtype=object), allow_pickle=True)
    np.savez(tmp / "evil.npz", mu=np.array(payload, dtype=object), sigma=np.eye(2))
    for i in range(1, 6):
        (tmp / f"cifar10/cifar-10-batches-py/data_batch_{i}").write_bytes(pickle.dumps({b"data": payload}))
    with zipfile.ZipFile(tmp / "escape.zip", "w") as archive:
        archive.writestr("../0.png", (tmp / "images/0.png").read_bytes())
    (tmp / "pointers.npy").write_bytes(
        b"\x80\x04cnumpy\nndarray\n(K\x01\x85cnumpy\ndtype\n(VO8\n\x89\x88tRC\x08" + b"A" * 8 + b"tR.")
    (tmp / "page.pth").write_text("<!DOCTYPE html><html>please log in</html>")
    (tmp / "lfs.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    torch.save({"w": torch.full((9,), 1.5)}, tmp / "flipped.pth")
    content = (tmp / "flipped.pth").read_bytes()
    (tmp / "flipped.pth").write_bytes(content.replace(np.float32(1.5).tobytes(), np.float32(-1.5).tobytes(), 1))
    lines = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    (tmp / "laughs.yml").write_text("\n".join(["a0: &a0 [x, x]", *lines]))
    os.mkfifo(tmp / "pipe/0.png")
    (tmp / "zero/0.png").symlink_to("/dev/zero")
    with zipfile.ZipFile(tmp / "claim.npz", "w") as archive, archive.open("arr_0.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, {"shape": (80 << 40,), "fortran_order": False, "descr": "|u1"})
    (tmp / "exp/logs/run/ckpt.pth").write_bytes((tmp / "evil.pth").read_bytes())
    (tmp / "exp/logs/run/config.yml").write_text(
        "data: {dataset: DIGITS, image_size: 8, channels: 1}\n"
        "model: {in_channels: 1, out_ch: 1, ch: 32, ch_mult: [1], num_res_blocks: 1, attn_resolutions: []}\n")
    return mark


def argv(command: str, tmp: Path) -> tuple[str, list[str]]:
    """Name of the script and its arguments; what the command does not say comes first, so that it can be overruled."""
    script, *words = command.split()
    words = [word.format(tmp=tmp) for word in words]
    first = [] if words and words[0].startswith("-") else words[:1]
    common = ["--exp", str(tmp / "exp"), "--verbose", "critical"]
    if script != "dataset_tool.py":
        common += ["--device", "cpu"]
    return script.removesuffix(".py"), [*first, *(common if first or script in WITHOUT_COMMAND else []),
                                        *words[len(first):]]


WITHOUT_COMMAND = ("train_ddp.py", "generate.py", "study.py")


def table() -> str:
    """Markdown, for docs/reliability.md: ``python -m tests.faults.bad_inputs``."""
    rows = ["| what | command | exit | the message says |", "|---|---|---|---|"]
    return "\n".join(rows + [f"| {what} | `{command}` | {code} | {part} |" for what, command, code, part in CASES])


if __name__ == "__main__":
    print(table())
