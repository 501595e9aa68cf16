"""What learns from the shards and uses the result: networks, training, evaluation, report, ``lodbrain``.

``lod_model.load`` is the Python interface, see :mod:`lod_model.api`. It is imported when it is asked for: torch is not needed before.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lod_model.api import load

__all__ = ["load"]


def __getattr__(name: str) -> object:
    if name == "load":
        from lod_model.api import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
