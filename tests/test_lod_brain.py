"""LOD-Brain: its blocks against small computations written out here, and, in full, against the published network's answers."""

import numpy as np
import pytest
import torch
from published import SCANS, published
from small_networks import made, noise
from torch.nn import functional as F

from data_registry.errors import InputError
from lod_model import networks
from lod_model.networks.group_norm import GroupNorm, group_moments
from lod_model.networks.lod_brain import LODBrain, LODBrainConfig, Plain, UpPlain

COARSE = LODBrainConfig(levels=1, coarse_pool=4)
RELEASED = LODBrainConfig()
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last_3d}


def naive_norm(x: np.ndarray, groups: int, weight: np.ndarray, bias: np.ndarray, epsilon: float) -> np.ndarray:
    """float64 NumPy on (B, C, *space), group by group."""
    x, out = x.astype(np.float64), np.empty(x.shape)
    size = x.shape[1] // groups
    for b in range(x.shape[0]):
        for c in range(x.shape[1]):
            group = x[b, c // size * size : (c // size + 1) * size]
            out[b, c] = (x[b, c] - group.mean()) / np.sqrt(group.var() + epsilon) * weight[c] + bias[c]
    return out


# Configuration


def test_released_parameter_counts():
    assert sum(p.numel() for p in LODBrain(RELEASED).parameters()) == 337_719
    assert sum(p.numel() for p in LODBrain(COARSE).parameters()) == 218_751


def test_parameters_of_each_part():
    net = LODBrain(RELEASED)
    level0, level1 = net.levels
    parts = [level0.stem, *level0.encoder, level0.bridge, *level0.decoder, level0.out]
    parts += [level1.stem, *level1.encoder, level1.bridge, *level1.decoder, level1.out, net.head]
    counts = [sum(p.numel() for p in part.parameters()) for part in parts]
    assert counts == [896, 22_128, 88_288, 63_600, 15_928, 27_680, 896, 60_640, 29_752, 27_680, 231]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"classes": 1}, "classes: 1, wanted an integer of at least 2"),
        ({"classes": True}, "classes: True"),
        ({"widths": (8,)}, "widths: .* two or more"),
        ({"widths": "816"}, "widths: '816'"),
        ({"widths": (8, 16.0)}, "widths: "),
        ({"levels": 3}, "levels: 3, wanted an integer from 1 to 2"),
        ({"levels": 0}, "levels: 0"),
        ({"coarse_pool": 4}, "coarse_pool: 4 with levels 2, wanted 2"),
        ({"levels": 1, "coarse_pool": 0}, "coarse_pool: 0 with levels 1, wanted a positive integer"),
        ({"dropout": 1.0}, "dropout: 1.0"),
        ({"groups": 3}, "groups: 3, wanted a positive integer that divides"),
        ({"epsilon": 0}, "epsilon: 0, wanted a positive number"),
        ({"epsilon": "1e-3"}, "epsilon: '1e-3'"),
        ({"width": [8, 16]}, "no width; known: classes, widths, dropout"),
    ],
)
def test_a_wrong_configuration_is_refused(values, words):
    with pytest.raises(ValueError, match=words):
        LODBrainConfig.from_dict(values)


def test_configuration_round_trip_is_plain():
    config = LODBrainConfig(classes=3, widths=(4, 8, 8, 16), levels=3, dropout=0.0)
    assert config.to_dict()["widths"] == [4, 8, 8, 16]
    assert LODBrainConfig.from_dict(config.to_dict()) == config
    assert (config.pools, config.multiple) == ((4, 2, 1), 32)
    assert (COARSE.pools, COARSE.multiple, COARSE.pooled_multiple) == ((4,), 16, 4)


# Registry


def test_the_registry_is_closed():
    assert isinstance(networks.build("lod_brain", {"levels": 2}), LODBrain)
    with pytest.raises(InputError, match="network 'unet3000' is not known; one of .*lod_brain"):
        networks.build("unet3000")
    with pytest.raises(InputError, match="network lod_brain: lod_brain has no depth"):
        networks.build("lod_brain", {"depth": 4})


def test_the_registry_leads_from_coarse_to_fine():
    coarse = networks.build_coarse("lod_brain", {"classes": 3})
    assert coarse.config == LODBrainConfig(classes=3, levels=1, coarse_pool=4)
    assert networks.build_coarse("lod_brain", {"levels": 1}) is None
    fine = networks.build("lod_brain", {"classes": 3})
    networks.load_coarse(fine, coarse, freeze=True)
    assert torch.equal(fine.levels[0].out.weight, coarse.levels[0].out.weight)


