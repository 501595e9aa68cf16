"""FastSurferCNN and FastSurferVINN: by hand on what can be printed, and equal to the public networks on random cases."""

import json
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from data_registry.errors import InputError
from lod_model import networks
from lod_model.networks.competitive import CompetitiveBlock, from_public, maxout
from lod_model.networks.cost import macs
from lod_model.networks.fastsurfer_cnn import FastSurferCNN, FastSurferCNNConfig, FastSurferCNNView
from lod_model.networks.fastsurfer_vinn import FastSurferVINNConfig, FastSurferVINNView, zoom, zoomed_sizes

SMALL = FastSurferVINNConfig(classes=5, filters=8, native_filters=4, inner_size=64)
LOGITS = 2e-4   # float32 against float64 alone makes 8e-5


@pytest.fixture(scope="module")
def reference(test_data):
    """The folder of what the public networks compute."""
    folder = test_data / "reference_networks"
    if not folder.is_dir():
        pytest.skip(f"no outputs of the public networks at {folder}")
    return folder


def tensors(file, prefix: str) -> dict[str, torch.Tensor]:
    return from_public({name.removeprefix(prefix): torch.from_numpy(file[name]) for name in file.files if name.startswith(prefix)})


def public_vinn(reference) -> FastSurferVINNView:
    net = FastSurferVINNView(SMALL, 5)
    net.load_state_dict(tensors(np.load(reference / "vinn_eval.npz"), "state/"))
    return net


def distance(found: torch.Tensor, wanted: np.ndarray | torch.Tensor) -> float:
    return (found - torch.as_tensor(wanted)).abs().max().item()


# Equal to the public networks


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("case", ["", "_extra"])
def test_vinn_is_the_public_one(reference, case, gradients):
    file, net = np.load(reference / "vinn_eval.npz"), public_vinn(reference).eval()
    x, scale = torch.from_numpy(file[f"input{case}"]), torch.from_numpy(file[f"scale_factors{case}"])
    before = x.clone(), scale.clone()
    with torch.set_grad_enabled(gradients):
        logits = net(x, scale)
    assert distance(logits, file[f"logits{case}"]) <= LOGITS
    assert torch.equal(x, before[0]) and torch.equal(scale, before[1])
    assert logits.is_contiguous(memory_format=torch.channels_last)


def test_vinn_trains_as_the_public_one(reference):
    file, net = np.load(reference / "vinn_train.npz"), public_vinn(reference).train()
    scale = torch.from_numpy(file["scale_factors"] + file["scale_noise"])      # the noise is the caller's to add
    assert distance(scale, file["scale_used"]) < 1e-6
    logits = net(torch.from_numpy(file["input"]), scale)
    assert distance(logits, file["logits"]) <= LOGITS
    loss = combined_loss(logits, torch.from_numpy(file["target"]).long(), torch.from_numpy(file["pixel_weight"]))
    assert distance(loss, file["loss_total"]) < 1e-5
    loss.backward()
    gradients, after = tensors(file, "grad/"), tensors(file, "bn_after/")
    assert gradients.keys() == dict(net.named_parameters()).keys()
    for name, gradient in gradients.items():
        assert distance(net.get_parameter(name).grad, gradient) <= 1e-5, name
    assert after.keys() == {name for name, _ in net.named_buffers()}
    for name, buffer in after.items():
        assert distance(net.get_buffer(name), buffer) <= 1e-5, name


def combined_loss(logits, target, pixel_weight):
    """Weighted cross-entropy, mean over pixels, and 1 − Dice over batch and pixels together, mean over classes."""
    p, g = logits.softmax(1), F.one_hot(target, logits.shape[1]).permute(0, 3, 1, 2)
    dice = 2 * (p * g).sum((0, 2, 3)) / ((p + g).sum((0, 2, 3)) + 1e-3)
    return (F.cross_entropy(logits, target, reduction="none") * pixel_weight).mean() + 1 - dice.mean()


@pytest.mark.parametrize("gradients", [False, True])
def test_cnn_is_the_public_one(reference, gradients):
    file, net = np.load(reference / "cnn_eval.npz"), FastSurferCNNView(FastSurferCNNConfig(filters=8, kernels=(5,) * 4), 5).eval()
    net.load_state_dict(tensors(file, "state/"))
    with torch.set_grad_enabled(gradients):
        assert distance(net(torch.from_numpy(file["input"])), file["logits"]) <= LOGITS


