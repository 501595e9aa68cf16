"""Whether a label map lies on its T1w: on the head, and not mirrored. What lies outside the field of view :mod:`data_registry.conform` refuses.

Shape and affine of the two may differ; only the world counts. The measure is the share of the T1w's variance that the labels explain
(the correlation ratio, Roche et al., MICCAI 1998), over points all over the grid: 0 where the labels say nothing of the intensities. A brain is
symmetric enough that mirrored labels look right to the eye, and asymmetric enough that they explain less.
"""

import numpy as np

from data_registry.conform import Placement
from data_registry.intensity import histogram_of
from data_registry.resample import bounding_box, resample_nearest
from data_registry.volume import Volume, VolumeError, axes_to_lia

POINTS_A_SIDE = 52
MIN_ON_HEAD = 0.7
"""Of the labelled points, those where the T1w shows a head: .98 and more on fifteen real maps; CSF at the skull and bone are darker."""
MIRRORED_GAIN = 0.02
"""Mirrored labels must explain more by this share. On the fifteen maps right ones explain .036 to .15 more than mirrored ones."""
NOISE = 2.5
"""Divided by the root of the number of labelled points: the gain that is wanted if these are few. The one above is larger from 15,600 points on."""
WHOLE_ML, WHOLE_IDS = 300.0, 3
"""Maps of less than a brain, or of fewer tissues, are not tested for mirroring: one structure may explain more where it does not belong."""
AIR = 25  # of 255; bright fat would else make a brain look dark
DIRECTIONS = ("left-right", "inferior-superior", "back-front")  # of the axes of LIA
_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def check_fit(labels: Volume, t1w: np.ndarray, placement: Placement) -> None:
    """Refuse labels that do not lie on the head of ``t1w`` (D, H, W) uint8, or that fit it better mirrored.

    A :class:`VolumeError` names the file and the figures. Maps of a few structures are held against the head alone.
    """
    step = max(1, round(max(placement.shape) / POINTS_A_SIDE))
    image = t1w[::step, ::step, ::step]
    to_world = placement.affine @ np.diag([step, step, step, 1.0])

    box = bounding_box(labels.data)
    labelled, first = labels.data[box], np.eye(4)
    first[:3, 3] = [part.start for part in box]
    whole = tuple(slice(0, side) for side in labelled.shape)

    def sampled(affine: np.ndarray) -> np.ndarray:
        return resample_nearest(labelled, np.linalg.inv(affine @ first) @ to_world, image.shape, box=whole)

    ids = sampled(labels.affine)
    on_head = (image > _dark(image))[ids > 0]
    if on_head.size and on_head.mean() < MIN_ON_HEAD:
        raise VolumeError(
            f"{labels.path}: {on_head.mean():.0%} of the labelled voxels lie where the T1w shows a head; "
            f"at least {MIN_ON_HEAD:.0%} are wanted (is it another person's, or another space's?)"
        )
    if not _is_whole(labelled, labels):
        return
    fit, enough = explained(image, ids), max(MIRRORED_GAIN, NOISE / on_head.size**0.5)
    for how, affine in _mistaken(labels).items():
        better = explained(image, sampled(affine))
        if better - fit > enough * better:
            raise VolumeError(
                f"{labels.path}: the labels fit the T1w better {how} (they explain {better:.2f} of its variance, as they stand {fit:.2f}); "
                "a map in the T1w's own space, left on its left, is wanted"
            )


def explained(image: np.ndarray, ids: np.ndarray) -> float:
    """Share of the variance of ``image`` that ``ids``, of the same shape, explain.

    >>> explained(np.array([1, 1, 5, 5]), np.array([0, 0, 2, 2])), explained(np.array([1, 5, 1, 5]), np.array([0, 0, 2, 2]))
    (1.0, 0.0)
    """
    values, ids = image.ravel().astype(np.float64), ids.ravel()
    counts, sums = np.bincount(ids), np.bincount(ids, weights=values)
    there = counts > 0
    mean = values.mean()
    total = float(((values - mean) ** 2).sum())
    return float((counts[there] * (sums[there] / counts[there] - mean) ** 2).sum()) / total if total else 0.0


def _is_whole(labelled: np.ndarray, labels: Volume) -> bool:
    """Whether the map is one of a brain's tissues or of all its structures."""
    counts = np.bincount(labelled[::2, ::2, ::2].ravel())[1:]
    return bool((counts > 0).sum() >= WHOLE_IDS and 8 * counts.sum() * labels.voxel_mm.prod() / 1000 >= WHOLE_ML)


def _mistaken(labels: Volume) -> dict[str, np.ndarray]:
    """Affines that the map would have, had a tool reversed an axis or mistaken one convention for another."""
    found = {}
    for direction, axis in zip(DIRECTIONS, axes_to_lia(labels.affine)[0], strict=True):
        reverse = np.eye(4)
        reverse[axis, axis], reverse[axis, 3] = -1, labels.data.shape[axis] - 1
        found[f"with its {direction} axis reversed"] = labels.affine @ reverse
    found["with the sign of x changed"] = np.diag([-1.0, 1.0, 1.0, 1.0]) @ labels.affine
    found["with its affine taken for LPS+"] = _LPS @ labels.affine
    return found


def _dark(image: np.ndarray) -> float:
    """Half the threshold that parts a picture's intensities best (Otsu, IEEE SMC 1979), but no more than :data:`AIR`: what is darker is air."""
    counts = histogram_of(image).astype(np.float64)
    levels = np.arange(256)
    below, sums = counts.cumsum(), (counts * levels).cumsum()
    above = below[-1] - below
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
    return min(float(np.nan_to_num(between).argmax()) / 2, AIR)
