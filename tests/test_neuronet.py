"""NeuroNet against the public code's own answers, and what of it is decided here."""

import json
import math

import numpy as np
import pytest
import torch
from small_networks import noise
from torch import nn
from torch.nn import functional as F

from data_registry.errors import InputError
from lod_model import networks
from lod_model.networks.neuronet import PROTOCOLS, VARIANTS, Doubling, NeuroNet, NeuroNetConfig, Unit
from lod_model.networks.neuronet_names import from_release, released_names

SMALL = NeuroNetConfig(protocols={"one": 3, "two": 5}, filters=(2, 3, 6), units=2)


@pytest.fixture(scope="module")
def reference(test_data) -> dict[str, np.ndarray]:
    return dict(np.load(test_data / "reference_networks" / "neuronet_eval.npz", allow_pickle=False))


def released(reference: dict[str, np.ndarray], **chosen) -> NeuroNet:
    """The network of the reference, with its weights."""
    own = json.loads(str(reference["config"]))["config"]
    protocols = dict(zip(own["protocols"], own["num_classes"], strict=True))
    config = NeuroNetConfig(protocols=protocols, filters=own["network"]["filters"], units=own["network"]["num_residual_units"], **chosen)
    network = NeuroNet(config).eval()
    variables = {name.removeprefix("state/"): value for name, value in reference.items() if name.startswith("state/")}
    network.load_state_dict(from_release(variables, config))
    return network


def ours_of(array: np.ndarray) -> torch.Tensor:
    """(B, D, H, W, C) → (B, C, D, H, W)."""
    return torch.from_numpy(array).permute(0, 4, 1, 2, 3)


