"""T1-weighted images drawn from label maps: another head, another contrast, another scanner each time, and their exact labels.

After SynthSeg (Billot et al., Medical Image Analysis 86:102789, 2023), with two differences. Contrasts are mostly those of T1-weighted scans
(dark fluid, grey below white matter), each tissue over a wide range, and now and then arbitrary. Shape, position and resolution are sampled
in one pass: a voxel is the mean of the labels' voxels under it, so partial volume in the image and class fractions in the target agree.
What a scanner adds is :mod:`lod_model.corrupt`.

Whole-head label maps have FreeSurfer's ids inside the skull and 502–530 outside of it (bone 515, marrow 516, skin 511, soft tissue 507, …).
Everything is drawn from one seed: the same seed gives the same sample in any process.
"""

import functools
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from data_registry.conform import labels_to_grid, place_grid
from data_registry.errors import InputError
from data_registry.protocol import IGNORED, Protocol
from data_registry.volume import load_labels
from lod_model.corrupt import corrupt

CUBE_MM = 256
FLUID_OUTSIDE = 24   # sulcal and cisternal fluid
OUTSIDE = range(500, 531)
BRIGHTEST = 2.2      # fat, where the brightest white matter is 1

# How far each structure lies from fluid (0) to white matter (1), beyond the grey matter's own level, and how far that varies. Left and right
# are one. On five FreeSurfer-normalised 3 T scans: cortex .57, hippocampus .64, caudate .70, putamen .87, thalamus .95, pallidum 1.04.
_BEYOND_GREY = {
    (3, 42): (0.0, 0.04),
    (17, 53, 18, 54, 26, 58): (0.05, 0.05),               # hippocampus, amygdala, accumbens
    (11, 50): (0.12, 0.08),                               # caudate
    (12, 51): (0.25, 0.12),                               # putamen
    (8, 47): (0.05, 0.07),                                # cerebellar cortex
    (10, 49): (0.33, 0.10),                               # thalamus
    (13, 52, 28, 60): (0.42, 0.12),                       # pallidum, ventral diencephalon
}
_NEAR_WHITE = {(2, 41): (1.0, 0.0), (7, 46): (0.95, 0.06), (16, 512): (0.95, 0.09), (25, 57, 77, 78, 79): (0.8, 0.15), (85, 508): (0.8, 0.15)}
_FLUID = (4, 5, 14, 15, 43, 44, 72, 136, 137, 163, 164)
# What has a range of its own, in white matter's intensity: vessels and plexus, …, eyes, soft tissue, mucosa, skin, sinuses, bone, marrow.
# Fat is up to twice as bright as white matter, so that the brain takes the lower half of the scale.
_RANGES = {
    (30, 62, 31, 63): (0.1, 0.9), (502,): (0.0, 1.2), (506,): (0.05, 0.5), (507, 530): (0.2, 1.0), (509,): (0.1, 1.0),
    (511,): (0.4, 2.2), (514,): (0.1, 1.8), (515,): (0.0, 0.4), (516,): (0.4, 2.0),
}  # fmt: skip


@dataclass(frozen=True)
class Anatomy:
    """A whole-head label map on the 1 mm grid, LIA."""

    name: str
    codes: Tensor
    """(258, 258, 258) uint8, an index into ``ids``; a layer of 0, which is air, all around."""
    ids: np.ndarray
    """(n,) source ids, 0 first."""


@dataclass(frozen=True)
class Rendering:
    """How widely heads, contrasts and scanners vary; ``strength`` scales what a scanner does to the image."""

    rotation_degrees: float = 15.0
    scale: float = 0.12
    axis_scale: float = 0.06
    translation_mm: float = 14.0
    warps: tuple[tuple[float, int], ...] = ((4.0, 5), (2.0, 12))
    """(standard deviation in mm, control points along an axis) of each random displacement field."""
    arbitrary_contrast: float = 0.1
    """Share of samples whose structures have any intensity at all."""
    inverted: float = 0.05
    """Share with dark and bright exchanged."""
    contrast_seed: int | None = None
    """The same contrast for every sample, as at one site; null: another each time."""
    texture: float = 0.06
    """Largest standard deviation within a structure, of the white matter's intensity."""
    stripped: float = 0.3
    """Share without skull and skin."""
    cut: float = 0.3
    """Share without face, and share without neck."""
    strength: float = 1.0


