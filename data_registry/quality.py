"""Image-quality figures of one harmonised T1w, and of its labels where it has them.

What they mean for the scan's use is told by :mod:`data_registry.quality_rules`.

Names and definitions are MRIQC's (Esteban et al., PLoS ONE 12:e0184661, 2017) where there is one. What is done otherwise:

- All is measured on the standard grid, uint8, on a lattice of voxels about 2 mm apart. Interpolation and the window of intensities change noise,
  so figures compare scans of one grid; they are not MRIQC's of the same scan to the digit.
- Tissues are the labels' (protocol lod7, else those of FSL FAST, SPM or MALP-EM, which give no volumes and sides here), by voxels whose six
  neighbours belong to the same class: none on a border.
- The bias field is not estimated: deviations of a tissue are those within cubes of 32 mm, over which it is nearly even; how far white matter
  differs between cubes is a figure of its own.
- Noise of the air is its standard deviation, which an offset of the window does not move, times 1.53 for Rayleigh's distribution.
- Air is what lies outside the head by 8 mm, inside the scan's field of view, where the scan is not empty: zeros of a defaced, stripped or padded
  scan are no air, and where little else is left, figures of air are null and ``air_reason`` says why.
"""

import numpy as np

from data_registry.intensity import histogram_of
from data_registry.quality_head import NO_AIR, block_sums, cut_cm2, faces, figures_of_air, head_of, upsampled
from data_registry.quality_labels import CLASSES, figures_of_labels

LATTICE_MM, BLOCK_MM = 2.0, 4.0


def measure(t1w: np.ndarray, ids: np.ndarray | None, *, affine: np.ndarray, native_affine: np.ndarray, native_shape: tuple[int, ...],
            classes: str = CLASSES, untouched: bool = True) -> dict:  # fmt: skip
    """All figures of a T1w (D, H, W) uint8 LIA and its label ids (D, H, W) of a source that protocol ``classes`` (lod7 or one of
    :data:`data_registry.quality_labels.TISSUES`) reads, or None; by column of the table quality.

    ``affine`` (4, 4) grid voxel → mm; ``native_affine``, ``native_shape`` of the scan's own grid, whose field of view is meant.
    ``untouched``: intensities went through the robust window alone, so that air is what the scanner gave. What is not defined is None.
    """
    edge = float(np.linalg.norm(affine[:3, 0]))
    step = max(1, round(LATTICE_MM / edge))
    lattice_mm = edge * step
    inside = field_of_view(affine, native_affine, native_shape, t1w.shape)
    lattice = tuple(slice(-(-part.start // step) * step, part.stop, step) for part in inside)
    grey = np.ascontiguousarray(t1w[lattice])
    block = max(1, round(BLOCK_MM / lattice_mm))
    sums = block_sums(grey, block)
    head, level = head_of(sums / block**3)
    histogram = histogram_of(grey)
    figures = {"own_voxel_mm": float(np.linalg.norm(native_affine[:3, :3], axis=0).max()), "efc": efc(histogram)}
    figures |= figures_of_air(grey, sums, head, block, lattice_mm) if untouched else dict(NO_AIR)
    in_head = upsampled(head, block, grey.shape)
    figures["head_cut_cm2"] = cut_cm2((inside & (values > level) for inside, values in zip(faces(in_head), faces(grey), strict=True)), lattice_mm)
    if ids is None:
        return figures
    bright = float(np.searchsorted(np.cumsum(histogram), 0.9995 * grey.size))
    noise = figures["noise"] or 0.0
    return figures | figures_of_labels(grey, np.ascontiguousarray(ids[lattice]), in_head, lattice_mm, classes=classes, noise=noise, bright=bright)


def field_of_view(affine: np.ndarray, native_affine: np.ndarray, native_shape: tuple[int, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    """The part of the grid whose voxel centres lie between those of the scan's own first and last voxels.

    >>> own = np.diag([1.0, 1, 1, 1]); own[:3, 3] = 2, 3, 0
    >>> field_of_view(np.eye(4), own, (4, 5, 9), (8, 8, 8))
    (slice(2, 6, None), slice(3, 8, None), slice(0, 8, None))
    """
    to_grid = np.linalg.inv(affine) @ native_affine
    ends = np.sort(np.stack([to_grid[:3, 3], to_grid[:3, :3] @ (np.array(native_shape) - 1) + to_grid[:3, 3]]), axis=0)
    low, high = np.ceil(ends[0] - 1e-3).astype(int), np.floor(ends[1] + 1e-3).astype(int)
    return tuple(slice(int(max(0, a)), int(max(a, min(n - 1, b))) + 1) for a, b, n in zip(low, high, shape, strict=True))


def efc(histogram: np.ndarray) -> float | None:
    """Entropy focus criterion (Atkinson et al., IEEE TMI 16:903, 1997) of the voxels that a histogram counts, as MRIQC norms it: 1 if all energy
    is spread evenly, 0 if one voxel has it. −Σ (x/b) ln(x/b) with b = √Σx², by its largest value √N ln √N.

    >>> even, one = np.zeros(256, int), np.zeros(256, int)
    >>> even[7] = 100; one[0], one[9] = 99, 1
    >>> round(efc(even), 6), round(efc(one), 6)
    (1.0, 0.0)
    """
    voxels, levels = histogram.sum(), np.arange(1, len(histogram))
    counts = histogram[1:]
    if voxels < 2 or not counts.any():
        return None
    share = levels / np.sqrt((counts * levels.astype(float) ** 2).sum())
    return float(-(counts * share * np.log(share)).sum() / (np.sqrt(voxels) * np.log(np.sqrt(voxels)))) + 0.0
