"""NeuroNet: one residual encoder, and for each labelling protocol a small decoder of its own, a tail.

Paper: Rajchl, Pawlowski, Rueckert, Matthews, Glocker, "NeuroNet: fast and robust reproduction of multiple brain image segmentation
pipelines", MIDL 2018; arXiv 1806.04224. Public code: DLTK/models, Apache-2.0.

    image ─ stem 3³ (16) ──────────────────────────────── skip 0
              └ unit ↓2 (32) ─ unit (32) ─────────────── skip 1
                                 └ unit ↓2 (64) ─ unit ─ skip 2
                                                   └ unit ↓2 (128) ─ unit ─ deepest

    tail of C classes: 1³ of the deepest to C, then for skips 2, 1, 0: doubled + norm(1³ of the skip to C); at last 1³ C → C

A unit is pre-activated: (norm → activation → convolution) twice, and its input added. No bias, no dropout. Doubling is trilinear and fixed.

Where the paper and its code differ, the code is followed:
- the activation is ReLU6: the leaky ReLU of 0.1 that was meant never reaches a unit. ``activation`` chooses;
- there is none in the tails, on the stem or on a unit's sum; the skips are raw sums.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data_registry.errors import InputError
from data_registry.protocol import Protocol
from lod_model.networks.conventions import check_image, convolutions, convolve, is_integer
from lod_model.networks.recipe import Recipe

RECIPE = Recipe(
    samples="crops", loss="cross_entropy", optimiser="adam", learning_rate=1e-3, epsilon=1e-5, schedule="constant", batch_size=1, visits=8
)  # fmt: skip

PROTOCOLS = {"fsl_fast": 4, "fsl_first": 16, "spm_tissue": 4, "malp_em": 139, "malp_em_tissue": 6}
"""Name → classes, in the paper's order; the tables are those of ``data_registry/protocols``."""

VARIANTS = {
    "single": tuple((name,) for name in PROTOCOLS),
    "all": (tuple(PROTOCOLS),),
    "tissue": (("fsl_fast", "spm_tissue", "malp_em_tissue"),),
}
"""The paper's three: the protocols of each network that it trains. What they reached: ``docs/published/neuronet_dice.tsv``."""

ACTIVATIONS = {"relu6": F.relu6, "leaky_relu": lambda x, inplace: F.leaky_relu(x, 0.1, inplace=inplace), "relu": F.relu}
MOMENTUM = 0.01
"""Of the running moments, torch's way round: the share that is new."""


