"""Cubes of scans, with labels of several protocols: what NeuroNet and MONAI's networks are trained on."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch.utils.data import Dataset

from data_registry import protocol as protocols
from lod_model.augment import augment, sample_seed
from lod_model.data import Scan
from lod_model.deferred import KEY, Deferred, drawn

IGNORED = protocols.IGNORED
MOST = 2.0  # times the scan's deviation, by augmentation: a cube of air tells nothing of what was done to the rest


class CropDataset(Dataset):
    """A cube of a scan, another one in each epoch. Items are asked for as (epoch, index) and depend on nothing else.

    ``image`` (1, d, h, w) float32, z-scored with the moments of the whole scan, and below each protocol's name its classes, (d, h, w) int64:
    255 everywhere where the scan has no labels of it. The cube has ``side`` voxels along each axis, or the scan's where these are fewer, then
    padded at their ends to a ``multiple``. Drawn anywhere in the scan; in ``validation`` it is the middle one. ``deferred``: image and classes
    uint8 as they are read, and what :func:`lod_model.deferred.finished` is to make of them; collated by that module.
    """

    def __init__(
        self, scans: list[Scan], *, protocol_names: Sequence[str], side: int, multiple: int, augmentation: str = "none", seed: int = 0,
        validation: bool = False, deferred: bool = False,
    ) -> None:  # fmt: skip
        self.deferred = deferred
        self.scans, self.protocols = scans, [protocols.load(name) for name in protocol_names]
        self.side, self.multiple, self.augmentation, self.seed, self.validation = side, multiple, augmentation, seed, validation

    def __len__(self) -> int:
        return len(self.scans)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, torch.Tensor]:
        epoch, index = key
        scan = self.scans[index]
        seed = sample_seed(self.seed, epoch, scan.scan_id)
        whole = scan.t1w()
        box = self._box(whole.shape, seed)
        raw = whole[box]
        there = [table for table in self.protocols if scan.has(table)]
        classes = [scan.classes(table)[box] for table in there]
        image = raw
        if self.deferred:
            mirrored = [_swap(table) for table in there]
            image, classes, variant, before = drawn(raw, classes, mirrored, preset=self.augmentation, seed=seed, voxel_mm=scan.voxel_mm)
            names = tuple(table.name for table in there)
            if before is not None:
                padded = self._padded(raw, 0)
                before = float(padded.mean(dtype=np.float64)), float(padded.std(dtype=np.float64))
            plan = Deferred(variant, raw.shape, names, scan.mean, scan.deviation, most=MOST, raw=before)
            image = torch.from_numpy(np.ascontiguousarray(self._padded(image, 0)))[None]
            return {"image": image, **self._targets(there, classes, raw.shape, np.uint8), KEY: plan}
        if self.augmentation != "none":
            image, classes = augmented(raw, classes, there, preset=self.augmentation, seed=seed, voxel_mm=scan.voxel_mm)
        image = scan.zscored(self._padded(image, 0), self._padded(raw, 0), most=MOST)
        return {"image": torch.from_numpy(image.astype(np.float32))[None], **self._targets(there, classes, raw.shape, np.int64)}

    def _targets(self, there: Sequence[protocols.Protocol], classes: Sequence[np.ndarray], shape: tuple[int, ...], dtype: type) -> dict:
        """The classes of each protocol by its name, padded."""
        found = dict(zip((table.name for table in there), classes, strict=True))
        missing = np.broadcast_to(np.uint8(IGNORED), shape)
        return {table.name: torch.from_numpy(self._padded(found.get(table.name, missing).astype(dtype), IGNORED)) for table in self.protocols}

    def _box(self, shape: tuple[int, ...], seed: int) -> tuple[slice, ...]:
        generator = np.random.default_rng([seed, 1])
        room = [max(length - self.side, 0) for length in shape]
        first = [n // 2 for n in room] if self.validation else [int(generator.integers(n + 1)) for n in room]
        return tuple(slice(start, start + self.side) for start in first)

    def _padded(self, array: np.ndarray, value: float) -> np.ndarray:
        return np.pad(array, [(0, -n % self.multiple) for n in array.shape], constant_values=value)


def augmented(
    image: np.ndarray, classes: list[np.ndarray], tables: Sequence[protocols.Protocol], *, preset: str, seed: int, voxel_mm: float
) -> tuple[np.ndarray, list[np.ndarray]]:
    """:func:`lod_model.augment.augment` with classes of several protocols: they move as one map of their combinations."""
    if not classes:
        return augment(image, np.zeros_like(image), preset=preset, seed=seed, mirrored=np.zeros(1, np.int64), voxel_mm=voxel_mm)[0], []
    swaps = [_swap(table) for table in tables]
    if len(classes) == 1:
        image, moved = augment(image, classes[0], preset=preset, seed=seed, mirrored=swaps[0], voxel_mm=voxel_mm)
        return image, [moved]
    codes = sum(part.astype(np.int64) << (8 * place) for place, part in enumerate(classes))
    which, seen = pd.factorize(codes.ravel())
    known = np.unique(np.concatenate([[0], seen, _swapped(seen, swaps)]))  # 0: background of all, which comes in from outside
    index = np.searchsorted(known, seen).astype(np.min_scalar_type(len(known)))[which].reshape(image.shape)
    mirrored = np.searchsorted(known, _swapped(known, swaps))
    image, moved = augment(image, index, preset=preset, seed=seed, mirrored=mirrored, voxel_mm=voxel_mm)
    return image, [((known >> (8 * place)) & 255).astype(np.uint8)[moved] for place in range(len(classes))]


def _swap(table: protocols.Protocol) -> np.ndarray:
    """(256,) the class after left and right change places, IGNORED among them."""
    return np.concatenate([table.mirrored(), np.arange(table.classes, 256)])


def _swapped(codes: np.ndarray, swaps: list[np.ndarray]) -> np.ndarray:
    """Combinations of classes, a byte a protocol, after left and right change places."""
    return sum(swap[(codes >> (8 * place)) & 255].astype(np.int64) << (8 * place) for place, swap in enumerate(swaps))
