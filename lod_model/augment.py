"""Augmentation: named presets, parameters drawn from (seed, epoch, sample) alone.

Everything draws from torch's global generator, TorchIO too, so the generator is forked and seeded for each sample: any number of workers
gives the same batch, and nothing else that draws is disturbed.

| preset | pose and shape | picture |
|---|---|---|
| none | – | – |
| light | ±10°, ±10 %, a little bending | bias, gamma, thick slices, blur, noise: what differs first between scanners |
| strong | ±15°, ±20 %, more bending | everything of ``corrupt``: also motion, ghosting, spikes, inverted contrast |
| paper | grid distortion | Svanera et al. 2024: an additive field and one of eight operations |

A preset draws first, see :class:`Variant`, and what it has drawn is then applied to tensors of any device: here, or later by
``lod_model.deferred`` on the device that trains.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from data_registry.protocol import IGNORED
from lod_model.corrupt import KSpace, Step, draw_bias, draw_corruption
from lod_model.paper_augmentation import draw_additive_field, draw_one_of_eight
from lod_model.randomness import chance, reproducible
from lod_model.torchio_picture import draw_torchio_picture
from lod_model.warp import Distortion, Pose, draw_pose, grid_distortion


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
    with reproducible(seed):
        flipped, variant = draw(image.shape, preset=preset, voxel_mm=voxel_mm)
        if flipped:
            image, target = flip(image, target, mirrored)
        if not variant.changes:
            return image.astype(np.float32), np.ascontiguousarray(target)
        labels = target if target.ndim == 4 else target[None].astype(np.float32)
        x, labels = variant(*(torch.from_numpy(np.ascontiguousarray(array)) for array in (image, labels)), fractions=target.ndim == 4)
    return x.numpy(), labels.numpy() if target.ndim == 4 else labels[0].numpy().astype(target.dtype)


@dataclass(frozen=True)
class Variant:
    """What is drawn for one sample: what is done to the picture, how picture and labels are moved, what is done to the picture then."""

    before: tuple[Step, ...] = ()
    move: Pose | Distortion | None = None
    after: tuple[Step, ...] = ()

    @property
    def changes(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.before or self.move or self.after)

    @property
    def anywhere(self) -> bool:
        """Whether all of it can be done on any device."""
        return not any(isinstance(step, KSpace) for step in self.before + self.after)

    @torch.no_grad()
    def __call__(self, image: torch.Tensor, labels: torch.Tensor, *, fractions: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Intensities of 0…255 (D, H, W) and labels on the same device, both in new tensors, in float32 whatever the precision around.

        ``labels`` are (C, D, H, W) class ``fractions``, moved linearly, or else (P, D, H, W) maps of classes, moved by nearest neighbour. Of
        fractions, all but the background's are moved: it is what they leave, so that what a warp brings in from outside is background. What is
        in no class, voxels to be ignored, moves along as one class more. Random fields are made on the device: on another than a processor
        they are other draws.
        """
        with _float32(image.device):
            x, labels = image.float() / 255, labels.float()
            for step in self.before:
                x = step(x)
            if self.move:
                moving = torch.cat([labels[1:], 1 - labels.sum(0, keepdim=True)]) if fractions else labels
                (x,), labels = self.move.moved((x[None], "linear"), (moving, "linear" if fractions else "nearest"))
                labels = torch.cat([1 - labels.sum(0, keepdim=True), labels[:-1]]) if fractions else labels
            for step in self.after:
                x = step(x)
            return x.contiguous().mul_(255), labels


@contextlib.contextmanager
def _float32(device: torch.device) -> Iterator[None]:
    """No autocast, and products of all bits: a coordinate in bfloat16 is a voxel off."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def draw(shape: tuple[int, ...], *, preset: str, voxel_mm: float) -> tuple[bool, Variant]:
    """Whether a sample of that shape is flipped, and all else, from torch's current generator."""
    if preset == "none" or (preset == "paper" and not chance(0.9)):
        return False, Variant()
    return chance(0.5), PRESETS[preset](tuple(shape), voxel_mm)


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


def _light(shape: tuple[int, ...], voxel_mm: float) -> Variant:
    pose = draw_pose(shape, degrees=10, scale=0.1, shift=0.06, bend=0.025, p_affine=0.8, p_bend=0.3)
    bias = [draw_bias(limit=0.4, order=2)] if chance(0.5) else []
    picture = draw_torchio_picture(log_gamma=0.4, p_gamma=0.7, thickness=(1.5, 3), p_thick=0.2, blur=0.7, p_blur=0.2, noise=0.05, p_noise=0.5)
    return Variant(move=pose, after=(*bias, *picture))


def _strong(shape: tuple[int, ...], voxel_mm: float) -> Variant:
    pose = draw_pose(shape, degrees=15, scale=0.2, shift=0.06, bend=0.035, p_affine=0.9, p_bend=0.5)
    with reproducible(int(torch.randint(2**62, ()))):
        return Variant(move=pose, after=tuple(draw_corruption(shape, strength=1.0, voxel_mm=voxel_mm)))


def _paper(shape: tuple[int, ...], voxel_mm: float) -> Variant:
    return Variant(before=(draw_additive_field(),), move=Distortion(grid_distortion(shape)), after=(draw_one_of_eight(),))


PRESETS: dict[str, Callable[[tuple[int, ...], float], Variant]] = {"light": _light, "strong": _strong, "paper": _paper}
