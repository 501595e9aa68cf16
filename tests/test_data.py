"""Which samples a training sees, in which order, and which part of each."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data_registry.errors import InputError
from data_registry.params import Train
from lod_model import networks
from lod_model.data import EpochOrder, Windows, epoch_order
from lod_model.module import VolumeModule
from lod_model.networks.recipe import LOD_BRAIN


def scans(number: int) -> list:
    return [SimpleNamespace(database="a", site="b")] * number


def test_few_scans_are_passed_through_several_times():
    order = EpochOrder(scans(3), seed=5, at_least=7)
    order.set_epoch(4)
    keys = list(order)
    assert len(keys) == len(order) == 9 and len(set(keys)) == 9  # never the same draw twice
    assert [sorted(i for n, i in keys if n == number) for number in (12, 13, 14)] == [[0, 1, 2]] * 3


def test_order_is_a_pure_function():
    order = EpochOrder(scans(7), seed=5)
    order.set_epoch(2)
    assert list(order) == list(order) and sorted(i for _, i in order) == list(range(7))
    assert not np.array_equal(epoch_order(["a"] * 20, 5, 2, 1.0), epoch_order(["a"] * 20, 5, 3, 1.0))


def test_every_window_with_a_label_is_equally_likely():
    """One labelled voxel at (4, 4, 4) of 12³: windows of 8 from multiples of 4 hold it from 0 and 4 along each axis, eight in all."""
    classes = np.zeros((12, 12, 12), np.uint8)
    classes[4, 4, 4] = 2
    drawn = [tuple(Windows(8, 4).first(classes, seed, where="")) for seed in range(800)]
    counts = {place: drawn.count(place) for place in set(drawn)}
    assert set(counts) == {(d, h, w) for d in (0, 4) for h in (0, 4) for w in (0, 4)} and min(counts.values()) > 60
    assert len({tuple(Windows(8, 4).first(classes * 0, seed, where="")) for seed in range(100)}) == 8    # nothing labelled: anywhere
    with pytest.raises(InputError, match="train.fine_patch is 16: sub-01 has 12 × 12 × 12 voxels; null or at most 12 is wanted"):
        Windows(16, 4).first(classes, 0, where="sub-01")


def test_the_loss_of_windows_is_the_mean_of_each_scans_own():
    net = networks.build("lod_brain", {"widths": [2, 4, 8], "dropout": 0.0})
    module = VolumeModule(net, level="fine", settings=Train(), recipe=LOD_BRAIN)
    generator = torch.Generator().manual_seed(0)
    image, labels = torch.randn(2, 1, 16, 16, 16, generator=generator), torch.randint(0, 3, (2, 16, 16, 16), generator=generator)
    first = torch.tensor([[0, 8, 0], [8, 0, 8]])
    targets = torch.stack([labels[0, :8, 8:, :8], labels[1, 8:, :8, 8:]])
    by_hand = []
    for i, box in enumerate(((slice(0, 8), slice(8, 16), slice(0, 8)), (slice(8, 16), slice(0, 8), slice(8, 16)))):
        p = net.forward_window(image[i : i + 1], box).softmax(1)[0]
        dice = [2 * p[c][targets[i] == c].sum() / (p[c].square().sum() + (targets[i] == c).sum()) for c in range(3)]   # of 7, three are there
        by_hand.append(1 - sum(dice) / 3)
    assert module.loss({"image": image, "target": targets, "window": first}).item() == pytest.approx((sum(by_hand) / 2).item(), abs=1e-5)
