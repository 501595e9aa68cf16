"""The plain U-Net: what it is by hand arithmetic, and what it costs beside LOD-Brain."""

import math

import pytest
import torch
from torch.nn import functional as F

from data_registry.errors import InputError
from lod_model import networks
from lod_model.networks.cost import macs
from lod_model.networks.unet import UNet, UNetConfig

SMALL = UNetConfig(classes=3, widths=(2, 4, 8), groups=2, dropout=0.0)


def small() -> UNet:
    torch.manual_seed(0)
    net = UNet(SMALL)
    for parameter in net.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return net.eval()


def by_hand(net: UNet, x: torch.Tensor) -> torch.Tensor:
    """The network of ``SMALL`` written out in torch's own functions and float64, tensor by tensor."""
    t = {name: tensor.double() for name, tensor in net.state_dict().items()}

    def norm(x, name):
        return F.relu(F.group_norm(x, min(2, x.shape[1]), t[f"{name}_norm.weight"], t[f"{name}_norm.bias"], 1e-3))

    def pair(x, name):
        for conv in ("first", "second"):
            x = norm(F.conv3d(x, t[f"{name}.{conv}.weight"], t[f"{name}.{conv}.bias"], padding=1), f"{name}.{conv}")
        return x

    def up(x, name):
        return F.conv_transpose3d(x, t[f"{name}.weight"], t[f"{name}.bias"], stride=2)

    fine = pair(x.double(), "encoder.0")
    middle = pair(F.max_pool3d(fine, 2), "encoder.1")
    bottom = pair(F.max_pool3d(middle, 2), "encoder.2")
    middle = pair(torch.cat((middle, up(bottom, "up.0")), 1), "decoder.0")
    fine = pair(torch.cat((fine, up(middle, "up.1")), 1), "decoder.1")
    return F.conv3d(fine, t["head.weight"], t["head.bias"])


def test_it_is_the_network_written_out_by_hand():
    net, x = small(), torch.randn(2, 1, 8, 12, 16)
    expected = by_hand(net, x)
    assert expected.shape == (2, 3, 8, 12, 16)
    torch.testing.assert_close(net(x).double(), expected, atol=1e-4, rtol=1e-4)
    with torch.inference_mode():
        torch.testing.assert_close(net(x).double(), expected, atol=1e-4, rtol=1e-4)
    if torch.get_num_threads() > 1:  # with one, torch takes another kernel for the last convolution
        assert net(x).is_contiguous(memory_format=torch.channels_last_3d)


def test_parameters_by_hand():
    widths, classes = UNetConfig().widths, 7

    def pair(channels, width):
        return 27 * (channels + width) * width + 2 * width + 4 * width   # two kernels, their biases, two norms

    down = sum(map(pair, (1, *widths), widths))
    up = sum(8 * below * width + width + pair(2 * width, width) for width, below in zip(widths, widths[1:], strict=False))
    assert sum(p.numel() for p in UNet(UNetConfig()).parameters()) == down + up + widths[0] * classes + classes == 2564311


def test_cost_by_hand():
    """A voxel's multiply-accumulates: 27·in·out a 3³ convolution; an up-convolution has one tap a voxel it writes."""
    net = UNet(SMALL)
    bottom = 27 * (4 * 8 + 8 * 8)
    middle = 27 * (2 * 4 + 4 * 4) + 8 * 4 + 27 * (8 * 4 + 4 * 4)
    fine = 27 * (1 * 2 + 2 * 2) + 4 * 2 + 27 * (4 * 2 + 2 * 2) + 2 * 3
    assert macs(net, 8) == 8**3 * fine + 4**3 * middle + 2**3 * bottom
    assert macs(net, 64) == 8**3 * macs(net, 8)
    for side in (0, -4, 6):
        with pytest.raises(ValueError, match=f"side: {side}, wanted a positive multiple of 4"):
            macs(net, side)


def test_cost_of_lod_brain_by_hand():
    """At each level's own resolution, the head too: 70,940 a voxel of the image."""
    fine = 27 * 32 + 27 * 32 * 32 + 32 * 128 + (27 * 128 * 8) // 8 + 8 * 32 + 27 * 32 * 32 + 32 * 7
    coarse = 27 * 32 + 27 * 32 * 16 + 16 * 64 + (27 * 64 * 32 + 32 * 128) // 8 + (27 * 128 * 16) // 64 + 16 * 64 // 8
    coarse += (27 * 64 * 8) // 8 + 8 * 32 + 27 * 32 * 32 + 32 * 7
    assert fine + coarse // 8 == 70940
    assert macs(networks.build("lod_brain"), 64) == 64**3 * fine + 32**3 * coarse


def test_it_costs_what_lod_brain_costs():
    cost = {name: macs(networks.build(name), 64) for name in ("lod_brain", "unet")}
    assert 0.95 < cost["unet"] / cost["lod_brain"] < 1.05


def test_initial_values_and_penalty_are_those_of_lod_brain():
    torch.manual_seed(0)
    net = UNet(UNetConfig())
    kernel = net.decoder[1].first.weight   # 80 → 40: what a He normal has
    assert kernel.std().item() == pytest.approx(math.sqrt(2 / (27 * kernel.shape[1])), rel=0.03)
    first = net.encoder[0].first.weight
    assert first.abs().max() <= math.sqrt(6 / (27 * (1 + 16))) and first.std() > 0.5 * math.sqrt(2 / (27 * (1 + 16)))
    assert all((m.bias == 0).all() for m in net.modules() if isinstance(m, torch.nn.Conv3d | torch.nn.ConvTranspose3d))
    for module in net.modules():
        if isinstance(module, torch.nn.Conv3d | torch.nn.ConvTranspose3d):
            module.weight.data.fill_(1)
    counted = sum(m.weight.numel() for m in net.modules() if isinstance(m, torch.nn.Conv3d | torch.nn.ConvTranspose3d)) - first.numel()
    assert net.l2().item() == pytest.approx(1e-4 * counted, rel=1e-5)


def test_dropout_acts_in_training_alone():
    net, x = UNet(UNetConfig(widths=(4, 8), dropout=0.5)), torch.randn(1, 1, 8, 8, 8)
    assert not torch.equal(net(x), net(x))
    net.eval()
    assert torch.equal(net(x), net(x))


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"classes": 1}, "classes: 1, wanted an integer of at least 2"),
        ({"widths": (8,)}, r"widths: \(8,\), wanted two or more"),
        ({"widths": 8}, "widths: 8, wanted two or more"),
        ({"widths": (12, 24)}, "groups: 8, wanted a positive integer that divides"),
        ({"dropout": 1}, "dropout: 1, wanted"),
        ({"epsilon": 0}, "epsilon: 0, wanted"),
        ({"levels": 2}, "unet has no levels; known: classes, widths"),
    ],
)
def test_bad_configurations_are_one_line(config, line):
    with pytest.raises(InputError, match=line) as raised:
        networks.build("unet", config)
    assert "\n" not in str(raised.value) and str(raised.value).startswith("network unet: ")


def test_bad_images_and_no_coarse_stage():
    net = small()
    with pytest.raises(ValueError, match="8 × 8 × 6 voxels, wanted every side a multiple of 4"):
        net(torch.zeros(1, 1, 8, 8, 6))
    with pytest.raises(ValueError, match=r"wanted \(B, 1, D, H, W\)"):
        net(torch.zeros(1, 2, 8, 8, 8))
    assert networks.build_coarse("unet") is None
    assert networks.build("unet", net.config.to_dict()).config == net.config