@dataclass(frozen=True)
class Sample:
    """One rendering."""

    image: np.ndarray
    """(D, H, W) float32, LIA, about 0 to 1."""
    counts: np.ndarray
    """(C, D, H, W) uint8: how many of a voxel's ``samples`` labels are of each class."""
    samples: int


def load_anatomy(path: str | os.PathLike) -> Anatomy:
    """Read a label map in any orientation. InputError for a file that is none, or with over 256 different ids."""
    labels = load_labels(Path(path))
    grid = labels_to_grid(labels, place_grid(labels, "1mm"), method="nearest")    # (256, 256, 256) uint16
    ids, codes = np.unique(grid, return_inverse=True)
    if len(ids) > 256 or ids[0] != 0:
        raise InputError(f"{path}: {len(ids)} different ids from {ids[0]}; a whole-head label map with at most 256, air as 0, is wanted")
    return Anatomy(Path(path).name.split(".")[0], F.pad(torch.from_numpy(codes.reshape(grid.shape).astype(np.uint8)), [1] * 6), ids)


def render(anatomy: Anatomy, *, protocol: Protocol, seed: int, voxel_mm: int = 2, samples: int | None = None, how: Rendering = Rendering()) -> Sample:
    """A head of this anatomy as a scanner might see it.

    The grid is that of ``conform`` at ``voxel_mm`` (2: 128³). Each voxel is the mean of ``samples``³ labels (default: one a millimetre).
    Left and right never change places here: a flip is the caller's.
    """
    generator = np.random.default_rng(seed)
    samples = samples or voxel_mm
    of_contrast = generator if how.contrast_seed is None else np.random.default_rng(how.contrast_seed)
    structures = _intensities(anatomy.ids, of_contrast, how)                      # (2, n): mean and deviation
    mean, deviation, counts = _sampled(anatomy, structures, protocol, _Pose(generator, how), side=CUBE_MM // voxel_mm, samples=samples)
    image = mean + deviation * _texture(mean.shape, generator)
    image = _cut(image, counts, generator, how)
    image, seed = image.clamp_(0, BRIGHTEST).div_(BRIGHTEST).numpy(), int(generator.integers(2**62))
    image = corrupt(image, seed=seed, strength=how.strength, voxel_mm=voxel_mm, inverted=how.inverted)
    return Sample(image, counts, samples**3)


def zscored(image: np.ndarray) -> np.ndarray:
    """Zero mean and unit deviation over all voxels, as the networks are fed."""
    deviation = float(image.std(dtype=np.float64))
    return ((image - np.float32(image.mean(dtype=np.float64))) / np.float32(max(deviation, 1e-6))).astype(np.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Contrast


def _intensities(ids: np.ndarray, generator: np.random.Generator, how: Rendering) -> Tensor:
    """Mean and deviation (2, n) float32 of each id; white matter is about 0.5 to 1, fat up to 2.2."""
    white = generator.uniform(0.55, 1.0)
    fluid = white * generator.uniform(0.02, 0.45)
    grey = generator.uniform(0.4, 0.75)
    by_id: dict[int, float] = {}
    for group, (offset, spread) in _BEYOND_GREY.items():
        shared = offset * (1 - grey) / 0.43 + generator.normal(0, spread)
        own = {i: generator.normal(0, spread / 3) for i in group if _left(i) == i}
        by_id |= {i: fluid + (white - fluid) * (grey + shared + own[_left(i)]) for i in group}
    for group, (level, spread) in _NEAR_WHITE.items():
        level += generator.normal(0, spread)
        by_id |= dict.fromkeys(group, fluid + (white - fluid) * level)
    by_id |= dict.fromkeys(_FLUID, fluid)
    by_id[FLUID_OUTSIDE] = fluid + (white - fluid) * generator.uniform(-0.05, 0.4)   # mixed with meninges and vessels
    for group, (low, high) in _RANGES.items():
        by_id |= dict.fromkeys(group, white * generator.uniform(low, high))
    if generator.random() < how.arbitrary_contrast:
        pairs = {i: generator.uniform(0.05, 1) for i in sorted({_left(i) for i in by_id})}
        by_id = {i: pairs[_left(i)] for i in by_id}
    if generator.random() < how.stripped:
        by_id |= dict.fromkeys(OUTSIDE, 0.0)
        if generator.random() < 0.3:
            by_id[FLUID_OUTSIDE] = 0.0
    by_id[0] = 0.0
    unknown = {i: white * generator.uniform(0, 1) for i in ids.tolist() if i not in by_id}
    mean = np.clip([(by_id | unknown)[i] for i in ids.tolist()], 0, BRIGHTEST)
    deviation = generator.uniform(0.005, how.texture, len(ids)) * white * (mean > 0)
    return torch.from_numpy(np.stack([mean, deviation]).astype(np.float32))


def _left(i: int) -> int:
    """FreeSurfer's id of the left structure for a right one's.

    >>> _left(42), _left(53), _left(16)
    (3, 17, 16)
    """
    return _RIGHT_TO_LEFT.get(i, i)


_RIGHT_TO_LEFT = {
    41: 2, 42: 3, 43: 4, 44: 5, 46: 7, 47: 8, 49: 10, 50: 11, 51: 12, 52: 13, 53: 17, 54: 18, 57: 25, 58: 26, 60: 28, 62: 30, 63: 31,
    137: 136, 164: 163,
}  # fmt: skip


def _texture(shape: torch.Size, generator: np.random.Generator) -> Tensor:
    """Unit-variance noise, white and smooth mixed."""
    torch_generator = torch.Generator().manual_seed(int(generator.integers(2**62)))
    white = torch.randn(shape, generator=torch_generator)
    smooth = torch.randn([1, 1, *(max(2, n // 4) for n in shape)], generator=torch_generator)
    share = generator.uniform(0.2, 0.9)
    return white * (1 - share) ** 0.5 + F.interpolate(smooth, size=shape, mode="trilinear", align_corners=False)[0, 0] * (2 * share) ** 0.5


# ---------------------------------------------------------------------------------------------------------------------
# Shape and position


class _Pose:
    """A map from the rendered grid to the anatomy's, in mm from the cube's centre: rotation, scales, translation and smooth displacement."""

    def __init__(self, generator: np.random.Generator, how: Rendering) -> None:
        angles = np.radians(generator.uniform(-how.rotation_degrees, how.rotation_degrees, 3))
        scales = np.exp(generator.uniform(-how.scale, how.scale) + generator.uniform(-how.axis_scale, how.axis_scale, 3))
        matrix = np.diag(1 / scales)
        for axis, angle in enumerate(angles):
            i, j = [a for a in range(3) if a != axis]
            turn = np.eye(3)
            turn[[i, i, j, j], [i, j, i, j]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
            matrix = matrix @ turn
        self.matrix = matrix
        self.shift = generator.uniform(-how.translation_mm, how.translation_mm, 3)
        self.field = torch.zeros(3, 32, 32, 32)                                   # mm; control points from face to face of the cube
        for sigma, points in how.warps:
            warp = torch.from_numpy(generator.normal(0, sigma, (1, 3, points, points, points)).astype(np.float32))
            self.field += F.interpolate(warp, size=self.field.shape[1:], mode="trilinear", align_corners=True)[0]


def _sampled(anatomy: Anatomy, structures: Tensor, protocol: Protocol, pose: _Pose, *, side: int, samples: int) -> tuple[Tensor, Tensor, np.ndarray]:
    """Mean and deviation (side³) and class counts (C, side³) of ``samples``³ labels under each voxel.

    The displacement field is interpolated along H and W once and along D a slice at a time, so that coordinates never leave the cache. A
    class count is a byte of a 64-bit word: eight classes are counted by one addition.
    """
    fine, (d_rows, rows) = side * samples, _order(side, samples)
    mm = (np.arange(fine) + 0.5) * (CUBE_MM / fine) - CUBE_MM / 2                 # of the sampled points, from the centre
    weights = _linear_weights(fine, pose.field.shape[1])                          # (fine, 32)
    planes = torch.einsum("cdhw,xh,yw->dcxy", pose.field, weights[rows], weights[rows])          # (32, 3, fine, fine)
    centre = torch.from_numpy(pose.shift + CUBE_MM / 2 + 0.5).float()             # + 1 for the layer of air, − 0.5 for voxel centres
    matrix, mm = torch.from_numpy(pose.matrix).float(), torch.from_numpy(mm).float()
    in_plane = matrix[:, 1, None, None] * mm[rows][:, None] + matrix[:, 2, None, None] * mm[rows][None] + centre[:, None, None]
    planes += in_plane
    words = _words(anatomy.ids, protocol)                                         # (words, n) int64
    size = anatomy.codes.shape[0]
    flat = anatomy.codes.flatten()
    mean, deviation = torch.empty(2, side, side, side)
    counted = torch.empty(len(words), side, side, side, dtype=torch.int64)
    for d in range(side):
        codes = []
        for row in d_rows[d]:
            at = float(weights[row] @ torch.arange(weights.shape[1], dtype=torch.float32))
            low = min(int(at), weights.shape[1] - 2)
            points = torch.lerp(planes[low], planes[low + 1], at - low).add_((matrix[:, 0] * mm[row])[:, None, None])
            index = points.round_().clamp_(0, size - 1).int()                     # (3, fine, fine)
            codes.append(flat[(index[0] * size).add_(index[1]).mul_(size).add_(index[2]).flatten()].int())
        codes = torch.stack(codes).view(samples, samples, side, samples, side)    # (sD, sH, H, sW, W)

        def gathered(table: Tensor, codes: Tensor = codes) -> Tensor:
            return table.index_select(0, codes.flatten()).view(codes.shape).sum((0, 1, 3))

        mean[d], deviation[d] = (gathered(values) / samples**3 for values in structures)
        for word, table in zip(counted, words, strict=True):
            word[d] = gathered(table)
    counts = counted.view(torch.uint8).view(len(words), side, side, side, 8).permute(0, 4, 1, 2, 3).flatten(0, 1)[: protocol.classes]
    return mean, deviation, counts.numpy()


def _order(side: int, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Fine rows under each coarse one (side, samples), and all fine rows as (sample, coarse row), flat."""
    rows = np.arange(side * samples).reshape(side, samples)
    return rows, rows.T.flatten()


@functools.cache
def _linear_weights(fine: int, points: int) -> Tensor:
    """(fine, points): linear interpolation of control points spread from edge to edge."""
    at = np.linspace(0, points - 1, fine)
    low = np.minimum(at.astype(int), points - 2)
    weights = np.zeros((fine, points), dtype=np.float32)
    weights[np.arange(fine), low], weights[np.arange(fine), low + 1] = 1 - (at - low), at - low
    return torch.from_numpy(weights)


def _words(ids: np.ndarray, protocol: Protocol) -> Tensor:
    """(words, n) int64: byte c % 8 of word c // 8 is 1 for an id of class c; none for an id that the protocol leaves out."""
    classes = protocol.classes_of(ids.astype(np.uint16), where="anatomy")
    hot = np.zeros((len(ids), -(-protocol.classes // 8) * 8), dtype=np.uint8)
    known = classes != IGNORED
    hot[known, classes[known]] = 1
    return torch.from_numpy(hot.view(np.int64).T.copy())


# ---------------------------------------------------------------------------------------------------------------------
# Field of view


def _cut(image: Tensor, counts: np.ndarray, generator: np.random.Generator, how: Rendering) -> Tensor:
    """Blank the face in front of a slanting plane, or all below a level under the brain; never the brain itself."""
    side = image.shape[0]
    brain = torch.from_numpy(counts[0] < counts.sum(0))                           # (D, H, W)
    height, front = (brain.any(2).any(0).nonzero().max() if brain.any() else side), side
    faceless, neckless = generator.random(2) < how.cut
    slope, ahead, below = generator.uniform(0.3, 1.2), generator.uniform(0.55, 0.75), generator.uniform(0.0, 0.12)
    if neckless:
        image[:, min(side, int(height + 2 + below * side)) :] = 0
    if faceless:
        h, w = torch.arange(side)[:, None] / side, torch.arange(front)[None] / side
        away = F.max_pool3d(brain[None, None].float(), 5, 1, 2)[0, 0] == 0
        image[((w + slope * (h - 0.55)) > ahead).expand_as(image) & away] = 0
    return image
