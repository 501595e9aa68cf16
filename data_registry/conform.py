"""One scan → the standard grid and back: geometry and intensity, never appearance across sites (*harmonise* here is not ComBat).

The grid keeps the scan's own axes: they are permuted and flipped to the nearest LIA (axis 0 grows to the left, 1 to inferior, 2 to
anterior) and rescaled, never rotated, because the slab was laid along the head. So every step is separable: one small sparse matrix
an axis, and the way back is the same with the inverse map. Batch and ``lodbrain segment`` both call this module.

Choices, each stated once:

- The grid's centre is the centre of the scan's field of view; where the voxel sizes agree it is moved by less than half a voxel so
  that no voxel is interpolated. What lies outside the scan is 0; what lies outside the grid is cut, and a warning says how much.
- Images: linear (default) or cubic interpolation, widened to the voxel ratio where the grid is coarser (a weighted mean, no aliasing).
- Labels: nearest neighbour, or (default) the majority among the labels inside a coarser voxel, counted in source ids.
- Intensity: the 0.1 % and 99.9 % points of the intensities map to 0 and 255 (FastSurfer's robust maximum, with a lower end
  that also serves scans with an offset); a scan that is uint8 on the grid already passes unchanged. Or a window that
  :mod:`data_registry.intensity` has found.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from data_registry.errors import InputError
from data_registry.resample import NIFTI_EDGE, Interpolation, in_c_order, is_whole, majority, resample_image, resample_nearest
from data_registry.volume import Volume, VolumeError, axes_to_lia

SAME_SIZE = 1e-3  # voxel sizes whose ratio is this near to 1 count as equal: a quarter of a voxel over 256
SIDE_MULTIPLE = 16  # every side can be halved four times, so that all levels of detail exist
FIELD_OF_VIEW_MM = 256.0
MIN_LABELS_INSIDE = 0.95
MAX_LABELS_ON_CUT_FACE = 0.001


@dataclass(frozen=True)
class Placement:
    """Where a grid lies in a scan; all that is needed to go there and back."""

    affine: np.ndarray
    """(4, 4) grid voxel → RAS+ mm."""
    shape: tuple[int, int, int]
    """Of the grid, LIA."""
    native_affine: np.ndarray
    """(4, 4) the scan's own voxel → RAS+ mm."""
    native_shape: tuple[int, int, int]

    @property
    def voxel_mm(self) -> float:
        """Edge of the grid's cubic voxels, mm."""
        return float(np.linalg.norm(self.affine[:3, 0]))

    @property
    def voxel_ml(self) -> float:
        """Volume of a grid voxel, mL."""
        return abs(float(np.linalg.det(self.affine[:3, :3]))) / 1000


@dataclass(frozen=True)
class Conformed:
    """A T1w on the standard grid."""

    data: np.ndarray
    """(D, H, W) uint8, LIA."""
    placement: Placement
    warnings: tuple[str, ...]


