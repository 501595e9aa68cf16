"""Intensities on a standard scale by the landmarks of Nyúl and Udupa (MRM 42:1072, 1999; IEEE TMI 19:143, 2000), on histograms of 256 levels.

The scale is fitted on the training scans of one fold; a scan then gets an increasing table uint8 → uint8 of its own, so that max-pooling
before or after it is the same. Landmarks are the percentiles PERCENTILES of the foreground: as in the papers, what is brighter than the mean
of all voxels, so that neither padding nor air counts. The papers leave the ends of the scale free: here each is the mean of the
training scans' own.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from data_registry.errors import InputError

PERCENTILES = (1, 10, 20, 30, 40, 50, 60, 70, 80, 90, 99)


def landmarks(histogram: Sequence[int] | np.ndarray) -> np.ndarray:
    """(11,) intensities, strictly increasing within 0.5 … 255.5: a level's voxels are spread evenly over level ± ½.

    InputError for a histogram of a single level.

    >>> landmarks([600] + 99 * [0] + [100] + 155 * [0]).round(2).tolist()     # the mean is 14.3: level 100 alone is foreground
    [99.51, 99.6, 99.7, 99.8, 99.9, 100.0, 100.1, 100.2, 100.3, 100.4, 100.49]
    """
    counts, levels = np.asarray(histogram, dtype=np.int64), np.arange(256)
    foreground = counts * (levels * counts.sum() > (counts * levels).sum())   # in integers: the same on any machine
    if not foreground.any():
        raise InputError(f"no contrast, every voxel is {int((counts * levels).sum() / max(counts.sum(), 1))}; a T1w image is wanted for nyul")
    filled = np.flatnonzero(foreground)
    below = np.cumsum(foreground)[filled]
    # two points a level, so that a gap between levels is a jump
    share = np.stack([below - foreground[filled], below], axis=1).ravel() * (100 / below[-1])
    value = np.stack([filled - 0.5, filled + 0.5], axis=1).ravel()
    return np.interp(PERCENTILES, share, value)


def fit(histograms: Iterable[Sequence[int] | np.ndarray]) -> tuple[float, ...]:
    """The standard scale of some scans: (11,) landmarks, strictly increasing.

    >>> one, other = np.zeros(256, int), np.zeros(256, int)
    >>> one[[0, 100, 200]] = other[[0, 60, 160]] = 900, 50, 50
    >>> [round(value, 1) for value in fit([one, other])][::5]
    [79.5, 179.5, 180.5]
    """
    own = np.array([landmarks(histogram) for histogram in histograms])   # (scans, 11)
    if not len(own):
        raise InputError("no scan to fit a standard scale on; at least one is wanted")
    first, last = own[:, :1], own[:, -1:]
    return tuple((first.mean() + (own - first) / (last - first) * (last.mean() - first.mean())).mean(axis=0).tolist())


def table_for(histogram: Sequence[int] | np.ndarray, scale: Sequence[float]) -> np.ndarray:
    """(256,) uint8, never decreasing, 0 at 0: the scan's landmarks to the scale's, straight lines between, and to (0, 0) and (256, 256) beyond.

    >>> one = np.zeros(256, int); one[[0, 100, 200]] = 900, 50, 50
    >>> (table_for(one, fit([one])) == np.arange(256)).all()
    np.True_
    """
    values = np.interp(np.arange(256), [0, *landmarks(histogram), 256], [0, *scale, 256])
    return np.minimum(np.rint(values), 255).astype(np.uint8)


def mapped(histogram: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The histogram (256,) of what the table makes of the voxels.

    >>> mapped(np.r_[1, 2, 3, np.zeros(253, int)], np.r_[0, 1, 1, np.arange(3, 256)])[:3].tolist()
    [1, 5, 0]
    """
    counts = np.zeros(256, dtype=np.int64)
    np.add.at(counts, table, histogram)
    return counts


def checked(scale: Sequence[float]) -> tuple[float, ...]:
    """A standard scale as :func:`fit` gives it; InputError for anything else."""
    try:
        values = np.array(scale, dtype=float)
    except (TypeError, ValueError):
        values = np.empty(0)
    if values.shape != (len(PERCENTILES),) or not (np.diff(values) > 0).all() or not 0 < values[0] < values[-1] < 256:
        raise InputError(f"scale is {str(scale)[:100]}; {len(PERCENTILES)} landmarks that grow from above 0 to below 256 are wanted")
    return tuple(values.tolist())
