"""Resampling of volumes: separable linear or cubic, nearest neighbour with any affine; majorities in blocks, bounding boxes.

Arrays are (D, H, W) or any three axes; affines map output voxels to input voxels. What lies outside the input is 0.
"""

import itertools
from typing import Literal

import numpy as np
from scipy import sparse

Interpolation = Literal["linear", "cubic"]
NIFTI_EDGE = 1e-3  # voxels; positions this near to a voxel's centre are on it


def resample_image(data: np.ndarray, to_input: np.ndarray, shape: tuple[int, ...], *, interpolation: Interpolation = "linear") -> np.ndarray:
    """Resample along permuted, flipped, scaled axes; float32, 0 outside.

    ``to_input`` (4, 4) maps output voxels to input voxels and must have one non-zero entry a row (no rotation).
    """
    axes, positions = _separate(to_input, shape)
    out = data.transpose(axes)
    for axis in range(3):
        index = np.rint(positions[axis]).astype(np.int64)
        if np.array_equal(index, positions[axis]) and (np.abs(np.diff(index)) == 1).all():
            out = _taken(out, index, axis)
            continue
        rest = np.ascontiguousarray(np.moveaxis(out, axis, 0))
        matrix = _axis_matrix(positions[axis], out.shape[axis], interpolation)
        out = np.moveaxis((matrix @ rest.reshape(rest.shape[0], -1)).reshape(-1, *rest.shape[1:]), 0, axis)
    return in_c_order(out.astype(np.float32, copy=False))


def is_whole(to_input: np.ndarray) -> bool:
    """Whether every output voxel is one of the input's, or outside: axes permuted, flipped, shifted by whole voxels.

    >>> is_whole(np.diag([1.0, -1.0, 1.0, 1.0])), is_whole(np.diag([1.0, 1.0, 0.9, 1.0]))
    (True, False)
    """
    return bool(np.abs(to_input - np.rint(to_input)).max() < 1e-6 and abs(abs(np.linalg.det(to_input)) - 1) < 1e-6)


def resample_nearest(
    data: np.ndarray, to_input: np.ndarray, shape: tuple[int, ...], *, box: tuple[slice, ...] | None = None
) -> np.ndarray:
    """Nearest voxel of ``data`` for every output voxel, any affine; 0 outside. Half-way positions go up. ``box``: where it is not 0, if known."""
    linear = to_input[:3, :3]
    off_axis = np.abs(linear).sum() - np.abs(linear).max(axis=0).sum()
    if off_axis * max(shape) < 1e-3:
        axes, positions = _separate(to_input, shape)
        out = data.transpose(axes)
        for axis in range(3):
            index = np.floor(positions[axis] + 0.5).astype(np.int64)
            out = _taken(out, index, axis)
        return in_c_order(out)
    out = np.zeros(shape, dtype=data.dtype)
    box = _reached(bounding_box(data) if box is None else box, to_input, shape)  # all else stays 0
    plane = np.stack(np.meshgrid(*(np.arange(s.start, s.stop) for s in box[1:]), indexing="ij"))  # (2, h, w)
    in_plane = np.tensordot(linear[:, 1:], plane, axes=1) + to_input[:3, 3][:, None, None]  # (3, h, w)
    size = np.array(data.shape)[:, None, None]
    for first in range(box[0].start, box[0].stop):
        index = np.floor(in_plane + (linear[:, 0] * first)[:, None, None] + 0.5).astype(np.int64)
        inside = ((index >= 0) & (index < size)).all(axis=0)
        out[first, box[1], box[2]][inside] = data[tuple(index[:, inside])]
    return out


def _reached(box: tuple[slice, ...], to_input: np.ndarray, shape: tuple[int, ...]) -> tuple[slice, ...]:
    """The box of output voxels that holds all whose nearest input voxel is in ``box``."""
    corners = np.array(list(itertools.product(*((s.start - 1, s.stop) for s in box))))  # half a voxel and some more around it
    to_output = np.linalg.inv(to_input)
    found = corners @ to_output[:3, :3].T + to_output[:3, 3]
    low, high = np.floor(found.min(0)).astype(int), np.ceil(found.max(0)).astype(int) + 1
    return tuple(slice(max(0, a), max(0, min(n, b))) for a, b, n in zip(low.tolist(), high.tolist(), shape, strict=True))


def in_c_order(data: np.ndarray, *, block_shape: tuple[int, int, int] = (128, 128, 16)) -> np.ndarray:
    """The same array, contiguous along its last axis; copied in blocks that stay in cache, in a quarter to a half of NumPy's time."""
    if data.flags.c_contiguous:
        return data
    out = np.empty(data.shape, data.dtype)
    for corner in itertools.product(*(range(0, n, edge) for n, edge in zip(data.shape, block_shape, strict=True))):
        block = tuple(slice(first, first + edge) for first, edge in zip(corner, block_shape, strict=True))
        out[block] = data[block]
    return out


def _taken(data: np.ndarray, index: np.ndarray, axis: int) -> np.ndarray:
    """``data.take(index, axis)``, 0 where an index is outside; a view where it only shifts, cuts or reverses."""
    inside = (index >= 0) & (index < data.shape[axis])
    if inside.all() and (np.abs(np.diff(index)) == 1).all() and len(set(np.sign(np.diff(index)))) <= 1:
        part = slice(index.min(), index.max() + 1)
        data = data[(slice(None),) * axis + (part,)]
        return np.flip(data, axis) if index[0] > index[-1] else data
    out = data[(slice(None),) * axis + (np.where(inside, index, 0),)]  # np.take would copy what is not in C order
    if not inside.all():
        out[(slice(None),) * axis + (~inside,)] = 0
    return out