# Group norm


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(("groups", "channels"), [(1, 3), (2, 6), (8, 8)])
def test_group_norm_against_float64(layout, groups, channels):
    x = (3 * noise(2, channels, 5, 4, 6) + 1).contiguous(memory_format=FORMATS[layout])
    norm = GroupNorm(groups, channels, epsilon=1e-3)
    norm.weight.data, norm.bias.data = noise(channels, seed=1), noise(channels, seed=2)
    expected = naive_norm(x.numpy(), groups, norm.weight.detach().numpy(), norm.bias.detach().numpy(), 1e-3)
    for y in (norm(x), torch.no_grad()(norm)(x), torch.no_grad()(norm)(x.clone(), inplace=True)):
        np.testing.assert_allclose(y.detach().numpy(), expected, atol=3e-6)
        assert y.is_contiguous(memory_format=FORMATS[layout])


@pytest.mark.parametrize("layout", FORMATS)
def test_group_norm_gradient(layout):
    x = noise(2, 4, 3, 2, 3, dtype=torch.float64).contiguous(memory_format=FORMATS[layout]).requires_grad_()
    weight, bias = (noise(4, seed=s, dtype=torch.float64).requires_grad_() for s in (1, 2))
    norm = GroupNorm(2, 4)

    def call(x, weight, bias):
        return torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(call, (x, weight, bias))


