"""What a pass through a network costs, in multiply-accumulates of its convolutions as its ``forward`` writes them."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lod_model.networks.competitive import ThreeViews

FIELD_OF_VIEW_MM = 256   # of a named grid


def macs(network: nn.Module, side: int) -> int:
    """Multiply-accumulates of one pass over (1, 1, side, side, side); ``side`` a multiple of ``network.config.multiple``.

    Counted at the smallest side, or that of a network's windows, and scaled: the cost of a padded convolution is proportional to the number
    of voxels, and windows are counted as if they did not overlap. Padding counts as if it were multiplied; norms, activations and sums do not
    count. The networks of three views pass over every slice of each.

    >>> from lod_model import networks
    >>> for name in networks.names():
    ...     print(name, macs(networks.build(name), 256) // 10**6)
    fastsurfer_cnn 23603261
    fastsurfer_vinn 34948678
    lod_brain 1190175
    neuronet 821752
    unet 1179056
    """
    smallest = network.config.multiple
    if side < 1 or side % smallest:
        raise ValueError(f"side: {side}, wanted a positive multiple of {smallest}")
    if isinstance(network, ThreeViews):
        return _macs_of_views(network, side)
    if hasattr(network.config, "window"):
        window = network.config.window + -network.config.window % smallest
        return _macs_of_a_window(network, window) * side**3 // window**3
    parameter = next(network.parameters())
    was_training = network.training
    network.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(parameter.new_zeros(1, 1, smallest, smallest, smallest))
    network.train(was_training)
    return counter.get_total_flops() // 2 * (side // smallest) ** 3


def _macs_of_a_window(network: nn.Module, side: int) -> int:
    """On the meta device, where nothing is computed."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        copy.deepcopy(network).to("meta").eval()(torch.zeros(1, 1, side, side, side, device="meta"))
    return counter.get_total_flops() // 2


def _macs_of_views(network: ThreeViews, side: int) -> int:
    """Over ``side`` slices in each view, counted for one; on the meta device nothing is computed."""
    scale = torch.tensor([network.config.scale(FIELD_OF_VIEW_MM / side)])
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        for _, view in copy.deepcopy(network).to("meta").eval().views():
            view(torch.zeros(1, network.config.slices, side, side, device="meta"), scale)
    return side * (counter.get_total_flops() // 2)