@dataclass(frozen=True)
class NeuroNetConfig:
    """What a NeuroNet is made of, checked here.

    protocols   protocol name → classes, background included, in the order of the tails
    filters     of the stem, then of each scale; a scale halves every side
    units       residual units of a scale
    activation  relu6, leaky_relu (0.1) or relu
    epsilon     added to the variance by the batch norm
    window      side of the windows it predicts in, as it was trained

    >>> NeuroNetConfig().multiple
    8
    >>> NeuroNetConfig(protocols={"lod7": 7}).classes
    7
    >>> NeuroNetConfig.from_dict(NeuroNetConfig(units=1).to_dict()) == NeuroNetConfig(units=1)
    True
    >>> NeuroNetConfig(activation="elu")
    Traceback (most recent call last):
    ValueError: activation: 'elu', wanted one of relu6, leaky_relu, relu
    """

    network: ClassVar[str] = "neuronet"

    protocols: dict[str, int] = field(default_factory=PROTOCOLS.copy)
    filters: tuple[int, ...] = (16, 32, 64, 128)
    units: int = 2
    activation: str = "relu6"
    epsilon: float = 1e-3
    window: int = 128

    def __post_init__(self) -> None:
        if not isinstance(self.protocols, dict) or not self.protocols or not all(is_integer(c, 2) for c in self.protocols.values()):
            raise ValueError(f"protocols: {self.protocols!r}, wanted one or more names, each with an integer of at least 2")
        unusable = [name for name in self.protocols if not isinstance(name, str) or not name.isidentifier() or hasattr(nn.ModuleDict, name)]
        if unusable:   # a weight is called by it
            raise ValueError(f"protocols: {unusable[0]!r}, wanted a name such as fsl_fast")
        object.__setattr__(self, "protocols", dict(self.protocols))
        if not isinstance(self.filters, list | tuple) or len(self.filters) < 2 or not all(is_integer(f, 1) for f in self.filters):
            raise ValueError(f"filters: {self.filters!r}, wanted two or more positive integers")
        if list(self.filters) != sorted(self.filters):
            raise ValueError(f"filters: {self.filters!r}, wanted none smaller than the one before it")
        object.__setattr__(self, "filters", tuple(self.filters))
        for name in ("units", "window"):
            if not is_integer(getattr(self, name), 1):
                raise ValueError(f"{name}: {getattr(self, name)!r}, wanted a positive integer")
        if self.window < 2 * self.multiple:   # of one voxel at the deepest scale a batch norm in training has no variance
            raise ValueError(f"window: {self.window}, the side of crops too, wanted at least {2 * self.multiple}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation: {self.activation!r}, wanted one of {', '.join(ACTIVATIONS)}")
        if isinstance(self.epsilon, bool) or not isinstance(self.epsilon, int | float) or not 0 < self.epsilon < math.inf:
            raise ValueError(f"epsilon: {self.epsilon!r}, wanted a positive number")

    @property
    def multiple(self) -> int:
        """Every side of the image, in voxels, must be a multiple of this."""
        return 2 ** (len(self.filters) - 1)

    @property
    def classes(self) -> int:
        """Of the one protocol; InputError where there are several."""
        if len(self.protocols) > 1:
            raise InputError(f"neuronet has {len(self.protocols)} protocols ({', '.join(self.protocols)}); here one is wanted")
        return next(iter(self.protocols.values()))

    def to_dict(self) -> dict:
        """Plain numbers, words, lists and a dict, for a checkpoint or a YAML file; ``from_dict`` takes them back."""
        return asdict(self) | {"filters": list(self.filters)}

    @classmethod
    def from_dict(cls, values: dict) -> Self:
        """The configuration with these values, defaults for the rest. An unknown key is a ValueError."""
        known = [f.name for f in fields(cls)]
        unknown = sorted(str(key) for key in values if key not in known)
        if unknown:
            raise ValueError(f"{cls.network} has no {', '.join(unknown)}; known: {', '.join(known)}")
        return cls(**values)


