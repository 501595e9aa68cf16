"""Weights for other programs: safetensors, which ``weights.load`` reads back bit for bit, and ONNX of the network as written.

Both carry as strings what a checkpoint carries: format, network, config, protocol, grid, preparation, provenance (config, preparation and
provenance as JSON), and the hash of the tensors.
"""

from __future__ import annotations

import copy
import json
import logging
import warnings
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from data_registry.conform import grid_geometry, parse_grid
from data_registry.errors import InputError
from data_registry.files import replacing
from lod_model.networks.group_norm import GroupNorm
from lod_model.weights import SAFETENSORS, Weights

OPSET = 18
ONNX_PACKAGES = ("onnx", "onnxscript")


def metadata(found: Weights) -> dict[str, str]:
    """What an exported file says of itself."""
    return {
        "format": SAFETENSORS,
        "network": found.name,
        "config": json.dumps(found.network.config.to_dict()),
        "protocol": found.protocol,
        "grid": found.grid,
        "preparation": json.dumps(asdict(found.preparation)),
        "provenance": json.dumps(found.provenance, ensure_ascii=False),
        "hash": found.hash,
    }


def write_safetensors(path: str | Path, found: Weights) -> Path:
    """The tensors under our names and :func:`metadata`, whole or not at all."""
    path = Path(path)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in found.network.state_dict().items()}
    with replacing(path) as aside:
        aside.write_bytes(safetensors_bytes(state, metadata(found)))
    return path


def write_onnx(path: str | Path, found: Weights, *, side: int | None = None) -> Path:
    """ONNX (opset 18, float32) of the network as written: ``image`` (1, 1, S, S, S), z-scored over all voxels → ``logits`` (1, C, S, S, S).

    S is fixed: ``side``, by default that of the weights' grid. The graph's group norms take means of means, see
    :class:`MeanOfMeansGroupNorm`. InputError where a package is not installed or the network does not take such a side.
    """
    absent = [name for name in ONNX_PACKAGES if find_spec(name) is None]
    if absent:
        raise InputError(f"{', '.join(absent)} is not installed; `pip install 'lodbrain[export]'` is wanted for ONNX")
    path, side = Path(path), side or grid_side(found.grid)
    multiple = found.network.config.multiple
    if side < 1 or side % multiple:
        raise InputError(f"side {side}: a positive multiple of {multiple} is wanted by {found.name}")
    import onnx

    model = traced(found.network, side)
    onnx.helper.set_model_props(model, metadata(found) | {"side": str(side), "input": "z-scored over all voxels, axes L I A"})
    onnx.checker.check_model(model, full_check=True)
    with replacing(path) as aside:
        aside.write_bytes(model.SerializeToString())
    return path


def grid_side(grid: str) -> int:
    """Voxels along a side of a named grid; InputError for one whose sides depend on the scan.

    >>> grid_side("1mm"), grid_side("2mm")
    (256, 128)
    """
    if np.isnan(parse_grid(grid)):
        raise InputError(f"grid {grid!r} has no side of its own; --side N is wanted")
    return grid_geometry(grid, np.ones(3), (1, 1, 1))[1]


class MeanOfMeansGroupNorm(nn.Module):
    """The function of a :class:`GroupNorm` in operations that ONNX has, accurate at any size in float32.

    A runtime's one float32 sum over 256³ voxels may lose the variance. Here means are taken along W, of those along H, of those along D, so
    that no sum runs over more than a side's voxels, and x is centred before it is squared.
    """

    def __init__(self, norm: GroupNorm) -> None:
        super().__init__()
        self.groups, self.epsilon = norm.groups, norm.epsilon
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: Tensor, *, inplace: bool = False) -> Tensor:
        """x (1, C, D, H, W) → the same shape; ``inplace`` is the twin's and does nothing here."""
        centred = x - self._group_means(x)
        scale = (self._group_means(centred * centred) + self.epsilon).rsqrt() * self.weight.view(1, -1, 1, 1, 1)
        return centred * scale + self.bias.view(1, -1, 1, 1, 1)

    def _group_means(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        means = x.mean(4).mean(3).mean(2).view(1, self.groups, channels // self.groups).mean(2, keepdim=True)   # (1, groups, 1)
        return means.expand(1, self.groups, channels // self.groups).reshape(1, channels, 1, 1, 1)


def traced(network: nn.Module, side: int) -> object:
    """The network as an ``onnx.ModelProto``, its weights within; nothing is computed, whatever the side."""
    network = copy.deepcopy(network).cpu().float().eval()
    for name, module in list(network.named_modules()):
        if isinstance(module, GroupNorm):
            network.set_submodule(name, MeanOfMeansGroupNorm(module))
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)   # it misses torchvision, we do not
    image = torch.zeros(1).expand(1, 1, side, side, side)
    with torch.enable_grad(), warnings.catch_warnings():   # with gradients the networks write nothing in place: a plainer graph
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            network, (image,), dynamo=True, opset_version=OPSET, input_names=["image"], output_names=["logits"], verbose=False
        )
    model = program.model_proto
    for part in (*model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output, *model.graph.initializer, model.graph, model):
        part.ClearField("metadata_props")   # stack traces of this machine
    return model
