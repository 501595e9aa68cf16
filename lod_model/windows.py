"""Sliding windows: a volume in overlapping cubes, the softmax of a voxel averaged over the windows that cover it.

Source: Rajchl et al. 2018 (NeuroNet) and its public code: windows of 128³, half a window apart, the last one of an axis flush with the end.

Memory follows the first axis. Windows come in rows of equal first slice; once the next row begins, the slices before it are finished and
give their classes away. So the sums of all classes stand for ``side`` slices at most: 4·ΣC·side·H·W bytes, 16 MB a class at 256 × 256.
A network that gives its logits a few slices at a time, as :class:`lod_model.neuronet_engine.FastNeuroNet` does, needs sums for ``SLICES``
slices alone, and what it keeps of the windows that are begun.

What could be computed once for all windows, exactly, and is not: what no zero padding of a window's faces has reached. In NeuroNet it reaches
1 voxel on the stem, 1 to 4 of 64 on the first scale, 3 to 6 of 32 on the second, 4 to 7 of 16 on the third; at the volume's own faces it is no
difference. At 256³ in 27 windows, with every layer's rim computed again and no more, the encoder would take 1/1.5 (stem and first scale) to
1/1.7 (two scales) of its multiply-accumulates. A rim needs what lies behind it, though: with a slab of 16 voxels behind each face 1/1.1. The
encoder being a quarter of :class:`FastNeuroNet`'s time for the five protocols and three quarters for one, that makes it less than 1.1 times as
fast. Of the tails nothing can be shared: the softmax comes before the average.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data_registry.errors import InputError
from lod_model.neuronet_engine import FastNeuroNet, Window

SLICES = 2
"""At a time, of a network that gives slices: those of some hundred classes then stay in the processor's cache."""


@dataclass(frozen=True)
class Grid:
    """Where windows stand; all by axis, (D, H, W)."""

    shape: tuple[int, ...]
    """Of the volume, padded where it is smaller than a window."""
    sides: tuple[int, ...]
    starts: tuple[tuple[int, ...], ...]

    def row(self) -> list[tuple[slice, slice]]:
        """The places along H and W of the windows with the same first slice."""
        return list(itertools.product(*([slice(s, s + side) for s in starts] for starts, side in zip(self.starts[1:], self.sides[1:], strict=True))))

    def covering(self, axis: int) -> np.ndarray:
        """How many windows cover each place along an axis, float32."""
        count = np.zeros(self.shape[axis], dtype=np.float32)
        for start in self.starts[axis]:
            count[start : start + self.sides[axis]] += 1
        return count


def plan(shape: tuple[int, ...], *, side: int, stride: int, multiple: int) -> Grid:
    """Windows of ``side`` every ``stride`` voxels, the last one of an axis flush with its end.

    An axis shorter than ``side`` has one window, as long as it is, made up to a multiple of ``multiple``. InputError where side, stride
    and multiple do not go together.

    >>> plan((256, 150, 61), side=128, stride=64, multiple=8)
    Grid(shape=(256, 150, 64), sides=(128, 128, 64), starts=((0, 64, 128), (0, 22), (0,)))
    """
    if side < 1 or side % multiple:
        raise InputError(f"side: {side}; a positive multiple of {multiple} is wanted")
    if not 0 < stride <= side:
        raise InputError(f"stride: {stride}; from 1 to the side of a window, {side}, is wanted")
    padded = tuple(length if length >= side else length + -length % multiple for length in shape)
    sides = tuple(min(side, length) for length in padded)
    starts = tuple((*range(0, length - own, stride), length - own) for length, own in zip(padded, sides, strict=True))
    return Grid(padded, sides, starts)


@torch.inference_mode()
def window_classes(
    network: nn.Module | FastNeuroNet, x: Tensor, *, side: int = 128, stride: int = 64, fill: float = 0.0
) -> np.ndarray | dict[str, np.ndarray]:
    """The most probable class of each voxel of x (1, 1, D, H, W), z-scored over all voxels: (D, H, W), uint8 up to 256 classes, else uint16.

    ``network`` maps (1, 1, d, h, w) to logits (1, C, d, h, w), or to a dict of them, and then a dict comes back. It runs where its
    parameters are; ``config.multiple`` is what sides must be divisible by. ``fill`` is the value of voxels added to a volume that is smaller
    than a window: the z-score of air, say. Of classes that are equally probable to the last bit, the first one is taken.
    InputError for a shape, side or stride that cannot be.
    """
    grid = _plan_of(network, x, side, stride)
    labels: dict[str | None, np.ndarray] = {}
    for first, sums in _summed(network, x, grid, fill):
        for name, probability in sums.items():                                   # (slices, H, W, C)
            if name not in labels:
                labels[name] = np.empty(tuple(x.shape[2:]), dtype=np.uint8 if probability.shape[-1] <= 256 else np.uint16)
            out = labels[name][first : first + len(probability)]
            _, height, width = out.shape
            out[...] = probability.argmax(-1)[: len(out), :height, :width].cpu().numpy()
    return labels.get(None, labels)


