"""Shards: what goes in comes out, bytes depend on the content alone, damage is found and named."""

import weakref

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_registry import protocol, shards
from data_registry.errors import InputError
from data_registry.shard_pages import read_cells


@pytest.fixture
def rows() -> list[dict]:
    generator = np.random.default_rng(0)
    made = []
    for index in range(3):
        t1w = generator.integers(0, 256, (16, 16, 16)).astype(np.uint8)
        ids = generator.choice(np.array([0, 2, 3, 1012, 16], dtype=np.uint16), (16, 16, 16))
        classes = protocol.load("lod7").classes_of(ids)
        row = {"scan_id": f"s{index}", **{f"t1w_x{f}": shards.pooled(t1w, f) for f in shards.FACTORS}}
        if index < 2:
            row |= {"aparc_aseg_x1": ids, "lod7_x4": shards.block_counts(classes, 4, 7), "lod7_x2": shards.block_counts(classes, 2, 7)}
        made.append(row)
    return made


def test_round_trip_and_absent_labels(tmp_path, rows):
    path = tmp_path / "a" / "part-000.parquet"
    shards.write_shard(path, rows, metadata={"recipe": "r", "samples": [1, 2]})
    columns = ["t1w_x1", "t1w_x2", "t1w_x4", "aparc_aseg_x1", "lod7_x2", "lod7_x4", "other_x1"]
    for index, row in enumerate(rows):
        read = shards.read_row(path, index, columns)
        assert set(read) == set(row) - {"scan_id"}
        for name, array in read.items():
            assert array.dtype == row[name].dtype and np.array_equal(array, row[name])
    assert shards.read_metadata(path) == {"recipe": "r", "samples": [1, 2]}