def test_zoom_sizes_are_the_public_ones(reference):
    """In float32. The public code in float64 loses a pixel on the way back in some of the cases."""
    table = json.loads((reference / "zoom2d_geometry.json").read_text())
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]
    assert len(rows) == 90
    lost = 0
    for row in rows:
        size = row["input_size"]
        taken, become, used = zoomed_sizes(size, 256, row["scale"])
        back_taken, back_become, back_used = zoomed_sizes(256, size, np.float32(1) / used)
        found = (taken, become, 256 - become, back_taken, back_become, size - back_become)
        wanted = tuple(row[f"{way}_{what}"] for way in ("fwd", "back") for what in ("crop_stop", "resize_to", "pad_end"))
        if row["scale_dtype"] == "f32":
            assert found == wanted and used == np.float32(row["fwd_used_scale"]), row
            assert back_used == pytest.approx(row["back_used_scale"], rel=2e-7), row
        else:
            lost += found != wanted
            assert found[:3] == wanted[:3] and np.abs(np.subtract(found, wanted)).max() <= 1, row
    assert lost == 7


def test_counts_of_parameters(reference):
    published = json.loads((reference / "fastsurfer_param_counts.json").read_text())
    vinn, cnn = networks.build("fastsurfer_vinn"), networks.build("fastsurfer_cnn", {"kernels": [5, 5, 5, 5]})
    assert vinn.parameter_counts() == {"axial": 1854632, "coronal": 1854632, "sagittal": 1852616}
    assert cnn.parameter_counts() == {"axial": 3607270, "coronal": 3607270, "sagittal": 3605450}
    for net, name in ((vinn.axial, "VINN_71_32_3x3"), (cnn.axial, "CNN_64_5x5")):
        blocks = published[f"FastSurfer{name}_79classes"]["by_module"]
        ours = {module: sum(p.numel() for p in net.get_submodule(module).parameters()) for module in ("unet.encoder.0", "unet.bottom", "classifier")}
        assert ours == {"unet.encoder.0": blocks["encode1"], "unet.bottom": blocks["bottleneck"], "classifier": blocks["classifier"]}


# By hand


def test_maxout_pooling_and_unpooling_by_hand():
    a = torch.tensor([[[[1.0, 5.0, 2.0, 0.0], [3.0, 4.0, 6.0, 6.0], [-1.0, -2.0, 7.0, 1.0], [-3.0, -4.0, 0.0, 2.0]]]])
    b = torch.tensor([[[[2.0, 0.0, 2.0, 9.0], [3.0, 3.0, 0.0, 0.0], [-5.0, -1.0, 0.0, 8.0], [-2.0, -5.0, 3.0, 1.0]]]])
    larger = maxout(a.clone(), b)
    assert larger[0, 0].tolist() == [[2, 5, 2, 9], [3, 4, 6, 6], [-1, -1, 7, 8], [-2, -4, 3, 2]]
    pooled, indices = F.max_pool2d(larger, 2, return_indices=True)
    assert pooled[0, 0].tolist() == [[5, 9], [-1, 8]]
    assert indices[0, 0].tolist() == [[1, 3], [8, 11]]                         # of two equal ones (−1) the first
    assert F.max_unpool2d(pooled, indices, 2)[0, 0].tolist() == [[0, 5, 0, 9], [0, 0, 0, 0], [-1, 0, 0, 8], [0, 0, 0, 0]]


@pytest.mark.parametrize("entry", ["image", "rival", "joined"])
def test_a_block_by_hand(entry):
    """Two channels, 1² kernels, norms that double: every step a line."""
    block = CompetitiveBlock(2, 2, (1, 1, 1), entry=entry).eval()
    weights = (torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[-1.0, 0.0], [2.0, 1.0]]), torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
    for conv, norm, weight in zip(block.convs, block.norms, weights, strict=True):
        conv.weight.data, conv.bias.data = weight[:, :, None, None], torch.tensor([0.5, 0.0])
        norm.weight.data, norm.bias.data, norm.eps = torch.full((2,), 2.0), torch.tensor([0.0, 1.0]), 0.0
    block.prelu.weight.data.fill_(0.5)

    def layer(i, v):
        return 2 * (weights[i] @ v + torch.tensor([0.5, 0.0])) + torch.tensor([0.0, 1.0])

    def prelu(v):
        return torch.where(v > 0, v, 0.5 * v)

    x = torch.tensor([-2.0, 4.0])
    first = layer(0, x / math.sqrt(1 + 1e-5) if entry == "image" else prelu(x))
    best = torch.maximum(first, x) if entry == "rival" else first
    best = torch.maximum(layer(1, prelu(best)), best)
    wanted = layer(2, prelu(best))
    for gradients in (False, True):
        given = x[None, :, None, None].clone()
        with torch.set_grad_enabled(gradients):
            torch.testing.assert_close(block(given)[0, :, 0, 0], wanted, atol=1e-5, rtol=1e-5)
        assert torch.equal(given[0, :, 0, 0], x)


