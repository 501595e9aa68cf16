"""The one predict: evaluation and ``lodbrain segment`` both call it, so what is measured is what ships.

Source: LOD-Brain z-scores over all voxels of the grid, padding included; so do we. The moments are exact: a uint8 scan has at most 256
different values, so they come from its histogram.
"""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch.nn import functional

from data_registry.errors import InputError
from lod_model.engine import FastLODBrain


def predict(
    network: torch.nn.Module | FastLODBrain,
    conformed: np.ndarray,
    *,
    mean: float | None = None,
    deviation: float | None = None,
    threads: int | None = None,
) -> np.ndarray:
    """Class probabilities (C, D, H, W) float32 of a conformed T1w (D, H, W) uint8.

    ``network`` maps z-scored (1, 1, D, H, W) to logits (1, C, D, H, W), or is a compiled one of :mod:`lod_model.engine`; it says in
    ``network.config.multiple`` what its sides must be divisible by; other sides are padded with intensity 0 at their ends and cropped
    again. It runs where its parameters are. ``mean`` and ``deviation`` are those of the conformed grid where they are already known;
    ``threads`` holds for this call only.
    Raises :class:`InputError` for a grid without contrast.
    """
    if mean is None or deviation is None:
        mean, deviation = moments(conformed)
    if not deviation > 0:
        raise InputError(f"no contrast, every voxel of the grid is {mean:g}; a T1w image is wanted")
    if isinstance(network, FastLODBrain):
        return _predict_fast(network, conformed, mean=mean, deviation=deviation, threads=threads)
    side = network.config.multiple
    pad = [-n % side for n in conformed.shape]
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    was_training = network.training
    network.eval()
    with torch.inference_mode(), _threads(threads):
        x = torch.tensor(conformed, device=device).float().sub_(mean).div_(deviation)[None, None]  # (1, 1, D, H, W)
        if any(pad):
            x = functional.pad(x, [n for end in reversed(pad) for n in (0, end)], value=-mean / deviation)
        logits = network(x).float()  # (1, C, D, H, W)
        del x
        # softmax in place: a copy of (7, 256, 256, 256) float32 is 470 MB
        logits.sub_(logits.amax(dim=1, keepdim=True)).exp_()
        logits.div_(logits.sum(dim=1, keepdim=True))
        d, h, w = conformed.shape
        probabilities = logits[0, :, :d, :h, :w].contiguous().cpu().numpy()  # (C, D, H, W)
    network.train(was_training)
    return probabilities


def _predict_fast(network: FastLODBrain, conformed: np.ndarray, *, mean: float, deviation: float, threads: int | None) -> np.ndarray:
    side = network.config.multiple
    pad = [(0, -n % side) for n in conformed.shape]
    with torch.inference_mode(), _threads(threads):
        x = torch.from_numpy(np.pad(conformed, pad)).float().sub_(mean).div_(deviation)[None, None]  # (1, 1, D, H, W)
        d, h, w = conformed.shape
        return np.ascontiguousarray(network.probabilities(x)[0, :, :d, :h, :w].numpy())  # (C, D, H, W)


def best_device() -> torch.device:
    """The GPU if there is one that torch can use, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def moments(conformed: np.ndarray) -> tuple[float, float]:
    """Mean and population standard deviation over all voxels of a uint8 array, exact to float64.

    >>> moments(np.array([0, 0, 10, 10], dtype=np.uint8))
    (5.0, 5.0)
    """
    counts = np.bincount(conformed.reshape(-1), minlength=256)  # (256,)
    values = np.arange(len(counts), dtype=np.float64)
    mean = float((counts * values).sum() / conformed.size)
    return mean, float(np.sqrt((counts * (values - mean) ** 2).sum() / conformed.size))


@contextlib.contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
