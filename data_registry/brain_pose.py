"""Where the brain lies in a T1w: its affine pose against the ICBM 152 nonlinear symmetric 2009a template that nilearn ships.

After Fonov et al., NeuroImage 54:313–327, 2011 (the template), and Baker & Matthews, IJCV 56:221–255, 2004 (Gauss–Newton in the template's own
frame, so that its matrices are computed once). Starts come from correlation of spectra over nods and sizes of the head. All of it at 4 mm, 0.17 s;
slow shading is divided out and fat cut off first, so raw scans with skull and neck do.

Arrays are (D, H, W) LIA.
"""

import functools
import importlib.util
from pathlib import Path

import numpy as np
from scipy import ndimage

from data_registry.plain_algebra import inverse, moved, pseudo_inverse, times
from data_registry.volume import load_image

EDGE_MM = 4.0
SIDE = 64
TURN_MM = 60.0
"""So that an entry of a turn and one of a shift move the brain's edge alike."""
_STARTS = 10
_FLAT = 5.0  # voxels
_SCALES = (0.78, 1.02)  # of a head against the template
_SPECTRUM = 48  # cube of 8 mm voxels


def at_4mm(t1w: np.ndarray, voxel_mm: float) -> np.ndarray:
    """(64, 64, 64) float32: means of blocks, then linear where they are not of 4 mm; the middle stays the middle."""
    factor = max(1, round(EDGE_MM / voxel_mm))
    data = t1w[tuple(slice(n % factor // 2, n % factor // 2 + n // factor * factor) for n in t1w.shape)]
    data = _pooled(data, factor)
    step = EDGE_MM / (voxel_mm * factor)
    if data.shape == (SIDE,) * 3 and abs(step - 1) < 1e-6:
        return data
    start = (np.array(data.shape) - 1) / 2 - step * (SIDE - 1) / 2
    return ndimage.affine_transform(data, [step] * 3, offset=start, output_shape=(SIDE,) * 3, order=1)


def _pooled(data: np.ndarray, factor: int = 2) -> np.ndarray:
    """Means over blocks of ``factor``³."""
    for axis in range(3):
        data = data.reshape(*data.shape[:axis], -1, factor, *data.shape[axis + 1 :]).mean(axis + 1, dtype=np.float32)
    return data


def flat(picture: np.ndarray) -> np.ndarray:
    """Without slow shading, and bright fat cut: divided by the mean of what is bright within 5 voxels, at most 1.5."""
    bright = picture > 0.1 * picture.max()
    bright = (picture > 0.5 * picture[bright].mean()).astype(np.float32) if bright.any() else bright.astype(np.float32)
    level = ndimage.gaussian_filter(picture * bright, _FLAT) / np.maximum(ndimage.gaussian_filter(bright, _FLAT), 0.02)
    return np.minimum(picture / np.maximum(level, max(0.05 * level.max(), 1e-6)), 1.5)


def register(picture: np.ndarray) -> np.ndarray:
    """(3, 4): template mm, from the brain's middle → voxels of the picture."""
    smooth = ndimage.gaussian_filter(picture, 1.5)
    starts = [_descend(smooth, pose, _solver(1.5, 1, True, 5), 10) for pose in _poses(picture)]
    pose, _ = max(starts, key=lambda item: item[1])
    pose, _ = _descend(smooth, pose, _solver(1.5, 1, False, 3), 8)
    pose, _ = _descend(picture, pose, _solver(0.0, 1, False, 1), 12)
    return _descend(picture, pose, _solver(0.0, 0, False, 1), 8)[0]


@functools.cache
def template_maps() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """T1w, grey and white matter, (D, H, W) LIA, 4 mm."""
    folder = Path(importlib.util.find_spec("nilearn").origin).parent / "datasets/data"  # nilearn itself is slow to load
    maps = [load_image(folder / f"mni_icbm152_{name}_tal_nlin_sym_09a_converted.nii.gz").data for name in ("t1", "gm", "wm")]
    lia = [np.pad(data[::-1, :, ::-1].transpose(0, 2, 1).astype(np.float32) / 255, 10) for data in maps]  # RAS before
    return tuple(_pooled(data[tuple(slice(n // 4 * 4) for n in data.shape)], 4) for data in lia)


@functools.cache
def brain_mask() -> tuple[np.ndarray, np.ndarray]:
    """The template's brain, and its middle in voxels."""
    brain = ndimage.binary_fill_holes(template_maps()[0] > 0.1)
    return brain, np.argwhere(brain).mean(0)


def clipped(values: np.ndarray, core: np.ndarray | slice, quantile: float) -> np.ndarray:
    return np.minimum(values, 1.1 * np.quantile(values[core], quantile) + 1e-6)


def sample(picture: np.ndarray, pose: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(n,) values at template ``points`` (n, 3) mm; ``pose`` (3, 4) maps them to voxels of the picture."""
    return ndimage.map_coordinates(picture, moved(pose, points), order=1, mode="constant", output=np.float64)


@functools.cache
def motions_of(smooth: float, grow: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Points (n, 3) mm of the grown brain, the template there (n,), its change by the 12 affine motions (n, 12), what lies deep (n,)."""
    brain, middle = brain_mask()
    region = ndimage.binary_dilation(brain, iterations=grow) if grow else brain
    template = ndimage.gaussian_filter(flat(template_maps()[0]), smooth) if smooth else flat(template_maps()[0])
    points = (np.argwhere(region) - middle) * EDGE_MM
    gradient = np.stack([np.gradient(template, axis=axis)[region] for axis in range(3)], 1) / EDGE_MM
    moves = np.concatenate([points / TURN_MM, np.ones((len(points), 1))], 1)
    return points, template[region], (gradient[:, :, None] * moves[:, None]).reshape(-1, 12), ndimage.binary_erosion(brain, iterations=3)[region]


def _rigid() -> np.ndarray:
    """(12, 7): three turns, one scale, three shifts."""
    moves = np.zeros((7, 3, 4))
    for index, (a, b) in enumerate(((0, 1), (0, 2), (1, 2))):
        moves[index, a, b], moves[index, b, a] = 1, -1
    moves[3, :, :3] = np.eye(3)
    moves[4:, :, 3] = np.eye(3)
    return moves.reshape(7, 12).T


_RIGID = _rigid()


@functools.cache
def _solver(smooth: float, grow: int, rigid: bool, every: int) -> tuple[np.ndarray, ...]:
    points, template, motions, core = (array[::every] for array in motions_of(smooth, grow))
    points = np.asfortranarray(points)
    basis = _RIGID if rigid else np.eye(12)
    fitted = pseudo_inverse(np.stack([template, np.ones(len(points)), *(times(motions, motion) for motion in basis.T)]))
    return points, template - template.mean(), core, fitted[2:], basis


def _descend(picture: np.ndarray, pose: np.ndarray, solver: tuple[np.ndarray, ...], steps: int) -> tuple[np.ndarray, float]:
    """Gauss–Newton from ``pose``; the pose reached, and the correlation with the template there."""
    points, template, core, fitted, basis = solver
    power = (template**2).sum()
    for _ in range(steps):
        values = clipped(sample(picture, pose, points), core, 0.9)
        gain = max((template * values).sum() / power, 0.3 * values.std() / template.std(), 1e-6)
        move = (times(basis, times(fitted, values)) / gain).reshape(3, 4)
        size = max(np.abs(move).max(), 1e-9)
        change = np.eye(3, 4) + move * min(1, 5 / size) / np.array([TURN_MM] * 3 + [1])
        turn = np.einsum("ij,jk->ik", pose[:, :3], inverse(change[:, :3])[0])
        pose = np.column_stack([turn, pose[:, 3] - times(turn, change[:, 3])])
        scale = np.cbrt(abs(inverse(turn * EDGE_MM)[1]))
        pose[:, :3] *= np.clip(scale, *_SCALES) / max(scale, 1e-6)
    values = clipped(sample(picture, pose, points), core, 0.9)
    values = values - values.mean()
    return pose, float((template * values).sum() / np.sqrt(power * (values**2).sum() + 1e-9))


@functools.cache
def _spectra() -> list[tuple[np.ndarray, np.ndarray, np.ndarray, float]]:
    """For each nod and size of the head: its (3, 3) matrix, spectra of template and mask on a cube of 8 mm voxels, voxels of the mask."""
    brain, middle = brain_mask()
    template = ndimage.gaussian_filter(flat(template_maps()[0]), 0.7)
    grown = ndimage.binary_dilation(brain).astype(np.float32)
    around = np.indices((_SPECTRUM,) * 3).reshape(3, -1).T - _SPECTRUM // 2
    found = []
    for degrees in (-30, -15, 0, 15, 30):
        cosine, sine = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
        for scale in (0.8, 0.9, 1.0):
            matrix = np.array([[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]]) * scale
            at = moved(np.column_stack([inverse(matrix)[0], middle]), around * 2)
            values, mask = (ndimage.map_coordinates(data, at, order=1).reshape((_SPECTRUM,) * 3) for data in (template, grown))
            mask = (mask > 0.5).astype(np.float32)
            values = (values - values[mask > 0].mean()) * mask
            spectrum = np.conj(np.fft.rfftn(values / np.sqrt((values**2).sum())))
            found.append((matrix, spectrum, np.conj(np.fft.rfftn(mask)), float(mask.sum())))
    return found


def _poses(picture: np.ndarray) -> list[np.ndarray]:
    """Where to start from: the best places of each nod and size by normalised correlation."""
    half = SIDE // 2
    cube = np.zeros((_SPECTRUM,) * 3, np.float32)
    cube[:half, :half, :half] = _pooled(picture)
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
