"""LOD-Brain: a cascade of small U-Nets, each of which sees the head at a finer level of detail.

Paper: Svanera, Savardi, Signoroni, Benini, Muckli, "Fighting the scanner effect in brain MRI segmentation with a
progressive level-of-detail network trained on multi-site data", Medical Image Analysis 93:103090, 2024; arXiv 2211.02400.

Level 0 sees the whole image max-pooled and so learns where things are; each next level sees twice the resolution, has
one encoder block less, and receives the features of the level before it. Skips are added, never concatenated.

    image ─┬─ max-pool 2 ─► level 0: stem, Plain(16), Plain(32), UpPlain(16), UpPlain(8), out ─┐ nearest ×2
           └──────────────► level 1: stem, Plain(32), UpPlain(8) + level 0's features,    out ─┴─ + ─► head

Where paper and released code differ we follow the code, whose weights load here:
- stage 0, trained alone, sees max-pool 4 (``levels=1, coarse_pool=4``); stacked in the two-level network the same
  tensors are fed max-pool 2. The figure of the paper draws 4 in both.
- a level's first convolution starts from Glorot uniform and has no L2 penalty; every other starts from He normal and has.

Our deviations, each the same function up to rounding:
- the 1³ head is linear, so it runs at each level's own resolution and class maps are upsampled, not feature maps;
- the moments of the group norm are accumulated in float64: in fp32 over 256³ voxels the common kernels lose so much
  of the variance that 20,000–40,000 voxels change class;
- logits come out; the softmax belongs to the loss and to the predictor.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

L2_WEIGHT = 1e-4
FREEZE = ("none", "coarse")


# ---------------------------------------------------------------------------------------------------------------------
# Configuration


@dataclass(frozen=True)
class LODBrainConfig:
    """What the network is made of. Checked here, so that a network that exists is a network that runs.

    classes      output channels, background included
    widths       filters of the blocks, finest first; the last is the bridge
    levels       levels of detail, 1 … len(widths) − 1
    coarse_pool  max-pooling in front of level 0; None is 2**(levels − 1), and only one level alone may have another
    dropout      probability that an element is dropped after each block's first convolution, in training
    groups       groups of a group norm, or as many as it has channels if these are fewer
    epsilon      added to the variance by the group norm

    >>> LODBrainConfig()
    LODBrainConfig(classes=7, widths=(8, 16, 32), levels=2, coarse_pool=2, dropout=0.05, groups=8, epsilon=0.001)
    >>> LODBrainConfig(levels=1, coarse_pool=4).multiple
    16
    >>> LODBrainConfig(levels=3)
    Traceback (most recent call last):
    ValueError: levels: 3, wanted an integer from 1 to 2 (len(widths) - 1)
    """

    classes: int = 7
    widths: tuple[int, ...] = (8, 16, 32)
    levels: int = 2
    coarse_pool: int | None = None
    dropout: float = 0.05
    groups: int = 8
    epsilon: float = 1e-3

    def __post_init__(self) -> None:
        if not _is_integer(self.classes, 2):
            raise ValueError(f"classes: {self.classes!r}, wanted an integer of at least 2")
        if not isinstance(self.widths, list | tuple) or len(self.widths) < 2 or not all(_is_integer(w, 1) for w in self.widths):
            raise ValueError(f"widths: {self.widths!r}, wanted two or more positive integers")
        object.__setattr__(self, "widths", tuple(self.widths))
        if not _is_integer(self.levels, 1) or self.levels >= len(self.widths):
            raise ValueError(f"levels: {self.levels!r}, wanted an integer from 1 to {len(self.widths) - 1} (len(widths) - 1)")
        stacked_pool = 2 ** (self.levels - 1)
        if self.coarse_pool is None:
            object.__setattr__(self, "coarse_pool", stacked_pool)
        if not _is_integer(self.coarse_pool, 1) or (self.levels > 1 and self.coarse_pool != stacked_pool):
            wanted = "a positive integer" if self.levels == 1 else f"{stacked_pool} (2**(levels - 1)) or nothing"
            raise ValueError(f"coarse_pool: {self.coarse_pool!r} with levels {self.levels}, wanted {wanted}")
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: {self.dropout!r}, wanted a number from 0 to below 1")
        if not _is_integer(self.groups, 1) or any(w % min(self.groups, w) for w in self.widths):
            raise ValueError(f"groups: {self.groups!r}, wanted a positive integer that divides every larger width of {self.widths}")
        if not _is_number(self.epsilon) or not 0 < self.epsilon < math.inf:
            raise ValueError(f"epsilon: {self.epsilon!r}, wanted a positive number")

    @property
    def pools(self) -> tuple[int, ...]:
        """Max-pooling in front of each level, coarsest first."""
        return (self.coarse_pool, *(2 ** (self.levels - 1 - k) for k in range(1, self.levels)))

    @property
    def multiple(self) -> int:
        """Every side of the image, in voxels, must be a multiple of this."""
        return self.coarse_pool * self.pooled_multiple

    @property
    def pooled_multiple(self) -> int:
        """Every side of what level 0 sees, in its own voxels, must be a multiple of this."""
        return 2 ** (len(self.widths) - 1)

    def to_dict(self) -> dict:
        """Plain numbers and lists, for a checkpoint or a YAML file; ``from_dict`` takes them back.

        >>> LODBrainConfig.from_dict(LODBrainConfig(levels=1).to_dict()) == LODBrainConfig(levels=1)
        True
        """
        return asdict(self) | {"widths": list(self.widths)}

    @classmethod
    def from_dict(cls, values: dict) -> LODBrainConfig:
        """The configuration with these values, defaults for the rest. An unknown key is a ValueError."""
        known = [f.name for f in fields(cls)]
        unknown = sorted(str(key) for key in values if key not in known)
        if unknown:
            raise ValueError(f"lod_brain has no {', '.join(unknown)}; known: {', '.join(known)}")
        return cls(**values)


def _is_integer(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# ---------------------------------------------------------------------------------------------------------------------
# Group norm with exact moments


def _slabs(x: Tensor) -> tuple[Tensor, ...]:
    """Cut along the first spatial axis, so that a slab in float64 stays in cache (CPU) or in small change (GPU)."""
    elements = 2**18 if x.device.type == "cpu" else 2**24
    per_slice = max(1, x.numel() // x.shape[2])
    return x.split(max(1, elements // per_slice), dim=2)


def _channel_sums(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of x and of x·y over space, each (B, C) float64; the largest temporary is a slab."""
    space = tuple(range(2, x.ndim))
    sum_x = x.new_zeros(x.shape[:2], dtype=torch.float64)
    sum_xy = torch.zeros_like(sum_x)
    for x_slab, y_slab in zip(_slabs(x), _slabs(y), strict=True):
        x64 = x_slab.double()
        sum_x += x64.sum(space)
        sum_xy += (x64 * (x64 if y_slab is x_slab else y_slab)).sum(space)
    return sum_x, sum_xy


