"""Augmentation by TorchIO: named presets, parameters drawn from (seed, epoch, sample) alone.

TorchIO draws from torch's global generator, so the generator is forked and seeded for each sample: any number of workers gives the
same batch, and nothing else that draws is disturbed.
"""

import functools
import hashlib

import numpy as np
import torch


def sample_seed(seed: int, epoch: int, scan_id: str) -> int:
    """A 63-bit seed that depends on these three alone."""
    digest = hashlib.sha256(f"{seed}/{epoch}/{scan_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def augment(image: np.ndarray, target: np.ndarray, *, preset: str, seed: int, mirrored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A random variant of one sample.

    ``image`` (D, H, W) uint8 intensities, LIA; ``target`` either (D, H, W) uint8 classes or (C, D, H, W) float32 class fractions of the
    same grid; ``mirrored`` (C,) the class index after left and right change places. Returns float32 intensities and the target moved
    along, in its own type.
    """
    image = image.astype(np.float32)
    if preset == "none":
        return image, target
    generator = torch.Generator().manual_seed(seed)
    if torch.rand((), generator=generator) < 0.5:  # LIA: axis 0 is left–right
        image = image[::-1]
        target = target[:, ::-1][mirrored] if target.ndim == 4 else mirrored.astype(target.dtype)[target[::-1]]
    return _render(np.ascontiguousarray(image), np.ascontiguousarray(target), seed)


def _render(image: np.ndarray, target: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    import torchio as tio

    fractions = target.ndim == 4
    moved = torch.from_numpy(target if fractions else target[None])
    subject = tio.Subject(t1w=tio.ScalarImage(tensor=torch.from_numpy(image / 255)[None]), target=tio.LabelMap(tensor=moved))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        subject = _light(side=image.shape[0], fractions=fractions)(subject)
    out = subject["target"].data.numpy()
    if fractions:  # what a warp brings in from outside is background
        out[0] += 1 - out.sum(axis=0)
    return subject["t1w"].data[0].numpy() * 255, out if fractions else out[0].astype(target.dtype)


@functools.cache
def _light(*, side: int, fractions: bool):
    """Pose, shape, bias, contrast, noise, resolution: what differs first between scanners. Lengths in voxels of a cube of ``side``."""
    import torchio as tio

    kind = "linear" if fractions else "nearest"
    return tio.Compose([
        tio.RandomAffine(scales=0.1, degrees=10, translation=side * 0.06, label_interpolation=kind, p=0.8),
        tio.RandomElasticDeformation(num_control_points=7, max_displacement=side * 0.025, label_interpolation=kind, p=0.3),
        tio.RandomBiasField(coefficients=0.4, order=2, p=0.5),
        tio.RandomGamma(log_gamma=(-0.4, 0.4), p=0.7),
        tio.RandomAnisotropy(downsampling=(1.5, 3), p=0.2),
        tio.RandomBlur(std=(0, 0.7), p=0.2),
        tio.RandomNoise(std=(0, 0.05), p=0.5),
    ])
