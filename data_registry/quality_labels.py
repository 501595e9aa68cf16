"""What the labels of a scan tell of its quality: contrast and noise of the tissues, volumes, sides; part of :mod:`data_registry.quality`."""

import functools

import numpy as np

from data_registry import protocol as protocols
from data_registry.quality_head import RAYLEIGH_SD, cut_cm2, faces, ratio
from data_registry.resample import bounding_box

CLASSES = "lod7"
TISSUES = ("fsl_fast", "spm_tissue", "malp_em_tissue", "malp_em")
_TISSUE_OF_GROUP = {"cortex": 1, "white_matter": 3}  # the classes of lod7
SIDES = "synthseg33"
LEFT, RIGHT = 1, 2
CUBE_MM = 32.0
LEAST_VOXELS = 50


def figures_of_labels(grey: np.ndarray, ids: np.ndarray, in_head: np.ndarray, voxel_mm: float, *, classes: str, noise: float, bright: float) -> dict:
    """Figures that labels give, of the box around them; none where they have no brain. ``bright``: the 99.95 % point of all intensities."""
    box = tuple(slice(max(0, part.start - 1), part.stop + 1) for part in bounding_box(ids))
    labels = np.take(class_of_id(classes), ids[box])
    brain = labels > 0
    if not brain.any():
        return {}
    everywhere = np.zeros(grey.shape, bool)
    everywhere[box] = brain
    figures = {"brain_cut_cm2": cut_cm2(faces(everywhere), voxel_mm), "labels_outside": float(1 - in_head[box][brain].mean())}
    figures |= _of_tissues(grey[box], labels, voxel_mm, noise=noise, bright=bright)
    if classes != CLASSES:
        return figures
    sides = np.take(_sides(), ids[box])
    left, right = ((sides == side).sum((1, 2)) for side in (LEFT, RIGHT))
    figures |= {"asymmetry": asymmetry(int(left.sum()), int(right.sum())), "left_mm": apart_mm(left, right, voxel_mm)}
    number, voxel_ml = np.bincount(labels.ravel(), minlength=7)[1:], voxel_mm**3 / 1000
    figures["volumes_ml"] = [{"class_name": name, "ml": float(n * voxel_ml)} for name, n in zip(_protocol().foreground, number, strict=True)]
    return figures


def _of_tissues(grey: np.ndarray, labels: np.ndarray, voxel_mm: float, *, noise: float, bright: float) -> dict:
    """Figures of grey and white matter; None of a tissue with too few voxels."""
    names = _protocol().class_names
    where = np.nonzero(interior(labels))
    kind, values = labels[where], grey[where]
    per_cube = max(1, round(CUBE_MM / voxel_mm))
    sides = [-(-n // per_cube) for n in grey.shape]
    cubes = np.ravel_multi_index([index // per_cube for index in where], sides)
    found = {}
    for name in ("grey matter", "white matter"):
        of = kind == names.index(name)
        if np.count_nonzero(of) >= LEAST_VOXELS:
            found[name] = float(np.median(values[of])), *spread(values[of], cubes[of])
    (gm, gm_sd, _), (wm, wm_sd, uneven) = (found.get(name, (None,) * 3) for name in ("grey matter", "white matter"))
    figures = {"snr_gm": ratio(gm, gm_sd), "snr_wm": ratio(wm, wm_sd), "unevenness": uneven, "wm2max": ratio(wm, bright)}
    if None not in (gm, wm, gm_sd, wm_sd):
        figures["cnr"] = ratio(wm - gm, float(np.sqrt(gm_sd**2 + wm_sd**2 + (noise * RAYLEIGH_SD) ** 2)))
        figures["cjv"] = ratio(gm_sd + wm_sd, abs(wm - gm))
    return figures


def asymmetry(left: int, right: int) -> float | None:
    """(left − right) / their mean, of volumes; None where there is neither.

    >>> asymmetry(110, 90), asymmetry(0, 0)
    (0.2, None)
    """
    return 2 * (left - right) / (left + right) if left + right else None


def apart_mm(left: np.ndarray, right: np.ndarray, voxel_mm: float) -> float | None:
    """How far the centre of the left's voxels lies to the left of the right's, mm, from their numbers (D,) along the axis that grows to the left.

    >>> apart_mm(np.array([0, 0, 0, 5]), np.array([2, 2, 0, 0]), 2.0)
    5.0
    """
    if not left.sum() or not right.sum():
        return None
    planes = np.arange(len(left))
    return float(((left * planes).sum() / left.sum() - (right * planes).sum() / right.sum()) * voxel_mm)


def spread(values: np.ndarray, cubes: np.ndarray) -> tuple[float | None, float | None]:
    """Of intensities and the number of the cube that each lies in: standard deviation within cubes, and the range of the cubes' means.

    The first is unbiased: √(Σ (x − its cube's mean)² / (voxels − cubes)). The second is (95 % − 5 % point) / median of means of cubes of at
    least LEAST_VOXELS; None with less than four of those.

    >>> within, between = spread(np.array([1, 3, 11, 13]), np.array([0, 0, 5, 5]))
    >>> round(within ** 2, 6), between       # 4 squares of 1, of 4 − 2 degrees of freedom
    (2.0, None)
    """
    number, total, squares = (np.bincount(cubes, weights=weight) for weight in (None, values, np.square(values.astype(np.int64))))
    full = number > 0
    number, total, squares = number[full], total[full], squares[full]
    free = number.sum() - len(number)
    within = float(np.sqrt(max(0.0, (squares - total**2 / number).sum()) / free)) if free > 0 else None
    means = (total / number)[number >= LEAST_VOXELS]
    if len(means) < 4:
        return within, None
    low, middle, high = np.quantile(means, (0.05, 0.5, 0.95))
    return within, float((high - low) / middle) if middle else None


def interior(labels: np.ndarray) -> np.ndarray:
    """Which voxels have six neighbours of their own class; none on the edge of the array."""
    same = np.zeros(labels.shape, bool)
    core = labels[1:-1, 1:-1, 1:-1]
    inner = core > 0
    for axis in range(3):
        for shift in (0, 2):
            inner &= labels[tuple(slice(shift, n - 2 + shift) if a == axis else slice(1, -1) for a, n in enumerate(labels.shape))] == core
    same[1:-1, 1:-1, 1:-1] = inner
    return same


@functools.cache
def class_of_id(name: str = CLASSES) -> np.ndarray:
    """(65536,) uint8: lod7's class of each id, 0 for what it leaves out or does not name; of another protocol's ids, grey and white matter."""
    table = protocols.load(name)
    of = range(table.classes) if name == CLASSES else [_TISSUE_OF_GROUP.get(group, 0) for group in table.groups]
    return np.array([*of, 0], dtype=np.uint8)[np.minimum(table.table, table.classes)]


@functools.cache
def _sides() -> np.ndarray:
    """(65536,) uint8: LEFT or RIGHT for ids that have a side, else 0."""
    table = protocols.load(SIDES)
    codes = np.array([{"left": LEFT, "right": RIGHT}.get(side, 0) for side in (*table.sides, "none")], dtype=np.uint8)
    return codes[np.minimum(table.table, table.classes)]


def _protocol() -> protocols.Protocol:
    return protocols.load(CLASSES)