def group_moments(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and population variance of each group of contiguous channels, each (B, groups) float64.

    x (B, C, *space) of any memory format and dtype. Right to about 1e-12 at any size.

    >>> mean, variance = group_moments(torch.tensor([[[1.0, 3.0], [5.0, 7.0]]]), 1)
    >>> mean.item(), variance.item()
    (4.0, 5.0)
    """
    batch, channels = x.shape[:2]
    count = x[0].numel() // groups
    total, squares = (s.view(batch, groups, channels // groups).sum(2) for s in _channel_sums(x, x))
    mean = total / count
    return mean, (squares / count - mean * mean).clamp_min_(0)


def _affine(x: Tensor, scale: Tensor, shift: Tensor, out: Tensor) -> Tensor:
    """out = scale·x + shift with (B, C) float64 coefficients; out may be x."""
    exact = x.dtype in (torch.float32, torch.float64)
    dtype = x.dtype if exact else torch.float32
    scale, shift = (c.to(dtype)[(...,) + (None,) * (x.ndim - 2)] for c in (scale, shift))   # (B, C, 1, 1, 1)
    for x_slab, out_slab in zip(_slabs(x), _slabs(out), strict=True):
        if exact:
            torch.mul(x_slab, scale, out=out_slab).add_(shift)
        else:
            out_slab.copy_(x_slab * scale + shift)
    return out


class _ExactGroupNorm(torch.autograd.Function):
    """y = γ·(x − mean)/√(variance + ε) + β, moments and the sums of the gradient in float64, a slab at a time."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, groups: int, epsilon: float, inplace: bool) -> Tensor:
        per_group = x.shape[1] // groups
        mean, variance = (m.repeat_interleave(per_group, 1) for m in group_moments(x, groups))   # (B, C)
        rstd = (variance + epsilon).rsqrt()
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.groups = groups
        scale = rstd * weight.double()
        return _affine(x, scale, bias.double() - mean * scale, x if inplace else torch.empty_like(x))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        batch, channels = x.shape[:2]
        per_group = channels // ctx.groups
        count = x[0].numel() // ctx.groups
        sum_dy, sum_dy_x = _channel_sums(dy, x)                              # (B, C)
        sum_dy_xhat = (sum_dy_x - mean * sum_dy) * rstd                      # x̂ = (x − mean)·rstd
        gamma = weight.double()

        def group_mean(per_channel: Tensor) -> Tensor:                       # (B, C) → (B, C), equal within a group
            grouped = per_channel.view(batch, ctx.groups, per_group).sum(2) / count
            return grouped.repeat_interleave(per_group, 1)

        # dx = rstd·(γ·dy − ⟨γ·dy⟩ − x̂·⟨γ·dy·x̂⟩), sorted into dy, x and 1
        dx = None
        if ctx.needs_input_grad[0]:
            of_x = -rstd * rstd * group_mean(gamma * sum_dy_xhat)
            constant = -rstd * group_mean(gamma * sum_dy) - of_x * mean
            dx = _affine(x, of_x, constant, torch.empty_like(x))
            scale = (rstd * gamma).to(dx.dtype if dx.dtype is torch.float64 else torch.float32)
            scale = scale[(...,) + (None,) * (x.ndim - 2)]
            for dx_slab, dy_slab in zip(_slabs(dx), _slabs(dy), strict=True):
                dx_slab += dy_slab * scale
        return dx, sum_dy_xhat.sum(0).to(weight.dtype), sum_dy.sum(0).to(weight.dtype), None, None, None
