"""Pose and shape: one resampling of picture and labels together.

A rotation, scales, a shift and a cubic B-spline deformation are composed into one map and applied once, by torch's grid_sample:
TorchIO's affine and elastic transforms through SimpleITK resample twice, and its deformation alone costs 106 ms at 64³ and 826 ms at 128³.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from lod_model.corrupt import along
from lod_model.randomness import chance

SLAB_VOXELS = 2**19  # of the output a pass: the map of a whole 256³ volume would take 200 MB
DEVICE_SLAB_VOXELS = 2**22  # beside a processor: fewer and larger pieces, of at most 150 MB
Moving = tuple[torch.Tensor, str]
"""A volume (C, D, H, W) float32, and how it is sampled: linear or nearest."""


@dataclass(frozen=True)
class Pose:
    """Where each voxel of the output comes from. Centred voxel coordinates, axes (D, H, W): ``matrix`` (3, 3) · p + ``shift`` (3,) +
    the B-spline of ``control`` (3, K, K, K), in voxels; None is no deformation."""

    matrix: torch.Tensor
    shift: torch.Tensor
    control: torch.Tensor | None = None

    def moved(self, *volumes: Moving) -> list[torch.Tensor]:
        """All of them by one map, which is made once; on their own device, and what comes from outside is 0."""
        shape, device = tuple(volumes[0][0].shape[1:]), volumes[0][0].device
        outs = [torch.zeros_like(volume) for volume, _ in volumes]
        boxes = [_box_of_a_sparse(volume) for volume, _ in volumes]
        splines = None if self.control is None else [_spline(n, self.control.shape[-1]).to(device, non_blocking=True) for n in shape]
        slab = max(1, (SLAB_VOXELS if device.type == "cpu" else DEVICE_SLAB_VOXELS) // (shape[1] * shape[2]))
        for start in range(0, shape[0], slab):
            part = slice(start, start + slab)
            grid = self._came_from(shape, part, splines, device)  # (slab, H, W, 3)
            for (volume, mode), box, out in zip(volumes, boxes, outs, strict=True):
                _sampled(volume, grid, "bilinear" if mode == "linear" else "nearest", box, out[:, part])
        return outs

    def _came_from(self, shape: tuple[int, ...], part: slice, splines: list[torch.Tensor] | None, device: torch.device) -> torch.Tensor:
        """(slab, H, W, 3): for the output slices ``part``, where they come from, as grid_sample wants it: (w, h, d) in −1…1 from edge to edge."""
        d, h, w = (torch.arange(n, dtype=torch.float32, device=device) - (n - 1) / 2 for n in shape)
        grid = torch.empty((len(d[part]), *shape[1:], 3), device=device)
        control = None if self.control is None else self.control.to(device, non_blocking=True)
        for axis in range(3):
            a, b, c = self.matrix[axis].tolist()
            came = (a * d[part, None, None] + float(self.shift[axis])) + b * h[:, None] + c * w  # (slab, H, W)
            if control is not None:
                came += along(along(along(control[axis], splines[0][part], 0), splines[1], 1), splines[2], 2)
            torch.mul(came, 2 / shape[axis], out=grid[..., 2 - axis])
        return grid


def draw_pose(shape: tuple[int, ...], *, degrees: float, scale: float, shift: float, bend: float, p_affine: float, p_bend: float) -> Pose:
    """From torch's current generator: angles about the three axes ±``degrees``, a factor of 1 ± ``scale`` an axis, shifts of ±``shift`` and
    control points moved by ±``bend``, both as a share of the grid's smallest side."""
    side = min(shape)
    matrix, moved = torch.eye(3), torch.zeros(3)
    if chance(p_affine):
        angles = torch.deg2rad((torch.rand(3) * 2 - 1) * degrees)
        for axis, angle in enumerate(angles):
            first, second = (other for other in range(3) if other != axis)
            turn = torch.eye(3)
            turn[first, first] = turn[second, second] = torch.cos(angle)
            turn[first, second], turn[second, first] = -torch.sin(angle), torch.sin(angle)
            matrix = matrix @ turn
        matrix = matrix / (1 + (torch.rand(3) * 2 - 1) * scale)  # head's axes, not the picture's, are stretched
        moved = (torch.rand(3) * 2 - 1) * shift * side
    control = (torch.rand(3, 7, 7, 7) * 2 - 1) * bend * side if chance(p_bend) else None
    return Pose(matrix, moved, control)


