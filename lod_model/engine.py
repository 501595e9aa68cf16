"""LOD-Brain on a CPU, fast: the trained network rewritten exactly, and computed a few slices at a time.

``compile_network`` takes a trained :class:`LODBrain` and leaves it as it is. The rewrites, each the same function up to rounding:

- A level's stem and the convolution after it have nothing between them: one 5³ convolution of the image. Only on the faces of the grid does
  it differ, where the intermediate is padded with zeros; the faces are computed in two steps.
- A level's output convolution and the head are linear: one 3³ convolution to the classes, the coarser levels' share upsampled after it.
- A group norm is an affine map once its moments are known, so the moments are taken in a first pass over the image, and the second pass has
  the norm in its kernel. Moments are summed over 256 values in float32 at most and from there on in float64.
- A vector unit computes 16 channels or none. A convolution to 8 channels or fewer gives those of two (four) slices as 16 channels.

What passes from one convolution to the next at full resolution is a slab of a few slices along D, which stays in cache, and never a volume.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lod_model.networks.group_norm import GroupNorm
from lod_model.networks.lod_brain import Level, LODBrain, Plain

LAST = torch.channels_last_3d
SLAB_VOXELS = 2**18   # of the finest grid: 4 slices of 256², 32 channels of which are 34 MB
LANES = 16            # float32 values in the widest vector

Fill = Callable[[int, int, Tensor], None]   # (start, stop, out): computes slices start … stop − 1 into out


def compile_network(network: LODBrain, *, dtype: torch.dtype = torch.float32, slab_voxels: int = SLAB_VOXELS) -> FastLODBrain:
    """The fast twin of a trained network, with copies of its weights; the network is not changed, nor followed if it changes.

    ``dtype`` is that of weights and activations: float32, or bfloat16 for CPUs that multiply it (AVX512-BF16, AMX). ``slab_voxels`` is how
    many voxels of a level are worked on at a time; two slices are the least.

    >>> from lod_model.networks.lod_brain import LODBrainConfig
    >>> network, x = LODBrain(LODBrainConfig()).eval(), torch.ones(1, 1, 16, 8, 8)
    >>> torch.allclose(compile_network(network)(x), network(x), atol=1e-4)
    True
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype: {dtype}, wanted torch.float32 or torch.bfloat16")
    with torch.inference_mode():
        return FastLODBrain(network, dtype, slab_voxels)


