"""FastSurferCNN: three two-dimensional networks, one a view, each of which sees seven slices and labels the middle one.

Paper: Henschel, Conjeti, Estrada, Diers, Fischl, Reuter, "FastSurfer – a fast and accurate deep learning based neuroimaging pipeline",
NeuroImage 219:117012, 2020.

    7 slices ─ block ─ pool ─ block ─ pool ─ block ─ pool ─ block ─ pool ─┐
                 └ max ─ …      └ max ─ …      └ max ─ …      └ max ─ …   block
    logits ─ 1² ─ block ─ unpool ─ block ─ unpool ─ block ─ unpool ─ block ─ unpool ─┘     (all blocks have 64 filters)

It knows one resolution, that of its training, and ignores the voxel size. The blocks stand in :mod:`lod_model.networks.competitive`.

Paper and public code differ in a block's kernels: 5², 5², 1² in the paper, the default here, 1,799,206 parameters a view; four of 5² in
today's public class, ``kernels=(5, 5, 5, 5)``, 3,607,270.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from lod_model.networks.competitive import CompetitiveUNet, ThreeViews, ViewsConfig, check_slices, initialise, laid_out
from lod_model.networks.recipe import Recipe

RECIPE = Recipe(samples="slices", loss="weighted", optimiser="adam", learning_rate=1e-2, schedule="step", batch_size=16, visits=16)


@dataclass(frozen=True)
class FastSurferCNNConfig(ViewsConfig):
    """:class:`ViewsConfig`.

    >>> FastSurferCNNConfig()
    FastSurferCNNConfig(classes=79, sagittal_classes=51, filters=64, slices=7, kernels=(5, 5, 1), depth=4, attention='none')
    >>> FastSurferCNNConfig(classes=7).sagittal_classes, FastSurferCNNConfig().multiple
    (7, 16)
    >>> FastSurferCNNConfig.from_dict({"kernel": 5})
    Traceback (most recent call last):
    ValueError: fastsurfer_cnn has no kernel; known: classes, sagittal_classes, filters, slices, kernels, depth, attention
    """

    network = "fastsurfer_cnn"
    kernels: tuple[int, ...] = (5, 5, 1)


class FastSurferCNNView(nn.Module):
    """The network of one view.

    >>> import torch
    >>> net = FastSurferCNNView(FastSurferCNNConfig(filters=4), 5).eval()
    >>> net(torch.zeros(2, 7, 32, 16)).shape
    torch.Size([2, 5, 32, 16])
    """

    def __init__(self, config: FastSurferCNNConfig, classes: int) -> None:
        super().__init__()
        self.config = config
        self.unet = CompetitiveUNet(config.slices, config)
        self.classifier = nn.Conv2d(config.filters, classes, 1)
        initialise(self)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """x (B, slices, H, W), intensities 0 … 1 → logits (B, classes, H, W); ``scale`` is for networks that know resolutions.

        ValueError where x has another number of slices, or a side is no multiple of ``config.multiple``.
        """
        check_slices(x, self.config)
        return self.classifier(self.unet(laid_out(x, training=self.training)))


class FastSurferCNN(ThreeViews):
    """The network of a ``FastSurferCNNConfig``: one for each view.

    >>> FastSurferCNN(FastSurferCNNConfig()).parameter_counts()
    {'axial': 1799206, 'coronal': 1799206, 'sagittal': 1797386}
    """

    def __init__(self, config: FastSurferCNNConfig) -> None:
        super().__init__(config, FastSurferCNNView)

    @classmethod
    def from_dict(cls, config: dict) -> FastSurferCNN:
        """The network of a plain dict, as a checkpoint or ``params.yaml`` has it."""
        return cls(FastSurferCNNConfig.from_dict(config))
