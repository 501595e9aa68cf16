"""LOD-Brain: a cascade of small U-Nets, each of which sees the head at a finer level of detail.

Paper: Svanera, Savardi, Signoroni, Benini, Muckli, "Fighting the scanner effect in brain MRI segmentation with a
progressive level-of-detail network trained on multi-site data", Medical Image Analysis 93:103090, 2024; arXiv 2211.02400.

Level 0 sees the whole image max-pooled and so learns where things are; each next level sees twice the resolution, has
one encoder block less, and receives the features of the level before it. Skips are added, never concatenated.

    image ─┬─ max-pool 2 ─► level 0: stem, Plain(16), Plain(32), UpPlain(16), UpPlain(8), out ─┐ nearest ×2
           └──────────────► level 1: stem, Plain(32), UpPlain(8) + level 0's features,    out ─┴─ + ─► head

Where paper and released code differ we follow the code, whose weights load here:
- stage 0, trained alone, sees max-pool 4 (``levels=1, coarse_pool=4``); stacked in the two-level network the same
  tensors are fed max-pool 2. The figure of the paper draws 4 in both.
- a level's first convolution starts from Glorot uniform and has no L2 penalty; every other starts from He normal and has.

Our deviations, each the same function up to rounding:
- the 1³ head is linear, so it runs at each level's own resolution and class maps are upsampled, not feature maps;
- the moments of the group norm are accumulated in float64: in fp32 over 256³ voxels the common kernels lose so much
  of the variance that 20,000–40,000 voxels change class;
- logits come out; the softmax belongs to the loss and to the predictor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lod_model.networks.conventions import L2_WEIGHT, NetworkConfig, check_image, convolve, initialise, is_integer, l2_penalty
from lod_model.networks.group_norm import GroupNorm
from lod_model.networks.recipe import LOD_BRAIN

RECIPE = LOD_BRAIN

COARSE_POOL = 4


# ---------------------------------------------------------------------------------------------------------------------
# Configuration


@dataclass(frozen=True)
class LODBrainConfig(NetworkConfig):
    """:class:`NetworkConfig`, of whose widths the last is the bridge's, and

    levels       levels of detail, 1 … len(widths) − 1
    coarse_pool  max-pooling in front of level 0; None is 2**(levels − 1), and only one level alone may have another

    >>> LODBrainConfig()
    LODBrainConfig(classes=7, widths=(8, 16, 32), dropout=0.05, groups=8, epsilon=0.001, levels=2, coarse_pool=2)
    >>> LODBrainConfig(levels=1, coarse_pool=4).multiple
    16
    >>> LODBrainConfig(levels=3)
    Traceback (most recent call last):
    ValueError: levels: 3, wanted an integer from 1 to 2 (len(widths) - 1)
    """

    network = "lod_brain"
    widths: tuple[int, ...] = (8, 16, 32)
    levels: int = 2
    coarse_pool: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_integer(self.levels, 1) or self.levels >= len(self.widths):
            raise ValueError(f"levels: {self.levels!r}, wanted an integer from 1 to {len(self.widths) - 1} (len(widths) - 1)")
        stacked_pool = 2 ** (self.levels - 1)
        if self.coarse_pool is None:
            object.__setattr__(self, "coarse_pool", stacked_pool)
        if not is_integer(self.coarse_pool, 1) or (self.levels > 1 and self.coarse_pool != stacked_pool):
            wanted = "a positive integer" if self.levels == 1 else f"{stacked_pool} (2**(levels - 1)) or nothing"
            raise ValueError(f"coarse_pool: {self.coarse_pool!r} with levels {self.levels}, wanted {wanted}")

    @property
    def pools(self) -> tuple[int, ...]:
        """Max-pooling in front of each level, coarsest first."""
        return (self.coarse_pool, *(2 ** (self.levels - 1 - k) for k in range(1, self.levels)))

    @property
    def multiple(self) -> int:
        """Every side of the image, in voxels, must be a multiple of this."""
        return self.coarse_pool * self.pooled_multiple

    @property
    def pooled_multiple(self) -> int:
        """Every side of what level 0 sees, in its own voxels, must be a multiple of this."""
        return 2 ** (len(self.widths) - 1)

    @property
    def halo(self) -> int:
        """Voxels on each side of a window beyond which nothing reaches the finest level's output in it.

        With d halvings its convolutions reach 3·2**d − 1 voxels far; one more keeps the cut on the halvings' grid.
        """
        return 3 * 2 ** (len(self.widths) - self.levels)


# ---------------------------------------------------------------------------------------------------------------------
# Blocks


class Plain(nn.Module):
    """Conv 3³ → norm → ReLU → dropout → a convolution 2³ of stride 2 that halves (or doubles) each side → ReLU.

    With ``checkpointing`` a training pass keeps the input alone and computes the rest again, dropout included, on the way back.
    """

    def __init__(self, channels: int, width: int, config: LODBrainConfig, *, resample: type = nn.Conv3d) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels, width, 3, padding=1)
        self.norm = GroupNorm(min(config.groups, width), width, epsilon=config.epsilon)
        self.resample = resample(width, 4 * width, 2, stride=2)   # Keras pads nothing here: the sides are even
        self.dropout = config.dropout
        self.checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self._compute, x, use_reentrant=False, preserve_rng_state=True)
        return self._compute(x)

    def _compute(self, x: Tensor) -> Tensor:
        x = convolve(self.conv, x)                                # (B, width, D, H, W)
        x = self.norm(x, inplace=not torch.is_grad_enabled()).relu_()
        x = F.dropout(x, self.dropout, self.training)
        return F.relu(self.resample(x), inplace=not torch.is_grad_enabled())   # (B, 4·width, D/2, H/2, W/2), or ·2 upwards


class UpPlain(Plain):
    """Plain with a transposed convolution: doubles each side."""

    def __init__(self, channels: int, width: int, config: LODBrainConfig) -> None:
        super().__init__(channels, width, config, resample=_Doubling)


class _Doubling(nn.ConvTranspose3d):
    """A transposed convolution whose kernel is as wide as its stride, 2³: in training a product of matrices.

    torch's float32 kernel on CPUs is for contiguous tensors alone: with the copies to and fro it takes thrice the time.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, I, D, H, W) → (B, O, 2·D, 2·H, 2·W)."""
        if not torch.is_grad_enabled():
            return super().forward(x)
        kernel = self.weight.permute(2, 3, 4, 1, 0).flatten(0, 3)                      # (8·O, I)
        voxels = F.linear(x.permute(0, 2, 3, 4, 1), kernel, self.bias.repeat(8))       # (B, D, H, W, 8·O)
        blocks = voxels.unflatten(4, (2, 2, 2, -1)).permute(0, 1, 4, 2, 5, 3, 6, 7)    # (B, D, 2, H, 2, W, 2, O)
        return blocks.flatten(5, 6).flatten(3, 4).flatten(1, 2).permute(0, 4, 1, 2, 3)


