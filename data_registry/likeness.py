"""How alike two heads are: a few hundred numbers a T1w, nearly the same for another scan of the same person, and their comparison.

The brain is found by the ICBM 152 nonlinear symmetric 2009a template that nilearn ships (Fonov et al., NeuroImage 54:313–327, 2011): poses by
correlation of spectra, then Gauss–Newton in the template's own frame (Baker & Matthews, IJCV 56:221–255, 2004). What describes a person is
what is left of the picture inside the brain once template, tissue maps, slow shading and every small error of the pose are fitted away, with
equal power everywhere; signs drawn by a hash project it. So skull, face, neck, place and turn of the head, scale and bias of the intensities
count little. A mirrored copy is another head.

How sure it is stands in README ("Who is who") and is measured by ``tests/benchmarks/bench_people.py``. Arrays are LIA at 4 mm.
"""

import functools
import hashlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from statistics import NormalDist

import numpy as np
from scipy import ndimage

from data_registry.volume import load_image

NUMBERS = 512
EDGE_MM = 4.0
SIDE = 64
COARSEST_MM = 4.6
WORST_FIT = 0.25
"""Share of the brain's variance that template and shading must explain; below it the head was not found."""
STRANGERS = (0.32, 0.09)
"""Mean and standard deviation of the likeness of two different people, measured on 36 heads; a run with many people measures its own."""
_STARTS = 10
_FLAT = 5.0  # voxels
_SCALES = (0.78, 1.02)  # of a head against the template
_SPECTRUM = 48  # cube of 8 mm voxels


def describe(t1w: np.ndarray, voxel_mm: float) -> np.ndarray | None:
    """(NUMBERS,) int8 of a T1w (D, H, W), LIA, cubic voxels; None where no brain is found, or the grid is coarser than 4.6 mm."""
    if voxel_mm > COARSEST_MM:
        return None
    picture = _flat(_at_4mm(t1w, voxel_mm))
    if not picture.any():
        return None
    inside, rows, spanned, signs = _brain()
    values = _clipped(_sample(picture, _register(picture), rows), slice(None), 0.95)
    rest = values - spanned @ (spanned.T @ values)
    if values.std() == 0 or 1 - rest.var() / values.var() < WORST_FIT:
        return None
    band = np.zeros(inside.shape, np.float32)
    band[inside] = rest
    band = (_smooth(band, 0.7, inside) - _smooth(band, 2.5, inside)) * inside
    band /= np.sqrt(_smooth(band**2, 2.5, inside) + 1e-6)
    projected = (band[inside] - band[inside].mean()) @ signs
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


