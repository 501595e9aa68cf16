"""The fast engine against the network that it was made from and, in full, against the published network's answers."""

import numpy as np
import pytest
import torch
from published import SCANS, published
from small_networks import made, noise

from lod_model.engine import _windows, compile_network
from lod_model.engine_kernels import ThinConv, empty, kernel_of
from lod_model.networks.lod_brain import LODBrain, LODBrainConfig
from lod_model.predict import predict

RELEASED = LODBrainConfig()
NETWORKS = {
    "released": (RELEASED, (32, 48, 64)),
    "released, flat": (RELEASED, (8, 24, 16)),
    "coarse": (LODBrainConfig(levels=1, coarse_pool=4), (32, 48, 64)),
    "one level, not pooled": (LODBrainConfig(levels=1, coarse_pool=1), (12, 8, 20)),
    "two levels, four widths": (LODBrainConfig(widths=(4, 8, 8, 16), classes=2), (16, 48, 32)),
    "three levels": (LODBrainConfig(widths=(4, 4, 4, 4), levels=3, classes=12), (32, 64, 32)),
    "as small as can be": (LODBrainConfig(widths=(1, 1), levels=1, classes=2), (2, 6, 4)),
}


@pytest.mark.parametrize("slab_voxels", [1, 3000, 2**18])   # slabs of two slices, of a few, and as a user has them
@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_logits(name, slab_voxels):
    config, shape = NETWORKS[name]
    net, x = made(config), noise(1, 1, *shape, seed=1)
    with torch.no_grad():
        expected = net(x)
    logits = compile_network(net, slab_voxels=slab_voxels)(x)
    assert logits.shape == expected.shape and logits.dtype is torch.float32
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_the_faces_of_the_grid_are_exact():
    """A bright image has its largest error where the zeros begin, were the two convolutions taken for one there."""
    net, x = made(RELEASED), noise(1, 1, 16, 16, 16, seed=1) + 5
    with torch.no_grad():
        expected = net(x)
    torch.testing.assert_close(compile_network(net)(x), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["released", "coarse"])
def test_probabilities_into_a_given_tensor(name):
    config, shape = NETWORKS[name]
    net, x = made(config), noise(1, 1, *shape, seed=1)
    with torch.no_grad():
        expected = net(x).softmax(1)
    out = torch.full((1, config.classes, *shape), torch.nan)
    assert compile_network(net).probabilities(x, out) is out
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=0)
    assert (compile_network(net).probabilities(x) == out).all()


@pytest.mark.parametrize("name", NETWORKS)
def test_bfloat16_is_near(name):
    config, shape = NETWORKS[name]
    net, x = made(config), noise(1, 1, *shape, seed=1)
    with torch.no_grad():
        expected = net(x)
    logits = compile_network(net, dtype=torch.bfloat16, slab_voxels=3000)(x)
    assert logits.dtype is torch.float32
    assert (logits - expected).abs().max() < 0.02 * expected.abs().max()


def test_neither_network_nor_image_changes():
    net, x = made(RELEASED).train(), noise(1, 1, 16, 16, 16, seed=1)
    state, before = {name: t.clone() for name, t in net.state_dict().items()}, x.clone()
    first = compile_network(net)
    logits = first(x)
    assert torch.equal(x, before) and net.training
    assert all(torch.equal(t, state[name]) for name, t in net.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert all(p.is_contiguous(memory_format=torch.channels_last_3d) for p in net.parameters() if p.ndim == 5)
    for parameter in net.parameters():   # the twin has copies
        parameter.data.zero_()
    assert torch.equal(first(x), logits)


def test_what_cannot_run_is_refused():
    fast = compile_network(made(RELEASED))
    for shape, words in [((1, 1, 16, 20, 16), "16 × 20 × 16 voxels, wanted every side a multiple of 8"), ((2, 1, 8, 8, 8), "image: shape"),
                         ((1, 1, 0, 8, 8), "multiple of 8"), ((8, 8, 8), "image: shape")]:  # fmt: skip
        with pytest.raises(ValueError, match=words):
            fast(torch.zeros(shape))
    with pytest.raises(ValueError, match="float16"):
        compile_network(made(RELEASED), dtype=torch.float16)


@pytest.mark.parametrize(("depth", "step"), [(8, 4), (9, 4), (3, 8), (1, 1), (5, 1), (6, 2)])
def test_windows_hold_each_slice_with_its_neighbours(depth, step):
    volume, computed = torch.arange(1.0, depth + 1), []

    def fill(start, stop, out):
        computed.extend(range(start, stop))
        out.copy_(volume[start:stop].view(1, 1, -1, 1, 1).expand_as(out))

    padded = torch.nn.functional.pad(volume, [1, 1])
    stops = []
    for a, b, slab in _windows(fill, empty((1, 3, step + 2, 2, 2), torch.float32), depth, step):
        assert torch.equal(slab[0, 0, :, 0, 0], padded[a : b + 2])
        stops.append(b)
    assert computed == list(range(depth)) and stops[-1] == depth


@pytest.mark.parametrize(("channels", "group"), [(1, 4), (4, 4), (5, 2), (7, 2), (8, 2), (9, 1), (16, 1), (32, 1)])
def test_slices_as_channels(channels, group):
    conv = torch.nn.Conv3d(5, channels, 3, padding=1)
    x, out = noise(1, 1, 8, 6, 4, seed=1).expand(1, 5, 8, 6, 4), torch.empty(8, 6, 4, channels)
    thin = ThinConv(kernel_of(conv), torch.float32)
    assert thin.group == group
    thin(torch.nn.functional.pad(x, [0, 0, 0, 0, 1, 1]), out)
    torch.testing.assert_close(out, conv(x)[0].permute(1, 2, 3, 0).detach(), atol=1e-5, rtol=1e-5)


# Against the published network


@pytest.mark.full
@pytest.mark.parametrize("scan", SCANS)
def test_published_answers_at_256(test_data, scan):
    net, x, reference = published(test_data, scan)
    sample = torch.from_numpy(reference["probability_index"])
    for dtype, voxels, error in [(torch.float32, 20, 1e-3), (torch.bfloat16, 0.0005 * x.numel(), None)]:
        probabilities = compile_network(net, dtype=dtype).probabilities(x)[0]   # (7, 256, 256, 256)
        assert np.count_nonzero(probabilities.argmax(0).numpy() != reference["labels"]) <= voxels
        if error is not None:   # the references' probabilities are float16
            sampled = probabilities.flatten(1)[:, sample].T.numpy()
            np.testing.assert_allclose(sampled, reference["probability"].astype(np.float32), atol=error)


def test_prediction_is_the_same_through_either_engine():
    """The one predict, on sides that need padding."""
    torch.manual_seed(0)
    network = LODBrain(LODBrainConfig()).eval()
    conformed = torch.randint(0, 256, (20, 24, 30), generator=torch.Generator().manual_seed(1), dtype=torch.uint8).numpy()
    plain, fast = predict(network, conformed), predict(compile_network(network), conformed)
    assert fast.shape == plain.shape == (7, 20, 24, 30)
    assert abs(fast - plain).max() < 1e-4
