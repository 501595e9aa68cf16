"""Training shards: Parquet, a row a scan, a row group a row, zstd, page checksums.

A shard holds scans of one site only, so that withdrawing or holding out a site touches whole files. Columns:

- ``t1w_x1, t1w_x2, t1w_x4``: uint8 T1w, (D, H, W) LIA, and max-pooled by 2 and 4 (LOD-Brain's own pooling);
- ``<source>_x1``: uint16 source label ids, (D, H, W), null where the scan has none;
- ``<protocol>_classes_x1``: uint8 classes, (D, H, W), for protocols that ask for it: half of the bytes, and nothing to look up on read;
- ``<protocol>_x2, <protocol>_x4``: uint8 class counts of each block, (C, D/f, H/f, W/f), for the same protocols. A voxel that the protocol
  leaves out counts in no class, so the counts of a block may sum to less than its voxels.

Arrays are C-order bytes of cubes, whose sides follow from their length; scans of one shard may differ in it. Who trains the coarse level
reads its columns alone. The file also carries its recipe (everything its bytes depend on) and the samples' rows, so that the table of samples can
be rebuilt from shards alone.
"""

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import BinaryIO
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_registry import protocol as protocols
from data_registry.errors import InputError
from data_registry.files import replacing
from data_registry.resample import bounding_box
from data_registry.shard_pages import read_cells

FACTORS = (1, 2, 4)
BLOCK_FACTORS = (2, 4)


class ShardError(InputError):
    """A shard that is missing, cut or damaged; the message names the file and row."""


class MissingShard(ShardError):
    """There is no such file."""


class DamagedShard(ShardError):
    """Bytes that are not those which were written."""


def shard_name(grid: str, database: str, site: str, part: int) -> str:
    """Path of a shard below the shard folder.

    >>> shard_name("1mm", "abide1", "NYU", 3)
    'grid=1mm/site=abide1.NYU/part-003.parquet'
    >>> shard_name("1mm", "db", "../a=b", 0)
    'grid=1mm/site=db...%2Fa%3Db/part-000.parquet'
    """
    return f"grid={grid}/site={database}.{quote(site, safe=' ')}/part-{part:03d}.parquet"


def shard_of(subject: str, shards_per_site: int) -> int:
    """Which of its site's shards a subject belongs to: a hash of the name, so neither order nor history moves it."""
    return int.from_bytes(hashlib.sha256(subject.encode()).digest()[:8], "big") % shards_per_site


def pooled(data: np.ndarray, factor: int) -> np.ndarray:
    """Max over blocks of ``factor``³ voxels: (D, H, W) → (D/f, H/f, W/f).

    >>> pooled(np.arange(8, dtype=np.uint8).reshape(2, 2, 2), 2).tolist()
    [[[7]]]
    """
    return _blockwise(np.maximum, data, factor)


def classes_of(ids: np.ndarray, protocol: protocols.Protocol, *, where: str = "labels") -> np.ndarray:
    """As :meth:`Protocol.classes_of`, looking up the box around labels alone: id 0 is background in every protocol.

    >>> classes_of(np.array([[[0, 0, 2], [0, 0, 16]]], dtype=np.uint16), protocols.load("lod7")).tolist()
    [[[0, 0, 3], [0, 0, 6]]]
    """
    box = bounding_box(ids)
    part = protocol.classes_of(ids[box], where=where)
    classes = np.zeros(ids.shape, dtype=part.dtype)
    classes[box] = part
    return classes


