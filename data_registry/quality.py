"""Image-quality figures of one harmonised T1w, and of its labels where it has them; what they mean for its use says :mod:`quality_rules`.

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

import functools
from collections.abc import Iterable

import numpy as np

from data_registry import protocol as protocols
from data_registry.intensity import histogram_of
from data_registry.resample import bounding_box

CLASSES = "lod7"
TISSUES = ("fsl_fast", "spm_tissue", "malp_em_tissue", "malp_em")
_TISSUE_OF_GROUP = {"cortex": 1, "white_matter": 3}  # the classes of lod7
SIDES = "synthseg33"
LEFT, RIGHT = 1, 2
LATTICE_MM, BLOCK_MM, CUBE_MM, AROUND_HEAD_MM = 2.0, 4.0, 32.0, 8.0
RAYLEIGH_SD = float(np.sqrt(2 - np.pi / 2))
"""Standard deviation of the magnitude of pure noise, by that of its two channels (Gudbjartsson & Patz, MRM 34:910, 1995)."""
LEAST_VOXELS = 50
LEAST_AIR_BLOCKS = 200
LEAST_AIR_SHARE = 0.2    # of the blocks outside the head
MOST_AIR_ZEROS = 0.5
GHOST_DEVIATIONS = 5.0
NO_AIR = {**dict.fromkeys(("noise", "snrd", "fber", "ghost_share")), "air_reason": "the choice of harmonise.intensity changes the background"}
FACES = ("right", "left", "superior", "inferior", "posterior", "anterior")
"""Of a field of view on a LIA grid: low and high end of each axis."""


def measure(t1w: np.ndarray, ids: np.ndarray | None, *, affine: np.ndarray, native_affine: np.ndarray, native_shape: tuple[int, ...],
            classes: str = CLASSES, untouched: bool = True) -> dict:  # fmt: skip
    """All figures of a T1w (D, H, W) uint8 LIA and its label ids (D, H, W) of a source that protocol ``classes`` (lod7 or one of
    :data:`TISSUES`) reads, or None; by column of the table quality.

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
    sums = _block_sums(grey, block)
    head, level = head_of(sums / block**3)
    histogram = histogram_of(grey)
    figures = {"own_voxel_mm": float(np.linalg.norm(native_affine[:3, :3], axis=0).max()), "efc": efc(histogram)}
    figures |= _of_air(grey, sums, head, block, lattice_mm) if untouched else dict(NO_AIR)
    in_head = _upsampled(head, block, grey.shape)
    figures["head_cut_cm2"] = cut_cm2((inside & (values > level) for inside, values in zip(faces(in_head), faces(grey), strict=True)), lattice_mm)
    if ids is None:
        return figures
    bright = float(np.searchsorted(np.cumsum(histogram), 0.9995 * grey.size))
    noise = figures["noise"] or 0.0
    return figures | _of_labels(grey, np.ascontiguousarray(ids[lattice]), in_head, lattice_mm, classes=classes, noise=noise, bright=bright)


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


def head_of(means: np.ndarray) -> tuple[np.ndarray, float]:
    """The head, by the mean intensities of blocks, and the intensity that bounds it from air.

    A quarter of the median of what is brighter than the mean; the largest piece of what lies above it, its holes filled.
    """
    from scipy import ndimage

    above = means[means > means.mean()]
    level = float(np.median(above)) / 4 if above.size else 0.0
    pieces, number = ndimage.label(means > level)
    sizes = np.bincount(pieces.ravel())[1:]
    head = pieces == 1 + int(sizes.argmax()) if number else np.zeros(means.shape, bool)
    return filled(head), level


def filled(mask: np.ndarray) -> np.ndarray:
    """``scipy.ndimage.binary_fill_holes``, by the pieces of what is not in ``mask``: those that reach no edge are holes. A fifth of its time.

    >>> filled(np.array([[1, 1, 1, 0], [1, 0, 1, 1], [1, 1, 1, 0]], bool)).astype(int).tolist()
    [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 0]]
    """
    from scipy import ndimage

    pieces, number = ndimage.label(~mask)
    hole = np.ones(number + 1, bool)                     # piece 0 is the mask
    for axis in range(mask.ndim):
        for end in (0, -1):
            hole[pieces.take(end, axis=axis)] = False
    hole[0] = True
    return hole[pieces]


def faces(data: np.ndarray) -> list[np.ndarray]:
    """The layer of (D, H, W) at each of :data:`FACES`; the last but one, as the last may be half empty."""
    return [data.take(index, axis=axis) for axis, n in enumerate(data.shape) for index in (min(1, n - 1), max(0, n - 2))]


