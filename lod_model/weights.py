"""Weights on disk: our checkpoint, as .pt or as safetensors, and the Keras weights that the authors of LOD-Brain published.

Our checkpoint is one ``.pt`` file of tensors and plain values, read with ``weights_only=True``, so that opening one runs
no code that it carries:

    {format: 1, network: {name, config}, protocol, grid, preparation: {...}, state: {name: tensor}, provenance: {...}}

A safetensors file has the same in its metadata, config, preparation and provenance as JSON (:mod:`lod_model.export` writes it).
``protocol`` says what the classes mean, ``grid`` on which voxels the network was trained, ``preparation`` what their intensities had gone
through (:class:`data_registry.intensity.Preparation`; the defaults where a file says nothing). The state that a run resumes
from (optimiser, epoch, random state) is another file and not read here.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import h5py
import torch
from safetensors import safe_open
from torch import Tensor, nn

from data_registry.errors import InputError
from data_registry.intensity import ROBUST, Preparation
from lod_model import checkpoints, networks
from lod_model.networks.lod_brain import LODBrain, LODBrainConfig

FORMAT = 1
SAFETENSORS = "lodbrain 1"
"""``format`` in the metadata of a safetensors file."""
PACKAGED = Path(__file__).parent / "models"
DEFAULT = "lod7-rendered"
KEYS = ("format", "network", "protocol", "grid", "state", "provenance")
AUTHORS = {
    "source": "rockNroll87q/LOD-Brain",
    "licence": "MIT",
    "citation": "Svanera et al., Medical Image Analysis 93:103090, 2024; doi:10.1016/j.media.2024.103090; arXiv 2211.02400",
}


class WeightsError(InputError):
    """A file that is not what it should be: one line naming the file and what is wrong with it."""


@dataclass(frozen=True)
class Weights:
    """A network ready to predict, in eval mode on the CPU, and what is known of it.

    name         key of ``networks.NETWORKS``
    protocol     label protocol of its classes, such as ``lod7``; of several outputs all, joined by a plus
    grid         grid it was trained on, such as ``1mm``
    hash         ``weights_hash`` of its tensors: the same for a .pt, the .h5 it came from and the .safetensors made of it
    provenance   plain values: source, licence, citation, run, data, ...
    preparation  what its scans' intensities went through, but for the z-score
    """

    network: nn.Module
    name: str
    protocol: str
    grid: str
    hash: str
    provenance: dict[str, Any]
    path: Path
    preparation: Preparation = ROBUST

    @property
    def protocols(self) -> tuple[str, ...]:
        """Names of all of them, in the order of the network's outputs."""
        return tuple(self.protocol.split("+"))


def joined(protocols: Sequence[str]) -> str:
    """Several protocols as a checkpoint names them."""
    return "+".join(protocols)


