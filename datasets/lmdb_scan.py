"""List the keys of an LMDB in a process of its own, which alone dies if the file is damaged.

LMDB maps its file and follows the numbers that it finds there: a damaged one makes it read anywhere. The child walks
through all entries, looks each key up and touches each value, so that nothing can happen to whoever reads them
afterwards.
"""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np

from utils.errors import DataError

SMALLEST_ENTRY = 10         # bytes of the file that an entry takes at least
PATIENCE = 600              # seconds
AT_ONCE = 1000              # entries that are followed in that time: a slow disk is not a damaged file


def scan(path: Path, file: Path, prepare: Callable = lambda: None) -> tuple[list[bytes], bytes | None]:
    """All keys in LMDB's order, and the value of the key ``length`` if there is one.

    Args:
        path: What ``lmdb.open`` is given.
        file: Its data file.
        prepare: Called in the child first: closes what it inherits.

    Raises:
        DataError: No LMDB, or a damaged one.
    """
    import lmdb  # noqa: F401  (before the fork: the child need not find it)

    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        _child(writing, reading, path, file, prepare)
    os.close(writing)
    try:
        with os.fdopen(reading, "rb") as pipe:
            content = pipe.read()
    finally:
        _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        problem = "takes too long" if os.WTERMSIG(status) == signal.SIGALRM else "leads outside of the file"
        raise DataError(f"{file}: damaged: following its index {problem}")
    head, _, rest = content.partition(b"\n")
    told = json.loads(head)
    if told["problem"]:
        raise DataError(told["problem"])
    ends = np.cumsum(np.frombuffer(rest, np.int32, told["count"]), dtype=np.int64)
    text = rest[4 * told["count"]:]
    keys = [text[start:end] for start, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True)] if len(ends) \
        else []
    return keys, None if told["length"] is None else bytes.fromhex(told["length"])


def _child(writing: int, reading: int, path: Path, file: Path, prepare: Callable) -> None:
    """Write what ``_walk`` finds to the pipe and end, whatever happens: a line of JSON, lengths of the keys, keys."""
    try:
        os.close(reading)
        for number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGALRM, signal.SIGFPE, signal.SIGABRT):
            signal.signal(number, signal.SIG_DFL)          # die quietly, without a report of faulthandler
        prepare()
        problem, keys, length = _walk(path, file)
        head = {"problem": problem, "count": len(keys), "length": None if length is None else length.hex()}
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(json.dumps(head).encode() + b"\n" + np.array([*map(len, keys)], np.int32).tobytes())
            pipe.write(b"".join(keys))
    finally:
        os._exit(0)


def _walk(path: Path, file: Path) -> tuple[str | None, list[bytes], bytes | None]:
    import lmdb

    size, keys = os.path.getsize(file), []
    signal.alarm(PATIENCE)
    try:
        with lmdb.open(str(path), subdir=path.is_dir(), readonly=True, lock=False, readahead=False) as environment:
            if (environment.info()["last_pgno"] + 1) * environment.stat()["psize"] > size:
                return f"{file}: truncated: shorter than its own index says", [], None
            if environment.stat()["entries"] > size // SMALLEST_ENTRY:
                return f"{file}: damaged: it claims more entries than fit into it", [], None
            with environment.begin(buffers=True) as transaction:
                for key, value in transaction.cursor().iternext():
                    if not len(key) or len(keys) >= environment.stat()["entries"]:
                        return f"{file}: damaged: its index has more entries than it says", [], None
                    found = transaction.get(bytes(key))    # searching takes another way than walking
                    if found is None or max(len(value), len(found)) > size:
                        return f"{file}: damaged: the value of {bytes(key)!r} is missing or too long", [], None
                    for part in (value, found):
                        part[:1].tobytes() + part[-1:].tobytes()   # both ends within the file: so is all between them
                    keys.append(bytes(key))
                    if len(keys) % AT_ONCE == 0:
                        signal.alarm(PATIENCE)
                length = transaction.get(b"length")
                return None, keys, None if length is None else bytes(length[:100])
    except lmdb.Error as error:
        return f"{path}: not a usable LMDB: {error}", [], None
    except Exception as error:                             # OSError, MemoryError, ...
        return f"{path}: cannot be read: {error}", [], None
