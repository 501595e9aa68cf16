"""Augmentation: named presets, parameters drawn from (seed, epoch, sample) alone.

Everything draws from torch's global generator, TorchIO too, so the generator is forked and seeded for each sample: any number of workers
gives the same batch, and nothing else that draws is disturbed.

| preset | pose and shape | picture |
|---|---|---|
| none | – | – |
| light | ±10°, ±10 %, a little bending | bias, gamma, thick slices, blur, noise: what differs first between scanners |
| strong | ±15°, ±20 %, more bending | everything of ``corrupt``: also motion, ghosting, spikes, inverted contrast |
| paper | grid distortion | Svanera et al. 2024: an additive field and one of eight operations |

The paper augments after the z-score, ours are intensities of 0…255, z-scored afterwards. Blur, noise, ghosts, resolution, slices, salt and
pepper, and contrast about the mean commute with that; gamma does not (ours raises the picture scaled to 0…1 by its minimum and maximum),
and a shift of the mean by the additive field is taken out again. The strength of that field is ours, as the paper names none.
"""

import functools
import hashlib
from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional

from data_registry.protocol import IGNORED
from lod_model.corrupt import along, bias_field, chance, corrupt, reproducible, resampling, uniform
from lod_model.warp import distort, draw_pose, grid_distortion, warp

Moved = tuple[torch.Tensor, torch.Tensor]


