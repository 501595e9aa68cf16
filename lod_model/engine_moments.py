"""Exact moments for the fast engine: of what is there, and of a convolution of the image without computing it.

The first group norm follows a 5³ convolution v = k * x of the image. To compute v for its moments alone would cost a sixth of the whole
pass. But over all space Σv is Σk·Σx, and Σv² = Σ_d r(d)·ρ(d), where r(d) = Σ_p x(p)·x(p + d) are the sums of products of the image with
itself shifted by up to four voxels, and ρ those of the kernel. What lies outside the grid or on its faces is computed and taken off.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lod_model.engine_kernels import LAST, Kernel, cast, conv, taps_as_channels, taps_of
from lod_model.networks.group_norm import GroupNorm

Face = tuple[int, int, Tensor]   # (axis, 0 or −1, values (1, O, and the two other axes in order))

_TILE = 4


class Moments:
    """Sums and sums of squares of each channel, in float64 from 256 values or one row of the grid on."""

    def __init__(self, channels: int) -> None:
        self.sums, self.squares = torch.zeros(2, channels, dtype=torch.float64)
        self.voxels = 0

    def add(self, x: Tensor) -> None:
        """x (1, C, D, H, W), channels last."""
        for piece in x[0].permute(1, 2, 3, 0):                               # (H, W, C)
            for rows in piece.float().flatten(1).split(256):                 # (≤ 256, W·C)
                self.sums += rows.sum(0).double().view(-1, x.shape[1]).sum(0)
                self.squares += (rows * rows).sum(0).double().view(-1, x.shape[1]).sum(0)
        self.voxels += x[0, 0].numel()


class Norm:
    """A group norm as the affine map that it is for given moments."""

    def __init__(self, norm: GroupNorm) -> None:
        self.groups, self.epsilon = norm.groups, norm.epsilon
        self.weight, self.bias = norm.weight.detach().cpu().double(), norm.bias.detach().cpu().double()

    def __call__(self, moments: Moments) -> tuple[Tensor, Tensor]:
        """(scale, shift), each (C,) float64, with which the norm is scale·x + shift."""
        size = self.weight.numel() // self.groups
        mean, square = (s.view(self.groups, size).mean(1) / moments.voxels for s in (moments.sums, moments.squares))
        rstd = ((square - mean * mean).clamp_min(0) + self.epsilon).rsqrt()
        scale = self.weight * rstd.repeat_interleave(size)
        return scale, self.bias - mean.repeat_interleave(size) * scale


def moments_with_faces(x: Tensor, kernel: Kernel, faces: list[Face]) -> Moments:
    """The moments of ``kernel`` over x, where ``faces`` replace its values on the faces of the grid.

    x (1, 1, D, H, W), every side at least 2; kernel (O, 1, 5, 5, 5) float64.
    """
    image, (weight, bias) = x[0, 0], kernel
    outside = Moments(bias.numel())
    for axis in range(3):
        for end in (0, -1):
            outside.add(_shell(image, weight, axis, end))
    lags = F.conv3d(F.pad(weight, [4] * 6).transpose(0, 1), weight, groups=len(weight))[0]    # ρ (O, 9, 9, 9)
    products = self_products(image)                                          # d from (0, −4, −4): r(d) = r(−d)
    products = torch.cat([products[1:].flip(0, 1, 2), products])             # (9, 9, 9)
    total = weight.sum((1, 2, 3, 4)) * image.sum(dtype=torch.float64)
    inside = Moments(bias.numel())
    inside.voxels = max(0, image.shape[0] - 2) * max(0, image.shape[1] - 2) * max(0, image.shape[2] - 2)
    sums, squares = total - outside.sums, torch.einsum("odhw,dhw->o", lags, products) - outside.squares
    inside.sums = sums + bias * inside.voxels                                # of v + bias
    inside.squares = squares + 2 * bias * sums + bias * bias * inside.voxels
    for axis, _, face in faces:                                              # voxels on two faces count once
        within = (slice(1, -1) if other < axis else slice(None) for other in (2, 3, 4) if other != axis)
        inside.add(face[:, :, *within][:, :, None])
    return inside


def self_products(image: Tensor, reach: int = 4) -> Tensor:
    """Σ over p of image(p)·image(p + d), zero outside, for d = (0 … reach, −reach … reach, −reach … reach); float64.

    image (D, H, W) float32. Tiles of 4² voxels of the ``reach`` slices before are multiplied with the tiles, wider by ``reach`` all round,
    of each slice: products of matrices, in float32 within a slice and float64 from there on.

    >>> self_products(torch.tensor([[[1.0, 2.0, 3.0]]]), reach=1)[0, 1].tolist()
    [8.0, 14.0, 8.0]
    """
    depth, height, width = image.shape
    rows, columns, wide = -(-height // _TILE), -(-width // _TILE), _TILE + 2 * reach
    padded = F.pad(image, [reach, columns * _TILE - width + reach, reach, rows * _TILE - height + reach])
    tiles = image.new_empty(rows * columns, wide, wide)
    inner = image.new_zeros(rows * columns, reach + 1, _TILE, _TILE)         # a slice and those before it, in turns
    product = image.new_empty((reach + 1) * _TILE**2, wide**2)
    sums = torch.zeros(reach + 1, _TILE**2, wide**2, dtype=torch.float64)
    for z in range(depth):
        tiles.view(rows, columns, wide, wide).copy_(padded[z].unfold(0, wide, _TILE).unfold(1, wide, _TILE))
        inner[:, z % (reach + 1)] = tiles[:, reach:-reach, reach:-reach]
        torch.mm(inner.flatten(1).T, tiles.flatten(1), out=product)
        for slot, part in enumerate(product.view(reach + 1, _TILE**2, -1)):
            sums[(z - slot) % (reach + 1)] += part                           # slices that many apart
    sums = sums.view(reach + 1, _TILE, _TILE, wide, wide)                    # (dz, y, x, y + dy + reach, x + dx + reach)
    sums = torch.stack([sums.diagonal(dy, 1, 3).sum(-1) for dy in range(2 * reach + 1)], 1)     # (dz, dy, x, …)
    return torch.stack([sums.diagonal(dx, 2, 3).sum(-1) for dx in range(2 * reach + 1)], 2)     # (dz, dy, dx)


def faces_of(x: Tensor, stem: Kernel, after: Kernel) -> list[Face]:
    """after(stem(x)), two 3³ convolutions, on the six faces of the grid, where the zeros around the stem's output count.

    x (1, 1, D, H, W). The axis across the face goes first: layers of whole slices compute faster than thin ones.
    """
    faces = []
    for axis in range(3):
        image = x.movedim(axis + 2, 2)                                       # (1, 1, across, the others in order)
        first, second = (Kernel(k.weight.movedim(axis + 2, 2), k.bias) for k in (stem, after))
        first = cast(first, torch.float32)
        for end in (0, -1):
            near = image[:, :, :3] if end == 0 else image[:, :, -3:]
            inner = conv(near.contiguous(), first, padding=(1, 1, 1))        # right but for its innermost of three layers
            inner = (inner[:, :, :2] if end == 0 else inner[:, :, -2:]).contiguous(memory_format=LAST)
            half = second.weight[:, :, 1:] if end == 0 else second.weight[:, :, :2]
            faces.append((axis + 2, end, conv(inner, cast(Kernel(half, second.bias), torch.float32), padding=(0, 1, 1))[:, :, 0]))
    return faces


def _shell(image: Tensor, weight: Tensor, axis: int, end: int) -> Tensor:
    """The convolution in the two layers outside the grid and the first inside, at one end of an axis, (1, O, 3, …); 0 bias.

    Along the axes before it only inside the faces, so that six shells cover what is outside the grid or on its faces once.
    """
    if 2 in image.shape[:axis]:                                              # nothing is inside
        return image.new_empty(1, len(weight), 0, 0, 0)
    image, weight = image.movedim(axis, 0), weight.movedim(axis + 2, 2)
    near = image[:3] if end == 0 else image[-3:]
    out, missing = 4, 3 - len(near)
    across = (out, missing) if end == 0 else (missing, out)
    others = [1 if other < axis else out for other in range(3) if other != axis]     # a 5³ convolution takes two off each end
    near = F.pad(near, [0, 0, others[0], others[0], *across])
    kernel = cast(Kernel(taps_as_channels(weight), weight.new_zeros(len(weight))), torch.float32)
    return conv(taps_of(near, torch.float32, margin=others[1]), kernel)