class FastLODBrain:
    """What ``compile_network`` makes. ``config`` is the network's."""

    def __init__(self, network: LODBrain, dtype: torch.dtype, slab_voxels: int) -> None:
        self.config = network.config
        finest = len(network.levels) - 1
        self._levels = [_FastLevel(level, network.head, dtype, slab_voxels, k == finest) for k, level in enumerate(network.levels)]

    def __call__(self, x: Tensor) -> Tensor:
        """x (1, 1, D, H, W) float32, z-scored over all voxels → logits (1, C, D, H, W) float32, as ``LODBrain.forward``."""
        return self._run(x, None, softmax=False)

    def probabilities(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """The softmax of the logits, (1, C, D, H, W) float32, in ``out`` if there is one."""
        return self._run(x, out, softmax=True)

    @torch.inference_mode()
    def _run(self, x: Tensor, out: Tensor | None, *, softmax: bool) -> Tensor:
        self._check(x)
        out = torch.empty((1, self.config.classes, *x.shape[2:])) if out is None else out
        finest, logits, above = self.config.pools[-1], None, ([], [])
        for pool, level in zip(self.config.pools, self._levels, strict=True):
            pooled = F.max_pool3d(x, pool) if pool > 1 else x                # (1, 1, D/pool, H/pool, W/pool)
            result = out[0] if level.finest and finest == 1 else out.new_empty((self.config.classes, *pooled.shape[2:]))
            above = level.run(pooled, above, logits, result, softmax=softmax and level.finest)
            logits = result
        if finest > 1:
            _blocks(out[0], finest).copy_(logits[:, :, None, :, None, :, None])
        return out

    def _check(self, x: Tensor) -> None:
        multiple = self.config.multiple
        if x.ndim != 5 or x.shape[:2] != (1, 1) or x.device.type != "cpu":
            raise ValueError(f"image: shape {tuple(x.shape)} on {x.device}, wanted (1, 1, D, H, W) on cpu")
        if any(side == 0 or side % multiple for side in x.shape[2:]):
            raise ValueError(f"image: {' × '.join(map(str, x.shape[2:]))} voxels, wanted every side a multiple of {multiple}")


# ---------------------------------------------------------------------------------------------------------------------
# One level


class _FastLevel:
    """One level: its first block from the image in slabs, the blocks below at once (they are small), its last block in slabs.

    The finest level keeps no volume of features. Where it has the bridge alone, the bridge's output (1 GB at 256³) is not kept either, but
    goes slab by slab into the decoder's convolution.
    """

    def __init__(self, level: Level, head: nn.Conv3d, dtype: torch.dtype, slab_voxels: int, finest: bool) -> None:
        self.dtype, self.slab_voxels, self.finest = dtype, slab_voxels, finest
        blocks = [*level.encoder, level.bridge]
        self.first = _FirstBlock(level.stem, blocks[0], dtype)
        self.down = [_Block(block, dtype) for block in blocks[1:]]
        self.up = [_Block(block, dtype) for block in level.decoder]
        self.thin = _ThinConv(_kernel(level.decoder[-1].conv), dtype)
        self.classify = _ThinConv(_with_head(level.out, head, with_bias=finest), dtype)
        stem = _kernel(level.stem)
        self.stem = _cast(Kernel(F.pad(_taps_as_channels(stem.weight), [0] * 6 + [1, 1]), stem.bias), dtype)   # (C, 5, 3, 3, 1)

    def run(self, x: Tensor, above: Features, coarse: Tensor | None, logits: Tensor, *, softmax: bool) -> Features:
        """Write the sum of this level's logits and the coarser ones' into ``logits``; return what the level after needs.

        x (1, 1, D, H, W); above, the features of the level before, at half the resolution; coarse (C, D/2, H/2, W/2) or None; logits
        (C, D, H, W). ``softmax`` turns the sum into probabilities.
        """
        step = max(2, self.slab_voxels // (x.shape[3] * x.shape[4]) // 2 * 2)
        taps = _taps(x, self.dtype)                                          # (1, 5, D+4, H, W)
        halved = self.first.prepare(x, taps, step)
        wide, (down, up) = self._middle(halved, x.shape[2:], above, step)    # wide (1, w0, D/2, H/2, W/2)
        step *= 2
        fill = self._last_block(wide, taps, above[1][-1] if above[1] else None)
        depth, window = x.shape[2], (1, self.stem.bias.numel(), 2 + (step if self.finest else x.shape[2]), *x.shape[3:])
        features = _empty(window, self.dtype)                                # (1, 4·w0, step+2 or D+2, H, W)
        slide = _windows if self.finest else _fixed_windows
        for a, b, slab in slide(fill, features, depth, step):
            self.classify(slab, logits[:, a:b].permute(1, 2, 3, 0))
            if coarse is not None:
                _add_upsampled(logits[:, a:b], coarse[:, a // 2 : b // 2])
            if softmax:
                _softmax(logits[:, a:b])
        return down, up if self.finest else [*up, features[:, :, 1:-1]][1:]

    def _middle(self, halved: Fill, size: torch.Size, above: Features, step: int) -> tuple[Tensor, Features]:
        """From the first block's output to the last block's convolution: that, its norm and ReLU done, and the features between."""
        d, h, w = (side // 2 for side in size)
        last = self.up[-1]
        width, channels = last.conv.weight.shape[:2]
        if not self.down:
            wide = _empty((1, width, d, h, w), torch.float32)
            buffer = _empty((1, channels, step + 2, h, w), self.dtype)
            for a, b, slab in _windows(halved, buffer, d, step):
                self.thin(slab, wide[0, :, a:b].permute(1, 2, 3, 0))
            return last.normed(wide).to(self.dtype), ([], [])
        skips = [_empty((1, self.first.channels, d, h, w), self.dtype)]
        for a in range(0, d, step):
            halved(a, min(a + step, d), skips[0][:, :, a : a + step])
        for i, block in enumerate(self.down):
            if i < len(above[0]):
                _add_upsampled(skips[-1][0], above[0][i][0])
            skips.append(block(skips[-1]))                                   # each side halves
        down, x, up = skips[:-1], skips.pop(), []
        for i, block in enumerate(self.up[:-1]):
            x = block(x).add_(skips.pop())                                   # each side doubles
            if i < len(above[1]):
                _add_upsampled(x[0], above[1][i][0])
            up.append(x)
        return last.normed(_conv(x, last.conv, padding=(1, 1, 1))), (down, up)

    def _last_block(self, wide: Tensor, taps: Tensor, above: Tensor | None) -> Fill:
        """The doubling of ``wide`` plus stem plus the features above, for the slices that are asked for.

        The kernel is as wide as its stride: each voxel becomes a 2³ block by a product with a matrix, for one slice of the block at a time.
        """
        weight, bias = self.up[-1].resample                                  # (w0, C, 2, 2, 2), (C,)
        halves = weight.permute(2, 0, 3, 4, 1).flatten(2).contiguous()       # (2, w0, 4·C), a row of the block after the other
        biases = bias.repeat(4)
        _, width, _, h, w = wide.shape
        block = wide.new_empty((h * w, halves.shape[2]))                     # (H/2·W/2, 2·2·C)

        def fill(start: int, stop: int, out: Tensor) -> None:                # out (1, C, stop−start, H, W)
            for s, flat in zip(range(start, stop), out[0].permute(1, 2, 3, 0), strict=True):   # (H, W, C)
                voxels = wide[0, :, s // 2].permute(1, 2, 0).reshape(-1, width)
                torch.addmm(biases, voxels, halves[s % 2], out=block)
                rows = flat.view(h, 2, w, -1)                                # (H/2, 2, W/2, 2·C)
                torch.clamp_min(block.view(h, w, 2, -1).transpose(1, 2), 0, out=rows)
                if above is not None:
                    rows.unflatten(3, (2, -1)).add_(above[0, :, s // 2].permute(1, 2, 0)[:, None, :, None])
            _add_conv(out, taps[:, :, start + 1 : stop + 3], self.stem, padding=(0, 1, 0))

        return fill


class _FirstBlock:
    """Stem, convolution, norm, ReLU and the halving convolution of a level's first block, as functions of the image."""

    def __init__(self, stem: nn.Conv3d, block: Plain, dtype: torch.dtype) -> None:
        self.dtype, self.norm = dtype, block.norm
        self.stem, self.conv = _kernel(stem), _kernel(block.conv)
        weight = F.conv_transpose3d(self.conv.weight, self.stem.weight)      # (O, 1, 5, 5, 5): Σ over k + j = t of conv[k]·stem[j]
        bias = self.conv.bias + torch.einsum("ocdhw,c->o", self.conv.weight, self.stem.bias)
        self.both = Kernel(_taps_as_channels(weight), bias)
        self.resample = _cast(_kernel(block.resample), dtype)
        self.channels = self.resample.bias.numel()
        self.scale_shift = _Norm(block.norm)

    def prepare(self, x: Tensor, taps: Tensor, step: int) -> Fill:
        """The first pass: the moments. Returns the second pass, which computes slices of the block's output."""
        faces = _faces(x, self.stem, self.conv)
        depth, kernel, moments = x.shape[2], _cast(self.both, self.dtype), _Moments(self.both.bias.numel())
        for a in range(0, depth, step):
            b = min(a + step, depth)
            moments.add(self._wide(taps, faces, kernel, a, b))
        scale, shift = self.scale_shift(moments)                             # (O,) float64
        kernel = _cast(Kernel(self.both.weight * scale.view(-1, 1, 1, 1, 1), self.both.bias * scale + shift), self.dtype)
        affine = [t.float().view(1, -1, 1, 1) for t in (scale, shift)]
        faces = [(axis, end, (face * affine[0] + affine[1]).relu_()) for axis, end, face in faces]

        def fill(start: int, stop: int, out: Tensor) -> None:                # out (1, 4·O, stop−start, H/2, W/2)
            for a in range(2 * start, 2 * stop, step):
                b = min(a + step, 2 * stop)
                wide = self._wide(taps, faces, kernel, a, b, relu=True)
                out[:, :, a // 2 - start : b // 2 - start].copy_(_conv(wide, self.resample, stride=2, relu=True))

        return fill

    @staticmethod
    def _wide(taps: Tensor, faces: list[Face], kernel: Kernel, a: int, b: int, *, relu: bool = False) -> Tensor:
        """Slices a … b − 1 of the 5³ convolution, its values on the faces of the grid replaced by ``faces``."""
        wide = _conv(taps[:, :, a : b + 4], kernel, padding=(0, 2, 0), relu=relu)   # (1, O, b−a, H, W)
        depth = taps.shape[2] - 4
        for axis, end, face in faces:
            if axis > 2:
                wide.select(axis, end).copy_(face[:, :, a:b])
            elif a <= end % depth < b:
                wide[:, :, end % depth - a].copy_(face)
        return wide


class _Block:
    """A Plain or UpPlain block on a volume that is small enough to be worked on at once."""

    def __init__(self, block: Plain, dtype: torch.dtype) -> None:
        self.norm, self.doubles = _Norm(block.norm), isinstance(block.resample, nn.ConvTranspose3d)
        self.conv, self.resample = _cast(_kernel(block.conv), dtype), _cast(_kernel(block.resample), dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """x (1, I, D, H, W) → (1, 4·O, D/2, H/2, W/2), or ·2 upwards."""
        x = self.normed(_conv(x, self.conv, padding=(1, 1, 1)))              # (1, O, D, H, W)
        if self.doubles:
            return F.conv_transpose3d(x, *self.resample, stride=2).relu_()
        return _conv(x, self.resample, stride=2, relu=True)

    def normed(self, x: Tensor) -> Tensor:
        """Norm and ReLU of the convolution's output, in place."""
        moments = _Moments(x.shape[1])
        moments.add(x)
        scale, shift = (t.float().view(1, -1, 1, 1, 1) for t in self.norm(moments))
        for piece in x.split(1, dim=2):
            piece.copy_((piece * scale).add_(shift).relu_())
        return x


# ---------------------------------------------------------------------------------------------------------------------
# Kernels


class Kernel(NamedTuple):
    """Weights (O, I, kD, kH, kW) or, to go up, (I, O, 2, 2, 2), and bias (O,)."""

    weight: Tensor
    bias: Tensor


def _kernel(conv: nn.Conv3d | nn.ConvTranspose3d) -> Kernel:
    return Kernel(conv.weight.detach().cpu().double(), conv.bias.detach().cpu().double())


def _cast(kernel: Kernel, dtype: torch.dtype) -> Kernel:
    return Kernel(kernel.weight.to(dtype, memory_format=LAST, copy=True), kernel.bias.to(dtype, copy=True))


def _with_head(out: nn.Conv3d, head: nn.Conv3d, *, with_bias: bool) -> Kernel:
    """The output convolution and the head after it as one. The levels are summed before the head: its bias belongs to one of them."""
    out, head = _kernel(out), _kernel(head)
    mix = head.weight[:, :, 0, 0, 0]                                         # (classes, C)
    return Kernel(torch.einsum("kc,cidhw->kidhw", mix, out.weight), mix @ out.bias + (head.bias if with_bias else 0))


def _taps_as_channels(weight: Tensor) -> Tensor:
    """(O, 1, kD, kH, kW) → (O, kW, kD, kH, 1), to go with ``_taps``."""
    return weight[:, 0].permute(0, 3, 1, 2)[..., None]


class _ThinConv:
    """A 3³ convolution to few channels; several slices of the output count as channels where that fills the vectors better.

    ``group`` slices take group + 2 slices of the input: the weights of a slice stand ``its number`` slices lower, zeros around them.
    """

    def __init__(self, kernel: Kernel, dtype: torch.dtype) -> None:
        channels = kernel.bias.numel()
        self.group = min((1, 2, 4), key=lambda g: (g + 2) / g * (-(-g * channels // LANES)))
        self.kernels = {group: _cast(self._grouped(kernel, group), dtype) for group in {1, self.group}}

    @staticmethod
    def _grouped(kernel: Kernel, group: int) -> Kernel:
        shifted = [F.pad(kernel.weight, [0] * 4 + [j, group - 1 - j]) for j in range(group)]
        return Kernel(torch.cat(shifted), kernel.bias.repeat(group))         # (group·O, I, group+2, 3, 3)

    def __call__(self, x: Tensor, out: Tensor) -> None:
        """x (1, I, n+2, H, W), the slice before and the slice after included → out (n, H, W, O), of any strides and dtype."""
        group = self.group if len(out) % self.group == 0 else 1
        y = _conv(x, self.kernels[group], stride=(group, 1, 1), padding=(0, 1, 1))   # (1, group·O, n/group, H, W)
        y = y[0].unflatten(0, (group, -1)).permute(2, 0, 3, 4, 1)            # (n/group, group, H, W, O)
        out.unflatten(0, (-1, group)).copy_(y)


# ---------------------------------------------------------------------------------------------------------------------
# Convolutions. Called here and not through F.conv3d: that one has its own slow kernel for small or thin float32 inputs, has no ReLU, and
# cannot add to what is there.

_FUSED = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")


def _conv(x: Tensor, kernel: Kernel, *, stride: int | tuple = 1, padding: tuple = (0, 0, 0), relu: bool = False) -> Tensor:
    strides = [stride] * 3 if isinstance(stride, int) else stride
    if _FUSED:
        attribute = "relu" if relu else "none"
        return torch.ops.mkldnn._convolution_pointwise(x, *kernel, padding, strides, [1] * 3, 1, attribute, [], "")
    y = F.conv3d(x, *kernel, strides, padding)
    return y.relu_() if relu else y


def _add_conv(out: Tensor, x: Tensor, kernel: Kernel, *, padding: tuple) -> None:
    """out += conv(x), without a copy of what is added."""
    if _FUSED and out.is_contiguous(memory_format=LAST):
        torch.ops.mkldnn._convolution_pointwise_(out, x, *kernel, padding, [1] * 3, [1] * 3, 1, "add", 1.0, None, [], "")
    else:
        out.add_(F.conv3d(x, *kernel, 1, padding))


def _taps(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x (1, 1, D, H, W) → (1, 5, D+4, H, W): the five voxels around each along W as its channels, zeros outside, two slices more at each end.

    A convolution of five channels runs at full speed, one of a single channel at a third of it.
    """
    padded = F.pad(x[0, 0].to(dtype), [2, 2, 0, 0, 2, 2])                    # (D+4, H, W+4)
    return padded.unfold(2, 5, 1).contiguous().permute(3, 0, 1, 2)[None]


Face = tuple[int, int, Tensor]          # (axis, 0 or −1, values (1, O, and the two other axes))
Features = tuple[list[Tensor], list[Tensor]]


def _faces(x: Tensor, stem: Kernel, conv: Kernel) -> list[Face]:
    """conv(stem(x)) on the six faces of the grid, where the zeros around the stem's output count; x (1, 1, D, H, W)."""
    stem, faces = _cast(stem, torch.float32), []
    for axis in (2, 3, 4):
        for end in (0, -1):
            first, size = end == 0, x.shape[axis]
            near = x.narrow(axis, 0 if first else max(0, size - 3), min(3, size))
            inner = _conv(near, stem, padding=(1, 1, 1))                     # right but for its innermost of three layers
            inner = inner.narrow(axis, 0 if first else inner.shape[axis] - 2, 2).contiguous(memory_format=LAST)
            kernel = _cast(Kernel(conv.weight.narrow(axis, int(first), 2), conv.bias), torch.float32)
            padding = tuple(int(a != axis) for a in (2, 3, 4))
            faces.append((axis, end, _conv(inner, kernel, padding=padding).select(axis, 0)))
    return faces


# ---------------------------------------------------------------------------------------------------------------------
# Moments


class _Moments:
    """Sums and sums of squares of each channel, in float64 from 256 values or one row of the grid on."""

    def __init__(self, channels: int) -> None:
        self.sums, self.squares = torch.zeros(2, channels, dtype=torch.float64)
        self.voxels = 0

    def add(self, x: Tensor) -> None:
        """x (1, C, D, H, W), channels last."""
        for piece in x[0].permute(1, 2, 3, 0):                               # (H, W, C)
            for rows in piece.float().flatten(1).split(256):                 # (≤ 256, W·C)
                self.sums += rows.sum(0).double().view(-1, x.shape[1]).sum(0)
                self.squares += (rows * rows).sum(0).double().view(-1, x.shape[1]).sum(0)
        self.voxels += x[0, 0].numel()


class _Norm:
    """A group norm as the affine map that it is for given moments."""

    def __init__(self, norm: GroupNorm) -> None:
        self.groups, self.epsilon = norm.groups, norm.epsilon
        self.weight, self.bias = norm.weight.detach().cpu().double(), norm.bias.detach().cpu().double()

    def __call__(self, moments: _Moments) -> tuple[Tensor, Tensor]:
        """(scale, shift), each (C,) float64, with which the norm is scale·x + shift."""
        size = self.weight.numel() // self.groups
        mean, square = (s.view(self.groups, size).mean(1) / moments.voxels for s in (moments.sums, moments.squares))
        rstd = ((square - mean * mean).clamp_min(0) + self.epsilon).rsqrt()
        scale = self.weight * rstd.repeat_interleave(size)
        return scale, self.bias - mean.repeat_interleave(size) * scale


# ---------------------------------------------------------------------------------------------------------------------
# Slabs


def _empty(shape: tuple, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, memory_format=LAST)


def _windows(fill: Fill, buffer: Tensor, depth: int, step: int) -> Iterator[tuple[int, int, Tensor]]:
    """(a, b, slices a − 1 … b of a volume, zeros outside it) for a = 0, step, …; each slice is computed once.

    buffer (1, C, step+2, H, W) holds the slices; the two that the next window needs too move to its front.
    """
    done = 0
    for a in range(0, depth, step):
        b = min(a + step, depth)
        if a == 0:
            buffer[:, :, 0].zero_()
        else:
            for i in (0, 1):   # one by one: with a step of 1 they overlap
                buffer[:, :, i].copy_(buffer[:, :, step + i])
        end = min(b + 1, depth)
        if done < end:
            fill(done, end, buffer[:, :, done - a + 1 : end - a + 1])
            done = end
        if b == depth:
            buffer[:, :, b - a + 1].zero_()
        yield a, b, buffer[:, :, : b - a + 2]


def _fixed_windows(fill: Fill, buffer: Tensor, depth: int, step: int) -> Iterator[tuple[int, int, Tensor]]:
    """As ``_windows``, in a buffer (1, C, depth+2, H, W) that keeps the whole volume."""
    buffer[:, :, 0].zero_()
    buffer[:, :, -1].zero_()
    done = 0
    for a in range(0, depth, step):
        b = min(a + step, depth)
        end = min(b + 1, depth)
        if done < end:
            fill(done, end, buffer[:, :, done + 1 : end + 1])
            done = end
        yield a, b, buffer[:, :, a : b + 2]


def _blocks(x: Tensor, factor: int) -> Tensor:
    """A view of x (C, D, H, W) as (C, D/f, f, H/f, f, W/f, f)."""
    return x.unflatten(3, (-1, factor)).unflatten(2, (-1, factor)).unflatten(1, (-1, factor))


def _add_upsampled(x: Tensor, coarse: Tensor) -> None:
    """x (C, D, H, W) += coarse (C, D/2, H/2, W/2), each value a 2³ block."""
    if coarse.stride(0) == 1:   # channels last: runs of C values
        _blocks(x, 2).add_(coarse[:, :, None, :, None, :, None])
    else:                       # contiguous: doubled along W first, so that runs are W long and not two
        rows = coarse.repeat_interleave(2, dim=3)                            # (C, D/2, H/2, W)
        x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).add_(rows[:, :, None, :, None])


def _softmax(x: Tensor) -> None:
    """Over the classes of x (C, D, H, W), in place."""
    x.sub_(x.amax(0)).exp_()
    x.div_(x.sum(0))
