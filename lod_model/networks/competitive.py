"""What FastSurferCNN and FastSurferVINN are built from: competitive dense blocks, a U of them, and three networks for the three views.

Paper: Henschel, Conjeti, Estrada, Diers, Fischl, Reuter, "FastSurfer – a fast and accurate deep learning based neuroimaging pipeline",
NeuroImage 219:117012, 2020; the blocks are those of Estrada et al., "FatSegNet", Magnetic Resonance in Medicine 83:1471, 2020.

What is elsewhere concatenated here competes: the element-wise maximum (maxout) of two feature maps goes on, within a block and where a skip
comes in. Pooling hands its indices to the unpooling opposite, which puts each value back where it was the largest.

On a CPU, where gradients are not wanted, norm, maxout and activation overwrite what nobody reads again: the same values from fewer pages. The
norm does not go into the convolution's kernel: the 2 to 3 % of time are not worth other roundings, by which equal values cease to be equal,
max-pooling points elsewhere, and logits of flat regions move by up to 0.5.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data_registry.protocol import Protocol, sagittal_classes
from lod_model.networks.conventions import Configuration, is_integer
from lod_model.networks.squeeze_excitation import SqueezeExcitation

VIEWS = ("axial", "coronal", "sagittal")
ATTENTIONS = ("none", "squeeze_excitation")
LATERAL_CLASSES, FUSED_CLASSES = 79, 51   # of the paper: a sagittal slice does not show which hemisphere it is of


# ---------------------------------------------------------------------------------------------------------------------
# Configuration


@dataclass(frozen=True)
class ViewsConfig(Configuration):
    """What the networks of three views have in common.

    classes           output channels of the axial and the coronal network, background included
    sagittal_classes  those of the sagittal network; None is 51 beside 79 classes, else the same number
    filters           channels of every feature map at the inner resolution
    slices            neighbouring slices that are the channels of the input; the middle one is predicted
    kernels           sides of the kernels of a block's convolutions, in order
    depth             poolings, and unpoolings
    attention         none, or squeeze_excitation at the end of every block
    """

    classes: int = LATERAL_CLASSES
    sagittal_classes: int | None = None
    filters: int = 64
    slices: int = 7
    kernels: tuple[int, ...] = ()
    depth: int = 4
    attention: str = "none"

    def __post_init__(self) -> None:
        if self.sagittal_classes is None:
            object.__setattr__(self, "sagittal_classes", FUSED_CLASSES if self.classes == LATERAL_CLASSES else self.classes)
        for name, least in {"classes": 2, "sagittal_classes": 2, "filters": 1, "slices": 1, "depth": 1}.items():
            if not is_integer(getattr(self, name), least):
                raise ValueError(f"{name}: {getattr(self, name)!r}, wanted an integer of at least {least}")
        if self.slices % 2 == 0:
            raise ValueError(f"slices: {self.slices}, wanted an odd number, with one in the middle")
        if not isinstance(self.kernels, list | tuple) or len(self.kernels) < 2 or not all(is_integer(k, 1) and k % 2 for k in self.kernels):
            raise ValueError(f"kernels: {self.kernels!r}, wanted two or more odd positive integers")
        object.__setattr__(self, "kernels", tuple(self.kernels))
        if self.attention not in ATTENTIONS:
            raise ValueError(f"attention: {self.attention!r}, wanted one of {', '.join(ATTENTIONS)}")

    @property
    def multiple(self) -> int:
        """Every side of a slice, in pixels, must be a multiple of this."""
        return 2**self.depth

    def scale(self, voxel_mm: float) -> float:
        """What the networks are told of an image's voxel size; here nothing."""
        return 1.0

    def classes_of(self, view: str) -> int:
        """Output channels of the network of a view."""
        return self.sagittal_classes if view == "sagittal" else self.classes


# ---------------------------------------------------------------------------------------------------------------------
# Blocks


