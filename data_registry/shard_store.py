"""Where shards stand: in a folder, read in place, or in an object store, read through a cache of whole shards on this machine.

Both are opened by :func:`open_store` from ``resources`` of ``params.yaml`` and behave alike. They hold no file and no connection, so they
may be sent to other processes and forked.
"""

import contextlib
import os
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np

from data_registry.errors import InputError
from data_registry.files import sha256
from data_registry.params import Resources
from data_registry.shard_cache import CHUNK_BYTES, ShardCache
from data_registry.shards import DamagedShard, MissingShard, ShardError, read_metadata, read_row, write_shard

SITE_FOLDERS = "grid=*/site=*/*"
HASH_SUFFIX = ".sha256"


@dataclass(frozen=True)
class FolderStore:
    """Shards in a folder of this machine or of a shared file system."""

    root: Path

    def where(self, shard: str) -> str:
        """For messages: the place of a shard."""
        return str(self.root / shard)

    def write(self, shard: str, rows: Iterable[dict], *, metadata: Mapping[str, object], columns: Sequence[str] | None = None) -> None:
        """See :func:`data_registry.shards.write_shard`."""
        write_shard(self.root / shard, rows, metadata=metadata, columns=columns)

    def metadata(self, shard: str) -> dict | None:
        """What a shard was written with; None if it is not there or not complete."""
        return read_metadata(self.root / shard)

    def sha256(self, shard: str) -> str:
        """Of a complete shard's bytes."""
        return sha256(self.root / shard)

    def read_row(self, shard: str, row_group: int, columns: Sequence[str], *, scan_id: str, sha256: str) -> dict[str, np.ndarray]:
        """See :func:`data_registry.shards.read_row`; ``sha256`` of the shard is what the other store finds it by."""
        return read_row(self.root / shard, row_group, columns, scan_id=scan_id)

    def shards(self) -> list[str]:
        """Names of all that stand there, complete or not."""
        return sorted(str(path.relative_to(self.root)) for path in self.root.glob(SITE_FOLDERS) if path.suffix == ".parquet")

    def keep_only(self, shards: Collection[str]) -> None:
        """Remove other shards, and folders left empty."""
        for path in self.root.glob(SITE_FOLDERS):
            if not path.is_dir() and str(path.relative_to(self.root)) not in shards:
                path.unlink()
        for depth in ("grid=*/site=*", "grid=*"):
            for folder in self.root.glob(depth):
                if not any(folder.iterdir()):
                    folder.rmdir()


@dataclass(frozen=True)
class RemoteStore:
    """Shards below an fsspec URL, e.g. ``s3://bucket/shards``. Beside each stands its hash, written last: without it ``harmonise``
    takes a shard for unfinished. Readers know it from the samples table."""

    url: str
    cache: ShardCache

    def where(self, shard: str) -> str:
        """For messages: the place of a shard."""
        return f"{self.url}/{shard}"

    def write(self, shard: str, rows: Iterable[dict], *, metadata: Mapping[str, object], columns: Sequence[str] | None = None) -> None:
        """Write on this machine, then upload."""
        with tempfile.TemporaryDirectory(prefix="lodbrain-") as folder:
            local = Path(folder, "shard.parquet")
            write_shard(local, rows, metadata=metadata, columns=columns)
            with self._asked(shard) as (remote, path):
                if remote.exists(path + HASH_SUFFIX):
                    remote.rm_file(path + HASH_SUFFIX)
                remote.put_file(str(local), path)
                remote.pipe_file(path + HASH_SUFFIX, sha256(local).encode())

    def metadata(self, shard: str) -> dict | None:
        """What a shard was written with; None if it is not there or not complete."""
        with self._asked(shard) as (remote, path):
            if not (remote.exists(path) and remote.exists(path + HASH_SUFFIX)):
                return None
            with remote.open(path, "rb", block_size=2**20) as file:  # the end of the file is enough
                return read_metadata(file)

    def sha256(self, shard: str) -> str:
        """Of a complete shard's bytes."""
        with self._asked(shard) as (remote, path):
            return remote.cat_file(path + HASH_SUFFIX).decode()

    def read_row(self, shard: str, row_group: int, columns: Sequence[str], *, scan_id: str, sha256: str) -> dict[str, np.ndarray]:
        """As from a folder; a damaged copy is fetched again once."""
        fresh = False
        while True:
            copy = self.cache.copy(sha256, lambda: self._opened(shard), where=self.where(shard))
            try:
                return read_row(copy, row_group, columns, scan_id=scan_id)
            except MissingShard:  # room was made for another since
                continue
            except ShardError as error:
                if fresh or not isinstance(error, DamagedShard):
                    raise type(error)(str(error).replace(str(copy), self.where(shard))) from None
                self.cache.drop(sha256)
                fresh = True

    def shards(self) -> list[str]:
        """Names of all that stand there, complete or not."""
        with self._asked() as (remote, root):
            return sorted({str(shard).removesuffix(HASH_SUFFIX) for _, shard in self._files(remote, root)})

    def keep_only(self, shards: Collection[str]) -> None:
        """Remove other shards."""
        with self._asked() as (remote, root):
            for path, shard in self._files(remote, root):
                if str(shard).removesuffix(HASH_SUFFIX) not in shards:
                    remote.rm_file(path)

    def _files(self, remote: Any, root: str) -> list[tuple[str, PurePosixPath]]:
        """Shards, and the hashes beside them: path, and that below the store."""
        found = [(path, PurePosixPath(path).relative_to(PurePosixPath(root))) for path in remote.find(root)]
        return [(path, shard) for path, shard in found if shard.match(SITE_FOLDERS) and len(shard.parts) == 3]

    @contextlib.contextmanager
    def _opened(self, shard: str) -> Iterator[BinaryIO]:
        with self._asked(shard) as (remote, path), remote.open(path, "rb", block_size=CHUNK_BYTES, cache_type="none") as file:
            yield file

    @contextlib.contextmanager
    def _asked(self, shard: str = "") -> Iterator[tuple[Any, str]]:
        """(fsspec's file system, path in it); whatever goes wrong with it is one line."""
        import fsspec

        settings = {"auto_mkdir": True} if self.url.startswith("file://") else {"use_listings_cache": False}
        try:
            yield fsspec.core.url_to_fs(self.where(shard).rstrip("/"), **settings)
        except InputError:
            raise
        except FileNotFoundError:
            raise MissingShard(f"{self.where(shard)}: no such shard, or no such bucket; run `python -m pipelines.harmonise` again") from None
        except Exception as error:  # every kind of store has its own
            reason = " ".join(str(error).split()) or type(error).__name__
            wanted = "a store that can be reached, and room for its copies, are wanted"
            raise InputError(f"resources.shards: {self.where(shard)}: {reason}; {wanted}") from None


ShardStore = FolderStore | RemoteStore


def open_store(resources: Resources) -> ShardStore:
    """The store that ``resources`` names; its paths are absolute from here on."""
    if "://" not in resources.shards:
        return FolderStore(Path(os.path.abspath(resources.shards)))
    cache = ShardCache(Path(os.path.abspath(resources.cache_folder)), int(resources.cache_gb * 1e9))
    return RemoteStore(resources.shards.rstrip("/"), cache)
