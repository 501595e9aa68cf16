"""The one predict: evaluation and ``lodbrain segment`` both call it, so what is measured is what ships.

Source: LOD-Brain z-scores over all voxels of the grid, padding included; so do we. The moments are exact: a uint8 scan has at most 256
different values, so they come from its histogram.
"""

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from data_registry import intensity
from data_registry import protocol as protocol_tables
from data_registry.errors import InputError
from lod_model import postprocess as cleaning
from lod_model.engine import FastLODBrain, compile_network
from lod_model.lateralise import relateralise
from lod_model.networks.lod_brain import LODBrain
from lod_model.networks.neuronet import NeuroNet
from lod_model.neuronet_engine import FastNeuroNet
from lod_model.views import segment_views
from lod_model.windows import window_classes

Network = torch.nn.Module | FastLODBrain | FastNeuroNet
ENGINES = ("fast", "fast-bf16", "plain")
MAX_PROBABILITY_BYTES = 2.5e9
"""Of class probabilities in float32; of more classes the likeliest is taken a slab at a time, so that `segment` stays below 6 GiB."""
_SLAB = 8


def predict_classes(
    network: Network,
    conformed: np.ndarray,
    *,
    protocols: Sequence[str],
    voxel_mm: float,
    mean: float | None = None,
    deviation: float | None = None,
    method: str = "none",
    threads: int | None = None,
) -> dict[str, np.ndarray]:
    """Label maps (D, H, W) uint8 of a conformed T1w (D, H, W) uint8, cleaned by ``method``, by the protocol that they are in.

    Whatever the network: one that sees whole scans, one that predicts in windows, or three that see slices of a view each. ``protocols`` are
    those that it was trained with; labels of FastSurfer's 79 classes are given their sides and come as its 95 ids. The rest as in
    :func:`predict`.
    """
    found = predict_any(network, conformed, protocols=protocols, voxel_mm=voxel_mm, mean=mean, deviation=deviation, threads=threads)
    if isinstance(found, dict):
        return {name: cleaning.clean_labels(labels, method=_fitting(method, name)) for name, labels in found.items()}
    labels = cleaning.hard_classes(cleaning.postprocess(found, method=_fitting(method, protocols[0])))
    return dict([with_sides(protocols[0], labels)])


def predict_any(
    network: Network, conformed: np.ndarray, *, protocols: Sequence[str], voxel_mm: float, **how
) -> np.ndarray | dict[str, np.ndarray]:
    """Class probabilities (C, D, H, W) float32 where the network gives one map and they fit, else label maps by protocol, not cleaned."""
    kind = getattr(network, "predicts", "whole")
    if kind == "views":
        return dict([with_sides(protocols[0], _viewed(network, conformed, protocols[0], voxel_mm, how.get("threads")))])
    if kind == "windows":
        maps = _windowed(network, conformed, **how)
        return dict(with_sides(name, labels) for name, labels in zip(protocols, maps, strict=True))
    if 4 * protocol_tables.load(protocols[0]).classes * conformed.size <= MAX_PROBABILITY_BYTES and output_protocol(protocols[0]) == protocols[0]:
        return predict(network, conformed, **how)
    return dict([with_sides(protocols[0], _slabwise(network, conformed, **how))])


def _fitting(method: str, protocol: str) -> str:
    return cleaning.fitting(method, protocol_tables.load(protocol))


def output_protocol(name: str) -> str:
    """The protocol of the label maps that a network trained with ``name`` gives."""
    return {"fastsurfer79": "fastsurfer95"}.get(name, name)


def with_sides(name: str, labels: np.ndarray) -> tuple[str, np.ndarray]:
    """The output protocol, and the labels in it."""
    return output_protocol(name), relateralise(labels) if output_protocol(name) != name else labels