class Doubling(torch.autograd.Function):
    """Trilinear doubling, (B, C, D, H, W) → (B, C, 2D, 2H, 2W), with zeros beyond the borders, not their repetition.

    It is the release's transposed convolution of 4³, stride 2 and weights ¼ ¾ ¾ ¼ along each axis, and the way back is that. The way there
    is interpolation, in a third of the time: it repeats the border, so the outermost ¼ + ¾ become ¾.

    >>> Doubling.apply(torch.tensor([4.0, 8.0, 0.0]).view(1, 1, 1, 1, 3)).flatten()[:6] * (4 / 3) ** 2   # two axes of one voxel: ¾ each
    tensor([3., 5., 7., 6., 2., 0.])
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2, mode="trilinear")
        for axis in (2, 3, 4):
            for border in (0, -1):
                x.select(axis, border).mul_(0.75)
        return x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        line = gradient.new_tensor([0.25, 0.75, 0.75, 0.25])
        channels = gradient.shape[1]
        kernel = (line[:, None, None] * line[:, None] * line).expand(channels, 1, 4, 4, 4)
        return F.conv3d(gradient, kernel, stride=2, padding=1, groups=channels)


class Unit(nn.Module):
    """Norm → activation → conv → norm → activation → conv, plus the input; (B, c, D, H, W) → (B, f, D, H, W), halved sides if ``halves``.

    A unit that halves has a first kernel of 4³ and stride 2, and adds the max-pooled input; new channels of what is added are zero, half
    of them (rounded down) before the old ones.
    """

    def __init__(self, channels: int, filters: int, config: NeuroNetConfig, *, halves: bool) -> None:
        super().__init__()
        self.first_norm, self.second_norm = _norm(channels, config), _norm(filters, config)
        self.first = nn.Conv3d(channels, filters, 4 if halves else 3, stride=2 if halves else 1, padding=1, bias=False)
        self.second = nn.Conv3d(filters, filters, 3, padding=1, bias=False)
        self.activation, self.halves = config.activation, halves

    def forward(self, x: Tensor) -> Tensor:
        activate = ACTIVATIONS[self.activation]
        y = convolve(self.first, activate(self.first_norm(x), inplace=True))
        y = convolve(self.second, activate(self.second_norm(y), inplace=True))
        return y + self.shortcut(x)

    def shortcut(self, x: Tensor) -> Tensor:
        """What is added: x in the shape of the unit's output."""
        new = self.first.out_channels - x.shape[1]
        x = F.max_pool3d(x, 2) if self.halves else x
        return F.pad(x, [0] * 6 + [new // 2, new - new // 2]) if new else x


class Tail(nn.Module):
    """The decoder of one protocol: skips, finest first and the deepest last, → logits (B, classes, D, H, W)."""

    def __init__(self, classes: int, config: NeuroNetConfig) -> None:
        super().__init__()
        *skips, deepest = config.filters
        self.convert = nn.Conv3d(deepest, classes, 1, bias=False) if classes != deepest else nn.Identity()
        self.skips = nn.ModuleList(nn.Conv3d(filters, classes, 1, bias=False) for filters in skips)
        self.norms = nn.ModuleList(_norm(classes, config) for _ in skips)
        self.head = nn.Conv3d(classes, classes, 1, bias=False)

    def forward(self, scales: Sequence[Tensor]) -> Tensor:
        *skips, x = scales
        x = self.convert(x)
        for skip, conv, norm in list(zip(skips, self.skips, self.norms, strict=True))[::-1]:
            x = Doubling.apply(x) + norm(conv(skip))
        return self.head(x)


class NeuroNet(nn.Module):
    """The network of a ``NeuroNetConfig``.

    >>> net = NeuroNet(NeuroNetConfig()).eval()
    >>> sum(p.numel() for p in net.parameters())
    2493171
    >>> {name: tuple(logits.shape) for name, logits in net(torch.zeros(1, 1, 16, 8, 24), ["malp_em", "fsl_fast"]).items()}
    {'malp_em': (1, 139, 16, 8, 24), 'fsl_fast': (1, 4, 16, 8, 24)}
    """

    predicts = "windows"

    def __init__(self, config: NeuroNetConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = nn.Conv3d(1, config.filters[0], 3, padding=1, bias=False)
        self.units = nn.ModuleList()
        for channels, filters in zip(config.filters, config.filters[1:], strict=False):
            self.units.append(Unit(channels, filters, config, halves=True))
            self.units.extend(Unit(filters, filters, config, halves=False) for _ in range(config.units - 1))
        self.tails = nn.ModuleDict({name: Tail(classes, config) for name, classes in config.protocols.items()})
        for conv in convolutions(self):   # variance scaling: uniform, of variance 1 / (what a kernel sums up)
            bound = math.sqrt(3 / conv.weight[0].numel())
            nn.init.uniform_(conv.weight, -bound, bound)
        self.to(memory_format=torch.channels_last_3d)

    def forward(self, x: Tensor, protocols: Collection[str] | None = None) -> dict[str, Tensor]:
        """x (B, 1, D, H, W), z-scored over all voxels → protocol → logits (B, classes, D, H, W), of all protocols or of these.

        ValueError where a side is no multiple of ``config.multiple`` or a protocol is not the network's.
        """
        names = tuple(self.config.protocols) if protocols is None else tuple(protocols)
        unknown = [name for name in names if name not in self.config.protocols]
        if unknown:
            raise ValueError(f"protocols: {', '.join(unknown)}, wanted some of {', '.join(self.config.protocols)}")
        scales = self.encode(x)
        return {name: self.tails[name](scales) for name in names}

    def encode(self, x: Tensor) -> list[Tensor]:
        """The skips, finest first, and the deepest: (B, filters[i], D/2ⁱ, H/2ⁱ, W/2ⁱ)."""
        check_image(x, self.config.multiple)
        scales = [self.stem(x)]
        for unit in self.units:
            if unit.halves:
                scales.append(unit(scales[-1]))
            else:
                scales[-1] = unit(scales[-1])                                    # a scale passes on what its last unit gives
        return scales

    @staticmethod
    def config_for(tables: Sequence[Protocol]) -> dict:
        """A tail for each label protocol."""
        return {"protocols": {table.name: table.classes for table in tables}}

    @classmethod
    def from_dict(cls, config: dict) -> NeuroNet:
        """The network of a plain dict, as a checkpoint or ``params.yaml`` has it."""
        return cls(NeuroNetConfig.from_dict(config))


def _norm(channels: int, config: NeuroNetConfig) -> nn.BatchNorm3d:
    return nn.BatchNorm3d(channels, eps=config.epsilon, momentum=MOMENTUM)