@pytest.mark.parametrize("sampling", ["bilinear", "nearest", "area", "bicubic"])
def test_zoom_there_and_back_is_nothing_at_scale_1(sampling):
    x = torch.randn(2, 3, 32, 32)
    there, used = zoom(x, (32, 32), np.ones((2, 2), np.float32), sampling=sampling)
    back, _ = zoom(there, (32, 32), 1 / used, sampling=sampling)
    torch.testing.assert_close(back, x, atol=1e-6, rtol=0)


def test_zoom_keeps_a_ramp():
    """0.7 of 40 pixels become 40, and 28 again; beyond them there is nothing."""
    ramp = (3 * torch.arange(40.0)[:, None] + torch.arange(40.0)).expand(1, 1, 40, 40)
    there, used = zoom(ramp, (40, 40), np.full((1, 2), 0.7, np.float32))
    assert used.tolist() == [[np.float32(28 / 40)] * 2] and there.shape == ramp.shape
    back, _ = zoom(there, (40, 40), 1 / used)
    torch.testing.assert_close(back[..., 3:25, 3:25], ramp[..., 3:25, 3:25], atol=1e-3, rtol=0)
    assert back[..., 27, 27] != 0 and not back[..., 28:, :].any() and not back[..., 28:].any()


def test_zoom_scales_each_sample_and_axis_on_its_own():
    x = torch.rand(3, 1, 16, 16)
    scales = np.array([[1, 1], [1, 1], [0.5, 2]], np.float32)
    zoomed, used = zoom(x, (16, 16), scales)
    assert used.tolist() == scales.tolist()
    assert torch.equal(zoomed[:2], x[:2])
    assert zoomed[2, 0, :, 8:].any().item() is False                           # 16 columns became 8
    torch.testing.assert_close(zoomed[2, 0, 0, 0], x[2, 0, 0, :2].mean())      # from the first pixel on, downwards stretched


# The networks as wholes


def small_vinn() -> FastSurferVINNView:
    torch.manual_seed(0)
    return FastSurferVINNView(FastSurferVINNConfig(classes=3, filters=4, native_filters=3, inner_size=32), 3)


def test_memory_reused_changes_nothing():
    net, x, scale = small_vinn().eval(), torch.rand(2, 7, 48, 32), torch.tensor([1.25, 0.8])
    wanted = net(x, scale)
    assert wanted.shape == (2, 3, 48, 32)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert torch.equal(net(x, scale), wanted.detach())
    with torch.inference_mode():
        torch.testing.assert_close(net(x[1:], scale[1:]), wanted[1:].detach(), atol=1e-5, rtol=1e-5)


