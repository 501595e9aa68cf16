"""Attention for the networks of slices: what a block finds is weighed, channel by channel and pixel by pixel.

Paper: Roy, Navab, Wachinger, "Recalibrating fully convolutional networks with spatial and channel squeeze and excitation blocks", IEEE
Transactions on Medical Imaging 38:540, 2019; the larger of the two weights counts. FastSurferVINN's paper finds that attention does not help.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

REDUCTION = 2


class SqueezeExcitation(nn.Module):
    """x (B, channels, H, W) → the same shape, each value times a weight between 0 and 1.

    Of a channel: from the means of all channels, through half as many; of a pixel: from its channels alone.

    >>> block = SqueezeExcitation(2)
    >>> for parameter in block.parameters():
    ...     _ = nn.init.zeros_(parameter)
    >>> block(torch.ones(1, 2, 1, 1)).flatten().tolist()
    [0.5, 0.5]
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, max(1, channels // REDUCTION), 1)
        self.excite = nn.Conv2d(max(1, channels // REDUCTION), channels, 1)
        self.pixel = nn.Conv2d(channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        channel = self.excite(self.squeeze(x.mean((2, 3), keepdim=True)).relu()).sigmoid()    # (B, channels, 1, 1)
        return x * torch.maximum(channel, self.pixel(x).sigmoid())                            # the pixel's is (B, 1, H, W)
