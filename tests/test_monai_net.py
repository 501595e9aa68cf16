"""MONAI's networks through the adapter: by any of their names, of one output or several, and one line for those that are of no use."""

import pytest
import torch

from data_registry.errors import InputError
from lod_model import networks

SMALL = {
    "UNet": {"channels": [4, 8], "strides": [2]},
    "DynUNet": {"filters": [2, 2, 2, 2, 2], "deep_supervision": True},
    "BasicUNetPlusPlus": {"features": [2] * 6, "deep_supervision": True},
    "SegResNetVAE": {"init_filters": 8, "blocks_down": [1, 1], "blocks_up": [1]},
    "UNETR": {"hidden_size": 12, "num_heads": 2, "mlp_dim": 8, "feature_size": 2},
}


def built(net: str, arguments: dict | None = None, **config):
    return networks.build(f"monai:{net}", {"classes": 3, "window": 32, "arguments": arguments or {}} | config)


@pytest.mark.parametrize("net", SMALL)
@pytest.mark.parametrize("training", [False, True])
def test_one_map_of_logits_whatever_the_class_gives(net, training):
    """Deep supervision, and the loss of an autoencoder, come beside it in training."""
    torch.manual_seed(0)
    logits = built(net, SMALL[net]).train(training)(torch.randn(2, 1, 32, 32, 32))
    assert logits.shape == (2, 3, 32, 32, 32) and logits.requires_grad


def test_other_names_of_a_class():
    assert type(built("DynUnet").net) is type(built("DynUNet").net)
    assert built("Unet").net.channels == (16, 32, 64, 128, 256)


@pytest.mark.parametrize(
    ("net", "line"),
    [
        ("DenseNet121", r"gives \(2, 3\); a network for segmentation, which gives \(2, 3, 32, 32, 32\), is wanted"),
        ("VoxelMorph", "fails on 32 × 32 × 32 voxels .*missing .*'fixed'.*; other arguments, multiple or crops are wanted"),
    ],
)
def test_a_class_that_does_not_segment_is_one_line(net, line):
    with pytest.raises(InputError, match=f"^network monai:{net}: {line}$"):
        built(net)(torch.zeros(2, 1, 32, 32, 32))


@pytest.mark.parametrize(
    ("net", "config", "line"),
    [
        ("Foo", {}, "net: 'Foo', wanted a class of monai.networks.nets"),
        ("Classifier", {}, "Classifier cannot be made .*; arguments that it takes are wanted"),
        ("UNet", {"arguments": {"depth": 3}}, "UNet cannot be made .*'depth'.*; arguments that it takes are wanted"),
        ("UNet", {"arguments": 5}, "arguments: 5, wanted a mapping"),
        ("UNet", {"filters": 5}, "a network of MONAI has no filters; known: net, classes, multiple, window, arguments"),
        ("UNet", {"window": 0}, "window: 0, wanted a positive integer"),
    ],
)
def test_bad_configurations_are_one_line(net, config, line):
    with pytest.raises(InputError, match=f"^network monai:{net}: {line}"):
        built(net, **config)