def grid_geometry(grid: str, voxel_mm: np.ndarray, shape: tuple[int, ...]) -> tuple[float, int]:
    """Voxel edge (mm) and side (voxels) of a named grid for a scan of these voxel sizes and shape.

    ``<x>mm``: x mm over 256 mm, the side rounded up to a multiple of 16. ``min``: FastSurfer's rule, the smallest voxel edge, at most
    1 mm, 1 mm if above 0.95; at least 256 voxels. ``native``: the smallest voxel edge, uncapped, side as large as the scan needs.

    >>> grid_geometry("1mm", np.ones(3), (160, 256, 256)), grid_geometry("3mm", np.ones(3), (160, 256, 256))
    ((1.0, 256), (3.0, 96))
    >>> grid_geometry("min", np.array([.7, .7, .8]), (256, 320, 320)), grid_geometry("native", np.array([1.6, 1.6, 1.6]), (104, 150, 133))
    ((0.7, 368), (1.6, 160))
    """
    extent_mm = float((voxel_mm * np.asarray(shape)).max())
    smallest = float(voxel_mm.min())
    if grid == "min":
        edge = 1.0 if smallest > 0.95 else smallest
        least = 256
    elif grid == "native":
        edge, least = smallest, 1
    else:
        edge, extent_mm, least = parse_grid(grid), FIELD_OF_VIEW_MM, 1
    side = max(least, int(np.ceil(extent_mm / edge - 1e-6)))
    return edge, -(-side // SIDE_MULTIPLE) * SIDE_MULTIPLE


def parse_grid(grid: str) -> float:
    """Voxel edge in mm of a grid named by its size; NaN for ``min`` and ``native``, an :class:`InputError` for anything else."""
    if grid in ("min", "native"):
        return float("nan")
    try:
        edge = float(grid.removesuffix("mm")) if grid.endswith("mm") else 0.0
    except ValueError:
        edge = 0.0
    if not 0.2 <= edge <= 16:
        raise InputError(f"grid {grid!r} is not known; 'min', 'native' or a size from 0.2mm to 16mm, e.g. '1mm', is wanted")
    return edge


def place_grid(volume: Volume, grid: str) -> Placement:
    """Lay the named grid into a scan, without touching a voxel."""
    source, flip = axes_to_lia(volume.affine)
    edge, side = grid_geometry(grid, volume.voxel_mm, volume.data.shape)
    to_native = np.zeros((4, 4))
    to_native[3, 3] = 1
    for axis in range(3):
        size, length = volume.voxel_mm[source[axis]], volume.data.shape[source[axis]]
        ratio = edge / size
        ratio = 1.0 if abs(ratio - 1) < SAME_SIZE else ratio
        first = (length - side * ratio + ratio - 1) / 2  # own index, along the grid's direction, of the grid's voxel 0
        first = np.floor(first) if ratio == 1 else first
        to_native[source[axis], axis] = -ratio if flip[axis] else ratio
        to_native[source[axis], 3] = length - 1 - first if flip[axis] else first
    return Placement(volume.affine @ to_native, (side,) * 3, volume.affine, tuple(volume.data.shape))


def conform(volume: Volume, *, grid: str, window: tuple[float, float] | None = None, interpolation: Interpolation = "linear") -> Conformed:
    """Bring a T1w to the named grid as uint8; ``window``: the intensities that become 0 and 255, by default :func:`robust_range`.

    Raises :class:`VolumeError` for a scan without contrast.
    """
    placement = place_grid(volume, grid)
    warnings = volume.warnings + _cut_warning(placement)
    to_native = np.linalg.inv(placement.native_affine) @ placement.affine
    on_grid = tuple(volume.data.shape) == placement.shape and np.allclose(to_native, np.eye(4), atol=NIFTI_EDGE)
    if on_grid and volume.stored_dtype == "uint8" and window is None:
        data = in_c_order(volume.data.astype(np.uint8))
        if data.min() == data.max():
            raise VolumeError(f"{volume.path}: no contrast, every voxel is {data.flat[0]}; a T1w image is wanted")
        return Conformed(data, placement, warnings)
    low, high = window or robust_range(volume)
    scaled = np.clip((volume.data - np.float32(low)) * np.float32(255 / (high - low)), 0, 255)
    if is_whole(to_native):  # nothing to interpolate, and a byte a voxel to move
        return Conformed(resample_nearest(np.rint(scaled).astype(np.uint8), to_native, placement.shape), placement, warnings)
    resampled = resample_image(scaled, to_native, placement.shape, interpolation=interpolation)
    if interpolation == "cubic":  # it overshoots
        resampled = np.clip(resampled, 0, 255)
    return Conformed(np.rint(resampled).astype(np.uint8), placement, warnings)


def robust_range(volume: Volume) -> tuple[float, float]:
    """The intensities that become 0 and 255: the 0.1 % point of all voxels, the 99.9 % point of those above it."""
    values = volume.data.reshape(-1)
    low = float(np.quantile(values, 0.001, method="lower"))
    above = values[values > low]
    if not above.size:
        raise VolumeError(f"{volume.path}: no contrast, the voxels are {low:g}; a T1w image is wanted")
    return low, float(np.quantile(above, 0.999, method="higher"))


def _cut_warning(placement: Placement) -> tuple[str, ...]:
    """A sentence if the scan is larger than the grid."""
    extent_mm = np.linalg.norm(placement.native_affine[:3, :3], axis=0) * placement.native_shape
    excess_mm = float(extent_mm.max()) - placement.voxel_mm * max(placement.shape)
    return (f"the scan is {excess_mm:.0f} mm longer than the grid and is cut at both ends",) if excess_mm > 2 * placement.voxel_mm else ()


def labels_to_grid(labels: Volume, placement: Placement, *, method: Literal["majority", "nearest"] = "majority") -> np.ndarray:
    """Source ids (D, H, W) uint16 on a scan's grid, through world space.

    Raises :class:`VolumeError` if the label map is empty, lies outside the scan's field of view, or ends inside it with labels on its edge.
    """
    _check_cover(labels, placement)
    to_labels = np.linalg.inv(labels.affine) @ placement.affine
    ratio = placement.voxel_mm / labels.voxel_mm.min()
    parts = max(1, round(ratio)) if method == "majority" else 1
    if parts == 1:
        return resample_nearest(labels.data, to_labels, placement.shape)
    # voxel p of the finer grid lies at (p + 0.5) / parts − 0.5 on the coarse one
    finer = np.diag([1 / parts] * 3 + [1.0])
    finer[:3, 3] = 0.5 / parts - 0.5
    fine = resample_nearest(labels.data, to_labels @ finer, tuple(n * parts for n in placement.shape))
    return majority(fine, parts)


def coarser_than_grid_mm(labels: Volume, placement: Placement) -> float | None:
    """Largest voxel edge (mm) of a label map that is coarser than the grid, and so no truth at the grid's resolution; None if it is not.

    >>> fine = Placement(np.diag([0.7, 0.7, 0.7, 1]), (368,) * 3, np.diag([0.7, 0.7, 0.8, 1]), (256, 320, 320))
    >>> labels = Volume(np.zeros((2, 2, 2), np.uint16), np.diag([0.7, 1.0, 0.7, 1]))
    >>> coarser_than_grid_mm(labels, fine), coarser_than_grid_mm(Volume(labels.data, fine.affine), fine)
    (1.0, None)
    """
    edge = float(labels.voxel_mm.max())
    return edge if edge > placement.voxel_mm * (1 + SAME_SIZE) else None


def labels_to_native(labels: np.ndarray, placement: Placement) -> np.ndarray:
    """Labels on the grid → the scan's own grid by nearest neighbour; exact where the grids differ by whole voxels."""
    return resample_nearest(labels, np.linalg.inv(placement.affine) @ placement.native_affine, placement.native_shape)


def probabilities_to_native(probabilities: np.ndarray, placement: Placement) -> np.ndarray:
    """(C, D, H, W) class probabilities on the grid → (I, J, K) uint8 class of the largest on the scan's own grid.

    Each map is interpolated linearly before the largest is taken: a coarse grid then loses little (a 4 mm grid keeps .87 mean Dice where
    repeated labels keep .82). One class is held at a time. Outside the grid the class is 0.
    """
    to_grid = np.linalg.inv(placement.affine) @ placement.native_affine
    winner = np.zeros(placement.native_shape, dtype=np.uint8)
    best = None
    for index, one in enumerate(probabilities):
        native = resample_image(np.asarray(one, dtype=np.float32), to_grid, placement.native_shape)
        if best is None:
            best = native.copy()  # on the same grid it is a view of the argument
            continue
        larger = native > best
        winner[larger] = index
        np.maximum(best, native, out=best)
    return winner


def _check_cover(labels: Volume, placement: Placement) -> None:
    """Refuse a label map that is empty, lies elsewhere in the world than the scan, or is cut inside it."""
    total = np.count_nonzero(labels.data)
    if not total:
        raise VolumeError(f"{labels.path}: no voxel is labelled; a label map of the scan is wanted")
    to_scan = np.linalg.inv(placement.native_affine) @ labels.affine
    step = 4 if total > 2**18 else 1  # a few thousand voxels say it as well as a million
    in_scan = step * np.argwhere(labels.data[::step, ::step, ::step]) @ to_scan[:3, :3].T + to_scan[:3, 3]
    share = float(((in_scan > -1) & (in_scan < placement.native_shape)).all(axis=1).mean())
    if share < MIN_LABELS_INSIDE:
        raise VolumeError(
            f"{labels.path}: {share:.0%} of the labelled voxels lie inside the scan's field of view in world space; "
            f"at least {MIN_LABELS_INSIDE:.0%} are wanted (do the two affines belong together?)"
        )
    shape = np.array(labels.data.shape)
    for axis in range(3):
        for index, outward in ((0, -1), (shape[axis] - 1, 1)):
            count = np.count_nonzero(labels.data[(slice(None),) * axis + (index,)])
            beyond = (shape - 1) / 2
            beyond[axis] = index + 2 * outward
            beyond = to_scan[:3, :3] @ beyond + to_scan[:3, 3]
            if count > MAX_LABELS_ON_CUT_FACE * total and ((beyond > 0) & (beyond < np.array(placement.native_shape) - 1)).all():
                raise VolumeError(
                    f"{labels.path}: the label map ends inside the scan's field of view with {count} labelled voxels on its edge; "
                    "a label map that covers the scan in world space is wanted"
                )
