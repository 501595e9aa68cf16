"""SHA-256 of a database's files, cached by path, size and time of change; part of the stage *index*."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import track

from data_registry.files import replacing, sha256

HASH_CACHE = Path("cache/hashes.parquet")


def hash_files(rows: list[dict], databases: dict[str, Path]) -> None:
    """Fill in the SHA-256 of every T1w and label map; a file that cannot be read quarantines its scan."""
    try:
        known = {(r["path"], r["bytes"], r["mtime_ns"]): r["sha256"] for r in pq.read_table(HASH_CACHE).to_pylist()}
    except (OSError, pa.ArrowInvalid):  # none yet, or damaged: it is a cache
        known = {}
    wanted = [(row, row, "t1w", row["t1w_path"]) for row in rows] + [(row, label, "", label["path"]) for row in rows for label in row["labels"]]

    def one(item: tuple) -> tuple | None:
        row, _, _, path = item
        file = (databases[row["database"]] / path).resolve()
        try:
            status = file.stat()
            if not status.st_size:  # all empty files have the same bytes
                return None, f"{databases[row['database']] / path}: an empty file; a volume is wanted"
            key = (str(file), status.st_size, status.st_mtime_ns)
            return key, known.get(key) or sha256(file)
        except OSError as error:
            there = databases[row["database"]] / path
            annexed = isinstance(error, FileNotFoundError) and there.is_symlink()
            why = "a link to a file that is not here (of DataLad's, `datalad get` fetches it)" if annexed else error.strerror
            return None, f"{there}: {why}; a readable file is wanted"

    cache, kept = {}, known
    try:
        with ThreadPoolExecutor(8) as pool:
            results = track(pool.map(one, wanted), "index: hashing", total=len(wanted), console=Console(stderr=True), transient=True)
            for (row, target, kind, _), (key, value) in zip(wanted, results, strict=True):
                if key is None:
                    row["reason"] = row["reason"] or value
                    continue
                target["t1w_sha256" if kind else "sha256"] = cache[key] = value
        kept = {}
    finally:  # stopped midway, what was read is not read again
        table = pa.Table.from_pylist([{"path": p, "bytes": b, "mtime_ns": t, "sha256": h} for (p, b, t), h in sorted((kept | cache).items())])
        with replacing(HASH_CACHE) as aside:
            pq.write_table(table, aside)


def forget_hashes(scans: Iterable[dict]) -> None:
    """Take the files of these rows of the scans table out of the cache."""
    digests = {digest for row in scans for digest in (row["t1w_sha256"], *(label["sha256"] for label in row["labels"])) if digest}
    try:
        table = pq.read_table(HASH_CACHE)
    except (OSError, pa.ArrowInvalid):  # none, or damaged: it is a cache
        HASH_CACHE.unlink(missing_ok=True)
        return
    kept = table.filter(pc.invert(pc.is_in(table["sha256"], pa.array(sorted(digests), pa.string()))))
    with replacing(HASH_CACHE) as aside:
        pq.write_table(kept, aside)
