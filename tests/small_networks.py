"""Small networks and images with nothing idle in them, for the tests."""

import torch

from lod_model.networks.lod_brain import LODBrain, LODBrainConfig


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def made(config: LODBrainConfig, seed: int = 0) -> LODBrain:
    torch.manual_seed(seed)
    net = LODBrain(config).eval()
    for parameter in net.parameters():   # biases and affines too, so that none is idle in a comparison
        if parameter.ndim == 1:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return net