def weights_hash(state: dict[str, Tensor]) -> str:
    """SHA-256, hex, over name, dtype, shape and values of every tensor, in order of name.

    Order of insertion, device and memory format do not change it.

    >>> weights_hash({"a": torch.zeros(2), "b": torch.ones(1)}) == weights_hash({"b": torch.ones(1), "a": torch.zeros(2)})
    True
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save(
    path: str | Path, network: nn.Module, *, name: str, protocol: str, grid: str, provenance: dict[str, Any], preparation: Preparation = ROBUST
) -> Path:
    """Write the checkpoint at ``path``, whole or not at all. ``provenance`` holds plain values, lists and dicts only."""
    path = Path(path)
    if not networks.is_known(name):
        raise WeightsError(f"{path}: network {name!r}, wanted one of {', '.join(networks.names())}")
    _check_plain(provenance, f"{path}: provenance")
    content = {
        "format": FORMAT,
        "network": {"name": name, "config": network.config.to_dict()},
        "protocol": protocol,
        "grid": grid,
        "preparation": asdict(preparation),
        "state": {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()},
        "provenance": provenance,
    }
    checkpoints.save(content, path)
    return path


def packaged() -> list[Path]:
    """The weights that come with the project, the default first."""
    return sorted(PACKAGED.glob("*.pt"), key=lambda path: (path.stem != DEFAULT, path.stem))


def default() -> Path:
    """The weights to use when none are named; InputError where the project was installed without them."""
    path = PACKAGED / f"{DEFAULT}.pt"
    if not path.is_file():
        raise InputError(
            f"no weights are named and no model is packaged ({path}); --weights with the weights.pt of a training run, "
            "or with what `lodbrain weights import FILE.h5` makes, is wanted"
        )
    return path


def load(path: str | Path) -> Weights:
    """Read our checkpoint, its safetensors, or the authors' Keras weights; the content decides which, not the name.

    WeightsError where the file is missing, cut short, carries code, or is something else.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    if h5py.is_hdf5(path):
        network, meta = import_keras(path)
    elif zipfile.is_zipfile(path):
        network, meta = _built(_read_checkpoint(path), path)
    elif _is_safetensors(path):
        network, meta = _built(_read_safetensors(path), path)
    else:
        raise WeightsError(f"{path}: neither a checkpoint nor Keras weights nor safetensors (or cut short), {path.stat().st_size} bytes")
    return Weights(network=network.eval(), hash=weights_hash(network.state_dict()), path=path, **meta)


def _read_checkpoint(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:   # whatever a damaged or hostile file makes of the reader, it is the file's fault
        raise WeightsError(f"{path}: not a checkpoint of tensors and plain values ({_first_line(error)})") from None


def _is_safetensors(path: Path) -> bool:
    """Eight bytes of length, little-endian, then a JSON object: the format has no other mark."""
    with open(path, "rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") + 8 <= path.stat().st_size


def _read_safetensors(path: Path) -> object:
    """A safetensors file as the content of a checkpoint."""
    try:
        with safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}   # noqa: SIM118, it is no dict
    except Exception as error:
        raise WeightsError(f"{path}: not readable as safetensors ({_first_line(error)})") from None
    if meta.get("format") != SAFETENSORS:
        raise WeightsError(f"{path}: safetensors of format {meta.get('format')!r}, wanted {SAFETENSORS!r}, as `lodbrain weights export` writes")
    if meta.get("hash") != weights_hash(state):
        raise WeightsError(f"{path}: hash {meta.get('hash')}, wanted {weights_hash(state)}, that of its tensors")
    try:
        config, provenance = json.loads(meta["config"]), json.loads(meta["provenance"])
        plain = {"protocol": meta["protocol"], "grid": meta["grid"], "provenance": provenance}
        plain |= {"preparation": json.loads(meta["preparation"])} if "preparation" in meta else {}
        return {"format": FORMAT, "network": {"name": meta["network"], "config": config}, "state": state, **plain}
    except KeyError as error:
        raise WeightsError(f"{path}: no {error.args[0]} in its metadata") from None
    except ValueError as error:
        raise WeightsError(f"{path}: metadata that is not JSON ({_first_line(error)})") from None