def _separate(to_input: np.ndarray, shape: tuple[int, ...]) -> tuple[list[int], list[np.ndarray]]:
    """The input axis that feeds each output axis, and the input positions (voxels) of its samples, snapped to whole voxels where near."""
    axes = [int(np.abs(to_input[:3, axis]).argmax()) for axis in range(3)]
    assert sorted(axes) == [0, 1, 2], "the axes are rotated, not permuted"
    positions = [to_input[source, axis] * np.arange(shape[axis]) + to_input[source, 3] for axis, source in enumerate(axes)]
    return axes, [np.where(np.abs(p - np.rint(p)) < NIFTI_EDGE, np.rint(p), p) for p in positions]


def _axis_matrix(positions: np.ndarray, length: int, interpolation: Interpolation) -> sparse.csr_array:
    """(len(positions), length) interpolation weights along one axis.

    linear: a triangle of half-width max(1, spacing) voxels: plain linear interpolation where the output is finer, a weighted mean where it is
    coarser. cubic: Keys's kernel (a = −½), widened likewise. Positions within half a voxel of the array (half a spacing for coarser grids) count
    as inside, others give 0.
    """
    spacing = abs(positions[1] - positions[0]) if len(positions) > 1 else 1.0
    width = max(1.0, spacing)
    reach = int(np.ceil(width if interpolation == "linear" else 2 * width))
    nearest = np.floor(positions).astype(int)
    columns = nearest[:, None] + np.arange(1 - reach, reach + 1)
    distance = np.abs(columns - positions[:, None]) / width
    weights = np.clip(1 - distance, 0, None) if interpolation == "linear" else _keys(distance)
    weights[(columns < 0) | (columns >= length)] = 0
    total = weights.sum(axis=1, keepdims=True)
    edge = max(0.5, spacing / 2)
    inside = (positions > -edge - NIFTI_EDGE) & (positions < length - 1 + edge + NIFTI_EDGE)
    weights = np.where(inside[:, None] & (total > 0), weights / np.where(total > 0, total, 1), 0).astype(np.float32)
    rows = np.repeat(np.arange(len(positions)), columns.shape[1])
    keep = weights.reshape(-1) != 0
    return sparse.csr_array((weights.reshape(-1)[keep], (rows[keep], columns.reshape(-1)[keep])), shape=(len(positions), length))


def _keys(distance: np.ndarray) -> np.ndarray:
    """Keys's cubic convolution (IEEE TASSP 29:1153, 1981), exact for second-order polynomials.

    >>> _keys(np.array([0, 0.5, 1, 1.5, 2, 3])).tolist()
    [1.0, 0.5625, 0.0, -0.0625, 0.0, 0.0]
    """
    near, far = (1.5 * distance - 2.5) * distance**2 + 1, ((2.5 - 0.5 * distance) * distance - 4) * distance + 2
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0))


def majority(labels: np.ndarray, parts: int) -> np.ndarray:
    """The commonest id in each block of ``parts``³ voxels; among equals the smallest.

    >>> majority(np.array([[[5, 5], [7, 7]], [[7, 0], [0, 5]]], dtype=np.uint16), 2).tolist()
    [[[5]]]
    """
    d, h, w = (n // parts for n in labels.shape)
    blocks = labels.reshape(d, parts, h, parts, w, parts).transpose(0, 2, 4, 1, 3, 5).reshape(d * h * w, parts**3)
    blocks = np.sort(blocks, axis=1)
    best = blocks[:, 0].copy()
    mixed = np.flatnonzero(blocks[:, 0] != blocks[:, -1])  # most blocks hold one id
    runs = np.ascontiguousarray(blocks[mixed].T)
    run, longest, winner = np.ones(len(mixed), np.int16), np.ones(len(mixed), np.int16), runs[0].copy()
    for previous, current in zip(runs[:-1], runs[1:], strict=True):
        run = np.where(current == previous, run + 1, 1)
        longer = run > longest
        longest = np.where(longer, run, longest)
        winner = np.where(longer, current, winner)
    best[mixed] = winner
    return best.reshape(d, h, w)


def bounding_box(labels: np.ndarray, *, step: int = 1) -> tuple[slice, slice, slice]:
    """The smallest box, from and to multiples of ``step``, around what is not 0; empty if all is.

    >>> bounding_box(np.array([[[0, 0, 0, 0, 7, 0]]]), step=2)
    (slice(0, 2, None), slice(0, 2, None), slice(4, 6, None))
    """
    if labels.flags.f_contiguous and not labels.flags.c_contiguous:
        return bounding_box(labels.T, step=step)[::-1]
    plane = labels.max(0)                                                    # (H, W)
    found = [np.flatnonzero(line).tolist() for line in (labels.reshape(len(labels), -1).max(1), plane.max(1), plane.max(0))]
    return tuple(slice(f[0] // step * step, -(-(f[-1] + 1) // step) * step) if len(f) else slice(0, 0) for f in found)