def warp(volume: torch.Tensor, pose: Pose, *, mode: str) -> torch.Tensor:
    """``volume`` (C, D, H, W) float32 moved by ``pose``: ``mode`` linear or nearest. What comes from outside is 0.

    >>> block = torch.arange(8.0).reshape(1, 2, 2, 2)
    >>> turned = Pose(torch.tensor([[-1.0, 0, 0], [0, -1, 0], [0, 0, 1]]), torch.zeros(3))     # half a turn about the last axis
    >>> warp(block, turned, mode="nearest")[0].tolist() == block[0].flip(0, 1).tolist()
    True
    """
    return pose.moved((volume, mode))[0]


def _sampled(volume: torch.Tensor, grid: torch.Tensor, mode: str, box: tuple[torch.Tensor, torch.Tensor] | None, out: torch.Tensor) -> None:
    """Into ``out`` (C, slab, H, W), a part of a volume of zeros: with a ``box``, only what comes from inside it."""
    if box is None:
        out[...] = functional.grid_sample(volume[None], grid[None], mode=mode, padding_mode="zeros", align_corners=False)[0]
        return
    low, high = box
    grid = grid.reshape(-1, 3)
    inside = torch.ones(len(grid), dtype=torch.bool)
    for axis in range(3):  # axis by axis: three times faster than .all(1)
        came = grid[:, 2 - axis]
        inside &= (came > low[axis]) & (came < high[axis])
    inside = inside.nonzero()[:, 0]
    values = functional.grid_sample(volume[None], grid[inside][None, None, None], mode=mode, padding_mode="zeros", align_corners=False)
    out.flatten(1)[:, inside] = values[0, :, 0, 0]  # a view: the slices of a channel are contiguous


def _box_of_a_sparse(volume: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Of a volume, on a processor, that fills less than half of its grid, as labels do; elsewhere to look for it would take longer."""
    if volume.device.type != "cpu":
        return None
    low, high = _filled_box(volume)
    return (low, high) if float((high - low).clamp(min=0).prod()) < 0.5 * volume[0].numel() else None


def _filled_box(volume: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lower and upper corner (3,) of what is not 0, a voxel's margin included (so that linear weights fade inside), in −1…1; (0, 0) if
    nothing is."""
    corners = []
    filled = (volume.numpy() != 0).any(0)  # (D, H, W)
    for axis in range(3):
        at = np.flatnonzero(filled.any(tuple(other for other in range(3) if other != axis)))
        n = filled.shape[axis]
        corners.append(((at.min() - 1) * 2 / n - 1, (at.max() + 2) * 2 / n - 1) if len(at) else (0.0, 0.0))
    return torch.tensor([low for low, _ in corners]), torch.tensor([high for _, high in corners])


def _spline(n: int, knots: int) -> torch.Tensor:
    """(n, knots): weights of uniform cubic B-splines whose inner knots span the axis."""
    at = torch.linspace(1, knots - 2, n)[:, None] - torch.arange(knots)
    distance = at.abs()
    return torch.where(distance < 1, 2 / 3 - distance**2 + distance**3 / 2, (2 - distance).clamp(min=0) ** 3 / 6)


def grid_distortion(shape: tuple[int, ...], *, steps: int = 5, limit: float = 0.10) -> list[torch.Tensor]:
    """For each axis the coordinate (n,) every output index comes from: ``steps`` intervals, each stretched by 1 ± ``limit``, one after
    the other from the axis's start, as in the paper's augmentation."""
    coordinates = []
    for n in shape:
        widths = torch.cat([torch.zeros(1), 1 + (torch.rand(steps) * 2 - 1) * limit]) * (n / steps)
        came = np.interp(np.arange(n), np.linspace(0, n, steps + 1), widths.cumsum(0).numpy())
        coordinates.append(torch.from_numpy(came.astype(np.float32)))
    return coordinates


def distort(volume: torch.Tensor, coordinates: list[torch.Tensor], *, mode: str) -> torch.Tensor:
    """``volume`` (C, D, H, W) sampled at the grid of ``coordinates``, one axis after the other; outside is 0."""
    for axis, came in enumerate(coordinates):
        n = volume.shape[1 + axis]
        if mode == "nearest":
            index = came.round().long()
            volume = volume.index_select(1 + axis, index.clamp(0, n - 1).to(volume.device, non_blocking=True))
            outside = torch.nonzero(index > n - 1).flatten()  # looked for on the host
            volume.index_fill_(1 + axis, outside.to(volume.device, non_blocking=True), 0)
        else:
            came = came.to(volume.device, non_blocking=True)
            volume = along(volume, (1 - (came[:, None] - torch.arange(n, device=volume.device)).abs()).clamp(min=0), axis)
    return volume


@dataclass(frozen=True)
class Distortion:
    """The coordinates of :func:`grid_distortion`."""

    coordinates: list[torch.Tensor]

    def moved(self, *volumes: Moving) -> list[torch.Tensor]:
        """As :meth:`Pose.moved`."""
        return [distort(volume, self.coordinates, mode=mode) for volume, mode in volumes]
