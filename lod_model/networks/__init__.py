"""The networks, by name. One file each; a file is imported when its network is built, not before.

A new network is a file here with a function that takes a plain dict of its configuration and returns the module, and a
line below. The module it returns has ``config.to_dict()``, which gives that dict back, complete, for the checkpoint.

>>> names()
('lod_brain',)
>>> type(build("lod_brain", {"levels": 1, "coarse_pool": 4})).__name__
'LODBrain'
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

NETWORKS = {                                   # name → module in this folder : function
    "lod_brain": "lod_brain:build",
}


def names() -> tuple[str, ...]:
    """The known networks, sorted."""
    return tuple(sorted(NETWORKS))


def build(name: str, config: dict | None = None) -> nn.Module:
    """The network ``name`` with this configuration, defaults for what it leaves out. ValueError for an unknown name or key."""
    if name not in NETWORKS:
        raise ValueError(f"network: {name!r}, wanted one of {', '.join(names())}")
    module, function = NETWORKS[name].split(":")
    return getattr(import_module(f"{__name__}.{module}"), function)(config or {})
