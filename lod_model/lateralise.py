"""FastSurfer's 79 classes → 95 FreeSurfer ids: parcels that the network does not tell left from right get their side back.

Seventeen cortical parcels are one class on both sides; two more (precuneus, superior frontal) have two classes that are easily confused.
Each connected piece of these goes to the side whose white matter has the nearer centroid. The seventeen are then split voxel by voxel, by
the side whose white matter, blurred, is stronger there: a piece may hold both twins where they touch.

Source: the post-processing of FastSurfer (Henschel et al., NeuroImage 219:117012, 2020). Deviations: it splits the pieces of four parcels
(lateral occipital, pars orbitalis, rostral anterior cingulate, superior parietal); but of eight real label maps one has its insulae touch,
and there 1.5 % of the cortex got the wrong side, here 0.04 %. Its centroids are those of the largest piece of white matter.
"""

from collections.abc import Iterator

import numpy as np
from scipy import ndimage

from data_registry import protocol as protocols
from data_registry.resample import bounding_box

CONFUSED = (1025, 1028)
"""Left ids of the parcels that have a class on each side and still are given a side piece by piece; the right id is 1000 more."""
BLUR_VOXELS = 3.0
REACH = 4  # standard deviations of the blur


def relateralise(classes: np.ndarray) -> np.ndarray:
    """Classes of ``fastsurfer79`` (D, H, W) uint8 on a cubic grid → classes of ``fastsurfer95``, same shape; ignored voxels stay so.

    Sides come from the map's own white matter, so any orientation will do. With white matter on one side alone all pieces are of that side;
    without any, a parcel of both sides is called left.

    >>> ids, both = np.array([[[2, 0, 1003, 0, 0, 0, 2003, 0, 41]]], np.uint16), protocols.load("fastsurfer79")
    >>> [protocols.load("fastsurfer95").ids[c] for c in relateralise(both.classes_of(ids)).ravel()]
    [2, 0, 1003, 0, 0, 0, 2003, 0, 41]
    """
    came, wanted = protocols.load("fastsurfer79"), protocols.load("fastsurfer95")
    fused = [left for left, is_cortex, side in zip(came.ids, came.cortex, came.sides, strict=True) if is_cortex and side == "none"]
    table = np.arange(256, dtype=np.uint8)
    table[: came.classes] = wanted.table[list(came.ids)]                     # a fused parcel is left for now
    box = bounding_box(classes)
    out = np.zeros_like(classes)
    classes, sided = classes[box], out[box]
    sided[...] = table[classes]
    white = [classes == came.table[side] for side in (2, 41)]
    centroids = [_centroid(mask) for mask in white]
    boxes = ndimage.find_objects(classes, came.classes - 1)
    for left in (*fused, *CONFUSED):
        index, part = came.table[left], boxes[came.table[left] - 1]
        for piece in _pieces(classes[part] == index, part) if part else ():
            to_left, to_right = (np.linalg.norm(piece.mean(1) - centroid) for centroid in centroids)
            if to_right < to_left:
                sided[tuple(piece)] = wanted.table[left + 1000]
    _split_by_blurred_white_matter(sided, [(wanted.table[left], wanted.table[left + 1000]) for left in fused], *white)
    return out


def _centroid(mask: np.ndarray) -> np.ndarray:
    """(3,) voxels; infinitely far away where the mask is empty."""
    where = np.nonzero(mask)
    return np.array([axis.mean() for axis in where]) if where[0].size else np.full(3, np.inf)


def _pieces(mask: np.ndarray, box: tuple[slice, ...]) -> Iterator[np.ndarray]:
    """Voxels (3, n) of each piece of a mask cut out at ``box``; voxels that share a corner are of one piece."""
    labels, number = ndimage.label(mask, np.ones((3, 3, 3)))
    where = np.stack(np.nonzero(mask))                                       # (3, voxels)
    of = labels[tuple(where)]
    where = (where + np.array([[s.start] for s in box]))[:, np.argsort(of, kind="stable")]
    yield from np.split(where, np.cumsum(np.bincount(of, minlength=number + 1))[1:-1], axis=1)


def _split_by_blurred_white_matter(sided: np.ndarray, pairs: list[tuple[int, int]], left_white: np.ndarray, right_white: np.ndarray) -> None:
    """Give each voxel of the ``pairs`` (left, right) of classes the side whose white matter is stronger there; where neither is, it stays."""
    twin = np.zeros((2, 256), dtype=np.uint8)                                # side, class → the class of the pair on that side
    for pair in pairs:
        twin[:, list(pair)] = np.array(pair, dtype=np.uint8)[:, None]
    wanting = twin[0][sided] > 0
    if not wanting.any():
        return
    margin = int(REACH * BLUR_VOXELS)
    box = tuple(slice(max(0, s.start - margin), s.stop + margin) for s in bounding_box(wanting))
    balance = left_white[box].astype(np.float32) - right_white[box]
    balance = ndimage.gaussian_filter(balance, BLUR_VOXELS, mode="constant", truncate=REACH)
    for side, stronger in enumerate((balance > 0, balance < 0)):
        where = stronger & wanting[box]
        sided[box][where] = twin[side][sided[box][where]]
