"""The networks, by name. One file each; a file is imported when its network is built, not before.

A new network is a file here and a line below. Its class has ``from_dict(config)``, a class method that builds the network
from a plain dict, and ``config`` with ``to_dict()``, that dict complete, for the checkpoint, and ``multiple``, which every
side of an image must be a multiple of. It gives logits, or a dict of them by label protocol, whose classes are then in
``config.protocols``. If it is trained coarse to fine it also has ``coarse_from_dict`` and ``load_coarse``.

>>> names()
('lod_brain', 'neuronet', 'unet')
>>> build("lod_brain", {"levels": 1}).config.levels
1
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from data_registry.errors import InputError

if TYPE_CHECKING:
    from torch import nn

NETWORKS = {                                   # name → module of this folder : class
    "lod_brain": "lod_brain:LODBrain",
    "neuronet": "neuronet:NeuroNet",
    "unet": "unet:UNet",
}


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


def _made(name: str, how: str, config: dict | None) -> nn.Module | None:
    if name not in NETWORKS:
        raise InputError(f"network {name!r} is not known; one of {', '.join(names())} is wanted")
    module, network = NETWORKS[name].split(":")
    maker = getattr(getattr(import_module(f"{__name__}.{module}"), network), how, lambda _: None)
    try:
        return maker(config or {})
    except ValueError as error:
        raise InputError(f"network {name}: {error}") from None