def cut_cm2(layers: Iterable[np.ndarray], voxel_mm: float) -> list[float]:
    """Area of tissue in each layer, cm².

    >>> tissue = np.zeros((4, 4, 4), bool); tissue[1, 1:3, 1] = True
    >>> cut_cm2(faces(tissue), 10.0)
    [2.0, 0.0, 1.0, 1.0, 2.0, 0.0]
    """
    return [float(np.count_nonzero(layer) * voxel_mm**2 / 100) for layer in layers]


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


def _of_labels(grey: np.ndarray, ids: np.ndarray, in_head: np.ndarray, voxel_mm: float, *, classes: str, noise: float, bright: float) -> dict:
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
    figures = {"snr_gm": _ratio(gm, gm_sd), "snr_wm": _ratio(wm, wm_sd), "unevenness": uneven, "wm2max": _ratio(wm, bright)}
    if None not in (gm, wm, gm_sd, wm_sd):
        figures["cnr"] = _ratio(wm - gm, float(np.sqrt(gm_sd**2 + wm_sd**2 + (noise * RAYLEIGH_SD) ** 2)))
        figures["cjv"] = _ratio(gm_sd + wm_sd, abs(wm - gm))
    return figures


def _of_air(grey: np.ndarray, sums: np.ndarray, head: np.ndarray, block: int, voxel_mm: float) -> dict:
    """Figures of the air around ``head``, and of the head against it, by voxels and their ``sums`` over blocks; or why there are none."""
    from scipy import ndimage

    around = ndimage.binary_dilation(head, iterations=max(1, round(AROUND_HEAD_MM / voxel_mm / block)))
    outside, air = int((~around).sum()), ~around & (sums > 0)
    blocks = int(air.sum())
    if blocks < LEAST_AIR_BLOCKS:
        size = f"{block * voxel_mm:.3g} mm"
        return NO_AIR | {"air_reason": f"{blocks} blocks of {size} with signal lie outside the head; {LEAST_AIR_BLOCKS} are wanted"}
    if blocks < LEAST_AIR_SHARE * outside:
        return NO_AIR | {"air_reason": f"the background is empty in {1 - blocks / outside:.0%} of the field of view (stripped, masked or padded)"}
    histogram = histogram_of(_cropped(grey, block)[_repeated(air, block)])
    if histogram[0] > MOST_AIR_ZEROS * histogram.sum():
        return NO_AIR | {"air_reason": f"{histogram[0] / histogram.sum():.0%} of the air is 0: removed, or quieter than one of 255 grey levels"}
    levels, number = np.arange(256), histogram.sum()
    mean = (histogram * levels).sum() / number
    noise = float(np.sqrt((histogram * (levels - mean) ** 2).sum() / number)) / RAYLEIGH_SD
    of_head = histogram_of(_cropped(grey, block)[_repeated(head, block)])
    foreground, background = _median(of_head), _median(histogram)
    means = sums[air] / block**3
    middle = np.median(means)
    deviation = 1.4826 * np.median(np.abs(means - middle))
    return {
        "air_reason": None,
        "noise": noise,
        "snrd": _ratio(foreground, noise),
        "fber": _ratio(foreground**2, background**2),
        "ghost_share": float((means > middle + GHOST_DEVIATIONS * deviation).mean()) if deviation else None,
    }


def _ratio(top: float | None, bottom: float | None) -> float | None:
    return float(top / bottom) if top is not None and bottom else None


def _median(histogram: np.ndarray) -> float:
    """The lower median of the voxels that a histogram counts; 0 of none."""
    return float(np.searchsorted(np.cumsum(histogram), histogram.sum() / 2))


def _block_sums(data: np.ndarray, block: int) -> np.ndarray:
    """(D, H, W) uint8 → (D//b, H//b, W//b) sums."""
    if block == 1:
        return data.astype(np.uint32)
    whole = _cropped(data, block)
    for axis in range(3):
        parts = np.moveaxis(whole.reshape(*whole.shape[:axis], -1, block, *whole.shape[axis + 1 :]), axis + 1, 0)
        whole = functools.reduce(np.add, parts[1:], parts[0].astype(np.uint32))
    return whole


def _cropped(data: np.ndarray, block: int) -> np.ndarray:
    return data[tuple(slice(n // block * block) for n in data.shape)]


def _repeated(blocks: np.ndarray, block: int) -> np.ndarray:
    for axis in range(3) if block > 1 else ():
        blocks = np.repeat(blocks, block, axis=axis)
    return blocks


def _upsampled(blocks: np.ndarray, block: int, shape: tuple[int, ...]) -> np.ndarray:
    """Blocks → voxels of ``shape``; what fills no block is taken from the nearest."""
    lacking = [(0, n - m * block) for n, m in zip(shape, blocks.shape, strict=True)]
    return np.pad(_repeated(blocks, block), lacking, mode="edge") if np.any(lacking) else _repeated(blocks, block)


def _protocol() -> protocols.Protocol:
    return protocols.load(CLASSES)


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
