"""The one predict: evaluation and ``lodbrain segment`` both call it, so what is measured is what ships.

Source: LOD-Brain z-scores over all voxels of the grid, padding included; so do we. The moments are exact: a uint8 scan has at most 256
different values, so they come from its histogram.
"""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch.nn import functional

from data_registry import intensity
from data_registry.errors import InputError
from lod_model.engine import FastLODBrain, compile_network
from lod_model.networks.lod_brain import LODBrain

ENGINES = ("fast", "fast-bf16", "plain")


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


class HalfPrecision(torch.nn.Module):
    """A network under autocast: convolutions in ``dtype``, group norms with their moments in float64 as ever."""

    def __init__(self, network: torch.nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self.dtype, self.config = network, dtype, network.config

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(1, 1, D, H, W) → the network's output in ``dtype``."""
        with torch.autocast(x.device.type, dtype=self.dtype):
            return self.network(x)


def with_engine(
    network: torch.nn.Module, engine: str, *, device: torch.device | None = None
) -> tuple[torch.nn.Module | FastLODBrain, dict[str, str]]:
    """The network for ``predict`` as the engine computes it, on the best device or ``device``, and what a sidecar says of it.

    - ``fast``: on a CPU, LOD-Brain rewritten exactly by :mod:`lod_model.engine`; on a GPU, the network as written in float16.
    - ``fast-bf16``: the same in bfloat16. One voxel in some thousands gets another class.
    - ``plain``: the network as written, in float32.

    Other networks have no rewrite: they are computed as written, by fast-bf16 in bfloat16. Raises :class:`InputError` for another engine.
    """
    if engine not in ENGINES:
        raise InputError(f"engine {engine!r} is not known; one of {', '.join(ENGINES)} is wanted")
    device = device or best_device()
    dtype = torch.float32
    if engine == "fast-bf16":
        dtype = torch.bfloat16
    elif engine == "fast" and device.type != "cpu":
        dtype = torch.float16
    said = {"engine": engine, "engine_dtype": str(dtype).removeprefix("torch."), "engine_device": device.type}
    if engine != "plain" and device.type == "cpu" and isinstance(network, LODBrain):
        return compile_network(network, dtype=dtype), said
    network.to(device)
    return (network if dtype is torch.float32 else HalfPrecision(network, dtype)), said


def best_device() -> torch.device:
    """The GPU if there is one that torch can use, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def moments(conformed: np.ndarray) -> tuple[float, float]:
    """Mean and population standard deviation over all voxels of a uint8 array, exact to float64.

    >>> moments(np.array([0, 0, 10, 10], dtype=np.uint8))
    (5.0, 5.0)
    """
    return intensity.moments(np.bincount(conformed.reshape(-1), minlength=256))


@contextlib.contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