def _built(content: object, path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a checkpoint's content, each part of which is checked."""
    if not isinstance(content, dict) or set(content) | {"preparation"} != {*KEYS, "preparation"}:
        came = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise WeightsError(f"{path}: has {came[:200] or 'nothing'}; wanted {', '.join(KEYS)}")
    if content["format"] != FORMAT:
        raise WeightsError(f"{path}: format {content['format']!r}, wanted {FORMAT}")
    network, state = content["network"], content["state"]
    if not isinstance(network, dict) or set(network) != {"name", "config"} or not isinstance(network["config"], dict):
        raise WeightsError(f"{path}: network is not {{name, config}}")
    for key, kind in (("protocol", str), ("grid", str), ("state", dict), ("provenance", dict)):
        if not isinstance(content[key], kind):
            raise WeightsError(f"{path}: {key} is a {type(content[key]).__name__}, wanted a {kind.__name__}")
    try:
        built = networks.build(network["name"], network["config"])
    except (ValueError, TypeError) as error:
        raise WeightsError(f"{path}: {_first_line(error)}") from None
    _fill(built, state, path)
    try:
        preparation = Preparation(**content.get("preparation", {}))   # files from before there was a choice have none
    except (TypeError, InputError) as error:
        raise WeightsError(f"{path}: preparation: {_first_line(error)}") from None
    meta = {"name": network["name"], "preparation": preparation, **{key: content[key] for key in ("protocol", "grid", "provenance")}}
    return built, meta


def _fill(network: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Put ``state`` into ``network``; WeightsError names the first tensor that is missing, too many, or misshapen."""
    wanted = network.state_dict()
    for name in (*wanted, *state):
        if name not in state:
            raise WeightsError(f"{path}: no tensor {name}")
        if name not in wanted:
            raise WeightsError(f"{path}: unknown tensor {name}")
        if not isinstance(state[name], Tensor) or state[name].shape != wanted[name].shape:
            came = tuple(state[name].shape) if isinstance(state[name], Tensor) else type(state[name]).__name__
            raise WeightsError(f"{path}: {name} is {came}, wanted {tuple(wanted[name].shape)}")
        if not torch.isfinite(state[name]).all():
            raise WeightsError(f"{path}: {name} has values that are not finite")
    network.load_state_dict(state)


def _check_plain(value: object, where: str) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            _check_plain(key, where)
            _check_plain(inner, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for inner in value:
            _check_plain(inner, where)
    elif type(value) not in (str, int, float, bool, type(None)):
        raise WeightsError(f"{where} is a {type(value).__name__}, wanted plain values")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


# ---------------------------------------------------------------------------------------------------------------------
# The authors' Keras weights

CONV = {"weight": "kernel", "bias": "bias"}                    # our tensor: Keras's, in Keras's order
BLOCK = {
    **{f"conv.{ours}": keras for ours, keras in CONV.items()},
    "norm.weight": "gamma",
    "norm.bias": "beta",
    **{f"resample.{ours}": keras for ours, keras in CONV.items()},
}


def import_keras(path: str | Path) -> tuple[LODBrain, dict[str, Any]]:
    """The published HDF5 weights as our network, and {name, protocol, grid, provenance} to go with it.

    Number of levels, widths and classes are read off the tensors. One level alone gets the max-pool 4 it was trained
    with. WeightsError names the file and the tensor that is missing, left over, or misshapen.
    """
    path = Path(path)
    try:
        with h5py.File(path, "r") as file:
            stored = _keras_tensors(file, path)
    except WeightsError:
        raise
    except Exception as error:   # h5py raises OSError, KeyError, RuntimeError, ... on a damaged file
        raise WeightsError(f"{path}: not readable as HDF5 ({_first_line(error)})") from None
    config = _keras_config(stored, path)
    network = LODBrain(config)
    left = dict(stored)
    state = {}
    for layer, prefix, names in _keras_layers(config, stored, path):
        came = left.pop(layer)
        kinds = [tensor.split("/")[-1].split(":")[0] for tensor in came]
        if kinds != list(names.values()):
            raise WeightsError(f"{path}: {layer} has {', '.join(kinds)}; wanted {', '.join(names.values())}")
        state |= {f"{prefix}.{name}": tensor for name, tensor in zip(names, came.values(), strict=True)}
    if left:
        raise WeightsError(f"{path}: left over {', '.join(left)}")
    _fill(network, state, path)
    meta = {"name": "lod_brain", "protocol": "lod7", "grid": "1mm", "provenance": {**AUTHORS, "file": path.name}}
    return network.eval(), meta


def _keras_tensors(file: h5py.File, path: Path) -> dict[str, dict[str, Tensor]]:
    """{layer: {tensor: values}}, in the file's order within a layer, kernels turned to PyTorch's axes."""
    if "layer_names" not in file.attrs:
        raise WeightsError(f"{path}: HDF5, but not Keras weights (no layer_names)")
    stored, paths = {}, set()
    for layer in map(_text, file.attrs["layer_names"]):
        if not isinstance(file.get(layer), h5py.Group):
            raise WeightsError(f"{path}: no layer {layer}")
        tensors = {}
        for name in map(_text, file[layer].attrs.get("weight_names", ())):
            if not isinstance(file[layer].get(name), h5py.Dataset):
                raise WeightsError(f"{path}: no tensor {layer}/{name}")
            values = torch.from_numpy(file[layer][name][()]).float()
            # Keras keeps (D, H, W, in, out), or (D, H, W, out, in) to go up; PyTorch (out, in, D, H, W), or (in, out, ...)
            tensors[name] = values.permute(4, 3, 0, 1, 2) if values.ndim == 5 else values
            paths.add(f"{layer}/{name}")
        if tensors:
            stored[layer] = tensors
    found = []
    file.visititems(lambda name, item: found.append(name) if isinstance(item, h5py.Dataset) else None)
    unnamed = sorted(set(found) - paths)
    if unnamed:
        raise WeightsError(f"{path}: unknown tensor {unnamed[0]}")
    return stored


def _keras_numbered(stored: dict[str, dict[str, Tensor]], kind: str) -> list[str]:
    """The layers ``kind``, ``kind_1``, ``kind_2``, … in the order in which they were made: the file's is another."""
    numbers = {layer: layer.removeprefix(kind).removeprefix("_") or "0" for layer in stored if layer.startswith(kind)}
    return sorted((layer for layer, number in numbers.items() if number.isdigit()), key=lambda layer: int(numbers[layer]))


def _keras_config(stored: dict[str, dict[str, Tensor]], path: Path) -> LODBrainConfig:
    convs, blocks = _keras_numbered(stored, "conv3d"), _keras_numbered(stored, "plain")
    levels = len(convs) // 2                                                  # a stem and an output each
    try:
        depth = (len(blocks) + levels * (levels - 1) // 2) // levels          # blocks of level 0; one less each level after
        first = [next(iter(stored[layer].values())).shape[0] for layer in (convs[0], *blocks[:depth], "main_output")]
        return LODBrainConfig(
            classes=first[-1], widths=(first[0] // 4, *first[1:-1]), levels=levels, coarse_pool=4 if levels == 1 else None
        )
    except (ZeroDivisionError, IndexError, KeyError, ValueError):
        raise WeightsError(f"{path}: Keras weights, but not of LOD-Brain (layers {', '.join(stored) or 'none'})"[:300]) from None


def _keras_layers(config: LODBrainConfig, stored: dict[str, dict[str, Tensor]], path: Path) -> list[tuple[str, str, dict[str, str]]]:
    """(Keras layer, our prefix, our tensors and Keras's names for them) for the whole network."""
    layers = {kind: iter(_keras_numbered(stored, kind)) for kind in ("conv3d", "plain", "up_plain")}
    wanted = []
    for k in range(config.levels):
        blocks = len(config.widths) - 1 - k
        encoder = [f"encoder.{i}" for i in range(blocks - 1)] + ["bridge"]
        wanted += [("conv3d", f"levels.{k}.stem", CONV)]
        wanted += [("plain", f"levels.{k}.{block}", BLOCK) for block in encoder]
        wanted += [("up_plain", f"levels.{k}.decoder.{i}", BLOCK) for i in range(blocks)]
        wanted += [("conv3d", f"levels.{k}.out", CONV)]
    found = [(next(layers[kind], None), prefix, names) for kind, prefix, names in wanted]
    for layer, prefix, _ in found:
        if layer is None:
            raise WeightsError(f"{path}: no layer for {prefix}")
    return [*found, ("main_output", "head", CONV)]


def _text(name: bytes | str) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)
