"""Augmentation on the device that trains: a worker reads a sample, draws what is to be done to it, and the device does it to the whole batch.

What travels is uint8, two bytes a voxel. A worker mirrors (a copy in another order, it needs no arithmetic) and keeps the rare pictures that
only TorchIO can make, motion, ghosts and spikes from k-space: those it augments itself, by the same functions. The device takes one sample of
the batch after the other, so that what was not drawn costs nothing and the memory in between is one sample's; parameters are numbers and small
tensors that go over as they are needed, so nothing waits for the device.

On a processor the result is the workers' to float32's rounding. On another device the parameters are the same and the noise has the same
distribution, but is another draw: 16 million normal numbers a volume would be most of a worker's time.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import default_collate

from lod_model.augment import Variant, draw, flip
from lod_model.randomness import reproducible

KEY = "deferred"


@dataclass(frozen=True)
class Deferred:
    """What is left to be done to one sample: its ``variant``, then the z-score by the whole scan's ``mean`` and ``deviation``, see
    :meth:`lod_model.data.Scan.zscored`, then what is made of the full grid."""

    variant: Variant
    shape: tuple[int, int, int]
    """Of what is augmented; the batch's volumes may be larger, padded at their ends."""
    names: tuple[str, ...]
    """Of the labels that are moved along; others have none."""
    mean: float
    deviation: float
    most: float = np.inf
    raw: tuple[float, float] | None = None
    """Mean and deviation of the picture before a worker augmented it."""
    pooling: tuple[int, int] | None = None
    """Factor and number of classes: the image max-pooled, its classes counted."""
    window: tuple["Windows", int, str] | None = None  # noqa: F821 (of lod_model.data, which imports this module)
    """Where the target is cut, a seed and the scan's name."""


class Plans(tuple):
    """What is left to be done to the samples of a batch, in order. Small, and stays where it is."""

    def to(self, *_args, **_how) -> "Plans":
        return self


def drawn(
    raw: np.ndarray, targets: Sequence[np.ndarray], mirrored: Sequence[np.ndarray], *, preset: str, seed: int, voxel_mm: float
) -> tuple[np.ndarray, list[np.ndarray], Variant, tuple[float, float] | None]:
    """A worker's part, as :func:`lod_model.augment.augment` has it: image and targets, mirrored where that is drawn, what is left to be done
    to them, and, where the worker had to do all of it, the moments of ``raw``."""
    with reproducible(seed):
        flipped, variant = draw(raw.shape, preset=preset, voxel_mm=voxel_mm)
        image = raw[::-1] if flipped else raw
        targets = [flip(raw, target, swap)[1] for target, swap in zip(targets, mirrored, strict=True)] if flipped else list(targets)
        if variant.anywhere:
            return image, targets, variant, None
        fractions = bool(targets) and targets[0].ndim == 4
        labels = targets[0] if fractions else np.stack(targets) if targets else np.zeros((1, *raw.shape), np.uint8)
        x, moved = variant(*(torch.from_numpy(np.ascontiguousarray(array)) for array in (image, labels)), fractions=fractions)
        found = [moved.numpy()] if fractions else [part.numpy().astype(np.uint8) for part in moved[: len(targets)]]
        return x.numpy(), found, Variant(), (float(raw.mean(dtype=np.float64)), float(raw.std(dtype=np.float64)))


def collated(samples: list[dict]) -> dict:
    """A batch of samples, some of which may be left as they were read. One that a worker had to augment makes all images float32."""
    plans = [sample[KEY] for sample in samples]
    samples = [{name: value for name, value in sample.items() if name != KEY} for sample in samples]
    if len({sample["image"].dtype for sample in samples}) > 1:
        samples = [sample | {"image": sample["image"].float()} for sample in samples]
    return default_collate(samples) | {KEY: Plans(plans)}


@torch.no_grad()
def finished(batch: dict) -> dict[str, Tensor]:
    """The batch as workers would have made it, on the device where it is, whatever the precision around; itself where nothing is left to do."""
    if KEY not in batch:
        return batch
    parts = ({name: value[index] for name, value in batch.items() if name != KEY} for index in range(len(batch[KEY])))
    return _stacked([_finished(part, plan) for part, plan in zip(parts, batch[KEY], strict=True)])


