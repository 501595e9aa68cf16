"""How alike two heads are: a few hundred numbers a T1w, nearly the same for another scan of the same person, and their comparison.

The brain is brought onto a template (:mod:`data_registry.brain_pose`). What describes a person is what is left of it once template, tissue maps,
slow shading and every small error of the pose are fitted away, band-passed, with equal power everywhere, and projected on signs drawn by a hash.
So skull, face, neck, place and turn of the head, scale and bias of the intensities count little. A mirrored copy is another head. The numbers
stand in shards: they are the same bits with any number of threads and on any x86-64 processor.

How sure it is stands in docs/databases.md ("Who is who") and is measured by ``tests/benchmarks/bench_people.py``.
"""

import functools
import hashlib
from collections.abc import Iterator
from statistics import NormalDist

import numpy as np
from scipy import ndimage

from data_registry.brain_pose import TURN_MM, at_4mm, brain_mask, clipped, flat, motions_of, register, sample, template_maps
from data_registry.plain_algebra import orthonormal, times

NUMBERS = 512
COARSEST_MM = 4.6
WORST_FIT = 0.25
"""Share of the brain's variance that template and shading must explain; below it the head was not found."""
STRANGERS = (0.32, 0.09)
"""Mean and standard deviation of the likeness of two different people: .27 and .084 on 561 pairs of real and rendered heads, rounded up; a run
with many people measures its own."""


def describe(t1w: np.ndarray, voxel_mm: float) -> np.ndarray | None:
    """(NUMBERS,) int8 of a T1w (D, H, W), LIA, cubic voxels; None where no brain is found, or the grid is coarser than 4.6 mm."""
    if voxel_mm > COARSEST_MM:
        return None
    picture = flat(at_4mm(t1w, voxel_mm))
    if not picture.any():
        return None
    inside, rows, spanned, signs = _brain()
    values = clipped(sample(picture, register(picture), rows), slice(None), 0.95)
    rest = values - np.einsum("k,kn->n", times(spanned, values), spanned)
    if values.std() == 0 or 1 - rest.var() / values.var() < WORST_FIT:
        return None
    band = np.zeros(inside.shape, np.float32)
    band[inside] = rest
    band = (_smooth(band, 0.7, inside) - _smooth(band, 2.5, inside)) * inside
    band /= np.sqrt(_smooth(band**2, 2.5, inside) + 1e-6)
    projected = times(signs, band[inside] - band[inside].mean())
    return np.rint(np.clip(projected / projected.std() * 32, -127, 127)).astype(np.int8)


def likeness(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine of two descriptors: about .3 for different people, above .8 for one.

    >>> round(likeness(np.array([3, 4], np.int8), np.array([4, 3], np.int8)), 2)
    0.96
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def blocks(descriptors: np.ndarray, *, rows: int = 1024) -> Iterator[tuple[int, np.ndarray]]:
    """All likenesses of (n, NUMBERS) descriptors, a pair once: the first row of each block, and (rows, n − first) float32."""
    unit = descriptors.astype(np.float32)
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-6)
    for first in range(0, len(unit), rows):
        yield first, unit[first : first + rows] @ unit[first:].T


def pairs_above(descriptors: np.ndarray, least: float) -> tuple[list[tuple[int, int, float]], tuple[float, float]]:
    """Pairs (i, j, likeness) with i < j and a likeness of at least ``least``; mean and standard deviation over all pairs.

    >>> pairs, (mean, _) = pairs_above(np.array([[3, 4], [4, 3], [-4, 3]], np.int8), 0.9)
    >>> [(i, j, round(value, 2)) for i, j, value in pairs], round(mean, 2)
    ([(0, 1, 0.96)], 0.23)
    """
    found, count, total, squares = [], 0, 0.0, 0.0
    for first, values in blocks(descriptors):
        height = len(values)
        corner = np.triu(values[:, :height], 1)                           # (rows, rows): each pair once, none with itself
        beyond = values[:, height:]
        count += height * (height - 1) // 2 + beyond.size
        total += float(corner.sum(dtype=np.float64) + beyond.sum(dtype=np.float64))
        squares += float(np.vdot(corner, corner) + np.vdot(beyond, beyond))
        values[:, :height] = np.where(np.tri(height, dtype=bool), -2, values[:, :height])
        found += [(first + int(i), first + int(j), float(values[i, j])) for i, j in np.argwhere(values >= least)]
    mean = total / max(count, 1)
    return found, (mean, max(squares / max(count, 1) - mean**2, 0.0) ** 0.5)


def sure_above(pairs: int, strangers: tuple[float, float] = STRANGERS, *, expected: float = 0.01) -> float:
    """The likeness that ``expected`` of so many ``pairs`` of different people reach, were likenesses normally distributed.

    >>> [round(sure_above(n), 2) for n in (100, 10_000, 364_486_500)]
    [0.65, 0.75, 0.91]
    """
    return strangers[0] + strangers[1] * NormalDist().inv_cdf(1 - expected / max(pairs, 1))


def _smooth(volume: np.ndarray, sigma: float, inside: np.ndarray) -> np.ndarray:
    return ndimage.gaussian_filter(volume, sigma) / np.maximum(ndimage.gaussian_filter(inside.astype(np.float32), sigma), 0.1)


@functools.cache
def _brain() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Inner brain of the template, its points (n, 3) mm, an orthonormal basis (k, n) of what is no person's own, signs (NUMBERS, n)."""
    brain, _ = brain_mask()
    inside = ndimage.binary_erosion(brain)
    points, template, motions, _ = (array[inside[brain]] for array in motions_of(0.0, 0))
    place = points / TURN_MM
    shading = [place[:, i] * place[:, j] for i in range(3) for j in range(i, 3)]
    tissues = [template, *(data[inside] for data in template_maps()[1:])]
    common = [*tissues, np.ones(len(points)), *place.T, *shading, *(template * axis for axis in place.T), *motions.T]
    bits = np.frombuffer(hashlib.shake_256(b"likeness").digest(len(points) * NUMBERS // 8), np.uint8)
    signs = np.unpackbits(bits).reshape(len(points), NUMBERS).astype(np.float32) * 2 - 1
    return inside, points, orthonormal(np.stack(common))[0], np.ascontiguousarray(signs.T)
