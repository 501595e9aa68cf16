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

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lod_model.networks.conventions import L2_WEIGHT, NetworkConfig, check_image, convolve, initialise, l2_penalty
from lod_model.networks.group_norm import GroupNorm
from lod_model.networks.recipe import LOD_BRAIN

RECIPE = LOD_BRAIN  # its rival in architecture alone


@dataclass(frozen=True)
class UNetConfig(NetworkConfig):
    """:class:`NetworkConfig`; sides are halved between two of its widths.

    >>> UNetConfig().multiple
    8
    >>> UNetConfig.from_dict(UNetConfig(classes=3).to_dict()) == UNetConfig(classes=3)
    True
    >>> UNetConfig(widths=(12, 24))
    Traceback (most recent call last):
    ValueError: groups: 8, wanted a positive integer that divides every larger width of (12, 24)
    """

    network = "unet"
    widths: tuple[int, ...] = (16, 40, 88, 176)

    @property
    def multiple(self) -> int:
        """Every side of the image, in voxels, must be a multiple of this."""
        return 2 ** (len(self.widths) - 1)


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
        x = self.first_norm(convolve(self.first, x), inplace=inplace).relu_()
        x = F.dropout(x, self.dropout, self.training)
        return self.second_norm(convolve(self.second, x), inplace=inplace).relu_()


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
        initialise(self, [self.encoder[0].first])
        self.to(memory_format=torch.channels_last_3d)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, 1, D, H, W), z-scored over all voxels → logits (B, classes, D, H, W).

        ValueError where a side is no multiple of ``config.multiple``.
        """
        return self.head(self.features(x))

    def features(self, x: Tensor) -> Tensor:
        """What the head, a 1³ convolution, makes logits of: (B, widths[0], D, H, W)."""
        check_image(x, self.config.multiple)
        skips = []
        for pair in self.encoder:
            x = pair(F.max_pool3d(x, 2) if skips else x)                                       # (B, widths[i], D/2ⁱ, H/2ⁱ, W/2ⁱ)
            skips.append(x)
        skips.pop()
        for up, pair in zip(self.up, self.decoder, strict=True):
            x = pair(torch.cat((skips.pop(), up(x)), 1))                                       # each side doubles
        return x

    def l2(self, weight: float = L2_WEIGHT) -> Tensor:
        """The penalty to add to the loss; as LOD-Brain's, not on the convolution that sees the image."""
        return l2_penalty(self, [self.encoder[0].first], weight)

    @classmethod
    def from_dict(cls, config: dict) -> UNet:
        """The network of a plain dict, as a checkpoint or ``params.yaml`` has it."""
        return cls(UNetConfig.from_dict(config))