def sample_seed(seed: int, epoch: int, scan_id: str) -> int:
    """A 63-bit seed that depends on these three alone."""
    digest = hashlib.sha256(f"{seed}/{epoch}/{scan_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def augment(
    image: np.ndarray, target: np.ndarray, *, preset: str, seed: int, mirrored: np.ndarray, voxel_mm: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """A random variant of one sample.

    ``image`` (D, H, W) uint8 intensities, LIA; ``target`` either (D, H, W) uint8 classes or (C, D, H, W) float32 class fractions of the
    same grid; ``mirrored`` (C,) the class index after left and right change places; ``voxel_mm`` scales what preset ``strong`` does.
    Voxels that the protocol leaves out stay so.
    Returns float32 intensities and the target moved along (classes by nearest neighbour, fractions linearly), in its own type.
    """
    image = image.astype(np.float32)
    if preset == "none":
        return image, target
    with reproducible(seed):
        if preset == "paper" and not chance(0.9):
            return image, target
        if chance(0.5):
            image, target = flip(image, target, mirrored)
        return _render(np.ascontiguousarray(image), np.ascontiguousarray(target), PRESETS[preset], voxel_mm)


def flip(image: np.ndarray, target: np.ndarray, mirrored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Left and right change places, sided classes with them. LIA: axis 0 is left–right.

    >>> image, target = flip(np.array([[[9.0]], [[0.0]]]), np.array([[[1]], [[0]]], np.uint8), np.array([0, 2, 1]))
    >>> image.ravel().tolist(), target.ravel().tolist()
    ([0.0, 9.0], [0, 2])
    """
    if target.ndim == 4:
        return image[::-1], target[:, ::-1][mirrored]
    table = np.arange(max(IGNORED + 1, len(mirrored)), dtype=target.dtype)
    table[: len(mirrored)] = mirrored
    return image[::-1], table[target[::-1]]


def _render(image: np.ndarray, target: np.ndarray, steps: Callable, voxel_mm: float) -> tuple[np.ndarray, np.ndarray]:
    """Scaled to 0…1 and (C, D, H, W), through ``steps``, and back. Of fractions, all but the background's are moved: it is what they leave,
    so that what a warp brings in from outside is background. What is in no class, voxels to be ignored, moves along as one class more."""
    fractions, channels = target.ndim == 4, len(target)
    if fractions and (left_out := 1 - target.sum(0, keepdims=True)).max() > 1e-3:
        target = np.concatenate([target, left_out])
    labels = torch.from_numpy(target[1:] if fractions else target[None].astype(np.float32))
    x, labels = steps(torch.from_numpy(image / 255), labels, "linear" if fractions else "nearest", voxel_mm)
    image = np.ascontiguousarray(x.numpy() * np.float32(255))
    if not fractions:
        return image, labels[0].numpy().astype(target.dtype)
    return image, np.concatenate([1 - labels.sum(0, keepdim=True).numpy(), labels.numpy()])[:channels]


def _light(x: torch.Tensor, labels: torch.Tensor, kind: str, voxel_mm: float) -> Moved:
    pose = draw_pose(x.shape, degrees=10, scale=0.1, shift=0.06, bend=0.025, p_affine=0.8, p_bend=0.3)
    x, labels = warp(x[None], pose, mode="linear"), warp(labels, pose, mode=kind)
    if chance(0.5):
        x *= bias_field(tuple(x.shape[1:]), limit=0.4, order=2)
    return _light_picture()(x)[0], labels


@functools.cache
def _light_picture():
    import torchio as tio

    return tio.Compose([
        tio.RandomGamma(log_gamma=(-0.4, 0.4), p=0.7),
        tio.RandomAnisotropy(downsampling=(1.5, 3), p=0.2),
        tio.RandomBlur(std=(0, 0.7), p=0.2),
        tio.RandomNoise(std=(0, 0.05), p=0.5),
    ])


def _strong(x: torch.Tensor, labels: torch.Tensor, kind: str, voxel_mm: float) -> Moved:
    pose = draw_pose(x.shape, degrees=15, scale=0.2, shift=0.06, bend=0.035, p_affine=0.9, p_bend=0.5)
    x, labels = warp(x[None], pose, mode="linear")[0], warp(labels, pose, mode=kind)
    return torch.from_numpy(corrupt(x.numpy(), seed=int(torch.randint(2**62, ())), voxel_mm=voxel_mm)), labels


def _paper(x: torch.Tensor, labels: torch.Tensor, kind: str, voxel_mm: float) -> Moved:
    x = x + _additive_field(x)
    came = grid_distortion(tuple(x.shape))
    x, labels = distort(x[None], came, mode="linear")[0], distort(labels, came, mode=kind)
    return PAPER_ONE_OF[int(torch.randint(len(PAPER_ONE_OF), ()))](x), labels


def _additive_field(x: torch.Tensor) -> torch.Tensor:
    """(D, H, W): a random polynomial of order 3, at most half the picture's deviation anywhere."""
    field = bias_field(tuple(x.shape), limit=0.5).log_()
    return field * (uniform(0, 0.5) * float(x.std(correction=0)) / max(float(field.abs().max()), 1e-6))


def _box_blur(x: torch.Tensor) -> torch.Tensor:
    return functional.avg_pool3d(x[None, None], 3, stride=1, padding=1, count_include_pad=False)[0, 0]


def _salt_and_pepper(x: torch.Tensor) -> torch.Tensor:
    draw = torch.rand(x.shape)
    return torch.where(draw < 0.002, x.max(), torch.where(draw < 0.01, x.min(), x))


def _gaussian(x: torch.Tensor) -> torch.Tensor:
    return 0.8 * x + 0.2 * (torch.randn(x.shape) * x.std(correction=0) + x.mean())


def _ghosts(x: torch.Tensor) -> torch.Tensor:
    """1–4 copies, evenly shifted along one axis, weigh 0.15 together; TorchIO's ghosts come from k-space and have no such weight."""
    copies, axis = int(torch.randint(1, 5, ())), int(torch.randint(3, ()))
    shifts = [round(x.shape[axis] * i / (copies + 1)) for i in range(1, copies + 1)]
    return 0.85 * x + 0.15 / copies * sum(torch.roll(x, shift, axis) for shift in shifts)


def _downscale(x: torch.Tensor) -> torch.Tensor:
    step = 1 / uniform(0.25, 0.75)
    for axis in range(3):
        matrix = resampling(x.shape[axis], slice_mm=step, width_mm=0, voxel_mm=1)
        x = x if matrix is None else along(x, matrix, axis)
    return x


def _gamma(x: torch.Tensor) -> torch.Tensor:
    low, span = x.min(), (x.max() - x.min()).clamp(min=1e-6)
    return ((x - low) / span) ** uniform(0.5, 3) * span + low


def _contrast(x: torch.Tensor) -> torch.Tensor:
    return ((x - x.mean()) * uniform(0.5, 3) + x.mean()).clamp(x.min(), x.max())


def _repeated_slices(x: torch.Tensor) -> torch.Tensor:
    """LIA: axis 1 runs from top to bottom, so its slices are axial."""
    every = int(torch.randint(2, 5, ()))
    return x.index_select(1, torch.arange(x.shape[1]) // every * every)


PAPER_ONE_OF = (_box_blur, _salt_and_pepper, _gaussian, _ghosts, _downscale, _gamma, _contrast, _repeated_slices)
PRESETS: dict[str, Callable] = {"light": _light, "strong": _strong, "paper": _paper}