def test_same_rows_same_bytes(tmp_path, rows):
    for name in ("a", "b"):
        shards.write_shard(tmp_path / name, rows, metadata={"recipe": "r"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_levels_of_detail_by_brute_force(rows):
    t1w, ids = rows[0]["t1w_x1"], rows[0]["aparc_aseg_x1"]
    assert rows[0]["t1w_x4"][1, 2, 3] == t1w[4:8, 8:12, 12:16].max()
    classes = protocol.load("lod7").classes_of(ids)
    assert rows[0]["lod7_x4"][:, 1, 2, 3].tolist() == np.bincount(classes[4:8, 8:12, 12:16].ravel(), minlength=7).tolist()
    assert (rows[0]["lod7_x4"].sum(axis=0) == 64).all()


def test_classes_of_the_box_around_labels():
    """As without the box: a label in a corner, none at all, and an id that the protocol does not name."""
    lod7, ids = protocol.load("lod7"), np.zeros((4, 5, 6), np.uint16)
    assert not shards.classes_of(ids, lod7).any() and shards.classes_of(ids, lod7).dtype == np.uint8
    ids[3, 1, 5], ids[1, 4, 0] = 16, 1012
    assert np.array_equal(shards.classes_of(ids, lod7), lod7.classes_of(ids)) and shards.classes_of(ids, lod7)[3, 1, 5] == 6
    ids[2, 2, 2] = 9999
    with pytest.raises(InputError, match=r"s1: label id 9999 \(1 voxels\)"):
        shards.classes_of(ids, lod7, where="s1")


def test_damage_is_found_by_checksum(tmp_path, rows):
    path = tmp_path / "part-000.parquet"
    shards.write_shard(path, rows, metadata={})
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0xFF
    path.write_bytes(content)
    seen = []
    for index in range(3):
        try:
            shards.read_row(path, index, ["t1w_x1", "t1w_x2", "t1w_x4", "aparc_aseg_x1", "lod7_x2", "lod7_x4"])
        except shards.ShardError as error:
            seen.append(str(error))
    assert len(seen) == 1 and str(path) in seen[0] and "is damaged" in seen[0]
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(shards.ShardError, match="is damaged"):
        shards.read_row(path, 0, ["t1w_x1"])
    assert shards.read_metadata(path) is None
    with pytest.raises(shards.ShardError, match="no such shard"):
        shards.read_row(tmp_path / "none.parquet", 0, ["t1w_x1"])


def test_a_row_of_another_scan_is_refused(tmp_path, rows):
    path = tmp_path / "part-000.parquet"
    shards.write_shard(path, rows, metadata={})
    assert shards.read_row(path, 1, ["t1w_x1"], scan_id="s1")["t1w_x1"].shape == (16, 16, 16)
    with pytest.raises(shards.ShardError, match="row group 1 holds s1; s2 is wanted"):
        shards.read_row(path, 1, ["t1w_x1"], scan_id="s2")


def test_a_subject_keeps_its_shard():
    assert [shards.shard_of(s, 4) for s in ("01", "02", "03", "A", "B")] == [1, 1, 1, 1, 0]  # in every release, or all shards move
    spread = [shards.shard_of(f"{i:04d}", 4) for i in range(400)]
    assert min(spread.count(part) for part in range(4)) > 70


def test_rows_are_taken_one_at_a_time_and_the_notes_last(tmp_path, rows):
    """A generator's rows, of columns that are named, are not kept; what it notes of them stands in the file."""
    rows, alive, notes = list(rows), [], []

    def one_by_one():
        for row in rows:
            copy = {name: value.copy() if isinstance(value, np.ndarray) else value for name, value in row.items()}
            alive.append(weakref.ref(copy["t1w_x1"]))
            notes.append(sum(reference() is not None for reference in alive))
            yield copy

    columns = sorted({name for row in rows for name in row} - {"scan_id"})
    shards.write_shard(tmp_path / "streamed.parquet", one_by_one(), columns=columns, metadata={"notes": notes})
    assert max(notes) == 1 and len(notes) == len(rows) > 2 and shards.read_metadata(tmp_path / "streamed.parquet") == {"notes": notes}
    shards.write_shard(tmp_path / "at_once.parquet", rows, metadata={"notes": notes})
    assert (tmp_path / "streamed.parquet").read_bytes() == (tmp_path / "at_once.parquet").read_bytes()


def test_scans_of_one_shard_may_differ_in_size(tmp_path):
    rows = [{"scan_id": name, "t1w_x1": np.full((side,) * 3, side, np.uint8)} for name, side in (("a", 16), ("b", 32))]
    shards.write_shard(tmp_path / "x.parquet", rows, metadata={})
    for index, row in enumerate(rows):
        assert np.array_equal(shards.read_row(tmp_path / "x.parquet", index, ["t1w_x1"])["t1w_x1"], row["t1w_x1"])


def test_cells_are_those_that_any_parquet_reader_finds(tmp_path, rows):
    """Read past the library, and by it, page checksums verified."""
    path = tmp_path / "part-000.parquet"
    shards.write_shard(path, rows, metadata={})
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        for index in range(len(rows)):
            wanted = file.read_row_group(index).to_pylist()[0]
            cells = read_cells(path, index, [*wanted, "other"])
            assert {name: cell if cell is None else cell.tobytes() for name, cell in cells.items()} == {
                name: value.encode() if isinstance(value, str) else value for name, value in wanted.items()
            }


def test_a_shard_that_is_replaced_is_read_anew(tmp_path, rows):
    path = tmp_path / "part-000.parquet"
    for order in (rows, rows[::-1]):
        shards.write_shard(path, order, metadata={})
        assert [shards.read_row(path, index, [], scan_id=row["scan_id"]) for index, row in enumerate(order)] == [{}, {}, {}]


def test_every_flipped_bit_of_a_cell_is_found(tmp_path):
    """In header and page alike; what lies between them and the footer is no cell's."""
    path, cube = tmp_path / "x.parquet", np.arange(4**3, dtype=np.uint8).reshape(4, 4, 4)
    shards.write_shard(path, [{"scan_id": "s", "t1w_x1": cube}], metadata={})
    content = path.read_bytes()
    chunk = pq.read_metadata(path).row_group(0).column(1)
    silent = []
    for place in range(chunk.data_page_offset, chunk.data_page_offset + chunk.total_compressed_size):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :])
        try:
            read = shards.read_row(path, 0, ["t1w_x1"])["t1w_x1"]
        except shards.DamagedShard:
            continue
        assert np.array_equal(read, cube)
        silent.append(place - chunk.data_page_offset)
    assert len(silent) <= 14  # of the header, what follows the checksum: how the one value is encoded, which is not read
