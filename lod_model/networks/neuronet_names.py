"""The names of NeuroNet's weights in the public TensorFlow code (DLTK), and those weights in our shapes.

A tail is numbered there by its place among the protocols. A kernel is (D, H, W, in, out) there, (out, in, D, H, W) here; the fixed kernels of
the doublings (``linear_up_kernel``) are no weights here.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from data_registry.errors import InputError
from lod_model.networks.neuronet import NeuroNetConfig

NORM = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}


def released_names(config: NeuroNetConfig) -> dict[str, str]:
    """Our name of each tensor → its name in the release.

    >>> names = released_names(NeuroNetConfig())
    >>> names["units.3.first.weight"], names["tails.fsl_first.norms.2.bias"]
    ('encoder/unit_2_1/sub_unit0/conv3d/kernel', 'tail_1/upscore_2/batch_normalization/beta')
    """
    names = {"stem.weight": "conv3d/kernel"}
    for unit in range(config.units * (len(config.filters) - 1)):
        theirs = f"encoder/unit_{unit // config.units + 1}_{unit % config.units}"
        for number, half in enumerate(("first", "second")):
            names |= _norm(f"units.{unit}.{half}_norm", f"{theirs}/sub_unit{number}")
            names[f"units.{unit}.{half}.weight"] = f"{theirs}/sub_unit{number}/conv3d/kernel"
    deepest = len(config.filters) - 2
    for number, (name, classes) in enumerate(config.protocols.items()):
        ours, theirs = f"tails.{name}", f"tail_{number}"
        if classes != config.filters[-1]:
            names[f"{ours}.convert.weight"] = f"{theirs}/upscore_{deepest}/filter_conversion/kernel"
        for scale in range(deepest + 1):
            names[f"{ours}.skips.{scale}.weight"] = f"{theirs}/upscore_{scale}/conv3d/kernel"
            names |= _norm(f"{ours}.norms.{scale}", f"{theirs}/upscore_{scale}")
        names[f"{ours}.head.weight"] = f"{theirs}/last/conv3d/kernel"
    return names


def from_release(variables: Mapping[str, np.ndarray], config: NeuroNetConfig) -> dict[str, Tensor]:
    """What ``NeuroNet(config).load_state_dict`` takes, of the release's variables by name.

    Those that are no weights (the doublings' and an optimiser's) are passed over; InputError for one that is missing. A norm's count of
    batches, which the release has not, is 0.
    """
    names = released_names(config)
    missing = [name for name in names.values() if name not in variables]
    if missing:
        raise InputError(f"{len(missing)} of the {len(names)} variables of {config.network} are missing, first {missing[0]}; all are wanted")
    tensors = {ours: torch.tensor(np.asarray(variables[theirs]), dtype=torch.float32) for ours, theirs in names.items()}
    tensors |= {name.replace("running_var", "num_batches_tracked"): torch.tensor(0) for name in names if name.endswith("running_var")}
    return {name: tensor.permute(4, 3, 0, 1, 2).contiguous() if tensor.ndim == 5 else tensor for name, tensor in tensors.items()}


def _norm(ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}.{mine}": f"{theirs}/batch_normalization/{name}" for mine, name in NORM.items()}