def test_group_norm_agrees_with_torch_in_training():
    ours, theirs = GroupNorm(4, 8, epsilon=1e-3), torch.nn.GroupNorm(4, 8, eps=1e-3)
    theirs.load_state_dict({"weight": noise(8, seed=1), "bias": noise(8, seed=2)})
    ours.load_state_dict(theirs.state_dict())
    grads = []
    for norm in (ours, theirs):
        x = noise(3, 8, 6, 5, 4).requires_grad_()
        (norm(x) * noise(3, 8, 6, 5, 4, seed=3)).sum().backward()
        grads.append((x.grad, norm.weight.grad, norm.bias.grad))
    for mine, other in zip(*grads, strict=True):
        torch.testing.assert_close(mine, other, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", FORMATS)
def test_moments_are_exact_at_size_and_offset(layout):
    n = 2**22
    x = (noise(1, 2, n // 2**8, 2**4, 2**4) * 0.05 + 20).contiguous(memory_format=FORMATS[layout])   # variance 1/160,000 of mean²
    mean, variance = group_moments(x, 1)
    exact = x.double()
    assert mean.item() == pytest.approx(exact.mean().item(), rel=1e-13)
    assert variance.item() == pytest.approx(exact.var(correction=0).item(), rel=1e-9)
    half = x.bfloat16()
    assert group_moments(half, 1)[1].item() == pytest.approx(half.double().var(correction=0).item(), rel=1e-8)


def test_group_norm_of_a_constant_is_its_bias():
    norm = GroupNorm(2, 4)
    norm.bias.data = torch.arange(4.0)
    assert norm(torch.full((1, 4, 2, 2, 2), 7.0))[0, :, 0, 0, 0].tolist() == pytest.approx([0, 1, 2, 3], abs=1e-4)


# Blocks and levels


@pytest.mark.parametrize("kind", [Plain, UpPlain])
def test_a_block_step_by_step(kind):
    config = LODBrainConfig(groups=4)
    torch.manual_seed(0)
    block = kind(6, 8, config).eval()
    x = noise(2, 6, 4, 6, 2)
    wide = F.conv3d(F.pad(x, [1] * 6), block.conv.weight, block.conv.bias)
    normed = naive_norm(wide.detach().numpy(), 4, np.ones(8), np.zeros(8), config.epsilon)
    rectified = torch.from_numpy(np.maximum(normed, 0)).float()
    weight, bias = block.resample.weight, block.resample.bias
    if kind is Plain:   # each 2³ block of voxels → one voxel
        blocks = rectified.reshape(2, 8, 2, 2, 3, 2, 1, 2)
        expected = torch.einsum("bcdihjwk,ocijk->bodhw", blocks, weight) + bias.view(1, -1, 1, 1, 1)
    else:               # each voxel → a 2³ block of voxels
        expected = torch.einsum("bcdhw,coijk->bodihjwk", rectified, weight).reshape(2, 32, 8, 12, 4) + bias.view(1, -1, 1, 1, 1)
    torch.testing.assert_close(block(x), expected.relu(), atol=1e-5, rtol=1e-5)


def upsampled(x: torch.Tensor, factor: int) -> torch.Tensor:
    for axis in (2, 3, 4):
        x = x.repeat_interleave(factor, axis)
    return x


def two_levels_written_out(net: LODBrain, x: torch.Tensor) -> torch.Tensor:
    """The table of the released network, a row a line."""
    coarse, fine = net.levels
    stem = coarse.stem(F.max_pool3d(x, 2))
    down = coarse.encoder[0](stem)
    up = coarse.decoder[0](coarse.bridge(down)) + down
    a1 = coarse.decoder[1](up) + stem
    o0 = upsampled(coarse.out(a1), 2)
    stem = fine.stem(x)
    o1 = fine.out(fine.decoder[0](fine.bridge(stem)) + stem + upsampled(a1, 2))
    return net.head(o0 + o1)


def three_levels_written_out(net: LODBrain, x: torch.Tensor) -> torch.Tensor:
    l0, l1, l2 = net.levels
    s00 = l0.stem(F.max_pool3d(x, 4))
    s01 = l0.encoder[0](s00)
    s02 = l0.encoder[1](s01)
    d00 = l0.decoder[0](l0.bridge(s02)) + s02
    d01 = l0.decoder[1](d00) + s01
    d02 = l0.decoder[2](d01) + s00
    s10 = l1.stem(F.max_pool3d(x, 2))
    s11 = l1.encoder[0](s10) + upsampled(s01, 2)
    d10 = l1.decoder[0](l1.bridge(s11)) + s11 + upsampled(d01, 2)
    d11 = l1.decoder[1](d10) + s10 + upsampled(d02, 2)
    s20 = l2.stem(x)
    d20 = l2.decoder[0](l2.bridge(s20)) + s20 + upsampled(d11, 2)
    return net.head(upsampled(l0.out(d02), 4) + upsampled(l1.out(d11), 2) + l2.out(d20))


@pytest.mark.parametrize(
    ("config", "written_out"),
    [(RELEASED, two_levels_written_out), (LODBrainConfig(classes=3, widths=(2, 4, 4, 8), levels=3), three_levels_written_out)],
)
def test_the_levels_are_wired_as_published(config, written_out):
    net, x = made(config), noise(1, 1, config.multiple, 2 * config.multiple, config.multiple)
    expected = written_out(net, x)
    torch.testing.assert_close(net(x), expected, atol=1e-4, rtol=1e-4)
    with torch.inference_mode():   # the path that overwrites what it no longer needs
        torch.testing.assert_close(net(x), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("config", [COARSE, RELEASED, LODBrainConfig(widths=(4, 8, 8, 16), levels=3, classes=5)])
def test_shapes(config):
    m = config.multiple
    x = noise(2, 1, m, 3 * m, 2 * m)
    before = x.clone()
    with torch.no_grad():
        assert made(config)(x).shape == (2, config.classes, m, 3 * m, 2 * m)
    assert torch.equal(x, before)


def test_memory_format_does_not_matter():
    net, x = made(RELEASED), noise(1, 1, 16, 16, 16)
    with torch.no_grad():
        last = net(x)
        first = net.to(memory_format=torch.contiguous_format)(x)
    torch.testing.assert_close(first, last, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1, 16, 20, 16), (1, 1, 0, 16, 16), (1, 2, 16, 16, 16), (1, 16, 16, 16)])
def test_a_size_that_does_not_divide_is_refused(shape):
    words = "16 × 20 × 16 voxels, wanted every side a multiple of 8" if shape[3] == 20 else "image: "
    with pytest.raises(ValueError, match=words):
        LODBrain(RELEASED)(torch.zeros(shape))


def test_coarse_logits_need_no_upsampling():
    net, x = made(COARSE), noise(1, 1, 32, 16, 16)
    coarse = net.forward_coarse(F.max_pool3d(x, 4))
    assert coarse.shape == (1, 7, 8, 4, 4)
    assert torch.equal(upsampled(coarse, 4), net(x))
    with pytest.raises(ValueError, match="multiple of 4"):
        net.forward_coarse(torch.zeros(1, 1, 6, 8, 8))
    with pytest.raises(ValueError, match="2 levels, wanted 1"):
        LODBrain(RELEASED).forward_coarse(torch.zeros(1, 1, 8, 8, 8))


# Training


@pytest.mark.parametrize("freeze", [False, True])
def test_coarse_to_fine(freeze):
    coarse, fine = made(COARSE, seed=1), made(RELEASED, seed=2)
    level1 = {name: tensor.clone() for name, tensor in fine.levels[1].state_dict().items()}
    fine.load_coarse(coarse, freeze=freeze)
    state = fine.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in coarse.state_dict().items())
    assert all(torch.equal(tensor, state[f"levels.1.{name}"]) for name, tensor in level1.items())
    optimiser = torch.optim.SGD([p for p in fine.parameters() if p.requires_grad], lr=0.1)
    fine.train()(noise(1, 1, 8, 8, 8)).square().mean().backward()
    optimiser.step()
    moved = {name for name, tensor in coarse.state_dict().items() if not torch.equal(tensor, fine.state_dict()[name])}
    assert {"head.weight", "head.bias"} <= moved
    if freeze:
        assert moved == {"head.weight", "head.bias"}
    else:
        assert {"levels.0.stem.weight", "levels.0.bridge.norm.weight", "levels.0.out.weight"} <= moved


@pytest.mark.parametrize(
    ("config", "words"),
    [(RELEASED, "2 levels, wanted fewer"), (LODBrainConfig(levels=1, classes=3), "classes 3, wanted 7"),
     (LODBrainConfig(levels=1, widths=(8, 16, 16)), "widths")],
)  # fmt: skip
def test_a_coarse_network_that_does_not_fit_is_refused(config, words):
    with pytest.raises(ValueError, match=words):
        LODBrain(RELEASED).load_coarse(LODBrain(config))


def test_initial_values():
    torch.manual_seed(0)
    net = LODBrain(RELEASED)
    stem = net.levels[1].stem.weight                                          # Glorot uniform: 1·27 in, 32·27 out
    assert stem.abs().max().item() == pytest.approx((6 / (33 * 27)) ** 0.5, rel=0.02)
    out = net.levels[1].out.weight                                            # He normal, cut at two (widened) deviations
    assert out.std().item() == pytest.approx((2 / (32 * 27)) ** 0.5, rel=0.02)
    assert out.abs().max() <= 2 * (2 / (32 * 27)) ** 0.5 / 0.8796
    up = net.levels[1].decoder[0].resample.weight                             # Keras counts what a transposed kernel gives, 32·8
    assert up.std().item() == pytest.approx((2 / (32 * 8)) ** 0.5, rel=0.03)
    assert all(not p.any() for name, p in net.named_parameters() if name.endswith("bias"))


def test_l2_penalty_by_hand():
    net = LODBrain(LODBrainConfig(classes=2, widths=(1, 1), levels=1))
    for p in net.parameters():
        p.data.fill_(2.0)
    # bridge: 4·27 + 1·4·8; decoder: 4·27 + 1·4·8; out: 4·4·27; head: 4·2; all · 2². Not the stem, no bias, no norm.
    assert net.l2().item() == pytest.approx(1e-4 * 4 * (2 * (108 + 32) + 432 + 8), rel=1e-6)
    net.l2().backward()
    assert net.head.weight.grad[0, 0, 0, 0, 0].item() == pytest.approx(2 * 1e-4 * 2)
    assert net.levels[0].stem.weight.grad is None


def test_training_reaches_every_parameter_and_drops():
    torch.manual_seed(0)
    net, x = LODBrain(RELEASED).train(), noise(2, 1, 16, 16, 16)
    assert not torch.equal(net(x), net(x))
    net(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
    net.eval()
    assert torch.equal(net(x), net(x))


def test_gradient_of_the_whole_network():
    net = made(LODBrainConfig(classes=2, widths=(1, 2), levels=1, coarse_pool=2)).double()
    x = noise(1, 1, 4, 8, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(net, (x,), atol=1e-6)


def test_autocast_keeps_moments_in_full_precision():
    net, x = made(RELEASED), noise(1, 1, 16, 16, 16)
    with torch.no_grad():
        exact = net(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = net(x)
    assert half.dtype is torch.bfloat16
    assert (half.float() - exact).abs().max() < 0.05 * exact.abs().max()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        net.train()(x).float().square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())


# Against the published network


@pytest.mark.full
@pytest.mark.parametrize("scan", SCANS)
def test_published_answers_at_256(test_data, scan):
    net, x, reference = published(test_data, scan)
    with torch.inference_mode():
        probabilities = net(x)[0].softmax(0)   # (7, 256, 256, 256)
    assert np.count_nonzero(probabilities.argmax(0).numpy() != reference["labels"]) <= 20
    sampled = probabilities.flatten(1)[:, torch.from_numpy(reference["probability_index"])].T.numpy()
    np.testing.assert_allclose(sampled, reference["probability"].astype(np.float32), atol=1e-3)
