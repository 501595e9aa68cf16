"""Whole shards on this machine's disk: capped in size, shared by all readers of the machine.

A copy is named by the SHA-256 of its bytes, so a shard that was replaced is another copy. It is downloaded into a file aside that its
downloader holds locked, compared with that hash and renamed: nobody sees half of it, and nobody downloads it a second time meanwhile. To
make room, copies are unlinked, least recently used first; who has one open reads on.
"""

import contextlib
import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from data_registry.errors import InputError
from data_registry.shards import ShardError, damage

CHUNK_BYTES = 16 * 2**20
"""A request to an object store, and what a download holds in memory."""
ASIDE = ".fetching-"


@dataclass(frozen=True)
class ShardCache:
    """Copies of shards in ``folder``, together at most ``max_bytes``; only what is on its way in may stand above that."""

    folder: Path
    max_bytes: int

    def copy(self, sha256: str, opened: Callable[[], AbstractContextManager[BinaryIO]], *, where: str) -> Path:
        """The copy whose bytes have this hash, downloaded from ``opened()`` if it is not there.

        Other bytes than that are asked for once more; then a :class:`ShardError` says what is wrong with ``where``.
        """
        copy = self._copy(sha256)
        while not _used(copy):
            self.folder.mkdir(parents=True, exist_ok=True)
            with _locked(self.folder / f"{ASIDE}{sha256}") as aside:
                if copy.exists():  # another reader brought it while this one waited
                    continue
                if self._download(opened, aside, where) != sha256 and self._download(opened, aside, where) != sha256:
                    reason = damage(aside.name) or "not the shard that tables/samples.parquet names; run `python -m pipelines.harmonise` again"
                    raise ShardError(f"{where}: {reason}")
                os.rename(aside.name, copy)  # not flushed to disk: after a crash its checksums tell
        return copy

    def drop(self, sha256: str) -> None:
        """Forget a copy, e.g. one that this disk has damaged."""
        self._copy(sha256).unlink(missing_ok=True)

    def _copy(self, sha256: str) -> Path:
        return self.folder / f"{sha256}.parquet"

    def _download(self, opened: Callable[[], AbstractContextManager[BinaryIO]], aside: BinaryIO, where: str) -> str:
        """Fill ``aside``; the hash of what came."""
        digest = hashlib.sha256()
        with opened() as source:
            self._make_room(aside, source.size, where)
            while chunk := source.read(CHUNK_BYTES):
                digest.update(chunk)
                aside.write(chunk)
        aside.flush()
        return digest.hexdigest()

    def _make_room(self, aside: BinaryIO, size: int, where: str) -> None:
        """Unlink old copies, and what died on its way in, until ``size`` bytes fit; ``aside`` then has that size, so that others count it."""
        if size > self.max_bytes:
            raise InputError(f"resources.cache_gb is {self.max_bytes / 1e9:g}: {where} alone has {size / 1e9:.3g} GB; more is wanted")
        with _locked(self.folder / ".room"):
            aside.seek(0)
            aside.truncate()
            for path in self.folder.glob(f"{ASIDE}*"):
                _remove_if_dead(path)
            files = [status for path in self.folder.iterdir() if (status := _status(path))]
            excess = size + sum(length for _, length, _ in files) - self.max_bytes
            for _, length, path in sorted(entry for entry in files if entry[2].suffix == ".parquet"):
                if excess <= 0:
                    break
                path.unlink(missing_ok=True)
                excess -= length
            aside.truncate(size)


def _used(copy: Path) -> bool:
    """Note that a copy is used now, in its time of access alone; False if it is not there."""
    try:
        os.utime(copy, ns=(time.time_ns(), copy.stat().st_mtime_ns))
    except FileNotFoundError:
        return False
    return True


def _status(path: Path) -> tuple[int, int, Path] | None:
    """(time of access, bytes, path); None if the file has gone."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_atime_ns, status.st_size, path


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    """A file that this process alone holds; removed at the end, unless it was renamed."""
    handle = _open(path)
    fcntl.flock(handle, fcntl.LOCK_EX)
    while not _stands_at(handle, path):  # who held it has renamed or removed it
        handle.close()
        handle = _open(path)
        fcntl.flock(handle, fcntl.LOCK_EX)
    with handle:
        try:
            yield handle
        finally:
            if _stands_at(handle, path):
                path.unlink()


def _remove_if_dead(path: Path) -> None:
    """Remove a file aside whose downloader is no more: nobody holds it."""
    with contextlib.suppress(FileNotFoundError, BlockingIOError), open(path, "rb") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _stands_at(handle, path):
            path.unlink()


def _open(path: Path) -> BinaryIO:
    return open(path, "r+b", opener=lambda name, flags: os.open(name, flags | os.O_CREAT, 0o666))


def _stands_at(handle: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle.fileno()), path.stat())
    except FileNotFoundError:
        return False