def test_the_public_networks_answers(reference):
    network, x = released(reference), ours_of(reference["input"])
    with torch.inference_mode():
        logits, deepest = network(x), network.encode(x)[-1]
    torch.testing.assert_close(deepest, ours_of(reference["encoder_out"]), atol=5e-5, rtol=0)
    assert list(logits) == ["p4", "p6"]
    for name, own in logits.items():
        torch.testing.assert_close(own, ours_of(reference[f"logits/{name}"]), atol=5e-5, rtol=0)
        inner = own.softmax(1)[:, :, 8:24, 8:24, 8:24]
        torch.testing.assert_close(inner, ours_of(reference[f"prob_8_24/{name}"]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
def test_the_activation_is_what_the_release_runs_not_what_was_meant(reference, activation):
    with torch.inference_mode():
        other = released(reference, activation=activation)(ours_of(reference["input"]))["p4"]
    assert (other - ours_of(reference["logits/p4"])).abs().max() > 10


def test_the_fixed_kernel_is_the_releases(reference):
    kernel = torch.from_numpy(reference["state/tail_0/upscore_1/linear_up_kernel"]).permute(4, 3, 0, 1, 2)
    x = noise(2, 4, 3, 1, 5)
    torch.testing.assert_close(Doubling.apply(x), F.conv_transpose3d(x, kernel, stride=2, padding=1), atol=1e-6, rtol=0)


def test_doubling_by_hand_and_its_gradient():
    x = torch.zeros(1, 1, 3, 4, 2)
    x[0, 0, 0, 2, 1] = 64   # at a border along D and W, inside along H
    along_d, along_h, along_w = [0.75, 0.75, 0.25, 0, 0, 0], [0, 0, 0, 0.25, 0.75, 0.75, 0.25, 0], [0, 0.25, 0.75, 0.75]
    expected = 64 * torch.tensor(along_d)[:, None, None] * torch.tensor(along_h)[:, None] * torch.tensor(along_w)
    assert torch.equal(Doubling.apply(x)[0, 0], expected)
    assert torch.autograd.gradcheck(Doubling.apply, noise(2, 3, 2, 1, 3, dtype=torch.float64).requires_grad_())


def test_parameters_are_the_public_ones(test_data):
    public = json.loads((test_data / "reference_networks" / "neuronet_param_counts.json").read_text())
    network = networks.build("neuronet")
    assert dict(zip(public["config"]["protocols"], public["config"]["num_classes"], strict=True)) == network.config.protocols == PROTOCOLS
    assert count(network) == public["trainable"] == 2_493_171
    assert count(network.stem) == public["trainable_by_scope"]["conv3d"]
    assert count(network.units) == public["trainable_by_scope"]["encoder"]
    for number, (name, classes) in enumerate(PROTOCOLS.items()):
        assert count(network.tails[name]) == public["trainable_by_scope"][f"tail_{number}"] == 246 * classes + classes**2
    moving = sum(b.numel() for name, b in network.named_buffers() if "running" in name)
    assert moving == public["bn_moving"]


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_no_bias_the_release_norms_and_initial_values():
    torch.manual_seed(0)
    network = NeuroNet(NeuroNetConfig(protocols={"fsl_fast": 4}))
    for module in network.modules():
        if isinstance(module, nn.Conv3d):
            assert module.bias is None
            bound = math.sqrt(3 / (module.in_channels * math.prod(module.kernel_size)))
            assert module.weight.abs().max() <= bound
            if module.weight.numel() > 2000:   # uniform: a third of the bound squared
                assert module.weight.var().item() == pytest.approx(bound**2 / 3, rel=0.1)
        if isinstance(module, nn.BatchNorm3d):
            assert (module.eps, module.momentum) == (1e-3, 0.01)
    first, last = network.units[0], network.units[-1]
    assert (first.first.kernel_size, first.first.stride, last.first.kernel_size) == ((4, 4, 4), (2, 2, 2), (3, 3, 3))


def test_a_shortcut_is_pooled_and_has_new_channels_on_both_sides():
    unit = Unit(3, 6, SMALL, halves=True)
    for conv in (unit.first, unit.second):
        nn.init.zeros_(conv.weight)
    x = noise(1, 3, 4, 6, 2)
    y = unit(x)
    assert y.shape == (1, 6, 2, 3, 1)
    assert y[:, :1].abs().max() == 0 and y[:, 4:].abs().max() == 0   # three new channels: one before, two after
    assert y[0, 2, 1, 2, 0] == x[0, 1, 2:4, 4:6].max()


def test_some_tails_alone_give_what_all_give():
    network, x = NeuroNet(SMALL).eval(), noise(2, 1, 8, 4, 12)
    every, some = network(x), network(x, ["two"])
    assert list(every) == ["one", "two"] and list(some) == ["two"]
    assert torch.equal(every["two"], some["two"]) and every["one"].shape == (2, 3, 8, 4, 12)
    with pytest.raises(ValueError, match="protocols: three, wanted some of one, two"):
        network(x, ["two", "three"])
    with pytest.raises(ValueError, match="8 × 4 × 10 voxels, wanted every side a multiple of 4"):
        network(noise(1, 1, 8, 4, 10))


def test_training_moves_every_parameter():
    network = NeuroNet(SMALL)
    sum(logits.logsumexp(1).mean() for logits in network(noise(2, 1, 8, 8, 8)).values()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


def test_half_precision_comes_near_and_trains():
    network, x = NeuroNet(SMALL).eval(), noise(1, 1, 16, 16, 32)  # of 2 × 2 × 4 voxels torch's bfloat16 gradient is now and then not finite
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = network(x)
        sum(logits.float().square().mean() for logits in half.values()).backward()
    for name, logits in network(x).items():
        assert half[name].dtype is torch.bfloat16
        torch.testing.assert_close(half[name].float(), logits, atol=0.05 * logits.std().item(), rtol=0.05)
    assert [name for name, p in network.named_parameters() if not p.grad.isfinite().all()] == []


def test_configuration_as_a_dict_and_back():
    network = networks.build("neuronet", {"protocols": {"lod7": 7}, "filters": [2, 4], "units": 1})
    assert network.config.to_dict() == {
        "protocols": {"lod7": 7}, "filters": [2, 4], "units": 1, "activation": "relu6", "epsilon": 1e-3, "window": 128,
    }  # fmt: skip
    assert networks.build("neuronet", network.config.to_dict()).config == network.config
    assert network.config.classes == 7 and network.config.multiple == 2
    assert networks.build_coarse("neuronet") is None
    with pytest.raises(InputError, match="has 5 protocols .*; here one is wanted"):
        _ = NeuroNetConfig().classes


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"classes": 7}, "neuronet has no classes; known: protocols, filters, units, activation, epsilon"),
        ({"protocols": {}}, "protocols: {}, wanted one or more names"),
        ({"protocols": ["lod7"]}, r"protocols: \['lod7'\], wanted one or more names"),
        ({"protocols": {"lod7": 1}}, "protocols: {'lod7': 1}, wanted one or more names, each with an integer of at least 2"),
        ({"protocols": {"a.b": 2}}, "protocols: 'a.b', wanted a name such as fsl_fast"),
        ({"protocols": {"train": 2}}, "protocols: 'train', wanted a name such as fsl_fast"),
        ({"filters": [16]}, r"filters: \[16\], wanted two or more positive integers"),
        ({"filters": [16, 8]}, r"filters: \[16, 8\], wanted none smaller than the one before it"),
        ({"units": 0}, "units: 0, wanted a positive integer"),
        ({"window": 8}, "window: 8, the side of crops too, wanted at least 16"),
        ({"activation": "elu"}, "activation: 'elu', wanted one of relu6, leaky_relu, relu"),
        ({"epsilon": True}, "epsilon: True, wanted a positive number"),
    ],
)
def test_bad_configurations_are_one_line(config, line):
    with pytest.raises(InputError, match=line) as raised:
        networks.build("neuronet", config)
    assert "\n" not in str(raised.value) and str(raised.value).startswith("network neuronet: ")


def test_names_cover_the_network_and_a_missing_variable_is_one_line():
    network = NeuroNet(SMALL)
    named = {name for name in network.state_dict() if not name.endswith("num_batches_tracked")}
    names = released_names(SMALL)
    assert set(names) == named and len(set(names.values())) == len(names)
    assert names["units.2.first.weight"] == "encoder/unit_2_0/sub_unit0/conv3d/kernel"
    assert "tails.one.convert.weight" not in released_names(NeuroNetConfig(protocols={"one": 6}, filters=(2, 3, 6)))
    with pytest.raises(InputError, match="the 65 variables of neuronet are missing, first conv3d/kernel"):
        from_release({}, SMALL)


def test_the_papers_variants():
    assert VARIANTS["all"] == (tuple(PROTOCOLS),) and len(VARIANTS["single"]) == 5
    assert VARIANTS["tissue"] == (("fsl_fast", "spm_tissue", "malp_em_tissue"),)
    for variant in VARIANTS.values():
        for chosen in variant:
            assert NeuroNetConfig(protocols={name: PROTOCOLS[name] for name in chosen}).protocols
