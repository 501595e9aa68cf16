"""Slices of a conformed volume in three views, for training and for use, and the label map that the three views' networks agree on.

Axes of an LIA volume (D, H, W): D runs to the left, H down, W to the front. A view is where its slices lie:

    view       slices along    rows of a slice    columns
    axial      H               W                  D
    coronal    W               D                  H
    sagittal   D               W                  H

Transpositions are those of the public FastSurfer code, and so are the input, uint8 / 255, seven neighbouring slices whose outermost repeat at
the volume's ends, and the sum of logits: 0.4 axial + 0.4 coronal + 0.2 sagittal.

Source: Henschel et al., NeuroImage 219:117012, 2020, and 251:118933, 2022.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from data_registry.errors import InputError
from lod_model.networks.competitive import ThreeViews

WEIGHTS = {"axial": 0.4, "coronal": 0.4, "sagittal": 0.2}
AXES = {"axial": (1, 2, 0), "coronal": (2, 0, 1), "sagittal": (0, 2, 1)}   # of the volume: along slices, rows, columns


def as_slices(volume: np.ndarray | Tensor, view: str) -> np.ndarray | Tensor:
    """A volume (D, H, W, …) as the slices (N, rows, columns, …) of a view, in the same memory: what is written there is in the volume.

    >>> volume = np.arange(24).reshape(2, 3, 4)
    >>> as_slices(volume, "coronal").shape, as_slices(volume, "coronal")[3, 1, 2] == volume[1, 2, 3]
    ((4, 2, 3), np.True_)
    """
    axes = (*AXES[view], *range(3, volume.ndim))
    return volume.permute(axes) if isinstance(volume, Tensor) else volume.transpose(axes)


def slices_of(volume: np.ndarray, view: str, indices: Sequence[int], thickness: int = 7) -> np.ndarray:
    """Thick slices (B, thickness, rows, columns) of a volume (D, H, W): those around each index, in order; the ends repeat.

    >>> slices_of(np.arange(3).reshape(3, 1, 1), "sagittal", [0, 2], thickness=3)[:, :, 0, 0].tolist()
    [[0, 0, 1], [1, 2, 2]]
    """
    slices = as_slices(volume, view)
    around = np.arange(thickness) - thickness // 2
    return slices[np.clip(np.asarray(indices)[:, None] + around, 0, len(slices) - 1)]


@torch.inference_mode()
def segment_views(
    network: ThreeViews,
    conformed: np.ndarray,
    *,
    voxel_mm: float,
    sagittal_class: Sequence[int] | None = None,
    batch: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> np.ndarray:
    """Classes (D, H, W) uint8 of a conformed T1w (D, H, W) uint8 in LIA: the argmax of the views' weighted logits.

    ``sagittal_class`` (classes,) says for each class which of the sagittal network's it is; needed where these are fewer. The networks
    run where their parameters are, in ``dtype``, ``batch`` slices at once: by default 8, on a CPU 1, whose feature maps at 256² are small
    enough for malloc to hand out again.

    Planes at the volume's sides that are 0 throughout lie outside the scan: they are class 0, and not computed.

    What is kept of the first two views is C float16 a voxel, 2.5 GiB for 79 classes at 256³; the third meets them slice by slice in float32. Each
    view's logits are taken relative to its largest in the voxel, which the argmax does not see, so that where classes rival each other the
    numbers are small and float16 is fine there.

    Raises :class:`InputError` for an empty volume, ValueError where ``sagittal_class`` does not fit.
    """
    config = network.config
    class_of = _sagittal_class(config, sagittal_class)
    box = _box(conformed)
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    sums = torch.empty(*(b.stop - b.start for b in box), config.classes, dtype=torch.float16, device=device)    # (D', H', W', C) of the box
    classes = torch.zeros(conformed.shape, dtype=torch.uint8)
    batch = batch or (1 if device.type == "cpu" else 8)
    was_training = network.training
    network.eval()
    for turn, (view, weight) in enumerate(WEIGHTS.items()):
        along, *within = (box[axis] for axis in AXES[view])
        for start in range(along.start, along.stop, batch):
            indices = range(start, min(start + batch, along.stop))
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32):
                logits = _logits(network.get_submodule(view), slices_of(conformed, view, indices, config.slices), config.scale(voxel_mm), device)
            relative = logits[:, :, *within].permute(0, 2, 3, 1).float()                      # (B, rows, columns, C)
            relative = relative.sub_(relative.amax(-1, keepdim=True)).mul_(weight)
            if view == "sagittal":
                relative = relative[..., class_of]
            here = as_slices(sums, view)[start - along.start :][: len(indices)]
            if turn == 0:
                here.copy_(relative)
            elif turn == 1:
                here.copy_(relative.add_(here))
            else:
                as_slices(classes, view)[indices.start : indices.stop, *within] = relative.add_(here).argmax(-1).to("cpu", torch.uint8)
    network.train(was_training)
    return classes.numpy()


def _logits(network: torch.nn.Module, slices: np.ndarray, scale: float, device: torch.device) -> Tensor:
    """Logits (B, C, H, W), at least, of slices (B, T, H, W) uint8, padded with 0 at the ends to what the network takes."""
    multiple = network.config.multiple
    h, w = slices.shape[2:]
    x = torch.from_numpy(slices).to(device).float().div_(255)
    return network(F.pad(x, (0, -w % multiple, 0, -h % multiple)), torch.full((len(x),), scale))


def _box(conformed: np.ndarray) -> tuple[slice, slice, slice]:
    """The smallest box around what is not 0."""
    there = [np.flatnonzero(conformed.any(axis=others)) for others in ((1, 2), (0, 2), (0, 1))]
    if not there[0].size:
        raise InputError("every voxel is 0; a T1w image is wanted")
    return tuple(slice(int(planes[0]), int(planes[-1]) + 1) for planes in there)


def _sagittal_class(config, sagittal_class: Sequence[int] | None) -> Tensor:
    if config.classes > 256:
        raise ValueError(f"classes: {config.classes}, wanted at most 256, as many as uint8 has")
    if sagittal_class is None and config.sagittal_classes == config.classes:
        return torch.arange(config.classes)
    found = torch.as_tensor(() if sagittal_class is None else sagittal_class, dtype=torch.long)
    if found.shape != (config.classes,) or found.min() < 0 or found.max() >= config.sagittal_classes:
        raise ValueError(f"sagittal_class: wanted, for each of {config.classes} classes, one of the sagittal network's {config.sagittal_classes}")
    return found
