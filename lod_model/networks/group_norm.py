"""Group normalisation with exact moments, whatever the size, memory format or dtype.

Over 256³ voxels the common fp32 kernels lose so much of the variance that 20,000–40,000 voxels of a LOD-Brain segmentation change class;
here moments and the sums of the gradient are accumulated in float64, a slab at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


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


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    """values (B, C) float64, ready to broadcast over x (B, C, *space): in fp32, or float64 where x is."""
    dtype = x.dtype if x.dtype is torch.float64 else torch.float32
    return values.to(dtype)[(...,) + (None,) * (x.ndim - 2)]


def _affine(x: Tensor, scale: Tensor, shift: Tensor, out: Tensor) -> Tensor:
    """out = scale·x + shift with (B, C) float64 coefficients; out may be x."""
    scale, shift = _per_channel(scale, x), _per_channel(shift, x)
    for x_slab, out_slab in zip(_slabs(x), _slabs(out), strict=True):
        if x.dtype == scale.dtype:
            torch.mul(x_slab, scale, out=out_slab).add_(shift)
        else:   # half precision: in fp32 until the end
            out_slab.copy_(x_slab * scale + shift)
    return out


def _scale_and_shift(x: Tensor, weight: Tensor, bias: Tensor, groups: int, epsilon: float) -> tuple[Tensor, ...]:
    """(scale, shift, mean, rstd), each (B, C) float64, with which the norm is scale·x + shift."""
    mean, variance = (m.repeat_interleave(x.shape[1] // groups, 1) for m in group_moments(x, groups))
    rstd = (variance + epsilon).rsqrt()
    scale = rstd * weight.double()
    return scale, bias.double() - mean * scale, mean, rstd


class _GroupNormFunction(torch.autograd.Function):
    """The norm with its gradient; what is kept for the gradient is x, nothing of its size besides."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, groups: int, epsilon: float) -> Tensor:
        scale, shift, mean, rstd = _scale_and_shift(x, weight, bias, groups, epsilon)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.groups = groups
        return _affine(x, scale, shift, torch.empty_like(x))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors                            # mean, rstd (B, C)
        count = x[0].numel() // ctx.groups
        sum_dy, sum_dy_x = _channel_sums(dy, x)                              # (B, C)
        sum_dy_xhat = (sum_dy_x - mean * sum_dy) * rstd                      # x̂ = (x − mean)·rstd
        gamma = weight.double()

        def group_mean(sums: Tensor) -> Tensor:                              # (B, C) → (B, C), equal within a group
            grouped = sums.unflatten(1, (ctx.groups, -1)).sum(2) / count
            return grouped.repeat_interleave(x.shape[1] // ctx.groups, 1)

        dx = None
        if ctx.needs_input_grad[0]:   # rstd·(γ·dy − ⟨γ·dy⟩ − x̂·⟨γ·dy·x̂⟩), sorted into what multiplies x, 1 and dy
            of_x = -rstd * rstd * group_mean(gamma * sum_dy_xhat)
            of_one = -rstd * group_mean(gamma * sum_dy) - of_x * mean
            dx = _affine(x, of_x, of_one, torch.empty_like(x))
            of_dy = _per_channel(rstd * gamma, dx)
            for dx_slab, dy_slab in zip(_slabs(dx), _slabs(dy), strict=True):
                dx_slab += dy_slab * of_dy
        return dx, sum_dy_xhat.sum(0).to(weight.dtype), sum_dy.sum(0).to(weight.dtype), None, None


class GroupNorm(nn.Module):
    """Group normalisation whose moments do not depend on size, memory format or dtype.

    x (B, C, *space) → the same shape, dtype and memory format; contiguous groups of channels; an affine per channel.
    ``inplace`` overwrites x and is for passes without gradients alone.

    >>> GroupNorm(1, 1, epsilon=1e-9)(torch.tensor([[[-3.0, 3.0]]])).tolist()
    [[[-1.0, 1.0]]]
    """

    def __init__(self, groups: int, channels: int, *, epsilon: float = 1e-3) -> None:
        super().__init__()
        self.groups, self.epsilon = groups, epsilon
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, *, inplace: bool = False) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            if torch.is_grad_enabled():
                assert not inplace, "the gradient needs x"
                return _GroupNormFunction.apply(x, self.weight, self.bias, self.groups, self.epsilon)
            scale, shift, _, _ = _scale_and_shift(x, self.weight, self.bias, self.groups, self.epsilon)
            return _affine(x, scale, shift, x if inplace else torch.empty_like(x))

    def extra_repr(self) -> str:
        return f"{self.groups}, {self.weight.numel()}, epsilon={self.epsilon}"
