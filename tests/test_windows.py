"""Sliding windows against the plain way of doing it, and NeuroNet's exact rewrite against NeuroNet."""

import weakref

import numpy as np
import pytest
import torch
from small_networks import noise
from torch import nn

from data_registry.errors import InputError
from lod_model import engine_kernels, neuronet_engine, windows
from lod_model.networks.neuronet import NeuroNet, NeuroNetConfig
from lod_model.neuronet_engine import FastNeuroNet
from lod_model.windows import window_classes, window_probabilities

SMALL = NeuroNetConfig(protocols={"few": 3, "many": 20}, filters=(3, 4, 6), units=2)


def network_of(config: NeuroNetConfig = SMALL) -> NeuroNet:
    """With norms that are not idle."""
    torch.manual_seed(0)
    network = NeuroNet(config).eval()
    for norm in (m for m in network.modules() if isinstance(m, nn.BatchNorm3d)):
        norm.weight.data.uniform_(0.5, 1.5)
        norm.bias.data.normal_(0, 0.3)
        norm.running_mean.normal_(0, 0.3)
        norm.running_var.uniform_(0.5, 2)
    return network


class Plain(nn.Module):
    """(1, 1, d, h, w) → logits (1, 3, d, h, w), different at a window's faces."""

    class config:  # noqa: N801
        multiple = 2

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv3d(1, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 3 * self.conv(x)


def by_the_book(network: nn.Module, x: torch.Tensor, side: int, stride: int) -> dict[str, np.ndarray]:
    """The mean softmax of all windows, (C, D, H, W) float64 by protocol; no axis shorter than a window."""
    places = [sorted({min(start, n - side) for start in range(0, n - side + stride, stride)}) for n in x.shape[2:]]
    sums, cover = {}, np.zeros(x.shape[2:])
    for d in places[0]:
        for h in places[1]:
            for w in places[2]:
                box = np.s_[d : d + side, h : h + side, w : w + side]
                cover[box] += 1
                with torch.no_grad():
                    output = network(x[(..., *box)])
                for name, logits in output.items() if isinstance(output, dict) else [("", output)]:
                    p = logits[0].double().softmax(0).numpy()
                    sums.setdefault(name, np.zeros((len(p), *x.shape[2:])))[(slice(None), *box)] += p
    return {name: total / cover for name, total in sums.items()}


@pytest.mark.parametrize(("shape", "side", "stride"), [((21, 16, 27), 8, 4), ((19, 30, 16), 16, 5), ((16, 8, 24), 8, 8), ((12, 12, 12), 12, 6)])
def test_windows_are_averaged_as_the_book_says(shape, side, stride):
    network, x = network_of(), noise(1, 1, *shape)
    before = x.clone()
    expected = by_the_book(network, x, side, stride)
    for own in (network, FastNeuroNet(network)):
        probabilities, classes = (way(own, x, side=side, stride=stride) for way in (window_probabilities, window_classes))
        for name, mean in expected.items():
            np.testing.assert_allclose(probabilities[name], mean, atol=5e-6)
            sure = np.diff(np.sort(mean, 0)[-2:], axis=0)[0] > 1e-5
            assert classes[name].dtype == np.uint8 and classes[name].shape == shape and sure.mean() > 0.99
            assert np.array_equal(classes[name][sure], mean.argmax(0)[sure])
    assert torch.equal(x, before)


def test_a_network_of_one_output_gives_one_array():
    network, x = Plain(), noise(1, 1, 9, 14, 6)
    mean = by_the_book(network, x, 6, 4)[""]
    np.testing.assert_allclose(window_probabilities(network, x, side=6, stride=4), mean, atol=1e-6)
    assert np.array_equal(window_classes(network, x, side=6, stride=4), mean.argmax(0))


class OfTheFirstVoxel(nn.Module):
    """Class 1 with the probability that stands in a window's first voxel, everywhere."""

    class config:  # noqa: N801
        multiple = 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        p = x[:, :, :1, :1, :1].expand_as(x)
        return torch.cat([(1 - p).log(), p.log()], 1)


def test_by_hand():
    # windows of 4 every 2 along 7 voxels begin at 0, 2 and 3; the first voxels say .2 .6 .9
    x = torch.zeros(1, 1, 7, 4, 4)
    x[0, 0, [0, 2, 3], 0, 0] = torch.tensor([0.2, 0.6, 0.9])
    expected = [0.2, 0.2, (0.2 + 0.6) / 2, (0.2 + 0.6 + 0.9) / 3, (0.6 + 0.9) / 2, (0.6 + 0.9) / 2, 0.9]
    for axis in range(3):
        turned = x.transpose(2, 2 + axis)
        mean = np.swapaxes(window_probabilities(OfTheFirstVoxel(), turned, side=4, stride=2)[1], 0, axis)
        np.testing.assert_allclose(mean, np.broadcast_to(np.array(expected)[:, None, None], (7, 4, 4)), atol=1e-6)
        classes = np.swapaxes(window_classes(OfTheFirstVoxel(), turned, side=4, stride=2), 0, axis)
        assert classes[:, 0, 0].tolist() == [0, 0, 0, 1, 1, 1, 1]


def test_a_tie_goes_to_the_first_class_and_many_classes_get_two_bytes():
    class Even(OfTheFirstVoxel):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.zeros(1, 300, *x.shape[2:])

    classes = window_classes(Even(), torch.zeros(1, 1, 3, 4, 5), side=2, stride=1)
    assert classes.dtype == np.uint16 and not classes.any()


@pytest.mark.parametrize("shape", [(5, 7, 3), (24, 7, 18)])
def test_a_volume_smaller_than_a_window_is_one_made_up_at_its_ends(shape):
    network, x = network_of(), noise(1, 1, *shape)
    padded = torch.full((1, 1, *(n if n >= 16 else n + -n % 4 for n in shape)), -0.7)
    padded[0, 0, : shape[0], : shape[1], : shape[2]] = x
    whole = {name: p[:, : shape[0], : shape[1], : shape[2]] for name, p in window_probabilities(network, padded, side=16, stride=8).items()}
    for own in (network, FastNeuroNet(network)):
        for name, p in window_probabilities(own, x, side=16, stride=8, fill=-0.7).items():
            np.testing.assert_allclose(p, whole[name], atol=5e-6)
    if max(shape) < 16:
        with torch.no_grad():
            alone = network(padded)["many"].softmax(1)[0, :, : shape[0], : shape[1], : shape[2]]
        np.testing.assert_allclose(whole["many"], alone, atol=5e-6)


CONFIGS = {
    "small": SMALL,
    "classes as many as the deepest filters": NeuroNetConfig(protocols={"one": 6, "two": 2}, filters=(3, 4, 6), units=1),
    "one scale, leaky": NeuroNetConfig(protocols={"one": 5}, filters=(4, 4), units=3, activation="leaky_relu"),
    "as published, relu": NeuroNetConfig(activation="relu"),
}


@pytest.mark.parametrize(("name", "fused"), [*((name, True) for name in CONFIGS), ("small", False)])
def test_the_rewrite_gives_the_networks_logits(name, fused, monkeypatch):
    if not fused:   # as on a GPU
        monkeypatch.setattr(engine_kernels, "_FUSED", False)
    network, x = network_of(CONFIGS[name]), noise(1, 1, 16, 8, 24)
    with torch.inference_mode():
        logits, window = network(x), FastNeuroNet(network).window(x)
        for first, last in ((0, 16), (0, 1), (0, 2), (3, 8), (7, 9), (8, 9), (14, 16), (15, 16)):
            slices = window.slices(first, last)
            assert list(slices) == list(logits)
            for protocol, own in slices.items():
                torch.testing.assert_close(own, logits[protocol][:, :, first:last], atol=1e-4, rtol=0)


def test_the_rewrite_of_some_protocols_and_of_weights_as_they_were():
    network, x = network_of(), noise(1, 1, 8, 4, 12)
    fast = FastNeuroNet(network, ("many",))
    with torch.inference_mode():
        before = network(x)["many"]
        for tensor in network.state_dict().values():
            tensor.mul_(2)
        torch.testing.assert_close(fast.window(x).slices(0, 8)["many"], before, atol=1e-5, rtol=0)
    assert list(window_classes(fast, x, side=8, stride=4)) == ["many"]


def test_sums_stand_for_a_windows_slices_and_features_for_two_rows_of_windows(monkeypatch):
    """40 slices in windows of 16 every 8: rows at 0, 8, 16 and 24 of 2 × 1 windows."""
    network, x = network_of(), noise(1, 1, 40, 24, 16)
    grid = windows.plan((40, 24, 16), side=16, stride=8, multiple=4)
    with torch.inference_mode():
        finished = [(first, sums["many"].shape, sums["many"].untyped_storage().nbytes()) for first, sums in windows._by_rows(network, x, grid)]
    assert [first for first, _, _ in finished] == [0, 8, 16, 24] and finished[0][1] == (8, 24, 16, 20)
    assert {held for _, _, held in finished} == {16 * 24 * 16 * 20 * 4}
    held, alive = weakref.WeakSet(), []

    class Counted(neuronet_engine.Window):
        def __init__(self, *args) -> None:
            super().__init__(*args)
            held.add(self)

    monkeypatch.setattr(neuronet_engine, "Window", Counted)
    with torch.inference_mode():
        for first, sums in windows._by_slices(FastNeuroNet(network), x, grid):
            alive.append(len(held))
            assert sums["many"].shape == (windows.SLICES, 24, 16, 20) and first == windows.SLICES * (len(alive) - 1)
    assert len(alive) == 20 and alive[0] == 2 and max(alive) == 4


def test_a_networks_mode_and_moments_stay():
    network = network_of().train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    window_classes(network, noise(1, 1, 8, 8, 12), side=8, stride=4)
    assert network.training and all(torch.equal(before[name], value) for name, value in network.state_dict().items())


@pytest.mark.parametrize(
    ("shape", "chosen", "words"),
    [
        ((1, 1, 8, 8, 8), {"side": 6, "stride": 2}, "side: 6; a positive multiple of 4 is wanted"),
        ((1, 1, 8, 8, 8), {"side": 8, "stride": 0}, "stride: 0; from 1 to the side of a window, 8, is wanted"),
        ((1, 1, 8, 8, 8), {"side": 8, "stride": 9}, "stride: 9; from 1 to"),
        ((1, 1, 8, 8), {}, r"image: shape \(1, 1, 8, 8\); \(1, 1, D, H, W\) is wanted"),
        ((2, 1, 8, 8, 8), {}, r"image: shape \(2, 1, 8, 8, 8\)"),
        ((1, 1, 8, 0, 8), {}, r"image: shape \(1, 1, 8, 0, 8\)"),
    ],
)
def test_what_cannot_be_is_one_line(shape, chosen, words):
    for way in (window_classes, window_probabilities):
        with pytest.raises(InputError, match=words):
            way(network_of(), torch.zeros(shape), **chosen)
