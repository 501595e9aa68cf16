"""What each voxel counts in FastSurfer's cross-entropy: rare classes, borders, and cortex that is hard to see count more.

    weight = min(median of the class counts / count of the voxel's class, 5)           ``median``
           + 4 where the label changes from one neighbour to the opposite one          ``gradient``
           + 4 in thin strands of white matter and in deep sulci                       ``hires``
           + 2 in cortex at the brain's surface                                        ``gm``

Counts are those of the one volume that is given, as in FastSurfer, not of the data set. Strands and sulci: voxels that a closing of the
cortex by 3³ adds. Surface: voxels of the brain that an erosion by 3³ takes away; what lies outside the volume is not brain.

Source: Henschel et al., NeuroImage 219:117012 (2020) and 251:118933 (2022), whose code adds 5 for the gradient unless told otherwise, and
the last two on request. It compares labels by central differences, so a structure one voxel thick between equal neighbours has no border
on itself. Deviation: it needs every label up to the largest; here a class may be absent.
"""

from collections.abc import Collection

import numpy as np
from scipy import ndimage

from data_registry.protocol import IGNORED
from data_registry.resample import bounding_box

PARTS = ("median", "gradient", "hires", "gm")
OPTIONAL = ("mean_filter",)  # the mean over 3³ voxels, at last
MARGIN = 2  # voxels around the labels that the neighbourhoods reach


def pixel_weights(
    classes: np.ndarray, cortex: np.ndarray, *, parts: Collection[str] = PARTS, most: float = 5, gradient: float = 4, hires: float = 4, gm: float = 2,
    table: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """(D, H, W) float32 weights of ``classes`` (D, H, W) uint8; 0 where they are ignored. Without the part ``median`` all begin with 1.

    ``cortex`` (C,) bool says which classes are cortex (:attr:`data_registry.protocol.Protocol.cortex`); ignored voxels are taken for cortex
    as well, as they are parcels that the protocol does not have. ``most`` bounds the first part, the other numbers are what a part adds.
    ``table`` are the :func:`counted_weights` of the whole where ``classes`` are a part of it. ValueError for an unknown part.

    >>> pixel_weights(np.array([[[0, 0, 0, 0, 1, 1]]], np.uint8), np.array([False, True]), parts=("median", "gradient")).tolist()
    [[[0.75, 0.75, 0.75, 4.75, 5.5, 1.5]]]
    """
    if unknown := set(parts) - {*PARTS, *OPTIONAL}:
        raise ValueError(f"parts: {', '.join(sorted(unknown))} not known; {', '.join((*PARTS, *OPTIONAL))} are wanted")
    box = tuple(slice(max(0, s.start - MARGIN), s.stop + MARGIN) for s in bounding_box(classes))  # background alone has nothing added
    part = classes[box]
    if "median" not in parts:
        table = np.ones(256, np.float32)
    elif table is None:
        table = class_weights(part, more_background=classes.size - part.size, most=most)
    weights = np.full(classes.shape, table[0], dtype=np.float32)
    inside = table[part]
    if "gradient" in parts:
        inside += np.float32(gradient) * _changes(part)
    if {"hires", "gm"} & set(parts):
        is_cortex = np.ones(256, dtype=bool)
        is_cortex[: len(cortex)] = cortex
        mask = is_cortex[part]
        if "hires" in parts:
            inside += np.float32(hires) * (mask ^ _eroded(_dilated(mask)))
        if "gm" in parts:
            inside += np.float32(gm) * (mask & ~_eroded(part > 0))
    if "mean_filter" in parts:
        inside = ndimage.uniform_filter(inside, 3)
    inside[part == IGNORED] = 0
    weights[box] = inside
    return weights


def class_weights(classes: np.ndarray, *, more_background: int = 0, most: float = 5) -> np.ndarray:
    """(256,) float32: the :func:`counted_weights` of ``classes``, and of so much background beyond them."""
    counts = np.bincount(classes.ravel(), minlength=256)
    counts[0] += more_background
    return counted_weights(counts, most=most)


def counted_weights(counts: np.ndarray, *, most: float = 5) -> np.ndarray:
    """(256,) float32 of (256,) voxels of each class: the median of the counts of the classes that are there, over a class's count; at most
    ``most``, and 0 for classes that are not there and for ignored voxels.

    >>> counted_weights(np.bincount([0, 0, 0, 0, 1, 2, 2, 255], minlength=256))[[0, 1, 2, 3, 255]].tolist()
    [0.5, 2.0, 1.0, 0.0, 0.0]
    """
    there = counts > 0
    there[IGNORED] = False
    weights = np.zeros(256, dtype=np.float32)
    weights[there] = np.minimum(np.median(counts[there]) / counts[there], most) if there.any() else 0
    return weights


def _changes(labels: np.ndarray) -> np.ndarray:
    """(D, H, W) bool: whether along any axis the label before a voxel is another than the one behind; at a face, it and its one neighbour."""
    changes = np.zeros(labels.shape, dtype=bool)
    for axis in range(3):
        a, c = np.moveaxis(labels, axis, 0), np.moveaxis(changes, axis, 0)
        if len(a) > 1:
            c[1:-1] |= a[2:] != a[:-2]
            c[0] |= a[1] != a[0]
            c[-1] |= a[-1] != a[-2]
    return changes


def _dilated(mask: np.ndarray) -> np.ndarray:
    """By 3³, an axis at a time."""
    for axis in range(3):
        wider = mask.copy()
        a, w = np.moveaxis(mask, axis, 0), np.moveaxis(wider, axis, 0)
        w[1:] |= a[:-1]
        w[:-1] |= a[1:]
        mask = wider
    return mask


def _eroded(mask: np.ndarray) -> np.ndarray:
    """By 3³; outside is nothing."""
    for axis in range(3):
        narrower = mask.copy()
        a, n = np.moveaxis(mask, axis, 0), np.moveaxis(narrower, axis, 0)
        n[1:] &= a[:-1]
        n[:-1] &= a[1:]
        n[0] = n[-1] = False
        mask = narrower
    return mask