def block_counts(classes: np.ndarray, factor: int, number: int) -> np.ndarray:
    """Voxels of each class in blocks of ``factor``³, at most 6: (D, H, W) classes → (number, D/f, H/f, W/f) uint8. IGNORED voxels in none.

    >>> block_counts(np.array([[[0, 1], [1, 1]], [[1, 1], [2, 1]]], dtype=np.uint8), 2, 3).ravel().tolist()
    [1, 6, 1]
    >>> block_counts(np.array([[[0, 1], [1, 1]], [[255, 255], [2, 1]]], dtype=np.uint8), 2, 3).ravel().tolist()
    [1, 4, 1]
    """
    counts = np.zeros((number, *(n // factor for n in classes.shape)), dtype=np.uint8)
    box = bounding_box(classes, step=factor)                                 # all else is background: three quarters of a head
    part, within = classes[box], (slice(None), *(slice(s.start // factor, s.stop // factor) for s in box))
    for index in range(1, number):
        counts[index][within[1:]] = _blockwise(np.add, (part == index).view(np.uint8), factor)
    counts[0] = factor**3
    counts[0][within[1:]] -= counts[1:][within].sum(0, dtype=np.uint8)
    ignored = part == protocols.IGNORED
    if ignored.any():
        counts[0][within[1:]] -= _blockwise(np.add, ignored.view(np.uint8), factor)
    return counts


def _blockwise(combine: np.ufunc, data: np.ndarray, factor: int) -> np.ndarray:
    """(D, H, W) → (D/f, H/f, W/f), an axis at a time: whole slices first, the short strides along W on the quarter that is left."""
    for axis in range(3) if factor > 1 else ():
        parts = data.reshape(*data.shape[:axis], -1, factor, *data.shape[axis + 1 :])
        data = functools.reduce(combine, np.moveaxis(parts, axis + 1, 0))
    return data


def write_shard(
    path: str | os.PathLike, rows: Iterable[dict[str, np.ndarray | str]], *, metadata: Mapping[str, object], columns: Sequence[str] | None = None
) -> None:
    """Write one row group a row; a row is ``scan_id`` and arrays by column name. Whole or not at all.

    With ``columns``, all that rows may have, the rows are taken one after the other and none is kept. ``metadata`` is read after the last
    row, so that it may say what became of them.
    """
    rows = rows if columns else list(rows)
    names = sorted(columns or {name for row in rows for name in row} - {"scan_id"})
    schema = pa.schema([pa.field("scan_id", pa.string())] + [pa.field(name, pa.large_binary()) for name in names])
    with (
        replacing(path) as aside,
        pq.ParquetWriter(aside, schema, compression="zstd", use_dictionary=False, write_statistics=False, write_page_checksum=True) as writer,
    ):
        for row in rows:
            values = {name: np.ascontiguousarray(row[name]).tobytes() if name in row else None for name in names}
            writer.write_table(pa.Table.from_pylist([{"scan_id": row["scan_id"], **values}], schema=schema), row_group_size=1)
            del row, values   # before the next is made
        notes = {key: json.dumps(value, sort_keys=True) for key, value in metadata.items()}
        writer.add_key_value_metadata(notes)


def read_metadata(source: str | os.PathLike | BinaryIO) -> dict | None:
    """What :func:`write_shard` was given as ``metadata``; None if the file is no complete shard."""
    try:
        notes = pq.read_metadata(source).metadata or {}
    except (OSError, pa.ArrowInvalid):
        return None
    return {key.decode(): json.loads(value) for key, value in notes.items() if key != b"ARROW:schema"}


def read_row(path: str | os.PathLike, row_group: int, columns: Sequence[str], *, scan_id: str | None = None) -> dict[str, np.ndarray]:
    """Arrays of one scan, by column; columns that are null or not in the file are left out.

    Raises :class:`MissingShard` for a missing file, :class:`DamagedShard` for a page whose checksum is wrong, and a plain
    :class:`ShardError` for a row of another scan than ``scan_id``.
    """
    try:
        cells = read_cells(path, row_group, ["scan_id", *columns])
        came = cells.pop("scan_id").tobytes().decode()
        arrays = {name: _array(cell, name) for name, cell in cells.items() if cell is not None}
    except FileNotFoundError:
        raise MissingShard(f"{path}: no such shard; run `python -m pipelines.harmonise` again") from None
    except (OSError, pa.ArrowInvalid, KeyError, IndexError, ValueError) as error:
        reason = str(error).split("\n")[0]
        message = f"{path}: row group {row_group} is damaged ({reason}); delete it and run `python -m pipelines.harmonise` again"
        raise DamagedShard(message) from None
    if scan_id not in (None, came):
        raise ShardError(f"{path}: row group {row_group} holds {came}; {scan_id} is wanted (run `python -m pipelines.harmonise` again)")
    return arrays


def damage(path: str | os.PathLike) -> str | None:
    """The first row group whose bytes are damaged, in words without the path; None if all are as they were written."""
    try:
        with pq.ParquetFile(path) as file:
            groups, columns = file.num_row_groups, file.schema_arrow.names[1:]
        for row_group in range(groups):
            read_row(path, row_group, columns)
    except DamagedShard as error:
        return str(error).removeprefix(f"{path}: ")
    except (OSError, pa.ArrowInvalid) as error:
        return f"no complete shard ({str(error).splitlines()[0]}); delete it and run `python -m pipelines.harmonise` again"
    return None


def _array(cell: np.ndarray, name: str) -> np.ndarray:
    """The array of a cell's bytes: a cube of voxels, or one for each class."""
    stem, factor = name.rsplit("_x", 1)
    counts = stem != "t1w" and int(factor) > 1
    kind = np.uint8 if stem == "t1w" or stem.endswith("_classes") or counts else np.uint16
    number = protocols.load(stem).classes if counts else 1
    side = round((cell.size / (kind().itemsize * number)) ** (1 / 3))
    return cell.view(kind).reshape((number, side, side, side) if counts else (side, side, side))
