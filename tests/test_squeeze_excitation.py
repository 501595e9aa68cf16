"""Attention in the networks of slices: by hand, in every block, and nowhere unless asked for."""

import math

import pytest
import torch

from lod_model import networks
from lod_model.networks.squeeze_excitation import SqueezeExcitation

SMALL = {"classes": 3, "filters": 4, "depth": 2}


def test_by_hand():
    """Channel 0 has mean 3, so its weight is σ(3), and that of channel 1 σ(−3), which is less than the pixel's ½."""
    block = SqueezeExcitation(2)
    for parameter in block.parameters():
        torch.nn.init.zeros_(parameter)
    with torch.no_grad():
        block.squeeze.weight[0, 0] = 1
        block.excite.weight[:, 0, 0, 0] = torch.tensor([1.0, -1.0])
    x = torch.tensor([[[[2.0, 4.0]], [[5.0, -1.0]]]])
    high = 1 / (1 + math.exp(-3))
    assert torch.allclose(block(x), torch.tensor([[[[2 * high, 4 * high]], [[2.5, -0.5]]]]))
    with torch.no_grad():
        block.pixel.weight[0, 1] = 10  # pixel by pixel: σ(50) and σ(−10)
    assert torch.allclose(block(x), torch.tensor([[[[2.0, 4 * high]], [[5.0, -1 / (1 + math.exp(3))]]]]))


@pytest.mark.parametrize(("name", "blocks"), [("fastsurfer_cnn", 5), ("fastsurfer_vinn", 7)])
def test_every_block_has_it_if_asked(name, blocks):
    more = {"native_filters": 4, "inner_size": 32} if name == "fastsurfer_vinn" else {}
    plain, asked = (networks.build(name, SMALL | more | extra) for extra in ({}, {"attention": "squeeze_excitation"}))
    assert not any(isinstance(part, SqueezeExcitation) for part in plain.modules())
    for view in ("axial", "coronal", "sagittal"):
        found = [part for part in asked.get_submodule(view).modules() if isinstance(part, SqueezeExcitation)]
        assert len(found) == blocks
        assert asked.parameter_counts()[view] - plain.parameter_counts()[view] == sum(p.numel() for part in found for p in part.parameters())
    asked.axial(torch.randn(2, 7, 32, 32), torch.ones(2)).square().mean().backward()
    assert all(p.grad.abs().sum() > 0 for n, p in asked.axial.named_parameters() if n.endswith("pixel.weight"))
    assert networks.build(name, asked.config.to_dict()).config == asked.config
    with pytest.raises(ValueError, match="attention: 'gates', wanted one of none, squeeze_excitation"):
        networks.build(name, {"attention": "gates"})
