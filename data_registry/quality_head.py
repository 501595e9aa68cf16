"""The head in a T1w, the air around it, and the faces of the field of view that cut it; part of :mod:`data_registry.quality`."""

import functools
from collections.abc import Iterable

import numpy as np

from data_registry.intensity import histogram_of

AROUND_HEAD_MM = 8.0
RAYLEIGH_SD = float(np.sqrt(2 - np.pi / 2))
"""Standard deviation of the magnitude of pure noise, by that of its two channels (Gudbjartsson & Patz, MRM 34:910, 1995)."""
LEAST_AIR_BLOCKS = 200
LEAST_AIR_SHARE = 0.2  # of the blocks outside the head
MOST_AIR_ZEROS = 0.5
GHOST_DEVIATIONS = 5.0
NO_AIR = {**dict.fromkeys(("noise", "snrd", "fber", "ghost_share")), "air_reason": "the choice of harmonise.intensity changes the background"}
FACES = ("right", "left", "superior", "inferior", "posterior", "anterior")
"""Of a field of view on a LIA grid: low and high end of each axis."""


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


def figures_of_air(grey: np.ndarray, sums: np.ndarray, head: np.ndarray, block: int, voxel_mm: float) -> dict:
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
        "snrd": ratio(foreground, noise),
        "fber": ratio(foreground**2, background**2),
        "ghost_share": float((means > middle + GHOST_DEVIATIONS * deviation).mean()) if deviation else None,
    }


def ratio(top: float | None, bottom: float | None) -> float | None:
    return float(top / bottom) if top is not None and bottom else None


def _median(histogram: np.ndarray) -> float:
    """The lower median of the voxels that a histogram counts; 0 of none."""
    return float(np.searchsorted(np.cumsum(histogram), histogram.sum() / 2))


def block_sums(data: np.ndarray, block: int) -> np.ndarray:
    """(D, H, W) uint8 → (D//b, H//b, W//b) sums."""
    if block == 1:
        return data.astype(np.uint32)
    whole = _cropped(data, block)
    for axis in range(3):
        parts = np.moveaxis(whole.reshape(*whole.shape[:axis], -1, block, *whole.shape[axis + 1 :]), axis + 1, 0)
        whole = functools.reduce(np.add, parts[1:], parts[0].astype(np.uint32))
    return whole


def upsampled(blocks: np.ndarray, block: int, shape: tuple[int, ...]) -> np.ndarray:
    """Blocks → voxels of ``shape``; what fills no block is taken from the nearest."""
    lacking = [(0, n - m * block) for n, m in zip(shape, blocks.shape, strict=True)]
    return np.pad(_repeated(blocks, block), lacking, mode="edge") if np.any(lacking) else _repeated(blocks, block)


def _cropped(data: np.ndarray, block: int) -> np.ndarray:
    return data[tuple(slice(n // block * block) for n in data.shape)]


def _repeated(blocks: np.ndarray, block: int) -> np.ndarray:
    for axis in range(3) if block > 1 else ():
        blocks = np.repeat(blocks, block, axis=axis)
    return blocks