def test_a_scale_for_both_axes_is_the_scale_of_each():
    net, x = small_vinn().eval(), torch.rand(2, 7, 32, 32)
    scale = torch.tensor([1.25, 0.8], dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(net(x, scale), net(x, scale[:, None].expand(2, 2)))
        assert not torch.equal(net(x, scale), net(x, torch.ones(2)))


def test_statistics_in_training_are_exact():
    """The variance of a channel that torch's channels-last kernel gets wrong by 1e-5 or more on a CPU."""
    net = FastSurferCNNView(FastSurferCNNConfig(filters=4, kernels=(1, 1), depth=1), 2).train()
    net.unet.encoder[0].entry_norm.momentum = 1.0
    x = (0.3 * torch.randn(2, 7, 256, 256) + 3).contiguous(memory_format=torch.channels_last)
    net(x)
    exact = x.double().var((0, 2, 3))
    assert ((net.unet.encoder[0].entry_norm.running_var - exact) / exact).abs().max() < 2e-7


def test_bfloat16_under_autocast():
    net, x, scale = small_vinn().eval(), torch.rand(1, 7, 32, 32), torch.ones(1)
    with torch.no_grad():
        wanted = net(x, scale)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = net(x, scale)
    assert found.dtype is torch.bfloat16
    assert (found - wanted).square().mean().sqrt() < 0.2 * wanted.std()


def test_initial_values():
    torch.manual_seed(0)
    net = FastSurferCNN(FastSurferCNNConfig())
    kernel = net.coronal.unet.bottom.convs[0].weight
    assert kernel.std().item() == pytest.approx(math.sqrt(2 / (1 + 0.01**2) / (64 * 25)), rel=0.02)
    assert net.coronal.unet.bottom.prelu.weight.item() == 0.25
    assert not torch.equal(kernel, net.axial.unet.bottom.convs[0].weight)


def test_three_views_and_their_classes():
    net = networks.build("fastsurfer_vinn", {"classes": 9, "sagittal_classes": 6, "filters": 4, "native_filters": 2, "inner_size": 32})
    assert [name for name, _ in net.named_children()] == ["axial", "coronal", "sagittal"]
    x, scale = torch.rand(1, 7, 32, 32), torch.ones(1)
    assert [net(x, view, scale).shape[1] for view in ("axial", "coronal", "sagittal")] == [9, 9, 6]
    assert networks.build("fastsurfer_vinn", net.config.to_dict()).config == net.config
    assert networks.build_coarse("fastsurfer_vinn") is None
    assert FastSurferCNNConfig(classes=79).sagittal_classes == 51 and FastSurferCNNConfig(classes=7).sagittal_classes == 7


def test_cost_by_hand():
    """A pixel's multiply-accumulates: 5², 5², 1² kernels of 64 channels, a quarter of the pixels a level down, in 3 · 256 slices of 256²."""
    dense = 2 * 25 * 64 * 64 + 64 * 64
    first = 25 * 7 * 64 + 25 * 64 * 64 + 64 * 64
    pixel = first + dense + 2 * dense * (1 / 4 + 1 / 16 + 1 / 64) + dense / 256
    assert macs(networks.build("fastsurfer_cnn"), 256) == 256**3 * (3 * pixel + 64 * (79 + 79 + 51))


@pytest.mark.parametrize(
    ("network", "config", "line"),
    [
        ("fastsurfer_cnn", {"classes": 1}, "classes: 1, wanted an integer of at least 2"),
        ("fastsurfer_cnn", {"sagittal_classes": 0}, "sagittal_classes: 0, wanted"),
        ("fastsurfer_cnn", {"slices": 6}, "slices: 6, wanted an odd number"),
        ("fastsurfer_cnn", {"kernels": [5, 4]}, r"kernels: \[5, 4\], wanted two or more odd"),
        ("fastsurfer_cnn", {"sampling": "area"}, "fastsurfer_cnn has no sampling; known: classes, sagittal_classes"),
        ("fastsurfer_vinn", {"sampling": "cubic"}, "sampling: 'cubic', wanted one of bilinear, nearest, area, bicubic"),
        ("fastsurfer_vinn", {"inner_size": 40}, "inner_size: 40, wanted a positive multiple of 16"),
        ("fastsurfer_vinn", {"base_mm": 0}, "base_mm: 0, wanted a positive number"),
    ],
)
def test_bad_configurations_are_one_line(network, config, line):
    with pytest.raises(InputError, match=line) as raised:
        networks.build(network, config)
    assert "\n" not in str(raised.value) and str(raised.value).startswith(f"network {network}: ")


@pytest.mark.parametrize(
    ("shape", "scale", "line"),
    [
        ((1, 6, 32, 32), torch.ones(1), r"shape \(1, 6, 32, 32\), wanted \(B, 7, H, W\)"),
        ((1, 7, 32, 40), torch.ones(1), "32 × 40 pixels, wanted sides that are multiples of 16"),
        ((2, 7, 32, 32), torch.ones(1), r"scale: shape \(1,\), wanted \(2,\) or \(2, 2\)"),
        ((1, 7, 32, 32), torch.zeros(1), "scale: 0, wanted a positive number"),
        ((1, 7, 32, 32), torch.tensor([math.nan]), "scale: nan, wanted a positive number"),
        ((1, 7, 32, 32), torch.tensor([0.01]), "scale: 0.01, which leaves no pixel"),
    ],
)
def test_bad_slices_and_scales(shape, scale, line):
    with pytest.raises(ValueError, match=line):
        small_vinn()(torch.zeros(shape), scale)


def test_a_voxel_size_far_from_that_inside_is_the_users_mistake():
    with pytest.raises(InputError, match="scale: 0.01, which leaves no pixel of 32 .*; base_mm near the voxel size is wanted"):
        zoomed_sizes(32, 32, np.float32(0.01))