def _finished(sample: dict[str, Tensor], plan: Deferred) -> dict[str, Tensor]:
    """``image`` (1, D, H, W) and, of each of the plan's names, (D, H, W) uint8 classes or (C, D, H, W) float32 fractions."""
    box = tuple(slice(n) for n in plan.shape)
    padded, labels = sample["image"][0], [sample[name] for name in plan.names]
    fractions = bool(labels) and labels[0].ndim == 4
    moved = labels
    if plan.variant.changes:
        stacked = labels[0] if fractions else torch.stack([part[box] for part in labels]) if labels else padded[box].new_zeros(1, *plan.shape)
        x, stacked = plan.variant(padded[box], stacked, fractions=fractions)
        moved = [stacked] if fractions else list(stacked.to(torch.uint8))[: len(labels)]
        if x.shape != padded.shape:
            x = functional.pad(x, [side for n, m in zip(padded.shape[::-1], x.shape[::-1], strict=True) for side in (0, n - m)])
            moved = [_pasted(part, whole, box) for part, whole in zip(moved, labels, strict=True)]
    else:
        x = padded.to(torch.float32, copy=True)
    x = _zscored(x, padded, plan)
    found = dict(sample, image=x[None], **dict(zip(plan.names, moved, strict=True)))
    if plan.pooling:
        found = _pooled(found, *plan.pooling)
    return found if plan.window is None else _cut(found, *plan.window)


def _pasted(part: Tensor, whole: Tensor, box: tuple[slice, ...]) -> Tensor:
    out = whole.clone()
    out[box] = part
    return out


def _zscored(x: Tensor, before: Tensor, plan: Deferred) -> Tensor:
    """By the moments of the whole scan, which augmentation is taken to have changed as it changed those of this part. In place; the moments
    stay on the device."""
    spread, centre = (moment.double() for moment in torch.std_mean(x, correction=0))
    raw_spread, raw_centre = plan.raw[::-1] if plan.raw else (moment.double() for moment in torch.std_mean(before.float(), correction=0))
    factor = ((spread + 1e-6) / (raw_spread + 1e-6)).clamp(1 / plan.most, plan.most)
    mean = plan.mean + centre - raw_centre
    return x.sub_(mean.float()).div_((plan.deviation * factor).clamp(min=1e-6).float())


def _pooled(sample: dict[str, Tensor], factor: int, classes: int) -> dict[str, Tensor]:
    """Image (1, d, h, w) and the share of each class in each block, (C, d, h, w); voxels that the protocol leaves out are in none."""
    target = sample["target"]
    counts = torch.stack([_blockwise(torch.add, (target == index).to(torch.uint8), factor) for index in range(classes)])
    return sample | {"image": _blockwise(torch.maximum, sample["image"], factor), "target": counts.float() / factor**3}


def _blockwise(combine: Callable[[Tensor, Tensor], Tensor], x: Tensor, factor: int) -> Tensor:
    """(…, D, H, W) → (…, D/f, H/f, W/f), an axis at a time: a processor takes half of what pooling takes."""
    for axis in (-3, -2, -1):
        x = functools.reduce(combine, x.unflatten(axis, (-1, factor)).unbind(axis))
    return x


def _cut(sample: dict[str, Tensor], windows, seed: int, where: str) -> dict[str, Tensor]:
    """The one thing that waits for the device: which windows hold labels."""
    target = sample["target"]
    windows.check(tuple(target.shape), where=where)
    labelled = _blockwise(torch.logical_or, target > 0, windows.step).cpu().numpy()
    first = windows.place(labelled, seed)
    cut = target[tuple(slice(start, start + windows.side) for start in first.tolist())]
    return sample | {"target": cut, "window": torch.from_numpy(first)}


def _stacked(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Classes become int64, as losses want them, a whole batch at once."""
    batch = {name: torch.stack([sample.pop(name) for sample in samples]) for name in list(samples[0])}
    return {name: value.long() if value.dtype == torch.uint8 else value for name, value in batch.items()}
