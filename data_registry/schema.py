"""The tables, each declared once: every column with its type, unit and meaning.

Code names columns from here, writers go through :func:`write_table` and readers through :func:`read_table`, so that a table on disk
either has exactly these columns or is refused by name. Every table is keyed by ``scan_id``, the catalogue's by database and site.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_registry.errors import InputError
from data_registry.files import replacing


def _column(name: str, kind: pa.DataType, meaning: str, unit: str = "") -> pa.Field:
    return pa.field(name, kind, metadata={"meaning": meaning, "unit": unit})


LABEL_FILE = pa.struct([
    _column("source", pa.string(), "what made the labels, e.g. aparc_aseg"),
    _column("path", pa.string(), "file, relative to the database's root; absolute below index.labels"),
    _column("sha256", pa.string(), "of the file's bytes"),
])

SCANS = pa.schema([
    _column("scan_id", pa.string(), "unique name: <database>_sub-<label>[_ses-…][_acq-…][_run-…]"),
    _column("database", pa.string(), "the database, as the catalogue or its folder names it"),
    _column("site", pa.string(), "the site as the database names it"),
    _column("place", pa.string(), "the institution, across databases"),
    _column("scanner", pa.string(), "one machine at a place, across databases where known"),
    _column("subject", pa.string(), "the database's own name for the person, without sub-"),
    _column("session", pa.string(), "BIDS session without ses-, empty if none"),
    _column("person", pa.string(), "one human, across databases where known"),
    _column("family", pa.string(), "people who are related share it; null if unknown"),
    _column("age_years", pa.float32(), "age at scan; null if not published", "years"),
    _column("sex", pa.string(), "F or M; null if not published"),
    _column("manufacturer", pa.string(), "scanner's maker, from the sidecar or the catalogue; null if unknown"),
    _column("model", pa.string(), "scanner's model; null if unknown"),
    _column("field_strength_tesla", pa.float32(), "null if unknown", "T"),
    _column("t1w_path", pa.string(), "the T1w, relative to the database's root"),
    _column("t1w_sha256", pa.string(), "of the file's bytes"),
    _column("labels", pa.list_(LABEL_FILE), "label maps found for this scan, one a source"),
    _column("reason", pa.string(), "why the scan is quarantined; null if it is usable"),
])

SITES = pa.schema([
    _column("database", pa.string(), "as the catalogue and its folder name it"),
    _column("site", pa.string(), "as the database names it"),
    _column("place", pa.string(), "the institution, across databases"),
    _column("country", pa.string(), "null if unknown"),
    _column("scanner", pa.string(), "one machine at a place, across databases; null if unknown"),
    _column("manufacturer", pa.string(), "scanner's maker; null if unknown"),
    _column("model", pa.string(), "scanner's model; null if unknown"),
    _column("field_strength_tesla", pa.float32(), "null if unknown", "T"),
    _column("voxel_mm", pa.list_(pa.float32()), "of the T1w as scanned: in plane, in plane, between slices", "mm"),
    _column("subjects", pa.int32(), "people to expect; null if not published"),
    _column("scans", pa.int32(), "T1w scans to expect; null if not published"),
    _column("age_mean_years", pa.float32(), "null if not published", "years"),
    _column("age_min_years", pa.float32(), "null if not published", "years"),
    _column("age_max_years", pa.float32(), "null if not published", "years"),
    _column("female", pa.int32(), "how many are stated as F; null if not published"),
    _column("male", pa.int32(), "how many are stated as M; null if not published"),
    _column("access", pa.string(), "open, registration or agreement; of the database; null if unknown"),
    _column("licence", pa.string(), "of the database; null if unknown"),
    _column("route", pa.string(), "where its images are got; null if unknown"),
    _column("state", pa.string(), "available, embargoed or withdrawn; null if unknown"),
    _column("used_by", pa.list_(pa.string()), "papers whose corpus the database belongs to"),
    _column("lod_brain_rows", pa.list_(pa.string()), "rows of LOD-Brain's table that the site stands in"),
    _column("unverified", pa.list_(pa.string()), "columns whose value no document confirms"),
])

VOLUMES = pa.list_(pa.struct([("class_name", pa.string()), ("ml", pa.float32())]))

CONFLICTS = pa.schema([
    _column("kind", pa.string(), "which kind of conflict, see pipelines/conflicts.py"),
    _column("database", pa.string(), "as in scans"),
    _column("site", pa.string(), "as in scans; null for the whole database"),
    _column("subject", pa.string(), "as in scans; null if no single one is meant"),
    _column("scan", pa.string(), "scan_id, of several scans the first; null if no scan is meant"),
    _column("scans", pa.int32(), "how many scans the row speaks of; of an age or a sex, how many people at a session"),
    _column("field", pa.string(), "the column of scans, or the name in the file, that it is about"),
    _column("expected", pa.string(), "what the catalogue says, or what would be clear"),
    _column("found", pa.string(), "what is written or there"),
    _column("done", pa.string(), "what the index made of it"),
    _column("file", pa.string(), "where it was found, relative to the database's root"),
])

SAMPLES = pa.schema([
    _column("scan_id", pa.string(), "as in scans"),
    _column("database", pa.string(), "as in scans"),
    _column("site", pa.string(), "as in scans"),
    _column("grid", pa.string(), "the standard grid, e.g. 1mm"),
    _column("status", pa.string(), "ok or quarantined"),
    _column("reason", pa.string(), "why it is quarantined; null if ok"),
    _column("warnings", pa.list_(pa.string()), "what was read with a stated assumption"),
    _column("shard", pa.string(), "file, relative to the shard folder; null if quarantined"),
    _column("row_group", pa.int32(), "row group of the shard that holds the scan"),
    _column("shard_sha256", pa.string(), "of the shard's bytes"),
    _column("label_sources", pa.list_(pa.string()), "sources whose labels stand in the shard"),
    _column("label_voxel_mm", pa.float32(), "largest voxel edge of label maps coarser than the grid, which are no truth at its resolution; "
            "null if none is", "mm"),
    _column("voxel_mm", pa.float32(), "edge of the grid's voxels", "mm"),
    _column("shape", pa.list_(pa.int32()), "of the grid, LIA axis order", "voxels"),
    _column("affine", pa.list_(pa.float64()), "grid voxel → RAS+ mm, row by row", "mm"),
    _column("native_shape", pa.list_(pa.int32()), "of the scan's own grid", "voxels"),
    _column("native_affine", pa.list_(pa.float64()), "own voxel → RAS+ mm, row by row", "mm"),
    _column("mean", pa.float64(), "of the T1w over the whole grid, padding included", "uint8 intensity"),
    _column("deviation", pa.float64(), "population standard deviation over the whole grid", "uint8 intensity"),
    _column("histogram", pa.list_(pa.int64()), "voxels of each uint8 intensity", "voxels"),
    _column("voxels_sha256", pa.string(), "of the T1w's voxels on the grid, whatever file, type or axis order they came from, but for roundings "
            "of what was interpolated"),
    _column("likeness", pa.string(), "what describes the person, see data_registry/likeness.py: signed bytes in hex; null if no brain was found"),
    _column("label_volumes_ml", VOLUMES, "volume of each foreground class of the stored block protocol", "mL"),
])

QUALITY = pa.schema([
    _column("scan_id", pa.string(), "as in scans"),
    _column("database", pa.string(), "as in scans"),
    _column("site", pa.string(), "as in scans"),
    _column("shard_sha256", pa.string(), "of the shard that was looked at"),
    _column("verdict", pa.string(), "pass, review or fail; rules and bounds stand in data_registry/quality_rules.py"),
    _column("reasons", pa.list_(pa.string()), "a sentence each, with the figure and the bound"),
    _column("suspicion", pa.float64(), "what the page sorts by: 100 for fail, 10 a reason, deviations from the site up to 9"),
    _column("own_voxel_mm", pa.float64(), "longest edge of the scan's own voxels", "mm"),
    _column("snr_gm", pa.float64(), "median of grey matter / its standard deviation within cubes of 32 mm; null, as all figures, if undefined", "1"),
    _column("snr_wm", pa.float64(), "the same of white matter", "1"),
    _column("cnr", pa.float64(), "(WM − GM) / √(their variances and that of the air), medians; negative: white matter is darker", "1"),
    _column("cjv", pa.float64(), "coefficient of joint variation: sum of their standard deviations / |WM − GM|", "1"),
    _column("wm2max", pa.float64(), "median of white matter / 99.95 % point of all intensities", "1"),
    _column("unevenness", pa.float64(), "(95 % − 5 % point) / median of white matter's means in cubes of 32 mm", "1"),
    _column("efc", pa.float64(), "entropy focus criterion, 0 to 1", "1"),
    _column("noise", pa.float64(), "of one channel, by the air's standard deviation and Rayleigh's distribution", "uint8 intensity"),
    _column("snrd", pa.float64(), "median of the head / noise", "1"),
    _column("fber", pa.float64(), "foreground to background energy: median of squares, head / air", "1"),
    _column("ghost_share", pa.float64(), "share of the air's 4 mm blocks that are brighter than the median by 5 robust deviations", "1"),
    _column("air_reason", pa.string(), "why figures of the air are null; null if they are not"),
    _column("head_cut_cm2", pa.list_(pa.float64()), "head on the faces of the field of view: right left superior inferior posterior anterior", "cm²"),
    _column("brain_cut_cm2", pa.list_(pa.float64()), "labelled brain on the same faces; null without labels", "cm²"),
    _column("labels_outside", pa.float64(), "share of the labelled brain that lies outside the head", "1"),
    _column("asymmetry", pa.float64(), "(left − right) / their mean, volumes of sided labels", "1"),
    _column("left_mm", pa.float64(), "how far the left's labels lie to the left of the right's", "mm"),
    _column("volumes_ml", VOLUMES, "of lod7's classes, by one voxel in each 2 mm", "mL"),
])

SPLIT = pa.schema([
    _column("fold", pa.int32(), "0 … k − 1"),
    _column("scan_id", pa.string(), "as in scans"),
    _column("role", pa.string(), "train, val, internal_test, external_test or excluded"),
    _column("group", pa.string(), "value of the split's key, e.g. the place"),
    _column("person", pa.string(), "as in scans, or a name shared with who turned out to be the same by voxels or likeness"),
    _column("reason", pa.string(), "why it is excluded; null for the other roles"),
])

RESULTS = pa.schema([
    _column("run", pa.string(), "<network>-<experiment>-<seed>"),
    _column("network", pa.string(), "name of the network"),
    _column("protocol", pa.string(), "label protocol that is scored"),
    _column("seed", pa.int32(), "of the training; null for reference weights"),
    _column("fold", pa.int32(), "fold whose weights made the prediction; for reference weights the fold whose roles are meant"),
    _column("role", pa.string(), "internal_test or external_test"),
    _column("scan_id", pa.string(), "as in scans"),
    _column("database", pa.string(), "as in scans"),
    _column("site", pa.string(), "as in scans"),
    _column("place", pa.string(), "as in scans"),
    _column("structure", pa.string(), "class name of the protocol"),
    _column("metric", pa.string(), "dice, hd95, asd (average symmetric surface distance), volume or reference_volume"),
    _column("value", pa.float64(), "null where the metric is not defined (a structure absent on one side)"),
    _column("unit", pa.string(), "1, mm or mL"),
    _column("split_hash", pa.string(), "of the frozen split"),
    _column("weights_hash", pa.string(), "of the network's tensors"),
])

TABLES = {"scans": SCANS, "samples": SAMPLES, "quality": QUALITY, "split": SPLIT, "results": RESULTS}


def write_table(path: str | os.PathLike, name: str, rows: Sequence[dict], *, metadata: dict[str, str] | None = None) -> None:
    """Write ``rows`` as table ``name`` of :data:`TABLES`, whole or not at all; the bytes depend on nothing but the arguments."""
    schema = TABLES[name]
    unknown = {key for row in rows for key in row} - set(schema.names)
    assert not unknown, f"{name} has no columns {sorted(unknown)}"
    table = pa.Table.from_pylist(list(rows), schema=schema.with_metadata({"table": name, **(metadata or {})}))
    with replacing(path) as aside:
        pq.write_table(table, aside, compression="zstd")


def read_table(path: str | os.PathLike, name: str) -> pa.Table:
    """Read table ``name``; a missing file or other columns than declared are an :class:`InputError` that names the stage's output."""
    path, schema = Path(path), TABLES[name]
    if not path.is_file():
        raise InputError(f"{path}: no such file; the table {name} is wanted (run the stage that makes it, or `dvc repro`)")
    try:
        table = pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise InputError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]}); the table {name} is wanted") from None
    for column in schema:
        if column.name not in table.column_names:
            raise InputError(f"{path}: column {column.name} is missing; the table {name} has {', '.join(schema.names)}")
        if table.schema.field(column.name).type != column.type:
            raise InputError(f"{path}: column {column.name} is {table.schema.field(column.name).type}; {column.type} is wanted")
    return table.select(schema.names)


def table_metadata(path: str | os.PathLike) -> dict[str, str]:
    """The key-value notes that stand in a table's file."""
    return {k.decode(): v.decode() for k, v in (pq.read_schema(path).metadata or {}).items() if k != b"ARROW:schema"}