@torch.inference_mode()
def window_probabilities(
    network: nn.Module | FastNeuroNet, x: Tensor, *, side: int = 128, stride: int = 64, fill: float = 0.0
) -> np.ndarray | dict[str, np.ndarray]:
    """As ``window_classes``, the mean probabilities, (C, D, H, W) float32: for few classes; 139 of them are 9.3 GB at 256³."""
    grid = _plan_of(network, x, side, stride)
    covering = np.multiply.outer(np.multiply.outer(grid.covering(0), grid.covering(1)), grid.covering(2))
    result: dict[str | None, np.ndarray] = {}
    for first, sums in _summed(network, x, grid, fill):
        for name, probability in sums.items():                                   # (slices, H, W, C)
            if name not in result:
                result[name] = np.empty((probability.shape[-1], *x.shape[2:]), dtype=np.float32)
            out = result[name][:, first : first + len(probability)]
            _, slices, height, width = out.shape
            mean = probability.permute(3, 0, 1, 2).cpu().numpy() / covering[first : first + len(probability)]
            out[...] = mean[:, :slices, :height, :width]
    return result.get(None, result)


Sums = dict[str | None, Tensor]
"""Name of an output, None for the only one → sums of probabilities (slices, H, W, C)."""


def _plan_of(network: nn.Module | FastNeuroNet, x: Tensor, side: int, stride: int) -> Grid:
    if x.ndim != 5 or x.shape[:2] != (1, 1) or 0 in x.shape:
        raise InputError(f"image: shape {tuple(x.shape)}; (1, 1, D, H, W) is wanted")
    return plan(tuple(x.shape[2:]), side=side, stride=stride, multiple=network.config.multiple)


def _summed(network: nn.Module | FastNeuroNet, x: Tensor, grid: Grid, fill: float) -> Iterator[tuple[int, Sums]]:
    """Finished slices in order: the number of the first one, and the sums, which hold until the next are asked for."""
    added = [padded - length for padded, length in zip(grid.shape, x.shape[2:], strict=True)]
    if any(added):
        x = F.pad(x, [n for end in added[::-1] for n in (0, end)], value=fill)
    if isinstance(network, FastNeuroNet):
        yield from _by_slices(network, x, grid)
    else:
        with _evaluating(network):
            yield from _by_rows(network, x, grid)


def _by_rows(network: nn.Module, x: Tensor, grid: Grid) -> Iterator[tuple[int, Sums]]:
    """One window after the other; the slices before the next row of windows are finished."""
    device = next((p.device for p in network.parameters()), x.device)
    depth, sums = grid.sides[0], {}
    for start, following in itertools.zip_longest(grid.starts[0], grid.starts[0][1:], fillvalue=grid.shape[0]):
        for rows, columns in grid.row():
            output = network(x[:, :, start : start + depth, rows, columns].to(device))
            for name, logits in output.items() if isinstance(output, Mapping) else [(None, output)]:
                if name not in sums:
                    sums[name] = logits.new_zeros((depth, *grid.shape[1:], logits.shape[1]), dtype=torch.float32)
                sums[name][:, rows, columns] += probabilities(logits)
            del output, logits
        finished = following - start
        yield start, {name: total[:finished] for name, total in sums.items()}
        for total in sums.values():
            for near in range(depth - finished):                                 # a slice at a time: the two parts may overlap
                total[near] = total[near + finished]
            total[depth - finished :] = 0


def _by_slices(network: FastNeuroNet, x: Tensor, grid: Grid) -> Iterator[tuple[int, Sums]]:
    """A few slices after the other, of all windows that have them; a window is begun when its first slice comes up."""
    depth, ahead = grid.sides[0], list(grid.starts[0])
    begun: list[tuple[int, slice, slice, Window]] = []
    for first in range(0, grid.shape[0], SLICES):
        last = min(first + SLICES, grid.shape[0])
        begun = [window for window in begun if window[0] + depth > first]
        while ahead and ahead[0] < last:
            start = ahead.pop(0)
            begun += [(start, *place, network.window(x[:, :, start : start + depth, *place])) for place in grid.row()]
        if not first or last - first < SLICES:
            sums = {name: torch.empty((last - first, *grid.shape[1:], c), device=network.device) for name, c in network.classes.items()}
        for total in sums.values():
            total.zero_()
        for start, rows, columns, window in begun:
            low, high = max(first, start), min(last, start + depth)
            for name, logits in window.slices(low - start, high - start).items():
                sums[name][low - first : high - first, rows, columns] += probabilities(logits)
        yield first, sums


def probabilities(logits: Tensor) -> Tensor:
    """The softmax of logits (1, C, D, H, W) as (D, H, W, C), float32; in the logits' own memory where they are float32.

    Class by class last, as the networks keep their maps, that takes a quarter of the time of torch's.
    """
    p = logits[0].permute(1, 2, 3, 0).float()
    p.sub_(p.amax(-1, keepdim=True)).exp_()
    return p.div_(p.sum(-1, keepdim=True))


@contextlib.contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    was_training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(was_training)
