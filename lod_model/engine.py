"""LOD-Brain on a CPU, fast: the trained network rewritten exactly, and computed a few slices at a time.

``compile_network`` takes a trained :class:`LODBrain` and leaves it as it is. The rewrites, each the same function up to rounding:

- A level's stem and the convolution after it have nothing between them: one 5³ convolution of the image. Only on the faces of the grid does
  it differ, where the intermediate is padded with zeros; the faces are computed in two steps.
- A level's output convolution and the head are linear: one 3³ convolution to the classes, the coarser levels' share upsampled after it.
- A group norm is an affine map once its moments are known, so they are put into the kernel. Those of the first block are known before it is
  computed: ``engine_moments`` has them from the image's products with itself.
- A vector unit computes 16 channels or none. A convolution to 8 channels or fewer gives those of two (four) slices as 16 channels.

What passes from one convolution to the next at full resolution is a slab of a few slices along D, which stays in cache, and never a volume.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lod_model.engine_kernels import (
    Kernel,
    ThinConv,
    add_conv,
    add_upsampled,
    blocks,
    cast,
    conv,
    empty,
    keep_freed_memory,
    kernel_of,
    max_pooled,
    softmax_,
    taps_as_channels,
    taps_between,
)
from lod_model.engine_moments import Face, Moments, Norm, faces_of, moments_with_faces
from lod_model.networks.lod_brain import Level, LODBrain, Plain

SLAB_VOXELS = 2**17   # of the finest grid: 2 slices of 256², 32 channels of which are 17 MB: in cache, and below what malloc gives back

Features = tuple[list[Tensor], list[Tensor]]
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
    keep_freed_memory()
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
    def classes(self, x: Tensor) -> Tensor:
        """The likeliest class of each voxel, (D, H, W) uint8, the first among equals; logits are held for a slab at a time."""
        self._check(x)
        logits, above = None, ([], [])
        for pool, level in zip(self.config.pools, self._levels, strict=True):
            pooled = max_pooled(x, pool)                                     # (1, 1, D/pool, H/pool, W/pool)
            if level.finest:
                labels = torch.empty(pooled.shape[2:], dtype=torch.uint8)
                level.run(pooled, above, logits, None, softmax=False, labels=labels)
                finer = torch.empty(x.shape[2:], dtype=torch.uint8)
                blocks(finer[None], pool).copy_(labels[None, :, None, :, None, :, None])
                return finer
            result = x.new_empty((self.config.classes, *pooled.shape[2:]))
            above = level.run(pooled, above, logits, result, softmax=False)
            logits = result
        raise AssertionError("there is a finest level")

    @torch.inference_mode()
    def _run(self, x: Tensor, out: Tensor | None, *, softmax: bool) -> Tensor:
        self._check(x)
        out = empty((1, self.config.classes, *x.shape[2:]), torch.float32, last=False) if out is None else out
        finest, logits, above = self.config.pools[-1], None, ([], [])
        for pool, level in zip(self.config.pools, self._levels, strict=True):
            pooled = max_pooled(x, pool)                                     # (1, 1, D/pool, H/pool, W/pool)
            result = out[0] if level.finest and finest == 1 else out.new_empty((self.config.classes, *pooled.shape[2:]))
            above = level.run(pooled, above, logits, result, softmax=softmax and level.finest)
            logits = result
        if finest > 1:
            blocks(out[0], finest).copy_(logits[:, :, None, :, None, :, None])
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
        self.thin = ThinConv(kernel_of(level.decoder[-1].conv), dtype)
        self.classify = ThinConv(_with_head(level.out, head, with_bias=finest), dtype)
        stem = kernel_of(level.stem)
        self.stem = cast(Kernel(F.pad(taps_as_channels(stem.weight), [0] * 6 + [1, 1]), stem.bias), dtype)   # (C, 5, 3, 3, 1)

    def run(
        self, x: Tensor, above: Features, coarse: Tensor | None, logits: Tensor | None, *, softmax: bool, labels: Tensor | None = None
    ) -> Features:
        """Write the sum of this level's logits and the coarser ones' into ``logits``; return what the level after needs.

        x (1, 1, D, H, W); above, the features of the level before, at half the resolution; coarse (C, D/2, H/2, W/2) or None; logits
        (C, D, H, W). ``softmax`` turns the sum into probabilities. With ``labels`` (D, H, W) uint8 its largest goes there, and no logits
        are kept.
        """
        step = max(2, self.slab_voxels // (x.shape[3] * x.shape[4]) // 2 * 2)
        halved = self.first.prepare(x, step)
        wide, (down, up) = self._middle(halved, x.shape[2:], above, step)    # wide (1, w0, D/2, H/2, W/2)
        # two slices of each window are copied to the next: more slices, fewer copies; of many classes fewer slices, less memory
        step *= max(1, min(8, 56 // self.classify.outputs))
        fill = self._last_block(wide, x, above[1][-1] if above[1] else None)
        depth, window = x.shape[2], (1, self.stem.bias.numel(), 2 + (step if self.finest else x.shape[2]), *x.shape[3:])
        features = empty(window, self.dtype)                                # (1, 4·w0, step+2 or D+2, H, W)
        slide = _windows if self.finest else _fixed_windows
        kept = x.new_empty((self.classify.outputs, step, *x.shape[3:])) if logits is None else None
        for a, b, slab in slide(fill, features, depth, step):
            part = logits[:, a:b] if kept is None else kept[:, : b - a]
            self.classify(slab, part.permute(1, 2, 3, 0))
            if coarse is not None:
                add_upsampled(part, coarse[:, a // 2 : b // 2])
            if softmax:
                softmax_(part)
            if labels is not None:
                labels[a:b] = part.argmax(0)
        return down, up if self.finest else [*up, features[:, :, 1:-1]][1:]

    def _middle(self, halved: Fill, size: torch.Size, above: Features, step: int) -> tuple[Tensor, Features]:
        """From the first block's output to the last block's convolution: that, its norm and ReLU done, and the features between."""
        d, h, w = (side // 2 for side in size)
        last = self.up[-1]
        width, channels = last.conv.weight.shape[:2]
        if not self.down:
            wide = empty((1, width, d, h, w), torch.float32)
            buffer = empty((1, channels, step + 2, h, w), self.dtype)
            for a, b, slab in _windows(halved, buffer, d, step):
                self.thin(slab, wide[0, :, a:b].permute(1, 2, 3, 0))
            return last.normed(wide).to(self.dtype), ([], [])
        skips = [empty((1, self.first.channels, d, h, w), self.dtype)]
        for a in range(0, d, step):
            halved(a, min(a + step, d), skips[0][:, :, a : a + step])
        for i, block in enumerate(self.down):
            if i < len(above[0]):
                add_upsampled(skips[-1][0], above[0][i][0])
            skips.append(block(skips[-1]))                                   # each side halves
        down, x, up = skips[:-1], skips.pop(), []
        for i, block in enumerate(self.up[:-1]):
            x = block(x).add_(skips.pop())                                   # each side doubles
            if i < len(above[1]):
                add_upsampled(x[0], above[1][i][0])
            up.append(x)
        return last.normed(conv(x, last.conv, padding=(1, 1, 1))), (down, up)

    def _last_block(self, wide: Tensor, x: Tensor, above: Tensor | None) -> Fill:
        """The doubling of ``wide`` plus stem plus the features above, for the slices that are asked for.

        The kernel is as wide as its stride: each voxel becomes a 2³ block by a product with a matrix, for one slice of the block at a time.
        """
        weight, bias = self.up[-1].resample                                  # (w0, C, 2, 2, 2), (C,)
        halves = weight.permute(2, 0, 3, 4, 1).flatten(2).contiguous()       # (2, w0, 4·C), a row of the block after the other
        biases = bias.repeat(4)
        _, width, _, h, w = wide.shape
        block = wide.new_empty((h * w, halves.shape[2]))                     # (H/2·W/2, 2·2·C)

        def fill(start: int, stop: int, out: Tensor) -> None:                # out (1, C, stop−start, H, W); a slice at a time, in cache
            taps = taps_between(x, start, stop, self.dtype, reach=1)         # (1, 5, stop−start+2, H, W)
            for i, (s, flat) in enumerate(zip(range(start, stop), out[0].permute(1, 2, 3, 0), strict=True)):   # (H, W, C)
                voxels = wide[0, :, s // 2].permute(1, 2, 0).reshape(-1, width)
                torch.addmm(biases, voxels, halves[s % 2], out=block)
                rows = flat.view(h, 2, w, -1)                                # (H/2, 2, W/2, 2·C)
                torch.clamp_min(block.view(h, w, 2, -1).transpose(1, 2), 0, out=rows)
                if above is not None:
                    rows.add_(above[0, :, s // 2].permute(1, 2, 0).repeat(1, 1, 2)[:, None])   # doubled along W: runs of a row, not of C
                add_conv(out[:, :, i : i + 1], taps[:, :, i : i + 3], self.stem, padding=(0, 1, 0))

        return fill


class _FirstBlock:
    """Stem, convolution, norm, ReLU and the halving convolution of a level's first block, as functions of the image."""

    def __init__(self, stem: nn.Conv3d, block: Plain, dtype: torch.dtype) -> None:
        self.dtype, self.norm = dtype, Norm(block.norm)
        self.stem, self.conv = kernel_of(stem), kernel_of(block.conv)
        weight = F.conv_transpose3d(self.conv.weight, self.stem.weight)      # (O, 1, 5, 5, 5): Σ over k + j = t of conv[k]·stem[j]
        bias = self.conv.bias + torch.einsum("ocdhw,c->o", self.conv.weight, self.stem.bias)
        self.both = Kernel(weight, bias)
        self.resample = cast(kernel_of(block.resample), dtype)
        self.channels = self.resample.bias.numel()

    def prepare(self, x: Tensor, step: int) -> Fill:
        """The moments; returns the pass that computes slices of the block's output."""
        faces = faces_of(x, self.stem, self.conv)
        scale, shift = self.norm(moments_with_faces(x, self.both, faces))    # (O,) float64
        kernel = Kernel(taps_as_channels(self.both.weight * scale.view(-1, 1, 1, 1, 1)), self.both.bias * scale + shift)
        kernel = cast(kernel, self.dtype)
        affine = [t.float().view(1, -1, 1, 1) for t in (scale, shift)]
        faces = [(axis, end, (face * affine[0] + affine[1]).relu_()) for axis, end, face in faces]

        def fill(start: int, stop: int, out: Tensor) -> None:                # out (1, 4·O, stop−start, H/2, W/2)
            for a in range(2 * start, 2 * stop, step):
                b = min(a + step, 2 * stop)
                wide = conv(taps_between(x, a, b, self.dtype), kernel, padding=(0, 2, 0), relu=True)   # (1, O, b−a, H, W)
                _set_faces(wide, faces, a, b, depth=x.shape[2])
                out[:, :, a // 2 - start : b // 2 - start].copy_(conv(wide, self.resample, stride=2, relu=True))

        return fill


def _set_faces(wide: Tensor, faces: list[Face], a: int, b: int, *, depth: int) -> None:
    """The values of slices a … b − 1 on the faces of the grid."""
    for axis, end, face in faces:
        if axis > 2:
            wide.select(axis, end).copy_(face[:, :, a:b])
        elif a <= end % depth < b:
            wide[:, :, end % depth - a].copy_(face)


class _Block:
    """A Plain or UpPlain block on a volume that is small enough to be worked on at once."""

    def __init__(self, block: Plain, dtype: torch.dtype) -> None:
        self.norm, self.doubles = Norm(block.norm), isinstance(block.resample, nn.ConvTranspose3d)
        self.conv, self.resample = cast(kernel_of(block.conv), dtype), cast(kernel_of(block.resample), dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """x (1, I, D, H, W) → (1, 4·O, D/2, H/2, W/2), or ·2 upwards."""
        x = self.normed(conv(x, self.conv, padding=(1, 1, 1)))              # (1, O, D, H, W)
        if self.doubles:
            return F.conv_transpose3d(x, *self.resample, stride=2).relu_()
        return conv(x, self.resample, stride=2, relu=True)

    def normed(self, x: Tensor) -> Tensor:
        """Norm and ReLU of the convolution's output, in place."""
        moments = Moments(x.shape[1])
        moments.add(x)
        scale, shift = (t.float().view(1, -1, 1, 1, 1) for t in self.norm(moments))
        for piece in x.split(1, dim=2):
            piece.copy_((piece * scale).add_(shift).relu_())
        return x


def _with_head(out: nn.Conv3d, head: nn.Conv3d, *, with_bias: bool) -> Kernel:
    """The output convolution and the head after it as one. The levels are summed before the head: its bias belongs to one of them."""
    out, head = kernel_of(out), kernel_of(head)
    mix = head.weight[:, :, 0, 0, 0]                                         # (classes, C)
    return Kernel(torch.einsum("kc,cidhw->kidhw", mix, out.weight), mix @ out.bias + (head.bias if with_bias else 0))


# ---------------------------------------------------------------------------------------------------------------------
# Slabs


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