def _at_4mm(t1w: np.ndarray, voxel_mm: float) -> np.ndarray:
    """(64, 64, 64) float32: means of blocks, then linear where they are not of 4 mm; the middle stays the middle."""
    factor = max(1, round(EDGE_MM / voxel_mm))
    data = t1w[tuple(slice(n % factor // 2, n % factor // 2 + n // factor * factor) for n in t1w.shape)]
    data = _halved(data, factor)
    step = EDGE_MM / (voxel_mm * factor)
    if data.shape == (SIDE,) * 3 and abs(step - 1) < 1e-6:
        return data
    start = (np.array(data.shape) - 1) / 2 - step * (SIDE - 1) / 2
    return ndimage.affine_transform(data, [step] * 3, offset=start, output_shape=(SIDE,) * 3, order=1)


def _halved(data: np.ndarray, factor: int = 2) -> np.ndarray:
    """Means over blocks of ``factor``³."""
    for axis in range(3):
        data = data.reshape(*data.shape[:axis], -1, factor, *data.shape[axis + 1 :]).mean(axis + 1, dtype=np.float32)
    return data


def _flat(picture: np.ndarray) -> np.ndarray:
    """Without slow shading, and bright fat cut: divided by the mean of what is bright within 5 voxels, at most 1.5."""
    bright = picture > 0.1 * picture.max()
    bright = (picture > 0.5 * picture[bright].mean()).astype(np.float32) if bright.any() else bright.astype(np.float32)
    level = ndimage.gaussian_filter(picture * bright, _FLAT) / np.maximum(ndimage.gaussian_filter(bright, _FLAT), 0.02)
    return np.minimum(picture / np.maximum(level, max(0.05 * level.max(), 1e-6)), 1.5)


def _smooth(volume: np.ndarray, sigma: float, inside: np.ndarray) -> np.ndarray:
    return ndimage.gaussian_filter(volume, sigma) / np.maximum(ndimage.gaussian_filter(inside.astype(np.float32), sigma), 0.1)


@functools.cache
def _template() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """T1w, grey and white matter, (D, H, W) LIA, 4 mm."""
    folder = Path(importlib.util.find_spec("nilearn").origin).parent / "datasets/data"  # nilearn itself is slow to load
    maps = [load_image(folder / f"mni_icbm152_{name}_tal_nlin_sym_09a_converted.nii.gz").data for name in ("t1", "gm", "wm")]
    lia = [np.pad(data[::-1, :, ::-1].transpose(0, 2, 1).astype(np.float32) / 255, 10) for data in maps]  # RAS before
    return tuple(_halved(data[tuple(slice(n // 4 * 4) for n in data.shape)], 4) for data in lia)


@functools.cache
def _mask() -> tuple[np.ndarray, np.ndarray]:
    """The template's brain, and its middle in voxels."""
    brain = ndimage.binary_fill_holes(_template()[0] > 0.1)
    return brain, np.argwhere(brain).mean(0)


def _clipped(values: np.ndarray, core: np.ndarray | slice, quantile: float) -> np.ndarray:
    return np.minimum(values, 1.1 * np.quantile(values[core], quantile) + 1e-6)


def _sample(picture: np.ndarray, pose: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(n,) values at template ``points`` (n, 3) mm; ``pose`` (3, 4) maps them to voxels of the picture."""
    return ndimage.map_coordinates(picture, pose[:, :3] @ points.T + pose[:, 3:], order=1, mode="constant")


@functools.cache
def _motions(smooth: float, grow: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Points (n, 3) mm of the grown brain, the template there (n,), its change by the 12 affine motions (n, 12), what lies deep (n,)."""
    brain, middle = _mask()
    region = ndimage.binary_dilation(brain, iterations=grow) if grow else brain
    template = ndimage.gaussian_filter(_flat(_template()[0]), smooth) if smooth else _flat(_template()[0])
    points = (np.argwhere(region) - middle) * EDGE_MM
    gradient = np.stack([np.gradient(template, axis=axis)[region] for axis in range(3)], 1) / EDGE_MM
    moves = np.concatenate([points / _TURN_MM, np.ones((len(points), 1))], 1)
    return points, template[region], (gradient[:, :, None] * moves[:, None]).reshape(-1, 12), ndimage.binary_erosion(brain, iterations=3)[region]


_TURN_MM = 60.0  # so that an entry of a turn and one of a shift move the brain's edge alike


@functools.cache
def _solver(smooth: float, grow: int, rigid: bool, every: int) -> tuple[np.ndarray, ...]:
    points, template, motions, core = (array[::every] for array in _motions(smooth, grow))
    basis = _RIGID if rigid else np.eye(12)
    inverse = np.linalg.pinv(np.concatenate([template[:, None], np.ones((len(points), 1)), motions @ basis], 1))
    return points, template - template.mean(), core, inverse[2:], basis


def _rigid() -> np.ndarray:
    """(12, 7): three turns, one scale, three shifts."""
    moves = np.zeros((7, 3, 4))
    for index, (a, b) in enumerate(((0, 1), (0, 2), (1, 2))):
        moves[index, a, b], moves[index, b, a] = 1, -1
    moves[3, :, :3] = np.eye(3)
    moves[4:, :, 3] = np.eye(3)
    return moves.reshape(7, 12).T


_RIGID = _rigid()


def _register(picture: np.ndarray) -> np.ndarray:
    """(3, 4): template mm, from the brain's middle → voxels of the picture."""
    smooth = ndimage.gaussian_filter(picture, 1.5)
    starts = [_descend(smooth, pose, _solver(1.5, 1, True, 5), 10) for pose in _poses(picture)]
    pose, _ = max(starts, key=lambda item: item[1])
    pose, _ = _descend(smooth, pose, _solver(1.5, 1, False, 3), 8)
    pose, _ = _descend(picture, pose, _solver(0.0, 1, False, 1), 12)
    return _descend(picture, pose, _solver(0.0, 0, False, 1), 8)[0]


def _descend(picture: np.ndarray, pose: np.ndarray, solver: tuple[np.ndarray, ...], steps: int) -> tuple[np.ndarray, float]:
    """Gauss–Newton from ``pose``; the pose reached, and the correlation with the template there."""
    points, template, core, inverse, basis = solver
    for _ in range(steps):
        values = _clipped(_sample(picture, pose, points), core, 0.9)
        gain = max(template @ values / (template @ template), 0.3 * values.std() / template.std(), 1e-6)
        move = (basis @ (inverse @ values) / gain).reshape(3, 4)
        size = max(np.abs(move).max(), 1e-9)
        change = np.eye(4)
        change[:3] += move * min(1, 5 / size) / np.array([_TURN_MM] * 3 + [1])
        pose = pose @ np.linalg.inv(change)
        scale = np.cbrt(abs(np.linalg.det(pose[:, :3] * EDGE_MM)))
        pose[:, :3] *= np.clip(scale, *_SCALES) / max(scale, 1e-6)
    values = _clipped(_sample(picture, pose, points), core, 0.9)
    values = values - values.mean()
    return pose, float(template @ values / np.sqrt((template @ template) * (values @ values) + 1e-9))


@functools.cache
def _spectra() -> list[tuple[np.ndarray, np.ndarray, np.ndarray, float]]:
    """For each nod and size of the head: its (3, 3) matrix, spectra of template and mask on a cube of 8 mm voxels, voxels of the mask."""
    brain, middle = _mask()
    template = ndimage.gaussian_filter(_flat(_template()[0]), 0.7)
    grown = ndimage.binary_dilation(brain).astype(np.float32)
    around = np.indices((_SPECTRUM,) * 3).reshape(3, -1).T - _SPECTRUM // 2
    found = []
    for degrees in (-30, -15, 0, 15, 30):
        cosine, sine = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
        for scale in (0.8, 0.9, 1.0):
            matrix = np.array([[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]]) * scale
            at = (around * 2 @ np.linalg.inv(matrix).T + middle).T
            values, mask = (ndimage.map_coordinates(data, at, order=1).reshape((_SPECTRUM,) * 3) for data in (template, grown))
            mask = (mask > 0.5).astype(np.float32)
            values = (values - values[mask > 0].mean()) * mask
            spectrum = np.conj(np.fft.rfftn(values / np.linalg.norm(values)))
            found.append((matrix, spectrum, np.conj(np.fft.rfftn(mask)), float(mask.sum())))
    return found


def _poses(picture: np.ndarray) -> list[np.ndarray]:
    """Where to start from: the best places of each nod and size by normalised correlation."""
    half = SIDE // 2
    cube = np.zeros((_SPECTRUM,) * 3, np.float32)
    cube[:half, :half, :half] = _halved(picture)
    cube = np.minimum(cube, np.quantile(cube[cube > 0.3 * cube.mean()], 0.8))
    image, square = np.fft.rfftn(cube), np.fft.rfftn(cube**2)
    found = []
    for matrix, template, mask, voxels in _spectra():
        match, sums, squares = (np.fft.irfftn(spectrum) for spectrum in (image * template, image * mask, square * mask))
        spread = squares - sums**2 / voxels
        match /= np.sqrt(np.maximum(spread, 0.02 * spread.max()))
        for _ in range(2):
            place = np.array(np.unravel_index(match.argmax(), match.shape))
            centre = (place + _SPECTRUM // 2) % _SPECTRUM  # the template's middle lies at the middle of its cube
            found.append((match[tuple(place)], np.column_stack([matrix / EDGE_MM, 2 * centre + 0.5])))
            match[np.ix_(*(np.arange(p - 2, p + 3) % _SPECTRUM for p in place))] = -1
    return [pose for _, pose in sorted(found, key=lambda item: -item[0])[:_STARTS]]


@functools.cache
def _brain() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Inner brain of the template, its points (n, 3) mm, an orthonormal basis (n, k) of what is no person's own, signs (n, NUMBERS)."""
    brain, _ = _mask()
    inside = ndimage.binary_erosion(brain)
    points, template, motions, _ = (array[inside[brain]] for array in _motions(0.0, 0))
    place = points / _TURN_MM
    shading = [place[:, i] * place[:, j] for i in range(3) for j in range(i, 3)]
    tissues = [template, *(data[inside] for data in _template()[1:])]
    common = [*tissues, np.ones(len(points)), *place.T, *shading, *(template * axis for axis in place.T), *motions.T]
    bits = np.frombuffer(hashlib.shake_256(b"likeness").digest(len(points) * NUMBERS // 8), np.uint8)
    signs = np.unpackbits(bits).reshape(len(points), NUMBERS).astype(np.float32) * 2 - 1
    return inside, points, np.linalg.qr(np.stack(common, 1))[0].astype(np.float32), signs
