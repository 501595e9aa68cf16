"""FastSurferVINN: FastSurferCNN inside at 1 mm, a block on either side of it at the image's own voxel size.

Paper: Henschel, Kügler, Reuter, "FastSurferVINN: building resolution-independence into deep learning segmentation methods – a solution for
HighRes brain MRI", NeuroImage 251:118933, 2022.

    7 slices ─ native block (32) ─┬───────────────────────────────────────────────────────────────── concat ─ output block (71) ─ 1² ─ logits
                                  └ zoom to 256² of 1 mm ─ competitive U (71 filters) ─ zoom back ─────┘

The zoom is by scale = base voxel size / voxel size, so the U sees structures of one size whatever the scan's resolution. Training adds noise
to the scale (inner scale augmentation, N(0, 0.1²) a sample, by the paper): the caller draws it, the network takes a scale and changes none.

Where paper and public code differ we follow the code: crop and padding are at the end of an axis; sizes are truncated, not rounded, so that
the way back from a zoom may miss by one pixel, which the padding makes up. Truncation is of float32 arithmetic, as the public code's is for
tensors in float32; in float64 some sizes would differ by one (0.95: 243 pixels there, 242 back). What lies beyond the inner size, e.g. beyond
256 pixels of 1 mm, is seen by the native blocks alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data_registry.errors import InputError
from lod_model.networks.competitive import CompetitiveBlock, CompetitiveUNet, ThreeViews, ViewsConfig, check_slices, initialise, laid_out
from lod_model.networks.conventions import is_integer, is_number
from lod_model.networks.recipe import Recipe

RECIPE = Recipe(
    samples="slices", loss="weighted", optimiser="adamw", learning_rate=1e-2, weight_decay=1e-4, schedule="warm_restarts", batch_size=16, visits=16,
    inner_scale=0.1,
)  # fmt: skip

SAMPLINGS = ("bilinear", "nearest", "area", "bicubic")


# ---------------------------------------------------------------------------------------------------------------------
# Configuration


@dataclass(frozen=True)
class FastSurferVINNConfig(ViewsConfig):
    """:class:`ViewsConfig`, and

    native_filters  channels of the block at the image's own resolution
    sampling        how the zoom takes values between pixels: bilinear, nearest, area or bicubic
    base_mm         voxel size inside
    inner_size      pixels along each side of a slice inside

    >>> FastSurferVINNConfig().to_dict()["kernels"], FastSurferVINNConfig().inner_size
    ([3, 3, 3, 3], 256)
    >>> FastSurferVINNConfig(inner_size=100)
    Traceback (most recent call last):
    ValueError: inner_size: 100, wanted a positive multiple of 16 (2**depth)
    """

    network = "fastsurfer_vinn"
    filters: int = 71
    kernels: tuple[int, ...] = (3, 3, 3, 3)
    native_filters: int = 32
    sampling: str = "bilinear"
    base_mm: float = 1.0
    inner_size: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_integer(self.native_filters, 1):
            raise ValueError(f"native_filters: {self.native_filters!r}, wanted an integer of at least 1")
        if self.sampling not in SAMPLINGS:
            raise ValueError(f"sampling: {self.sampling!r}, wanted one of {', '.join(SAMPLINGS)}")
        if not is_number(self.base_mm) or not 0 < self.base_mm < math.inf:
            raise ValueError(f"base_mm: {self.base_mm!r}, wanted a positive number")
        if not is_integer(self.inner_size, 1) or self.inner_size % self.multiple:
            raise ValueError(f"inner_size: {self.inner_size!r}, wanted a positive multiple of {self.multiple} (2**depth)")

    def scale(self, voxel_mm: float) -> float:
        """The zoom's scale for an image of this voxel size, without noise.

        >>> FastSurferVINNConfig().scale(0.8)
        1.25
        """
        return self.base_mm / voxel_mm


# ---------------------------------------------------------------------------------------------------------------------
# Zoom


def zoomed_sizes(size: int, target: int, scale: np.float32) -> tuple[int, int, np.float32]:
    """Along an axis of ``size`` pixels: how many are taken, what number they become, and the scale that makes, taken / become.

    At most ``target`` pixels come out; fewer are padded to it. InputError for a scale that leaves none.

    >>> zoomed_sizes(320, 256, np.float32(0.8))                                # 256 · 0.8 = 204.8 pixels become 256
    (204, 256, np.float32(0.796875))
    >>> zoomed_sizes(256, 256, np.float32(1.25))                               # all become 256 / 1.25 = 204.8
    (256, 204, np.float32(1.254902))
    """
    scale = np.float32(scale)
    if not 0 < scale < np.inf:
        raise ValueError(f"scale: {scale:g}, wanted a positive number")
    taken, become = int(np.float32(target) * scale), target
    if taken > size:
        taken, become = size, int(np.float32(size) / scale)
    if taken < 1 or become < 1:
        raise InputError(f"scale: {scale:g}, which leaves no pixel of {size} to zoom to {target}; base_mm near the voxel size is wanted")
    return taken, become, np.float32(taken / become)


def zoom(x: Tensor, size: tuple[int, int], scales: np.ndarray, *, sampling: str = "bilinear") -> tuple[Tensor, np.ndarray]:
    """x (B, C, H, W) → (B, C, *size), shrunk by ``scales`` (B, 2) float32 along H and W, and the scales that came of it, (B, 2).

    From each axis's first pixel on: the rest is cut off, what is missing at its end is 0.
    """
    corners = {"align_corners": False} if sampling in ("bilinear", "bicubic") else {}
    zoomed, used, start = [], [], 0
    for scale, group in groupby(map(tuple, scales)):                           # neighbours of one scale together
        count = len(list(group))
        (h, to_h, used_h), (w, to_w, used_w) = map(zoomed_sizes, x.shape[2:], size, scale)
        part = F.interpolate(x[start : start + count, :, :h, :w], size=(to_h, to_w), mode=sampling, **corners)
        zoomed.append(F.pad(part, (0, size[1] - to_w, 0, size[0] - to_h)))
        used += [(used_h, used_w)] * count
        start += count
    return (zoomed[0] if len(zoomed) == 1 else torch.cat(zoomed)), np.array(used, dtype=np.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Network


class FastSurferVINNView(nn.Module):
    """The network of one view.

    >>> net = FastSurferVINNView(FastSurferVINNConfig(filters=6, native_filters=4, inner_size=32), 5).eval()
    >>> net(torch.zeros(2, 7, 48, 48), torch.tensor([1.25, 0.8])).shape
    torch.Size([2, 5, 48, 48])
    """

    def __init__(self, config: FastSurferVINNConfig, classes: int) -> None:
        super().__init__()
        self.config = config
        how = {"kernels": config.kernels, "attention": config.attention}
        self.native = CompetitiveBlock(config.slices, config.native_filters, **how, entry="image")
        self.unet = CompetitiveUNet(config.native_filters, config)
        self.output = CompetitiveBlock(config.filters + config.native_filters, config.filters, **how, entry="joined")
        self.classifier = nn.Conv2d(config.filters, classes, 1)
        initialise(self)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        """x (B, slices, H, W), intensities 0 … 1 → logits (B, classes, H, W).

        scale (B,), or (B, 2) for H and W: ``config.scale(voxel_mm)``, and noise if so wanted; best on the CPU. It stays as it is.
        ValueError where x has another number of slices, a side is no multiple of ``config.multiple``, or a scale leaves nothing to see.
        """
        check_slices(x, self.config)
        if scale.shape not in ((len(x),), (len(x), 2)):
            raise ValueError(f"scale: shape {tuple(scale.shape)}, wanted ({len(x)},) or ({len(x)}, 2)")
        scales = np.broadcast_to(scale.detach().float().cpu().numpy().reshape(len(x), -1), (len(x), 2))
        native = self.native(laid_out(x, training=self.training))                 # (B, native_filters, H, W)
        inner, size = self.config.inner_size, tuple(x.shape[2:])
        x, used = zoom(native, (inner, inner), scales, sampling=self.config.sampling)
        x = self.unet(x)                                                                      # (B, filters, inner, inner)
        x, _ = zoom(x, size, np.float32(1) / used, sampling=self.config.sampling)             # (B, filters, H, W)
        return self.classifier(self.output(torch.cat((x, native), 1)))


class FastSurferVINN(ThreeViews):
    """The network of a ``FastSurferVINNConfig``: one for each view.

    >>> FastSurferVINN(FastSurferVINNConfig()).parameter_counts()
    {'axial': 1854632, 'coronal': 1854632, 'sagittal': 1852616}
    """

    def __init__(self, config: FastSurferVINNConfig) -> None:
        super().__init__(config, FastSurferVINNView)

    @classmethod
    def from_dict(cls, config: dict) -> FastSurferVINN:
        """The network of a plain dict, as a checkpoint or ``params.yaml`` has it."""
        return cls(FastSurferVINNConfig.from_dict(config))
