"""The first labelled scan of a real database, harmonised into a shard of its own, as training reads it."""

from pathlib import Path

from data_registry.label_sources import find_labels
from data_registry.params import Harmonise
from data_registry.shard_store import FolderStore
from lod_model.data import Scan
from pipelines.harmonise import harmonise_scan


def real_scan(database: Path, folder: Path, settings: Harmonise) -> Scan:
    """A scan of ``database``, a BIDS folder, whose shard is written to ``folder``."""
    t1w = first_t1w(database)
    subject = t1w.relative_to(database).parts[0].removeprefix("sub-")
    row = {
        "scan_id": f"{database.name}_sub-{subject}", "database": database.name, "site": database.name, "t1w_path": str(t1w.relative_to(database)),
        "labels": [{"source": source, "path": str(path.relative_to(database))} for source, path in find_labels(database, subject, "").items()],
    }  # fmt: skip
    arrays, sample = harmonise_scan(row, database, settings)
    store, shard = FolderStore(folder), f"{row['scan_id']}-{settings.grid}.parquet"
    store.write(shard, [{"scan_id": row["scan_id"], **arrays}], metadata={})
    import numpy as np

    return Scan(
        scan_id=row["scan_id"], database=row["database"], site=row["site"], place=row["site"], store=store, shard=shard, shard_sha256="",
        row_group=0, mean=sample["mean"], deviation=sample["deviation"], voxel_mm=sample["voxel_mm"], label_sources=tuple(sample["label_sources"]),
        histogram=np.array(sample["histogram"]),
    )  # fmt: skip


def first_t1w(database: Path) -> Path:
    """Its file."""
    return sorted(database.glob("sub-*/**/*_T1w.nii.gz"))[0]
