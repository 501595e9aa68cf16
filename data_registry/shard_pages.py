"""The bytes of a shard's cells, decompressed once and copied nowhere.

A row of a shard is a row group, so a cell is the one page of a column chunk: where it lies stands in the file's footer, how long it is and
its checksum in the page's header. Parquet's own reader decompresses a page and then copies the cell out of it, and parses the footer for
each row anew. Here a footer is parsed once for each row of a file as it stands (its inode, time and size); the file itself is opened for
each row, so a shard may be replaced or removed at any time, processes may be forked, and of thousands of shards none stays open.

Source: Apache Parquet's format, README and parquet.thrift (data page version 1, plain byte arrays, at most one level of nulls).
"""

import os
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from isal import isal_zlib

_PAGE_HEADER_BYTES = 64
_NULL_BYTES, _PREFIX_BYTES = 6, 10
"""Of a page: the levels of nulls, 4 bytes of length and 2 of content; then 4 bytes of the cell's length."""
_ROWS_KEPT = 32_768
_CODEC = pa.Codec("zstd")
_places: dict[tuple, dict[str, tuple[int, int, int]]] = {}
"""Column → first byte, bytes, bytes when decompressed (page header included in both), of rows that were read before."""


def read_cells(path: str | os.PathLike, row_group: int, columns: Sequence[str]) -> dict[str, np.ndarray | None]:
    """(bytes,) uint8 of each cell of a row, None where it is null; columns that the file does not have are left out.

    Raises ValueError for bytes that are not those which were written, FileNotFoundError for no file, and what pyarrow raises for a file
    without a whole footer.
    """
    with open(path, "rb", buffering=0) as file:
        stands = os.fstat(file.fileno())
        key = (os.fspath(path), row_group, stands.st_ino, stands.st_mtime_ns, stands.st_size)
        places = _places.get(key)
        if places is None:
            if len(_places) >= _ROWS_KEPT:
                _places.clear()
            places = _places[key] = _placed(file, row_group)
        return {name: _cell(name, os.pread(file.fileno(), size, first), size, whole) for name in columns if name in places
                for first, size, whole in (places[name],)}  # fmt: skip


def _placed(file, row_group: int) -> dict[str, tuple[int, int, int]]:
    metadata = pq.read_metadata(file)
    if not 0 <= row_group < metadata.num_row_groups:
        raise ValueError(f"there are {metadata.num_row_groups}")
    chunks = [metadata.row_group(row_group).column(index) for index in range(metadata.num_columns)]
    return {chunk.path_in_schema: (chunk.data_page_offset, chunk.total_compressed_size, chunk.total_uncompressed_size) for chunk in chunks}


def _cell(name: str, chunk: bytes, size: int, whole: int) -> np.ndarray | None:
    if len(chunk) != size:
        raise ValueError(f"column {name} is cut")
    uncompressed, compressed, checksum = _page_header(chunk)
    if not 0 < compressed < size or uncompressed < _NULL_BYTES:
        raise ValueError(f"column {name}: the page header is not one of a shard")
    page = memoryview(chunk)[size - compressed :]
    if isal_zlib.crc32(page) != checksum or whole - size != uncompressed - compressed:
        raise ValueError(f"column {name}: the checksum is wrong")
    content = np.frombuffer(_CODEC.decompress(page, uncompressed), dtype=np.uint8)
    if uncompressed == _NULL_BYTES:
        return None
    if int.from_bytes(content[_NULL_BYTES:_PREFIX_BYTES].tobytes(), "little") != uncompressed - _PREFIX_BYTES:
        raise ValueError(f"column {name} holds more than one cell")
    return content[_PREFIX_BYTES:]


def _page_header(chunk: bytes) -> tuple[int, int, int]:
    """Bytes of a page when decompressed and as stored, and its CRC-32: fields 2 to 4 of Thrift's compact PageHeader.

    >>> _page_header(bytes.fromhex("1500159480802015b2802915dc87f5d7021c"))
    (33554442, 335897, 360620526)
    """
    at, fields = 0, []
    for _ in range(4):  # type, uncompressed size, compressed size, checksum: each a byte 0x15 (the next field, an i32) and its value
        if chunk[at] != 0x15:
            raise ValueError("the page header is not one of a shard")
        at, value, shift = at + 1, 0, 0
        while True:  # varint, least significant seven bits first
            value |= (chunk[at] & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if chunk[at - 1] < 0x80:
                break
        fields.append((value >> 1) ^ -(value & 1))  # zigzag
    kind, uncompressed, compressed, checksum = fields
    if kind != 0:
        raise ValueError("the page header is not one of a shard")
    return uncompressed, compressed, checksum & 0xFFFFFFFF
