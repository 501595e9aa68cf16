"""Scans as training reads them, out of arrays instead of shards."""

import numpy as np

from data_registry.intensity import moments
from data_registry.protocol import load
from lod_model.data import Scan


class Arrays:
    """A store of one scan's arrays, by column."""

    def __init__(self, **columns: np.ndarray) -> None:
        self.columns = columns

    def where(self, shard: str) -> str:
        return shard

    def read_row(self, shard: str, row_group: int, columns: list[str], *, scan_id: str, sha256: str) -> dict[str, np.ndarray]:
        return {name: self.columns[name] for name in columns if name in self.columns}


def small_scan(t1w: np.ndarray, *, scan_id: str = "sub-01", voxel_mm: float = 1.0, **classes: np.ndarray) -> Scan:
    """A scan with ``t1w`` (D, H, W) uint8 and the classes of protocols, by name."""
    histogram = np.bincount(t1w.ravel(), minlength=256)
    mean, deviation = moments(histogram)
    sources = tuple(dict.fromkeys(load(name).sources[0] for name in classes))
    store = Arrays(t1w_x1=t1w, **{f"{name}_classes_x1": array for name, array in classes.items()})
    return Scan(
        scan_id=scan_id, database="small", site="small", place="small", store=store, shard="small", shard_sha256="", row_group=0,
        mean=mean, deviation=deviation, voxel_mm=voxel_mm, label_sources=sources, histogram=histogram,
    )  # fmt: skip


def blocks(shape: tuple[int, int, int], number: int, *, seed: int = 0, side: int = 3) -> np.ndarray:
    """(D, H, W) uint8: blocks of ``side`` voxels, each of a class below ``number``."""
    coarse = np.random.default_rng(seed).integers(0, number, [-(-n // side) for n in shape], dtype=np.uint8)
    return np.kron(coarse, np.ones((side, side, side), np.uint8))[tuple(map(slice, shape))]
