"""The one predict: exact moments, padding, engines and half precision, with networks of a few parameters."""

import numpy as np
import pytest
import torch

from data_registry.errors import InputError
from lod_model.engine import FastLODBrain
from lod_model.networks.lod_brain import LODBrain, LODBrainConfig
from lod_model.predict import HalfPrecision, moments, predict, with_engine


def test_moments_count_every_voxel():
    data = np.random.default_rng(0).integers(0, 256, (9, 8, 7), dtype=np.uint8)
    assert moments(data) == pytest.approx((data.mean(dtype=np.float64), data.std(dtype=np.float64)), rel=1e-12)


def test_predict_is_a_softmax_and_pads_to_what_the_network_needs():
    torch.manual_seed(0)
    network = LODBrain(LODBrainConfig(widths=(2, 2, 4)))
    data = np.random.default_rng(0).integers(0, 256, (20, 24, 17), dtype=np.uint8)
    probabilities = predict(network, data)
    assert probabilities.shape == (7, 20, 24, 17) and probabilities.dtype == np.float32
    assert np.allclose(probabilities.sum(axis=0), 1, atol=1e-5)
    mean, deviation = moments(data)
    padded = np.pad(data, [(0, -n % network.config.multiple) for n in data.shape])
    assert np.array_equal(predict(network, padded, mean=mean, deviation=deviation)[:, :20, :24, :17], probabilities)


def test_predict_equals_the_network_and_leaves_its_mode_and_threads_alone():
    torch.manual_seed(0)
    network = LODBrain(LODBrainConfig(widths=(2, 2, 4))).train()
    data = np.random.default_rng(0).integers(0, 256, (16, 16, 16), dtype=np.uint8)
    threads = torch.get_num_threads()
    found = predict(network, data, threads=1)
    assert network.training and torch.get_num_threads() == threads
    x = torch.from_numpy((data - data.mean()) / data.std()).float()[None, None]
    with torch.no_grad():
        wanted = torch.softmax(network.eval()(x), dim=1)[0].numpy()
    assert np.allclose(found, wanted, atol=1e-5)


def test_predict_refuses_a_grid_without_contrast():
    with pytest.raises(InputError, match="no contrast, every voxel of the grid is 7"):
        predict(LODBrain(LODBrainConfig(widths=(2, 2, 4))), np.full((16, 16, 16), 7, dtype=np.uint8))


def test_the_engine_decides_what_computes():
    lod, cpu = LODBrain(LODBrainConfig(widths=(2, 2, 4))), torch.device("cpu")
    assert isinstance(with_engine(lod, "fast", device=cpu)[0], FastLODBrain)
    assert with_engine(lod, "plain", device=cpu)[0] is lod
    other = torch.nn.Identity()   # it has no rewrite
    assert with_engine(other, "fast", device=cpu)[0] is other
    with pytest.raises(InputError, match="one of fast, fast-bf16, plain is wanted"):
        with_engine(lod, "slow")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_as_on_a_gpu(dtype):
    """The path of a GPU, by autocast on the CPU: half-precision convolutions, probabilities in float32 near the exact ones."""
    torch.manual_seed(0)
    network = LODBrain(LODBrainConfig(widths=(2, 2, 4))).eval()
    data = np.random.default_rng(0).integers(0, 256, (16, 16, 24), dtype=np.uint8)
    half, exact = predict(HalfPrecision(network, dtype), data), predict(network, data)
    assert half.dtype == np.float32 and np.allclose(half.sum(axis=0), 1, atol=1e-5)
    assert 0 < abs(half - exact).max() < 0.05
