"""Steps on a whole label map that no table id → class can say, because they look at what lies near a voxel. A protocol asks for one by name.

Label maps are (D, H, W) source ids on a cubic grid, in any orientation: what is left and what is right is said by the labels themselves
(FreeSurfer's white matter, 2 left and 41 right), never by an axis. Nothing outside the labelled voxels is looked at, so a map may be cut to
a box that holds them. Who changes what a step does raises the version of the protocols that ask for it.

Source: the mapping of FastSurfer's training labels (Henschel et al., NeuroImage 219:117012, 2020). Deviations: FastSurfer looks up what
aseg without corpus callosum has there and blurs parcels to find the nearest; here it is the nearest voxel in both cases.
"""

from collections.abc import Callable, Iterable

import numpy as np
from scipy import ndimage

from data_registry.resample import bounding_box

WHITE_MATTER = (2, 41)
CORPUS_CALLOSUM = (192, *range(250, 256))  # and the fornix, which lies below it
WITHOUT_SIDE = (*CORPUS_CALLOSUM, 77, 80)  # white matter too: hypointensities
UNKNOWN_CORTEX = {first: (first, first + 4) for first in (1000, 2000)}  # FreeSurfer's medial wall: unknown, corpus callosum
PARCELS = {first: tuple(i for i in range(first + 1, first + 36) if i != first + 4) for first in (1000, 2000)}
CEREBRAL_CORTEX = (3, 42)


def dkt_ids(ids: np.ndarray) -> np.ndarray:
    """Ids (D, H, W) of an aparc+aseg map without what FastSurfer's classes do not know; the same array where there is nothing of it.

    Corpus callosum becomes the white matter of its side, cortex without a parcel the nearest parcel of its hemisphere, and cortex that is
    left over (3, 42) background. What has nothing to become keeps its id: the protocols ignore it.

    >>> dkt_ids(np.array([[[2, 251, 0, 251, 41, 1000, 0, 1002, 42]]], dtype=np.uint16)).tolist()
    [[[2, 2, 0, 41, 41, 1002, 0, 1002, 0]]]
    """
    nearest = {CORPUS_CALLOSUM: WHITE_MATTER} | {UNKNOWN_CORTEX[first]: PARCELS[first] for first in UNKNOWN_CORTEX}
    return _replaced(ids, nearest, removed=CEREBRAL_CORTEX)


def sided_white_matter(ids: np.ndarray) -> np.ndarray:
    """Ids (D, H, W) in which white matter that FreeSurfer gives no side (corpus callosum, fornix, hypointensities) is 2 or 41, the nearer.

    >>> sided_white_matter(np.array([[[2, 77, 0, 254, 0, 41]]], dtype=np.uint16)).tolist()
    [[[2, 2, 0, 41, 0, 41]]]
    """
    return _replaced(ids, {WITHOUT_SIDE: WHITE_MATTER})


STEPS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"dkt_ids": dkt_ids, "sided_white_matter": sided_white_matter}


def _replaced(ids: np.ndarray, nearest: dict[tuple[int, ...], tuple[int, ...]], *, removed: Iterable[int] = ()) -> np.ndarray:
    """``nearest``: ids that become the nearest of other ids; ``removed``: ids that become 0. All are looked for in ``ids`` as it came."""
    kinds = np.zeros(65536, dtype=np.uint8)
    kinds[list(removed)] = 1
    for kind, wanting in enumerate(nearest, start=2):
        kinds[list(wanting)] = kind
    kind_of = kinds[ids]                                                     # (D, H, W); 0: stays
    if not kind_of.any():
        return ids
    out = ids.copy()
    out[kind_of == 1] = 0
    for kind, among in enumerate(nearest.values(), start=2):
        _take_nearest(out, ids, kind_of == kind, among)
    return out


def _take_nearest(out: np.ndarray, ids: np.ndarray, where: np.ndarray, among: tuple[int, ...]) -> None:
    """Give ``out`` at ``where`` (D, H, W) bool the id of the nearest voxel whose id is one of ``among``, if the map has any.

    In the box of these voxels and a margin: no voxel outside it is nearer than one at a distance of the margin.
    """
    if not where.any():
        return
    tight, margin = bounding_box(where), 8
    while True:
        box = tuple(slice(max(0, s.start - margin), min(n, s.stop + margin)) for s, n in zip(tight, ids.shape, strict=True))
        whole = all(s == slice(0, n) for s, n in zip(box, ids.shape, strict=True))
        others, wanting = ~np.isin(ids[box], among), where[box]
        if not others.all():
            distance, index = ndimage.distance_transform_edt(others, return_indices=True)
            if whole or distance[wanting].max() <= margin:
                out[box][wanting] = ids[box][tuple(index[:, wanting])]
                return
        elif whole:
            return
        margin *= 2
