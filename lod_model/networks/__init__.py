"""The networks, by name. One file each; a file is imported when its network is built, not before.

A new network is a file here and a line below. Its class has ``from_dict(config)``, a class method that builds the network
from a plain dict, and ``config`` with ``to_dict()``, that dict complete, for the checkpoint, and ``multiple``, which every
side of an image must be a multiple of; its file has ``RECIPE``, how it is fed and trained. It gives logits, or a dict of them
by label protocol, whose classes are then in ``config.protocols``. ``predicts`` is "windows" or "views" where it does not see whole
scans. If it is trained coarse to fine it also has ``coarse_from_dict`` and ``load_coarse``.

>>> names()
('fastsurfer_cnn', 'fastsurfer_vinn', 'lod_brain', 'neuronet', 'unet')
>>> build("lod_brain", {"levels": 1}).config.levels
1
>>> build("monai:BasicUNet", {"classes": 3}).config.classes
3
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from data_registry.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from data_registry.protocol import Protocol
    from lod_model.networks.recipe import Recipe

NETWORKS = {                                   # name → module of this folder : class
    "fastsurfer_cnn": "fastsurfer_cnn:FastSurferCNN",
    "fastsurfer_vinn": "fastsurfer_vinn:FastSurferVINN",
    "lod_brain": "lod_brain:LODBrain",
    "neuronet": "neuronet:NeuroNet",
    "unet": "unet:UNet",
}
MONAI = "monai:"                               # and any 3-D network of MONAI, by its class


def names() -> tuple[str, ...]:
    """The known networks, sorted."""
    return tuple(sorted(NETWORKS))


def build(name: str, config: dict | None = None) -> nn.Module:
    """The network ``name`` with this configuration, defaults for what it leaves out.

    InputError (a ValueError) for an unknown name, key or value.
    """
    return _made(name, "from_dict", config)


def build_coarse(name: str, config: dict | None = None) -> nn.Module | None:
    """The network that the coarse stage trains on the way to ``build(name, config)``; None if it has no such stage."""
    return _made(name, "coarse_from_dict", config)


def load_coarse(net: nn.Module, coarse: nn.Module, *, freeze: bool = False) -> None:
    """Put what the coarse stage learned into ``net``; ``freeze`` holds it still there."""
    net.load_coarse(coarse, freeze=freeze)


def config_for(name: str, protocols: Sequence[Protocol]) -> dict:
    """What in a network's configuration follows from the protocols it is trained with: its classes, or several outputs; else of the first alone."""
    module, network = _module(name)
    return getattr(getattr(module, network), "config_for", lambda tables: {"classes": tables[0].classes})(protocols)


def outputs(name: str, protocols: Sequence[str]) -> tuple[str, ...]:
    """Those of the protocols that the network learns: all where it has an output for each, else the first."""
    return tuple(protocols) if _module(name)[0].RECIPE.loss == "cross_entropy" else tuple(protocols[:1])


def recipe_of(name: str, chosen: str = "own") -> Recipe:
    """How a network is fed and trained; by ``train.recipe`` its optimiser, schedule and batch are those of another network.

    >>> recipe_of("fastsurfer_cnn", "fastsurfer_vinn").optimiser, recipe_of("fastsurfer_cnn").optimiser
    ('adamw', 'adam')
    """
    own = _module(name)[0].RECIPE
    return own if chosen in ("own", "shared") else own.optimised_as(_module(chosen)[0].RECIPE)


def is_known(name: str) -> bool:
    """Whether there may be such a network; of MONAI's that is known when it is built."""
    return name in NETWORKS or name.startswith(MONAI)


def _module(name: str) -> tuple[ModuleType, str]:
    """The file of a network, and its class there."""
    if not is_known(name):
        raise InputError(f"network {name!r} is not known; one of {', '.join(names())} or {MONAI}<class> is wanted")
    module, network = ["monai_net", "MONAINet"] if name.startswith(MONAI) else NETWORKS[name].split(":")
    return import_module(f"{__name__}.{module}"), network


def _made(name: str, how: str, config: dict | None) -> nn.Module | None:
    module, network = _module(name)
    maker = getattr(getattr(module, network), how, lambda _: None)
    config = dict(config or {})
    wanted = name.removeprefix(MONAI)
    if wanted != name and config.setdefault("net", wanted) != wanted:
        raise InputError(f"network {name}: net: {config['net']!r}, wanted {wanted}, as its name says, or nothing")
    try:
        return maker(config)
    except ValueError as error:
        raise InputError(f"network {name}: {error}") from None
