"""Checkpoints of a training: they exist only when complete, the first process writes them, and all go on from what that reads."""

import io
import os
from pathlib import Path

from data_registry.files import replacing
from lod_model import processes


def save(value: object, path: str | os.PathLike) -> None:
    """As ``torch.save``, which says of a full disk that a position is unexpected; this raises OSError with the file's name."""
    import torch

    content = io.BytesIO()
    torch.save(value, content)
    with replacing(path) as aside:
        aside.write_bytes(content.getbuffer())


def plugin():
    """For Lightning's Trainer, whose own writes to the temporary folder and copies from there where that is another file system."""
    from lightning_fabric.plugins import TorchCheckpointIO

    class Checkpoints(TorchCheckpointIO):
        def save_checkpoint(self, checkpoint: dict, path, storage_options=None) -> None:
            save(checkpoint, path)

        def load_checkpoint(self, path, map_location=None, weights_only=None) -> dict:
            import torch

            return processes.from_first(lambda: torch.load(Path(path), map_location="cpu", weights_only=weights_only))

    return Checkpoints()
