"""Figures between two label maps of class indices (D, H, W): overlap, surface distance, volume, and the baseline they are compared with.

Background (class 0) is never scored: every per-class array has ``classes − 1`` entries, class 1 first. Where a figure is not defined it
is NaN, never 0 and never infinite, and each docstring says where that is. A voxel that the reference leaves out
(:data:`data_registry.protocol.IGNORED`) counts on neither side.
"""

import warnings
from collections.abc import Iterable, Sequence

import numpy as np
from scipy import ndimage

from data_registry.protocol import IGNORED


def dice(reference: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Dice of each foreground class, (classes − 1,) float64: 2·|both| / (|reference| + |predicted|).

    NaN where a class is absent on both sides, 0 where it is absent on one.

    >>> dice(np.array([[[0, 1, 1, 2]]]), np.array([[[1, 1, 1, 0]]]), 4).tolist()
    [0.8, 0.0, nan]
    """
    reference, predicted = _checked(reference, predicted, classes)
    inside = (reference > 0) | (predicted > 0)
    reference, predicted = reference[inside], predicted[inside]  # (voxels that either side names,)
    both = np.bincount(reference[reference == predicted], minlength=classes)[1:]
    total = (np.bincount(reference, minlength=classes) + np.bincount(predicted, minlength=classes))[1:]
    return np.divide(2.0 * both, total, out=np.full(classes - 1, np.nan), where=total > 0)


def hd95(reference: np.ndarray, predicted: np.ndarray, classes: int, *, voxel_mm: float | Sequence[float]) -> np.ndarray:
    """95 % Hausdorff distance of each foreground class in mm, (classes − 1,) float64: the first of :func:`surface_distances`.

    >>> one, other = np.zeros((2, 4, 4, 4), dtype=np.uint8)
    >>> one[0, 0, 0] = other[0, 0, 2] = 1
    >>> hd95(one, other, 3, voxel_mm=(1, 1, 1.5)).tolist()
    [3.0, nan]
    """
    return surface_distances(reference, predicted, classes, voxel_mm=voxel_mm)[0]


def surface_distances(
    reference: np.ndarray, predicted: np.ndarray, classes: int, *, voxel_mm: float | Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """95 % Hausdorff and average symmetric surface distance of each foreground class in mm, (classes − 1,) float64 each; NaN where a class is
    absent on either side.

    MONAI's: a surface voxel has a face neighbour outside the class (or lies on the border of the volume), distances are between voxel
    centres. HD95: of the two directed 95 % points (linearly interpolated) the larger. ASD: the mean over the voxels of both surfaces.
    ``voxel_mm`` is one edge or one an axis. Where the reference leaves voxels out, both surfaces end there.

    >>> one, other = np.zeros((2, 1, 1, 4), dtype=np.uint8)
    >>> one[0, 0, :2] = other[0, 0, :3] = 1                             # 0 0 mm one way, 0 0 1 mm the other
    >>> [float(mm.round(3)[0]) for mm in surface_distances(one, other, 2, voxel_mm=1)]
    [0.9, 0.2]
    """
    import torch
    from monai.metrics.utils import get_edge_surface_distance

    reference, predicted = _checked(reference, predicted, classes)
    spacing_mm = [float(edge) for edge in np.broadcast_to(voxel_mm, 3)]
    far_mm, average_mm = np.full((2, classes - 1), np.nan)
    boxes = zip(ndimage.find_objects(reference, classes - 1), ndimage.find_objects(predicted, classes - 1), strict=True)
    for index, (one, other) in enumerate(boxes):
        if one is None or other is None:
            continue
        # The smallest box that holds both: outside it is neither surface nor class, so the distances are those of the whole volume.
        box = tuple(slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(one, other, strict=True))
        masks = [torch.from_numpy(labels[box] == index + 1) for labels in (predicted, reference)]  # (d, h, w) each
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # MONAI's, about an argument that it passes to itself
            _, distances, _ = get_edge_surface_distance(*masks, spacing=spacing_mm, symmetric=True)
        far_mm[index] = max(float(torch.quantile(mm, 0.95)) for mm in distances)
        average_mm[index] = float(torch.cat(distances).mean())
    return far_mm, average_mm


def volumes_ml(labels: np.ndarray, classes: int, *, voxel_ml: float) -> np.ndarray:
    """Volume of each foreground class in mL, (classes − 1,) float64; 0 where a class is absent. Voxels left out count nowhere.

    >>> volumes_ml(np.array([[[0, 1, 1, 3, IGNORED]]]), 4, voxel_ml=0.008).tolist()
    [0.016, 0.0, 0.008]
    """
    labels, _ = _checked(labels, labels, classes)
    return np.bincount(labels[labels > 0], minlength=classes)[1:] * voxel_ml


def majority_atlas(label_maps: Iterable[np.ndarray]) -> np.ndarray:
    """The commonest class of every voxel over maps (D, H, W) uint8, as (D, H, W) uint8; among equals the smallest class.

    Of the maps that do not leave the voxel out; background where all do.

    The baseline of evaluation: what a fold's training scans predict for any scan without looking at it. Maps are read once, one at a
    time; memory is two bytes a voxel and class. Raises ValueError for no map, maps of other shapes or types, or more than 65,535 maps.

    >>> majority_atlas(np.array([[[[1, 2, 0]]], [[[1, 0, 0]]], [[[2, 3, 0]]]], dtype=np.uint8)).tolist()
    [[[1, 0, 0]]]
    """
    counts, shape, maps = None, None, 0  # counts: (foreground classes seen, voxels) uint16
    left_out = 0  # (voxels,) maps that leave a voxel out, once one does
    for labels in label_maps:
        if labels.dtype != np.uint8 or (shape is not None and labels.shape != shape):
            raise ValueError(f"map {maps} is {labels.dtype} {labels.shape}; uint8 {shape or '(D, H, W)'} is wanted")
        if counts is None:
            counts, shape = np.zeros((0, labels.size), dtype=np.uint16), labels.shape
        maps += 1
        ignored = labels.reshape(-1) == IGNORED
        if ignored.any():
            left_out = left_out + ignored.astype(np.uint16)
        where = np.flatnonzero((labels.reshape(-1) != 0) & ~ignored)
        found = labels.reshape(-1)[where]
        highest = int(found.max(initial=0))
        if highest > len(counts):  # a row a foreground class, grown as classes turn up; pages that no class reaches take no memory
            counts, seen = np.zeros((highest, labels.size), dtype=np.uint16), counts
            counts[: len(seen)] = seen
        counts[found - 1, where] += 1  # every voxel once a map, so no index repeats
    if counts is None or maps > np.iinfo(np.uint16).max:
        raise ValueError(f"{maps} label maps; 1 to {np.iinfo(np.uint16).max} are wanted")
    commonest = np.zeros(int(np.prod(shape)), dtype=np.uint8)
    best = maps - left_out - counts.sum(axis=0, dtype=np.int64)  # the background's count
    for index, count in enumerate(counts, start=1):
        more = count > best
        commonest[more] = index
        best[more] = count[more]
    return commonest.reshape(shape)


def without_ignored(reference: np.ndarray, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both maps with background where the reference leaves voxels out; as they came where it leaves out none.

    >>> without_ignored(np.array([1, IGNORED, 0]), np.array([1, 1, 1]))
    (array([1, 0, 0]), array([1, 0, 1]))
    """
    ignored = reference == IGNORED
    return (np.where(ignored, 0, reference), np.where(ignored, 0, predicted)) if ignored.any() else (reference, predicted)


def _checked(reference: np.ndarray, predicted: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Both :func:`without_ignored`. Refuses maps that cannot be compared voxel by voxel, or a class index that the protocol does not have."""
    if reference.shape != predicted.shape or reference.ndim != 3:
        raise ValueError(f"label maps are {reference.shape} and {predicted.shape}; two of one (D, H, W) are wanted")
    reference, predicted = without_ignored(reference, predicted)
    highest = max(int(reference.max(initial=0)), int(predicted.max(initial=0)))
    if highest >= classes or min(int(reference.min(initial=0)), int(predicted.min(initial=0))) < 0:
        raise ValueError(f"class index {highest} among {classes} classes; 0 … {classes - 1} are wanted")
    return reference, predicted
