"""FastSurfer's loss on slices: soft Dice plus cross-entropy in which every pixel has a weight (:mod:`lod_model.pixel_weights`).

    dice = mean over classes of 1 − 2·Σpg / (Σp + Σg + 0.001)
    ce   = mean over pixels of weight · −log p of the pixel's class

Sums run over the whole batch, p is the softmax, g the label as 0 or 1. The background is a class as any other; a class that the batch does
not have costs nearly 1. The weighted mean is not divided by the sum of the weights. Pixels that the protocol leaves out
(:data:`data_registry.protocol.IGNORED`) are in no sum and no mean.

Source: Henschel et al., NeuroImage 219:117012 (2020) and 251:118933 (2022). LOD-Brain's Dice (:mod:`lod_model.losses`) has squares and is
taken per scan.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from data_registry.protocol import IGNORED

SMOOTH = 1e-3


class Loss(NamedTuple):
    """Scalars; ``total`` is what is minimised."""

    total: Tensor
    dice: Tensor
    ce: Tensor


def combined_loss(
    logits: Tensor, target: Tensor, weight: Tensor | None = None, *, dice_weight: float = 1, ce_weight: float = 1,
    summed: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> Loss:  # fmt: skip
    """Of logits (B, C, H, W) against classes (B, H, W) of any integer type, with a ``weight`` (B, H, W) for each pixel, or 1 for all.

    ``dice_weight`` and ``ce_weight``: what either counts in the total; 0 leaves it out. ``summed`` adds to sums over this share of a batch
    those of its other shares; the gradients are then this one's part of the whole batch's. Computed in float32, also of half precision and
    under autocast. ValueError where the shapes do not fit or a class is outside 0 … C − 1 and not IGNORED.

    >>> logits, target = torch.zeros(1, 2, 1, 4), torch.tensor([[[0, 0, 1, IGNORED]]])             # p = ½ everywhere; three pixels count
    >>> [round(value.item(), 3) for value in combined_loss(logits, target, torch.tensor([[[1.0, 2, 3, 4]]]))]
    [1.901, 0.514, 1.386]
    """
    _check(logits, target, weight)
    kept = target != IGNORED                                                          # (B, H, W)
    known = target.long().where(kept, 0)
    if outside := int(((known < 0) | (known >= logits.shape[1])).sum()):
        raise ValueError(f"target: {outside} pixels outside the classes 0 … {logits.shape[1] - 1}")
    log_p = logits.log_softmax(1, dtype=torch.promote_types(logits.dtype, torch.float32))
    nats = -log_p.gather(1, known[:, None])[:, 0]                                     # (B, H, W)
    entropy = (nats * kept if weight is None else nats * kept * weight).sum()
    overlap, size = _by_class((-nats).exp() * kept, known, logits.shape[1]), _by_class(kept.to(nats.dtype), known, logits.shape[1])
    covered = (log_p.exp() * kept[:, None]).sum((0, 2, 3))                            # (C,) = Σp
    sums = summed(torch.cat([overlap, size, covered, entropy[None], kept.sum()[None].to(nats.dtype)]))
    overlap, size, covered, (entropy, pixels) = sums.split([logits.shape[1]] * 3 + [2])
    ce = entropy / pixels.clamp(min=1)
    dice = (1 - 2 * overlap / (covered + size + SMOOTH)).mean()
    return Loss(dice_weight * dice + ce_weight * ce, dice, ce)


def _by_class(values: Tensor, classes: Tensor, number: int) -> Tensor:
    """(number,): sums of ``values`` (B, H, W) over the pixels of each class. A row at a time, since one float32 sum over a batch's pixels
    would round away the last of them."""
    rows = values.new_zeros(*values.shape[:2], number).scatter_add(2, classes, values)   # (B, H, number)
    return rows.sum((0, 1))


def _check(logits: Tensor, target: Tensor, weight: Tensor | None) -> None:
    shape = (logits.shape[0], *logits.shape[2:])
    if logits.dim() != 4 or target.shape != shape or target.is_floating_point():
        raise ValueError(f"target: {tuple(target.shape)} {target.dtype}, wanted integers of {shape}")
    if weight is not None and weight.shape != shape:
        raise ValueError(f"weight: {tuple(weight.shape)}, wanted {shape}")