def predict(
    network: Network,
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
    d, h, w = conformed.shape
    with _asked(network, threads):
        x = _image(network, conformed, mean, deviation)
        if isinstance(network, FastLODBrain):
            return np.ascontiguousarray(network.probabilities(x)[0, :, :d, :h, :w].numpy())  # (C, D, H, W)
        logits = network(x).float()  # (1, C, D, H, W)
        del x
        # softmax in place: a copy of (7, 256, 256, 256) float32 is 470 MB
        logits.sub_(logits.amax(dim=1, keepdim=True)).exp_()
        logits.div_(logits.sum(dim=1, keepdim=True))
        return logits[0, :, :d, :h, :w].contiguous().cpu().numpy()  # (C, D, H, W)


def _slabwise(network: Network, conformed: np.ndarray, *, mean=None, deviation=None, threads: int | None = None) -> np.ndarray:
    """The likeliest class of each voxel, (D, H, W) uint8; of the logits a slab at a time is held, but on a GPU and for unknown networks."""
    d, h, w = conformed.shape
    with _asked(network, threads):
        x = _image(network, conformed, mean, deviation)
        if isinstance(network, FastLODBrain):
            return np.ascontiguousarray(network.classes(x)[:d, :h, :w].numpy())
        if not hasattr(network, "features"):
            return network(x)[0, :, :d, :h, :w].argmax(0).to(torch.uint8).cpu().numpy()
        features = network.features(x)
        slabs = [network.head(part)[0].argmax(0).to(torch.uint8) for part in features.split(_SLAB, dim=2)]
        return torch.cat(slabs)[:d, :h, :w].cpu().numpy()


def _windowed(network: torch.nn.Module, conformed: np.ndarray, *, mean=None, deviation=None, threads: int | None = None) -> list[np.ndarray]:
    """A label map (D, H, W) for each output of a network that sees windows."""
    with _asked(network, threads):
        x = _image(network, conformed, mean, deviation)
        side = network.config.window + -network.config.window % network.config.multiple
        found = window_classes(network, x, side=side, stride=side // 2, fill=float(x.min()))
    d, h, w = conformed.shape
    maps = found.values() if isinstance(found, dict) else [found]  # as the network has its outputs: in the order of its protocols
    return [np.ascontiguousarray(labels[:d, :h, :w]) for labels in maps]


def _viewed(network: torch.nn.Module, conformed: np.ndarray, protocol: str, voxel_mm: float, threads: int | None) -> np.ndarray:
    """The label map (D, H, W) of three views together."""
    sagittal, _ = protocol_tables.sagittal_classes(protocol_tables.load(protocol))
    inner, dtype = (network.network, network.dtype) if isinstance(network, HalfPrecision) else (network, torch.float32)
    with _asked(network, threads):
        return segment_views(inner, conformed, voxel_mm=voxel_mm, sagittal_class=sagittal, dtype=dtype)


def _image(network: Network, conformed: np.ndarray, mean: float | None, deviation: float | None) -> torch.Tensor:
    """(1, 1, D, H, W) float32, z-scored over all voxels, padded with intensity 0 to the network's multiple, where its parameters are."""
    if mean is None or deviation is None:
        mean, deviation = moments(conformed)
    if not deviation > 0:
        raise InputError(f"no contrast, every voxel of the grid is {mean:g}; a T1w image is wanted")
    side = network.config.multiple
    parameters = network.parameters() if isinstance(network, torch.nn.Module) else ()
    device = next((p.device for p in parameters), torch.device("cpu"))
    padded = np.pad(conformed, [(0, -n % side) for n in conformed.shape])
    return torch.tensor(padded, device=device).float().sub_(mean).div_(deviation)[None, None]


@contextlib.contextmanager
def _asked(network: Network, threads: int | None) -> Iterator[None]:
    """A network in use: not trained, without gradients, with so many threads."""
    was_training = getattr(network, "training", False)
    if was_training:
        network.eval()
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(before)
        if was_training:
            network.train()


class HalfPrecision(torch.nn.Module):
    """A network under autocast: convolutions in ``dtype``, group norms with their moments in float64 as ever."""

    def __init__(self, network: torch.nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self.dtype, self.config = network, dtype, network.config
        self.predicts = getattr(network, "predicts", "whole")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(1, 1, D, H, W) → the network's output in ``dtype``."""
        with torch.autocast(x.device.type, dtype=self.dtype):
            return self.network(x)


def with_engine(
    network: torch.nn.Module, engine: str, *, device: torch.device | None = None
) -> tuple[Network, dict[str, str]]:
    """The network for ``predict`` as the engine computes it, on the best device or ``device``, and what a sidecar says of it.

    - ``fast``: on a CPU, LOD-Brain rewritten exactly by :mod:`lod_model.engine`, and NeuroNet by :mod:`lod_model.neuronet_engine`; on a GPU,
      the network as written in float16.
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
    if engine == "fast" and device.type == "cpu" and isinstance(network, NeuroNet):
        return FastNeuroNet(network), said
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
    return intensity.moments(intensity.histogram_of(conformed))

