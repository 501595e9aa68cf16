"""What a pass through a network costs, in multiply-accumulates of its convolutions as its ``forward`` writes them."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def macs(network: nn.Module, side: int) -> int:
    """Multiply-accumulates of one pass over (1, 1, side, side, side); ``side`` a multiple of ``network.config.multiple``.

    Counted at the smallest side and scaled: the cost of a padded convolution is proportional to the number of voxels. Padding counts as
    if it were multiplied; norms, activations and sums do not count.

    >>> from lod_model import networks
    >>> for name in networks.names():
    ...     print(name, macs(networks.build(name), 256) // 10**6)
    lod_brain 1190175
    neuronet 821752
    unet 1179056
    """
    smallest = network.config.multiple
    if side < 1 or side % smallest:
        raise ValueError(f"side: {side}, wanted a positive multiple of {smallest}")
    parameter = next(network.parameters())
    was_training = network.training
    network.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(parameter.new_zeros(1, 1, smallest, smallest, smallest))
    network.train(was_training)
    return counter.get_total_flops() // 2 * (side // smallest) ** 3
