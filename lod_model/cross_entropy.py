"""NeuroNet's loss: cross-entropy, averaged over the voxels of a protocol, then over protocols, then over scans.

Source: Rajchl et al. 2018, whose scans carry every protocol's labels. Ours may lack some: a scan's mean is over the protocols it has labels of,
so that it trains their tails and the encoder, at the same weight as any other scan; in a target it is ``IGNORED`` everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from data_registry.protocol import IGNORED


def protocols_cross_entropy(logits: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Tensor:
    """A scalar of logits (B, C, D, H, W) and classes (B, D, H, W) of any integer type, each by protocol.

    A protocol that is not among the targets is one whose labels no scan has. Scans without any label count nothing; where none has one, the
    loss is 0, with gradients of 0. ValueError for shapes that do not fit, for a class outside 0 … C − 1, and for targets without logits.

    >>> logits = {"fsl_fast": torch.tensor([0.0, 0.0]).view(1, 2, 1, 1, 1), "malp_em": torch.tensor([0.0, 0.0, 0.0]).view(1, 3, 1, 1, 1)}
    >>> here, absent = torch.tensor([[[[1]]]]), torch.tensor([[[[255]]]])
    >>> protocols_cross_entropy(logits, {"fsl_fast": here, "malp_em": here})   # (log 2 + log 3) / 2
    tensor(0.8959)
    >>> protocols_cross_entropy(logits, {"fsl_fast": here, "malp_em": absent})   # log 2
    tensor(0.6931)
    """
    strangers = sorted(set(targets) - set(logits))
    if strangers:
        raise ValueError(f"target: protocol {', '.join(strangers)}, wanted some of {', '.join(logits)}")
    sums, voxels = zip(*(_of_scans(name, logits[name], targets.get(name)) for name in logits), strict=True)
    entropies, counts = torch.stack(sums, 1), torch.stack(voxels, 1)               # (B, protocols)
    has = counts > 0
    of_scans = (entropies / counts.clamp(min=1)).sum(1) / has.sum(1).clamp(min=1)  # (B,)
    return of_scans.sum() / has.any(1).sum().clamp(min=1)


def _of_scans(name: str, logits: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropy over a scan's labelled voxels, and their number, each (B,)."""
    scans, classes, *space = logits.shape
    if target is None:
        nothing = logits.flatten(1)[:, :0].float().sum(1)   # in the graph, so that no parameter is without a gradient
        return nothing, torch.zeros_like(nothing, dtype=torch.long)
    if target.shape != (scans, *space) or target.is_floating_point():
        raise ValueError(f"target {name}: {tuple(target.shape)} {target.dtype}, wanted integers of {(scans, *space)}")
    target = target.long()
    labelled = target != IGNORED
    outside = int((labelled & ((target < 0) | (target >= classes))).sum())
    if outside:
        raise ValueError(f"target {name}: {outside} voxels outside the classes 0 … {classes - 1}, and not {IGNORED}")
    entropy = F.cross_entropy(logits.float(), target, ignore_index=IGNORED, reduction="none")   # (B, D, H, W), 0 where ignored
    return entropy.flatten(1).sum(1), labelled.flatten(1).sum(1)
