"""A plain 3-D U-Net, LOD-Brain's rival at equal cost.

Paper: Çiçek, Abdulkadir, Lienkamp, Brox, Ronneberger, "3D U-Net: learning dense volumetric segmentation from sparse annotation",
MICCAI 2016; arXiv 1606.06650.

    image ─ Pair(16) ────────────────────── concat ─ Pair(16) ─ head
              └ max-pool 2 ─ Pair(40) ──── concat ─ Pair(40) ┘ transposed 2³
                               └ … Pair(88), and Pair(176) at the bottom

It sees the whole image at once: no levels of detail, no stage before the other. All else is LOD-Brain's (group norm of 8 groups with exact
moments, ReLU, dropout .05 after a block's first convolution, initial values, L2 penalty), so that a comparison is of the architecture alone.

Deviations from the paper:
- widths such that a pass costs what LOD-Brain's two levels cost: 70,277 against 70,940 multiply-accumulates a voxel (−0.9 %);
  both convolutions of a pair have the same width, and the transposed convolution goes down to the width it is concatenated with;
- sides stay as they are (padded convolutions), group norm stands in for batch norm, which one volume a batch does not allow.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lod_model.networks.group_norm import GroupNorm

L2_WEIGHT = 1e-4


@dataclass(frozen=True)
class UNetConfig:
    """What the network is made of; checked here.

    classes  output channels, background included
    widths   channels at each resolution, finest first; between two of them sides are halved
    dropout  probability that an element is dropped after each pair's first convolution, in training
    groups   groups of a group norm, or as many as it has channels if these are fewer
    epsilon  added to the variance by the group norm

    >>> UNetConfig().multiple
    8
    >>> UNetConfig(widths=(12, 24))
    Traceback (most recent call last):
    ValueError: groups: 8, wanted a positive integer that divides every larger width of (12, 24)
    """

    classes: int = 7
    widths: tuple[int, ...] = (16, 40, 88, 176)
    dropout: float = 0.05
    groups: int = 8
    epsilon: float = 1e-3

    def __post_init__(self) -> None:
        if not _is_integer(self.classes, 2):
            raise ValueError(f"classes: {self.classes!r}, wanted an integer of at least 2")
        if not isinstance(self.widths, list | tuple) or len(self.widths) < 2 or not all(_is_integer(w, 1) for w in self.widths):
            raise ValueError(f"widths: {self.widths!r}, wanted two or more positive integers")
        object.__setattr__(self, "widths", tuple(self.widths))
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: {self.dropout!r}, wanted a number from 0 to below 1")
        if not _is_integer(self.groups, 1) or any(w % min(self.groups, w) for w in self.widths):
            raise ValueError(f"groups: {self.groups!r}, wanted a positive integer that divides every larger width of {self.widths}")
        if not _is_number(self.epsilon) or not 0 < self.epsilon < math.inf:
            raise ValueError(f"epsilon: {self.epsilon!r}, wanted a positive number")

    @property
    def multiple(self) -> int:
        """Every side of the image, in voxels, must be a multiple of this."""
        return 2 ** (len(self.widths) - 1)

    def to_dict(self) -> dict:
        """Plain numbers and lists; ``from_dict`` takes them back."""
        return asdict(self) | {"widths": list(self.widths)}

    @classmethod
    def from_dict(cls, values: dict) -> UNetConfig:
        """The configuration with these values, defaults for the rest. An unknown key is a ValueError.

        >>> UNetConfig.from_dict(UNetConfig(classes=3).to_dict()) == UNetConfig(classes=3)
        True
        """
        known = [f.name for f in fields(cls)]
        unknown = sorted(str(key) for key in values if key not in known)
        if unknown:
            raise ValueError(f"unet has no {', '.join(unknown)}; known: {', '.join(known)}")
        return cls(**values)


def _is_integer(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class Pair(nn.Module):
    """Conv 3³ → norm → ReLU → dropout → conv 3³ → norm → ReLU; (B, channels, D, H, W) → (B, width, D, H, W)."""

    def __init__(self, channels: int, width: int, config: UNetConfig) -> None:
        super().__init__()
        groups = min(config.groups, width)
        self.first, self.second = nn.Conv3d(channels, width, 3, padding=1), nn.Conv3d(width, width, 3, padding=1)
        self.first_norm, self.second_norm = (GroupNorm(groups, width, epsilon=config.epsilon) for _ in range(2))
        self.dropout = config.dropout

    def forward(self, x: Tensor) -> Tensor:
        inplace = not torch.is_grad_enabled()
        x = self.first_norm(self.first(x), inplace=inplace).relu_()
        x = F.dropout(x, self.dropout, self.training)
        return self.second_norm(self.second(x), inplace=inplace).relu_()


class UNet(nn.Module):
    """The network of a ``UNetConfig``.

    >>> net = UNet(UNetConfig()).eval()
    >>> sum(p.numel() for p in net.parameters())
    2564311
    >>> net(torch.zeros(1, 1, 16, 8, 24)).shape
    torch.Size([1, 7, 16, 8, 24])
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.widths
        self.encoder = nn.ModuleList(Pair(channels, width, config) for channels, width in zip((1, *widths), widths, strict=False))
        finer = list(zip(widths, widths[1:], strict=False))[::-1]                              # (width, width below), coarsest first
        self.up = nn.ModuleList(nn.ConvTranspose3d(below, width, 2, stride=2) for width, below in finer)
        self.decoder = nn.ModuleList(Pair(2 * width, width, config) for width, _ in finer)
        self.head = nn.Conv3d(widths[0], config.classes, 1)
        self._initialise()
        self.to(memory_format=torch.channels_last_3d)

    def _initialise(self) -> None:
        """LOD-Brain's: Glorot uniform for what sees the image, Keras's He normal (cut at two deviations, widened) for the rest."""
        for conv in self._convolutions():
            if conv is self.encoder[0].first:
                nn.init.xavier_uniform_(conv.weight)
            else:
                deviation = math.sqrt(2 / (conv.weight.shape[1] * conv.weight[0, 0].numel())) / 0.87962566103423978
                nn.init.trunc_normal_(conv.weight, std=deviation, a=-2 * deviation, b=2 * deviation)
            nn.init.zeros_(conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, 1, D, H, W), z-scored over all voxels → logits (B, classes, D, H, W).

        ValueError where a side is no multiple of ``config.multiple``.
        """
        if x.ndim != 5 or x.shape[1] != 1:
            raise ValueError(f"image: shape {tuple(x.shape)}, wanted (B, 1, D, H, W)")
        if any(side == 0 or side % self.config.multiple for side in x.shape[2:]):
            raise ValueError(f"image: {' × '.join(map(str, x.shape[2:]))} voxels, wanted every side a multiple of {self.config.multiple}")
        skips = []
        for pair in self.encoder:
            x = pair(F.max_pool3d(x, 2) if skips else x)                                       # (B, widths[i], D/2ⁱ, H/2ⁱ, W/2ⁱ)
            skips.append(x)
        skips.pop()
        for up, pair in zip(self.up, self.decoder, strict=True):
            x = pair(torch.cat((skips.pop(), up(x)), 1))                                       # each side doubles
        return self.head(x)

    def l2(self, weight: float = L2_WEIGHT) -> Tensor:
        """The penalty to add to the loss: weight · Σw² over every kernel but the one that sees the image, as LOD-Brain's."""
        kernels = [conv.weight for conv in self._convolutions() if conv is not self.encoder[0].first]
        return weight * torch.stack([kernel.float().square().sum() for kernel in kernels]).sum()

    def _convolutions(self) -> list[nn.Module]:
        return [m for m in self.modules() if isinstance(m, nn.Conv3d | nn.ConvTranspose3d)]

    @classmethod
    def from_dict(cls, config: dict) -> UNet:
        """The network of a plain dict, as a checkpoint or ``params.yaml`` has it."""
        return cls(UNetConfig.from_dict(config))