class _Stem(nn.Conv3d):
    """A 3³ convolution of the one channel of the image; in float32 training on a CPU with nine voxels of a slice as channels.

    torch has a slow kernel of its own for few channels there, contiguous and so followed by copies: four times the time.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, D, H, W) → (B, O, D, H, W), in training channels last."""
        if not torch.is_grad_enabled():
            return super().forward(x)
        if x.device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
            taps = F.pad(x[:, 0], (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1).flatten(4)      # (B, D, H, W, 9)
            kernel = self.weight[:, 0].permute(0, 2, 3, 1).flatten(1, 2)[..., None, None]      # (O, 9, 3, 1, 1)
            x = F.conv3d(taps.permute(0, 4, 1, 2, 3), kernel, self.bias, padding=(1, 0, 0))
        else:
            x = super().forward(x)
        return x.contiguous(memory_format=torch.channels_last_3d)


def _plus(x: Tensor, y: Tensor) -> Tensor:
    return x + y if torch.is_grad_enabled() else x.add_(y)   # the gradient of x's ReLU needs x as it was


def _plus_upsampled(x: Tensor, coarse: Tensor, factor: int = 2) -> Tensor:
    """x + coarse repeated ``factor`` times along each axis; x (B, C, f·d, f·h, f·w), coarse (B, C, d, h, w)."""
    if torch.is_grad_enabled():
        return x + F.interpolate(coarse, scale_factor=factor, mode="nearest")
    blocks = x.unflatten(4, (-1, factor)).unflatten(3, (-1, factor)).unflatten(2, (-1, factor))   # (B, C, d, f, h, f, w, f)
    blocks.add_(coarse[:, :, :, None, :, None, :, None])      # a view of x: no copy of coarse at x's size
    return x


def _part(x: Tensor, box: Sequence[slice], image: Tensor) -> Tensor:
    """What x (B, C, d, h, w), of any resolution, has of a box in the image's voxels."""
    step = image.shape[2] // x.shape[2]
    return x[:, :, *(slice(s.start // step, s.stop // step) for s in box)]


def _is_frozen(level: nn.Module) -> bool:
    return not any(p.requires_grad for p in level.parameters())


class Level(nn.Module):
    """The U-Net of level ``index``, one encoder block shorter than the level before it.

    forward(x, above): x (B, 1, d, h, w), the image at this level; ``above`` what the level before returned as features,
    None for level 0. Returns what the convolution ``out`` makes the level's output from, (B, 4·widths[0], d, h, w), and the
    features for the level after: the encoder's skips and the decoder's outputs that this one has a counterpart for, finest
    first and coarsest first.
    """

    def __init__(self, index: int, config: LODBrainConfig) -> None:
        super().__init__()
        widths, channels = config.widths, 4 * config.widths[0]
        self.stem = _Stem(1, channels, 3, padding=1)
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        for width in widths[1:-1 - index]:
            self.encoder.append(Plain(channels, width, config))
            channels = 4 * width
        self.bridge = Plain(channels, widths[-1], config)
        channels = 4 * widths[-1]
        for width in widths[::-1][1 + index:]:
            self.decoder.append(UpPlain(channels, width, config))
            channels = 4 * width
        self.out = nn.Conv3d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, above: tuple[list[Tensor], list[Tensor]] | None) -> tuple[Tensor, tuple[list, list]]:
        skips = [self.stem(x)]                                    # (B, 4·w0, d, h, w)
        for i, block in enumerate(self.encoder):
            x = block(skips[-1])                                  # each side halves, 4·w(i+1) channels
            skips.append(x if above is None else _plus_upsampled(x, above[0][i]))
        down = skips[1:]
        x = self.bridge(skips[-1])                                # halves once more, 4·w(-1) channels
        up = []
        for i, block in enumerate(self.decoder):
            x = _plus(block(x), skips.pop())                      # each side doubles
            up.append(x if above is None else _plus_upsampled(x, above[1][i]))
            x = up[-1]
        return x, (down, up[1:])


# ---------------------------------------------------------------------------------------------------------------------
# Network


class LODBrain(nn.Module):
    """The network of a ``LODBrainConfig``.

    >>> net = LODBrain(LODBrainConfig()).eval()
    >>> sum(p.numel() for p in net.parameters())
    337719
    >>> net(torch.zeros(1, 1, 16, 16, 24)).shape
    torch.Size([1, 7, 16, 16, 24])
    """

    def __init__(self, config: LODBrainConfig) -> None:
        super().__init__()
        self.config = config
        self.levels = nn.ModuleList(Level(k, config) for k in range(config.levels))
        self.head = nn.Conv3d(4 * config.widths[0], config.classes, 1)
        initialise(self, self._stems())
        self.to(memory_format=torch.channels_last_3d)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, 1, D, H, W), z-scored over all voxels, LIA, 1 mm → logits (B, classes, D, H, W).

        ValueError where a side is no multiple of ``config.multiple``.
        """
        check_image(x, self.config.multiple)
        return self._sum(self._run(x, len(self.levels))[0])

    def forward_window(self, x: Tensor, window: Sequence[slice]) -> Tensor:
        """``forward`` with its finest level on a part of the image, all levels before it on the whole head.

        x as for ``forward``; ``window`` three slices of voxels, from and to multiples of ``config.multiple`` → logits
        (B, classes, *window), what ``forward`` gives there except for one thing. The finest level runs on the window and
        ``config.halo`` voxels around it, so that no convolution sees a border that the image does not have; but the moments of its
        group norms are those of this part, as those of the whole would take the finest level's largest convolution over the whole
        image. Weights that are to meet whole volumes should end their training on whole volumes.

        ValueError for a window that does not fit, and with one level, which has none before it.
        """
        check_image(x, self.config.multiple)
        if self.config.levels == 1:
            raise ValueError("forward_window: the network has 1 level, wanted at least 2")
        self._check_window(x, window)
        logits, (down, up) = self._run(x, len(self.levels) - 1)
        outer = [slice(max(0, s.start - self.config.halo), min(side, s.stop + self.config.halo))
                 for s, side in zip(window, x.shape[2:], strict=True)]  # fmt: skip
        finest = self.levels[-1]
        features = [[_part(f, outer, x) for f in few] for few in (down[: len(finest.encoder)], up)]
        out = self._logits(finest, finest(x[:, :, *outer], features)[0])
        inner = [slice(s.start - o.start, s.stop - o.start) for s, o in zip(window, outer, strict=True)]
        return self._sum([_part(part, window, x) for part in logits] + [out[:, :, *inner]])

    def _run(self, x: Tensor, levels: int) -> tuple[list[Tensor], tuple[list, list]]:
        """Logits (B, classes, D/pool, H/pool, W/pool) of the first levels, and the last one's features; no graph for frozen ones."""
        logits, features, graph = [], None, x.requires_grad
        for pool, level in zip(self.config.pools[:levels], self.levels[:levels], strict=True):
            graph = graph or not _is_frozen(level)
            with torch.set_grad_enabled(graph and torch.is_grad_enabled()):
                out, features = level(F.max_pool3d(x, pool) if pool > 1 else x, features)
            logits.append(self._logits(level, out))
        return logits, features

    def forward_coarse(self, x_pooled: Tensor) -> Tensor:
        """What ``forward`` gives before its last upsampling: logits (B, classes, d, h, w) on the grid of the pooled image.

        x_pooled (B, 1, d, h, w) is the z-scored image after max-pooling by ``config.coarse_pool``. One level alone has
        this: ValueError for more.
        """
        if self.config.levels != 1:
            raise ValueError(f"forward_coarse: the network has {self.config.levels} levels, wanted 1")
        check_image(x_pooled, self.config.pooled_multiple)
        level = self.levels[0]
        return self._logits(level, level(x_pooled, None)[0])

    def _logits(self, level: Level, x: Tensor) -> Tensor:
        """A level's share of the logits (B, classes, d, h, w): its output convolution, then the head, whose bias is the finest level's.

        Both are linear. In training they are one convolution to the classes: a quarter of the multiplications, and no gradient of the
        features between.
        """
        bias = self.head.bias if level is self.levels[-1] else torch.zeros_like(self.head.bias)
        if not torch.is_grad_enabled():
            return F.conv3d(level.out(x), self.head.weight, bias)
        mix = self.head.weight.flatten(1)                         # (classes, C)
        with torch.autocast(x.device.type, enabled=False):
            weight = torch.einsum("kc,cidhw->kidhw", mix, level.out.weight)
            bias = mix @ level.out.bias + bias
        return F.conv3d(x, weight, bias, padding=1)

    def _sum(self, logits: list[Tensor]) -> Tensor:
        """Of all levels' logits, at the image's resolution."""
        finest, total = self.config.pools[-1], logits.pop()       # (B, classes, D/finest, …)
        for pool, share in zip(self.config.pools, logits, strict=False):
            total = _plus_upsampled(total, share, pool // finest)
        return total if finest == 1 else F.interpolate(total, scale_factor=finest, mode="nearest")

    def _check_window(self, x: Tensor, window: Sequence[slice]) -> None:
        m = self.config.multiple
        whole = len(window) == 3 and all(s.step in (None, 1) and s.start is not None and s.stop is not None for s in window)
        if not whole or any(s.start % m or s.stop % m or not 0 <= s.start < s.stop <= side for s, side in zip(window, x.shape[2:], strict=True)):
            sides = " × ".join(map(str, x.shape[2:]))
            raise ValueError(f"window: {window}, wanted three slices within {sides} voxels, from and to multiples of {m}")

    def train(self, mode: bool = True) -> LODBrain:
        """As any module's; but a frozen level stays as it is in use: without dropout."""
        super().train(mode)
        for level in self.levels:
            level.train(mode and not _is_frozen(level))
        return self

    def checkpoint_blocks(self, on: bool = True) -> None:
        """In training, keep only the blocks' inputs and compute their insides again: less memory for more time, same gradients."""
        for block in (m for m in self.modules() if isinstance(m, Plain)):
            block.checkpointing = on

    def l2(self, weight: float = L2_WEIGHT) -> Tensor:
        """The penalty to add to the loss; the levels' first convolutions have none."""
        return l2_penalty(self, self._stems(), weight)

    def _stems(self) -> list[nn.Module]:
        return [level.stem for level in self.levels]

    def load_coarse(self, coarse: LODBrain, *, freeze: bool = False) -> None:
        """Start this stage from the one before: every tensor of ``coarse``, head included, into the levels it has here.

        ``coarse`` has fewer levels and the same classes, widths, groups and epsilon: ValueError if not. The finer levels
        keep their initial values. ``freeze`` holds the loaded levels still, without gradients and without dropout; the head,
        which all levels share, trains on. The published weights were trained with nothing held still.
        """
        if coarse.config.levels >= self.config.levels:
            raise ValueError(f"coarse: {coarse.config.levels} levels, wanted fewer than the network's {self.config.levels}")
        for field in ("classes", "widths", "groups", "epsilon"):
            came, wanted = getattr(coarse.config, field), getattr(self.config, field)
            if came != wanted:
                raise ValueError(f"coarse: {field} {came}, wanted {wanted}")
        self.load_state_dict(self.state_dict() | coarse.state_dict())
        if freeze:
            self.levels[: coarse.config.levels].requires_grad_(False)
            self.train(self.training)

    @classmethod
    def from_dict(cls, config: dict) -> LODBrain:
        """The network of a plain dict, as a checkpoint or ``params.yaml`` has it."""
        return cls(LODBrainConfig.from_dict(config))

    @classmethod
    def coarse_from_dict(cls, config: dict) -> LODBrain | None:
        """The one level, behind max-pool 4, that stage 0 trains for this network; None if the network is one level anyway."""
        config = LODBrainConfig.from_dict(config)
        return None if config.levels == 1 else cls(replace(config, levels=1, coarse_pool=COARSE_POOL))
