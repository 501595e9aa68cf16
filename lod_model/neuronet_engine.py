"""NeuroNet rewritten exactly for windows: the same logits to rounding, a few slices at a time.

In evaluation a tail is linear: norms are scalings, and a 1³ convolution commutes with doubling. So the last C → C convolution, two fifths
of the network's arithmetic where C is 139, goes through the doublings into the small convolutions of the skips and of the deepest map:

    head(double(u) + norm(conv(skip)))  =  double(head(u)) + (head · norm · conv)(skip)

What is left of all tails together is one of Σ C channels: a 1³ convolution of each scale, doubled and added up. A slice of the logits needs
two to three of the next coarser map, so they are computed when asked for, in cache, and never stand in memory as a whole; kept of a window are
its maps from the first halving on, 1/32 of the logits of the paper's five protocols.

Of the encoder, a norm between two convolutions goes into the first.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lod_model.engine_kernels import Kernel, add_conv, cast, conv, keep_freed_memory
from lod_model.networks.neuronet import ACTIVATIONS, NeuroNet, NeuroNetConfig, Tail, Unit


class FastNeuroNet:
    """A trained ``NeuroNet`` as it stands, for inference on the device it is on; later changes of its weights change nothing here.

    ``protocols`` are those to compute, by default all.
    """

    predicts = "windows"

    def __init__(self, network: NeuroNet, protocols: tuple[str, ...] | None = None) -> None:
        self.config: NeuroNetConfig = network.config
        self.classes = {name: network.config.protocols[name] for name in protocols or network.config.protocols}
        self.device, dtype = network.stem.weight.device, network.stem.weight.dtype
        keep_freed_memory()
        with torch.no_grad():
            stem = network.stem.weight
            self.stem = cast(Kernel(stem, stem.new_zeros(len(stem))), dtype)
            self.units = [_FastUnit(unit) for unit in network.units]
            levels = zip(*(_composed(network.tails[name]) for name in self.classes), strict=True)
            self.levels = [cast(Kernel(*map(torch.cat, zip(*kernels, strict=True))), dtype) for kernels in levels]
            """Of each scale, finest first: a 1³ convolution to all classes of all protocols."""

    def window(self, x: Tensor) -> Window:
        """What can be asked for slices of the logits of x (1, 1, D, H, W), sides multiples of ``config.multiple``."""
        return Window(self, x.to(self.device, self.stem.weight.dtype))


class Window:
    """An image whose coarser maps are computed."""

    def __init__(self, network: FastNeuroNet, x: Tensor) -> None:
        self.network, self.image = network, x
        x = self._stem(0, x.shape[2])
        self.coarse: list[Tensor] = []
        """(1, filters[i], D/2ⁱ, H/2ⁱ, W/2ⁱ) from i = 1 on."""
        for unit in network.units:
            x = unit(x)
            if unit.halves:
                self.coarse.append(x)
            self.coarse[-1] = x

    def slices(self, first: int, last: int) -> dict[str, Tensor]:
        """Protocol → logits (1, classes, last − first, H, W) of slices first … last − 1; a new tensor, channels last.

        The protocols' are views of one tensor, next to each other.
        """
        y = self._level(0, first, last)
        return dict(zip(self.network.classes, y.split(list(self.network.classes.values()), dim=1), strict=True))

    def _level(self, level: int, first: int, last: int) -> Tensor:
        """These slices of what the tails sum up at a scale, (1, Σ classes, last − first, h, w)."""
        kernel = self.network.levels[level]
        features = self.coarse[level - 1][:, :, first:last] if level else self._stem(first, last)
        if level == len(self.coarse):
            return conv(features, kernel)
        depth = self.coarse[level].shape[2]
        low, high = max((first - 1) // 2, 0), min(last // 2 + 1, depth)          # the coarser slices that these lie between
        u = self._level(level + 1, low, high)[0].transpose(0, 1)                 # (slices, Σ classes, h/2, w/2), channels last
        wanted = torch.arange(first, last, device=u.device)
        near = wanted // 2
        far = (near + 2 * (wanted % 2) - 1).clamp(0, depth - 1)
        u = torch.lerp(u[near - low], u[far - low], 0.25)                        # ¾ of the nearer slice, ¼ of the other
        u = F.interpolate(u, scale_factor=2, mode="bilinear")
        for border in (u[: first == 0], u[len(u) - (last == 2 * depth) :], u[:, :, 0], u[:, :, -1], u[..., 0], u[..., -1]):
            border.mul_(0.75)                                                    # zeros lie beyond it, where it was repeated
        y = u.transpose(0, 1)[None]                                              # (1, Σ classes, slices, h, w)
        add_conv(y, features, kernel, padding=(0, 0, 0))
        return y

    def _stem(self, first: int, last: int) -> Tensor:
        """These slices of the finest skip, (1, filters[0], last − first, H, W)."""
        depth = self.image.shape[2]
        near = self.image[:, :, max(first - 1, 0) : last + 1]
        front, back = max(1 - first, 0), max(last + 1 - depth, 0)
        return conv(F.pad(near, [0] * 4 + [front, back]) if front or back else near, self.network.stem, padding=(0, 1, 1))


class _FastUnit:
    """A residual unit that owns its input: one that does not halve writes over it."""

    def __init__(self, unit: Unit) -> None:
        self.unit, self.halves, self.activate = unit, unit.halves, ACTIVATIONS[unit.activation]
        dtype = unit.first.weight.dtype
        scale, shift = _affine(unit.second_norm)
        self.first = cast(Kernel(unit.first.weight.double() * scale.view(-1, 1, 1, 1, 1), shift), dtype)
        self.second = cast(Kernel(unit.second.weight, torch.zeros_like(shift)), dtype)
        self.norm = [tensor.detach().clone() for tensor in (unit.first_norm.running_mean, unit.first_norm.running_var)]
        self.norm += [tensor.detach().clone() for tensor in (unit.first_norm.weight, unit.first_norm.bias)]
        self.epsilon = unit.first_norm.eps

    def __call__(self, x: Tensor) -> Tensor:
        y = self.activate(F.batch_norm(x, *self.norm, eps=self.epsilon), inplace=True)
        y = self.activate(conv(y, self.first, stride=2 if self.halves else 1, padding=(1, 1, 1)), inplace=True)
        x = self.unit.shortcut(x)
        add_conv(x, y, self.second, padding=(1, 1, 1))
        return x


def _affine(norm: torch.nn.BatchNorm3d) -> tuple[Tensor, Tensor]:
    """(scale, shift), each (C,) in float64, that a norm is in evaluation."""
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return scale, norm.bias.double() - norm.running_mean.double() * scale


def _composed(tail: Tail) -> list[Kernel]:
    """A tail's 1³ convolutions of the skips, finest first, and of the deepest map, with norms and head in them; float64."""
    head = tail.head.weight.double().flatten(1)                                  # (C, C)
    kernels = []
    for skip, norm in zip(tail.skips, tail.norms, strict=True):
        scale, shift = _affine(norm)
        weight = (head * scale) @ skip.weight.double().flatten(1)
        kernels.append(Kernel(weight[..., None, None, None], head @ shift))
    deepest = head if isinstance(tail.convert, torch.nn.Identity) else head @ tail.convert.weight.double().flatten(1)
    return [*kernels, Kernel(deepest[..., None, None, None], torch.zeros_like(head[0]))]
