"""The soft Dice loss of LOD-Brain, at full resolution and on blocks of voxels.

For class c: Dice = 2·Σpg / (Σp² + Σg² + 1e-6), sums over the voxels of one scan; p the softmax, g the label as 0 or 1. The loss is
1 − the mean over all channels, background included, without class weights; then the mean over scans. A class that a scan does not
have scores 0 there, whatever is predicted, as in the release. Its term then has no gradient: what is predicted of it costs by lowering
the Dice of the classes that are there.

Over a window of a scan most classes are often absent, so there the mean is over the classes that are present: the loss goes to 0 as the
window's labels are met, and a window of few classes counts as much as one of many. The Dice of a window is not a part of the scan's.

A voxel that the protocol leaves out (:data:`data_registry.protocol.IGNORED`) is in none of the sums.

Source: Svanera et al. 2024, whose code takes its sums over the whole batch; with the batch of one it is trained with, that is the same.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from data_registry.protocol import IGNORED

SMOOTH = 1e-6


def soft_dice(logits: Tensor, target: Tensor) -> Tensor:
    """Soft Dice of each scan and class, (B, C), of logits (B, C, D, H, W) against classes (B, D, H, W) of any integer type.

    ValueError where the shapes do not fit or a class is outside 0 … C − 1 and not IGNORED.

    >>> certain = torch.tensor([[[[[9e9, 0.0]]], [[[0.0, 9e9]]]]])                   # two classes, two voxels: 0, 1
    >>> soft_dice(certain, torch.tensor([[[[0, 1]]]]))
    tensor([[1.0000, 1.0000]])
    >>> soft_dice(certain, torch.tensor([[[[0, 0]]]]))                               # 2·1 / (1 + 2), 0
    tensor([[0.6667, 0.0000]])
    """
    if target.shape != (logits.shape[0], *logits.shape[2:]) or target.is_floating_point():
        raise ValueError(f"target: {tuple(target.shape)} {target.dtype}, wanted integers of {(logits.shape[0], *logits.shape[2:])}")
    p = _softmax(logits)                                                              # (B, C, D, H, W)
    space = (1, 2, 3)
    overlap, voxels = [], []
    for c, p_c in enumerate(p.unbind(1)):                                             # a mask a class: no one-hot of p's size
        mask = target == c                                                            # (B, D, H, W)
        overlap.append((p_c * mask).sum(space))
        voxels.append(mask.sum(space))
    size = torch.stack(voxels, 1)                                                     # (B, C) = Σg = Σg²
    if outside := target.numel() - int(size.sum()):
        kept = target != IGNORED
        if outside := outside - target.numel() + int(kept.sum()):
            raise ValueError(f"target: {outside} voxels outside the classes 0 … {logits.shape[1] - 1}")
        p = p * kept[:, None]
    return _dice(torch.stack(overlap, 1), _square_sum(p), size.to(p.dtype))


def block_soft_dice(logits: Tensor, fractions: Tensor, voxels_per_block: int) -> Tensor:
    """Soft Dice, (B, C), that the nearest-upsampled logits have at full resolution, from blocks alone.

    logits and fractions (B, C, d, h, w); fractions is the share of a block's K = ``voxels_per_block`` voxels in each class. With p
    constant over a block: Σpg = K·Σpf, Σp² = K·Σp², and, labels being 0 or 1, Σg² = Σg = K·Σf, not K·Σf². Where fractions sum to s < 1
    the rest of the block is left out: Σp² = K·Σsp².

    ValueError where the shapes do not fit.
    """
    if fractions.shape != logits.shape:
        raise ValueError(f"fractions: {tuple(fractions.shape)}, wanted {tuple(logits.shape)}")
    if not isinstance(voxels_per_block, int) or voxels_per_block < 1:
        raise ValueError(f"voxels_per_block: {voxels_per_block!r}, wanted a positive integer")
    p = _softmax(logits)
    fractions = fractions.to(p.dtype)
    share = fractions.sum(1, keepdim=True)                                            # (B, 1, d, h, w)
    overlap, squares, size = (p * fractions).sum((2, 3, 4)), (p.square() * share).sum((2, 3, 4)), fractions.sum((2, 3, 4))
    return _dice(*(voxels_per_block * sums for sums in (overlap, squares, size)))


def dice_loss(logits: Tensor, target: Tensor, *, over: Literal["all", "present"] = "all") -> Tensor:
    """1 − the mean of ``soft_dice``: a scalar from about 0 (right) to 1; over all classes, or over those that a scan's target has.

    >>> certain = torch.tensor([[[[[9e9, 9e9]]], [[[0.0, 0.0]]], [[[0.0, 0.0]]]]])   # three classes, two voxels: 0, 0
    >>> target = torch.tensor([[[[0, 1]]]])                                          # Dice 2·1 / (2 + 1), 0, and 0 for the absent class 2
    >>> dice_loss(certain, target), dice_loss(certain, target, over="present")       # 1 − (2/3)/3, 1 − (2/3)/2
    (tensor(0.7778), tensor(0.6667))
    """
    dice = soft_dice(logits, target)
    if over == "all":
        return 1 - dice.mean()
    there = torch.stack([(target == c).flatten(1).any(1) for c in range(logits.shape[1])], 1)                     # (B, C)
    return 1 - ((dice * there).sum(1) / there.sum(1).clamp(min=1)).mean()             # a window that is all left out has none


def block_dice_loss(logits: Tensor, fractions: Tensor, voxels_per_block: int) -> Tensor:
    """``dice_loss`` of the nearest-upsampled logits, value and gradient, at 1/``voxels_per_block`` of the voxels."""
    return 1 - block_soft_dice(logits, fractions, voxels_per_block).mean()


def _softmax(logits: Tensor) -> Tensor:
    """Over classes, in fp32 even under autocast: millions of small squares are about to be added up."""
    return logits.softmax(1, dtype=torch.float64 if logits.dtype is torch.float64 else torch.float32)


def _square_sum(p: Tensor) -> Tensor:
    return p.square().sum((2, 3, 4))


def _dice(overlap: Tensor, squares: Tensor, size: Tensor) -> Tensor:
    return 2 * overlap / (squares + size + SMOOTH)