class CompetitiveBlock(nn.Module):
    """Convolutions with a batch norm each; between two of them maxout with the best so far, then PReLU, one slope for the block.

    x (B, channels, H, W) → (B, filters, H, W). ``entry`` is what x is:

    - ``image``: normalised on entry, by a batch norm;
    - ``rival``: activated on entry, and competes with the first convolution;
    - ``joined``: activated on entry.

    >>> block = CompetitiveBlock(1, 1, (1, 1), entry="rival").eval()
    >>> for parameter in (*block.convs.parameters(), *block.norms.parameters()):
    ...     _ = nn.init.constant_(parameter, 0)
    >>> _ = nn.init.eye_(block.convs[1].weight[:, :, 0, 0]), nn.init.ones_(block.norms[1].weight)
    >>> block(torch.tensor([[[[-4.0, 4.0]]]])).tolist()                       # the first convolution gives 0, so max(x, 0) goes on
    [[[[0.0, 3.999979...]]]]
    """

    def __init__(
        self, channels: int, filters: int, kernels: tuple[int, ...], *, entry: Literal["image", "rival", "joined"], attention: str = "none"
    ) -> None:
        super().__init__()
        assert entry != "rival" or channels == filters
        self.competes = entry == "rival"
        self.entry_norm = nn.BatchNorm2d(channels) if entry == "image" else None
        ins = (channels, *[filters] * (len(kernels) - 1))
        self.convs = nn.ModuleList(nn.Conv2d(i, filters, side, padding=side // 2) for i, side in zip(ins, kernels, strict=True))
        self.norms = nn.ModuleList(nn.BatchNorm2d(filters) for _ in kernels)
        self.prelu = nn.PReLU()
        self.attention = SqueezeExcitation(filters) if attention == "squeeze_excitation" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        best = x if self.competes else None
        x = self.prelu(x) if self.entry_norm is None else self.entry_norm(x)
        *rounds, (last_conv, last_norm) = zip(self.convs, self.norms, strict=True)
        for conv, norm in rounds:
            y = normalised(norm, conv(x))                                     # (B, filters, H, W), as all that follows
            best = y if best is None else maxout(y, best)
            x = self._activated(best, x)
        return self.attention(normalised(last_norm, last_conv(x)))

    def _activated(self, best: Tensor, spent: Tensor) -> Tensor:
        """PReLU of ``best``, which is needed again; where memory is to be reused, in that of ``spent``."""
        if not _reuses_memory(best) or spent.shape != best.shape or spent.dtype != best.dtype:
            return self.prelu(best)
        return F.leaky_relu_(spent.copy_(best), float(self.prelu.weight))


def normalised(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """norm(x), which may overwrite x."""
    if norm.training or not _reuses_memory(x):
        return norm(x)
    moments = dict.fromkeys(("save_mean", "save_invstd"), norm.weight.new_empty(0))    # of the batch: none are taken
    affine = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    torch.ops.aten.native_batch_norm.out(x, *affine, False, 0.0, norm.eps, out=x, **moments)
    return x


def maxout(fresh: Tensor, other: Tensor) -> Tensor:
    """The element-wise maximum, which may overwrite ``fresh``. Equal values share a gradient.

    >>> maxout(torch.tensor([1.0, -2.0]), torch.tensor([0.0, 3.0]))
    tensor([1., 3.])
    """
    return torch.maximum(fresh, other, out=fresh if _reuses_memory(fresh) else None)


def _reuses_memory(x: Tensor) -> bool:
    """Without gradients on a CPU, where the pages of fresh memory cost more than what is done in them."""
    return not torch.is_grad_enabled() and x.device.type == "cpu"


class CompetitiveUNet(nn.Module):
    """Blocks down, with max-pooling; a block at the bottom; blocks up, each of which sees the maximum of the unpooled and the skip.

    x (B, channels, H, W), sides multiples of 2**depth → (B, filters, H, W).
    """

    def __init__(self, channels: int, config: ViewsConfig) -> None:
        super().__init__()

        def block(channels: int = config.filters, entry: Literal["image", "rival"] = "rival") -> CompetitiveBlock:
            return CompetitiveBlock(channels, config.filters, config.kernels, entry=entry, attention=config.attention)

        first = block(channels, "image")
        self.encoder = nn.ModuleList([first, *(block() for _ in range(config.depth - 1))])
        self.bottom = block()
        self.decoder = nn.ModuleList(block() for _ in range(config.depth))     # coarsest first

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for block in self.encoder:
            skip = block(x)                                                    # (B, filters, H/2ⁱ, W/2ⁱ)
            x, indices = F.max_pool2d(skip, 2, return_indices=True)            # each side halves
            skips.append((skip, indices))
        x = self.bottom(x)
        for block in self.decoder:
            skip, indices = skips.pop()
            x = block(maxout(F.max_unpool2d(x, indices, 2), skip))             # each side doubles
        return x


# ---------------------------------------------------------------------------------------------------------------------
# Three views


class ThreeViews(nn.Module):
    """A network a view, made by ``view_network(config, classes)``: ``axial``, ``coronal`` and ``sagittal``, which share nothing."""

    predicts = "views"

    def __init__(self, config: ViewsConfig, view_network: Callable[[ViewsConfig, int], nn.Module]) -> None:
        super().__init__()
        self.config = config
        for view in VIEWS:
            self.add_module(view, view_network(config, config.classes_of(view)))

    def forward(self, x: Tensor, view: str, scale: Tensor | None = None) -> Tensor:
        """Logits of one view's network."""
        return self.get_submodule(view)(x, scale)

    def views(self) -> Iterator[tuple[str, nn.Module]]:
        """The three, by name."""
        return ((view, self.get_submodule(view)) for view in VIEWS)

    @staticmethod
    def config_for(tables: Sequence[Protocol]) -> dict:
        """The classes of the protocol, and those that the sagittal view can tell apart."""
        return {"classes": tables[0].classes, "sagittal_classes": sagittal_classes(tables[0])[1]}

    def parameter_counts(self) -> dict[str, int]:
        """Parameters of each view's network."""
        return {view: sum(p.numel() for p in network.parameters()) for view, network in self.views()}


def laid_out(x: Tensor, *, training: bool) -> Tensor:
    """x in the memory format that is best.

    Convolutions want channels last. In training on a CPU they do not get it: there torch's batch norm sums a channel's squares one after
    another in float32, and the variance over 8 slices of 256² is off by 2e-4; contiguous it is right to 4e-8, in 1.1 times the time of a step.
    """
    statistics_on_cpu = training and x.device.type == "cpu"
    return x.contiguous(memory_format=torch.contiguous_format if statistics_on_cpu else torch.channels_last)


def check_slices(x: Tensor, config: ViewsConfig) -> None:
    """ValueError unless x is (B, slices, H, W) with sides that are multiples of ``config.multiple``."""
    if x.ndim != 4 or x.shape[1] != config.slices:
        raise ValueError(f"slices: shape {tuple(x.shape)}, wanted (B, {config.slices}, H, W)")
    if any(side == 0 or side % config.multiple for side in x.shape[2:]):
        raise ValueError(f"slices: {' × '.join(map(str, x.shape[2:]))} pixels, wanted sides that are multiples of {config.multiple}")


def initialise(network: nn.Module) -> None:
    """The public code's initial values: He normal by a kernel's outputs, gain of a leaky ReLU of slope .01; norms and PReLU are torch's own."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="leaky_relu")


# ---------------------------------------------------------------------------------------------------------------------
# The public code's names


def from_public(state: Mapping[str, Tensor], *, depth: int = 4) -> dict[str, Tensor]:
    """The state of one of the public FastSurfer networks of a view under our names.

    >>> state = {"encode2.conv0.weight": 1, "decode4.bn4.bias": 2, "inp_block.gn1.running_var": 3, "encode1.bn0.weight": 4, "classifier.conv.bias": 5}
    >>> for name in from_public(state):
    ...     print(name)
    unet.encoder.1.convs.0.weight
    unet.decoder.0.norms.3.bias
    native.norms.0.running_var
    unet.encoder.0.entry_norm.weight
    classifier.bias
    """
    return {_our_name(name, depth): tensor for name, tensor in state.items()}


def _our_name(public: str, depth: int) -> str:
    module, layer, tensor = public.split(".")
    if module == "classifier":
        return f"classifier.{tensor}"
    blocks = {"inp_block": "native", "outp_block": "output", "bottleneck": "unet.bottom"}
    blocks |= {f"encode{i + 1}": f"unet.encoder.{i}" for i in range(depth)}
    blocks |= {f"decode{depth - i}": f"unet.decoder.{i}" for i in range(depth)}
    kind, number = re.fullmatch(r"([a-z]+)(\d*)", layer).groups()
    if kind in ("bn", "gn"):                                                   # gn is a batch norm too
        layer = "entry_norm" if number == "0" else f"norms.{int(number) - 1}"
    elif kind == "conv":
        layer = f"convs.{number}"
    return f"{blocks[module]}.{layer}.{tensor}"
