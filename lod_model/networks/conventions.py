"""What the networks share: a checked configuration, LOD-Brain's initial values and L2 penalty, the check of an image, a guarded convolution."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import asdict, dataclass, fields
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

L2_WEIGHT = 1e-4


class Configuration:
    """What a network is made of: a frozen dataclass, checked on construction, so that a network that exists is a network that runs."""

    network: ClassVar[str]
    """Its name, for what is said of a wrong configuration."""

    def to_dict(self) -> dict:
        """Plain numbers, names and lists, for a checkpoint or a YAML file; ``from_dict`` takes them back."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict) -> Self:
        """The configuration with these values, defaults for the rest. An unknown key is a ValueError."""
        known = [f.name for f in fields(cls)]
        unknown = sorted(str(key) for key in values if key not in known)
        if unknown:
            raise ValueError(f"{cls.network} has no {', '.join(unknown)}; known: {', '.join(known)}")
        return cls(**values)


@dataclass(frozen=True)
class NetworkConfig(Configuration):
    """What a network with group norms is made of.

    classes  output channels, background included
    widths   filters at each resolution, finest first
    dropout  probability that an element is dropped after each block's first convolution, in training
    groups   groups of a group norm, or as many as it has channels if these are fewer
    epsilon  added to the variance by the group norm
    """

    classes: int = 7
    widths: tuple[int, ...] = ()
    dropout: float = 0.05
    groups: int = 8
    epsilon: float = 1e-3

    def __post_init__(self) -> None:
        if not is_integer(self.classes, 2):
            raise ValueError(f"classes: {self.classes!r}, wanted an integer of at least 2")
        if not isinstance(self.widths, list | tuple) or len(self.widths) < 2 or not all(is_integer(w, 1) for w in self.widths):
            raise ValueError(f"widths: {self.widths!r}, wanted two or more positive integers")
        object.__setattr__(self, "widths", tuple(self.widths))
        if not is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: {self.dropout!r}, wanted a number from 0 to below 1")
        if not is_integer(self.groups, 1) or any(w % min(self.groups, w) for w in self.widths):
            raise ValueError(f"groups: {self.groups!r}, wanted a positive integer that divides every larger width of {self.widths}")
        if not is_number(self.epsilon) or not 0 < self.epsilon < math.inf:
            raise ValueError(f"epsilon: {self.epsilon!r}, wanted a positive number")


def is_integer(value: object, least: int) -> bool:
    """Whether it is an int of at least ``least``; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def convolutions(network: nn.Module) -> list[nn.Conv3d | nn.ConvTranspose3d]:
    """All of a network's, in order."""
    return [m for m in network.modules() if isinstance(m, nn.Conv3d | nn.ConvTranspose3d)]


def initialise(network: nn.Module, stems: Collection[nn.Module]) -> None:
    """LOD-Brain's initial values: Glorot uniform for the ``stems``, which see the image, He normal for every other convolution, bias 0."""
    for conv in convolutions(network):
        if conv in stems:
            nn.init.xavier_uniform_(conv.weight)
        else:   # Keras cuts the normal at two deviations and widens it to keep the variance
            deviation = math.sqrt(2 / (conv.weight.shape[1] * conv.weight[0, 0].numel())) / 0.87962566103423978
            nn.init.trunc_normal_(conv.weight, std=deviation, a=-2 * deviation, b=2 * deviation)
        nn.init.zeros_(conv.bias)


def l2_penalty(network: nn.Module, stems: Collection[nn.Module], weight: float) -> Tensor:
    """weight · Σw² over the kernels of every convolution but the ``stems``.

    Keras's L2: the squares are summed, neither halved nor averaged, so the gradient is 2·weight·w. It is part of the loss that Adam sees;
    AdamW's decay is another thing.
    """
    kernels = [conv.weight for conv in convolutions(network) if conv not in stems]
    return weight * torch.stack([kernel.float().square().sum() for kernel in kernels]).sum()


def check_image(x: Tensor, multiple: int) -> None:
    """ValueError unless x is (B, 1, D, H, W) with sides that are multiples of ``multiple``."""
    if x.ndim != 5 or x.shape[1] != 1:
        raise ValueError(f"image: shape {tuple(x.shape)}, wanted (B, 1, D, H, W)")
    if any(side == 0 or side % multiple for side in x.shape[2:]):
        raise ValueError(f"image: {' × '.join(map(str, x.shape[2:]))} voxels, wanted every side a multiple of {multiple}")


def convolve(conv: nn.Conv3d, x: Tensor) -> Tensor:
    """conv(x), under autocast too.

    torch 2.13: oneDNN's bf16 weight gradient of a 3³ convolution over exactly 2³ voxels holds uninitialised memory; those are in float32.
    """
    if tuple(x.shape[2:]) == (2, 2, 2) and torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return conv(x.float())
    return conv(x)
