"""The fast engine's convolutions and what goes between them, each on a slab of a few slices.

Convolutions are called here and not through ``F.conv3d``: that one has its own slow kernel for small or thin float32 inputs, has no ReLU,
and cannot add to what is there.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LAST = torch.channels_last_3d
LANES = 16                      # float32 values in the widest vector
HUGE_BYTES = 2**24              # from here on memory is asked for in huge pages
KEPT_BYTES = 2**28              # of freed memory, more than all buffers of a pass that live in malloc's heap

_FUSED = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")


class Kernel(NamedTuple):
    """Weights (O, I, kD, kH, kW) or, to go up, (I, O, 2, 2, 2), and bias (O,)."""

    weight: Tensor
    bias: Tensor


def kernel_of(conv: nn.Conv3d | nn.ConvTranspose3d) -> Kernel:
    return Kernel(conv.weight.detach().cpu().double(), conv.bias.detach().cpu().double())


def cast(kernel: Kernel, dtype: torch.dtype) -> Kernel:
    return Kernel(kernel.weight.to(dtype, memory_format=LAST, copy=True), kernel.bias.to(dtype, copy=True))


def empty(shape: tuple, dtype: torch.dtype, *, last: bool = True) -> Tensor:
    """An empty tensor, channels last unless ``last`` is False; a large one in huge pages where the system has them.

    A page fault for every 4 KB of freshly mapped memory costs as much as the arithmetic on it.
    """
    order = (0, 2, 3, 4, 1) if last else range(len(shape))
    count = torch.Size(shape).numel()
    if count * dtype.itemsize < HUGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, memory_format=LAST if last else torch.contiguous_format)
    memory = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):                                       # a system without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    flat = torch.frombuffer(memory, dtype=dtype, count=count)
    back = (0, 4, 1, 2, 3) if last else range(len(shape))
    return flat.view([shape[axis] for axis in order]).permute(*back)


@functools.cache
def keep_freed_memory() -> None:
    """Have this process's malloc keep freed memory for the next buffer of its size; where it is not glibc's, nothing happens.

    It would give large blocks back to the system, and every slab would begin with page faults: a twentieth of a pass.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**25)                                                   # M_MMAP_THRESHOLD, the most it takes
        mallopt(-1, KEPT_BYTES)                                              # M_TRIM_THRESHOLD


def conv(x: Tensor, kernel: Kernel, *, stride: int | tuple = 1, padding: tuple = (0, 0, 0), relu: bool = False) -> Tensor:
    """x (1, I, D, H, W) → (1, O, …), and its ReLU."""
    strides = [stride] * 3 if isinstance(stride, int) else stride
    if _FUSED and x.device.type == "cpu":
        attribute = "relu" if relu else "none"
        return torch.ops.mkldnn._convolution_pointwise(x, *kernel, padding, strides, [1] * 3, 1, attribute, [], "")
    y = F.conv3d(x, *kernel, strides, padding)
    return y.relu_() if relu else y


def add_conv(out: Tensor, x: Tensor, kernel: Kernel, *, padding: tuple) -> None:
    """out += conv(x), without a copy of what is added."""
    if _FUSED and out.device.type == "cpu" and out.is_contiguous(memory_format=LAST):
        torch.ops.mkldnn._convolution_pointwise_(out, x, *kernel, padding, [1] * 3, [1] * 3, 1, "add", 1.0, None, [], "")
    else:
        out.add_(F.conv3d(x, *kernel, 1, padding))


class ThinConv:
    """A 3³ convolution to few channels; several slices of the output count as channels where that fills the vectors better.

    ``group`` slices take group + 2 slices of the input: the weights of a slice stand ``its number`` slices lower, zeros around them.
    """

    def __init__(self, kernel: Kernel, dtype: torch.dtype) -> None:
        self.outputs = kernel.bias.numel()
        self.group = min((1, 2, 4), key=lambda g: (g + 2) / g * (-(-g * self.outputs // LANES)))
        self.kernels = {group: cast(self._grouped(kernel, group), dtype) for group in {1, self.group}}

    @staticmethod
    def _grouped(kernel: Kernel, group: int) -> Kernel:
        shifted = [F.pad(kernel.weight, [0] * 4 + [j, group - 1 - j]) for j in range(group)]
        return Kernel(torch.cat(shifted), kernel.bias.repeat(group))         # (group·O, I, group+2, 3, 3)

    def __call__(self, x: Tensor, out: Tensor) -> None:
        """x (1, I, n+2, H, W), the slice before and the slice after included → out (n, H, W, O), of any strides and dtype."""
        group = self.group if len(out) % self.group == 0 else 1
        y = conv(x, self.kernels[group], stride=(group, 1, 1), padding=(0, 1, 1))    # (1, group·O, n/group, H, W)
        y = y[0].unflatten(0, (group, -1)).permute(2, 0, 3, 4, 1)            # (n/group, group, H, W, O)
        for slices, result in zip(out.unflatten(0, (-1, group)), y, strict=True):    # one after the other: they are read once for each class
            slices.copy_(result)


def taps_as_channels(weight: Tensor) -> Tensor:
    """(O, 1, kD, kH, kW) → (O, kW, kD, kH, 1), to go with ``taps_of``."""
    return weight[:, 0].permute(0, 3, 1, 2)[..., None]


def taps_of(image: Tensor, dtype: torch.dtype, *, margin: int = 2) -> Tensor:
    """image (D, H, W) → (1, 5, D, H, W + 2·margin − 4): five voxels along W as channels, zeros outside.

    A convolution of five channels runs at full speed, one of a single channel at a third of it.
    """
    return F.pad(image.to(dtype), [margin, margin]).unfold(2, 5, 1).contiguous().permute(3, 0, 1, 2)[None]


def taps_between(x: Tensor, start: int, stop: int, dtype: torch.dtype, *, reach: int = 2) -> Tensor:
    """The taps of slices start − reach … stop − 1 + reach of x (1, 1, D, H, W), zeros outside."""
    depth = x.shape[2]
    near = x[0, 0, max(0, start - reach) : stop + reach]
    front, back = max(0, reach - start), max(0, stop + reach - depth)
    return taps_of(F.pad(near, [0, 0, 0, 0, front, back]) if front or back else near, dtype)


def blocks(x: Tensor, factor: int) -> Tensor:
    """A view of x (C, D, H, W) as (C, D/f, f, H/f, f, W/f, f)."""
    return x.unflatten(3, (-1, factor)).unflatten(2, (-1, factor)).unflatten(1, (-1, factor))


def add_upsampled(x: Tensor, coarse: Tensor) -> None:
    """x (C, D, H, W) += coarse (C, D/2, H/2, W/2), each value a 2³ block."""
    if coarse.stride(0) == 1:   # channels last: runs of C values
        blocks(x, 2).add_(coarse[:, :, None, :, None, :, None])
    else:                       # contiguous: doubled along W first, so that runs are W long and not two
        rows = coarse.repeat_interleave(2, dim=3)                            # (C, D/2, H/2, W)
        x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).add_(rows[:, :, None, :, None])


def max_pooled(x: Tensor, factor: int) -> Tensor:
    """max_pool3d of x (1, 1, D, H, W), an axis at a time: a quarter of its time for factor 2."""
    for axis in (2, 3, 4) if factor > 1 else ():
        x = functools.reduce(torch.maximum, x.unflatten(axis, (-1, factor)).unbind(axis + 1))
    return x


def softmax_(x: Tensor) -> None:
    """Over the classes of x (C, D, H, W), in place."""
    x.sub_(x.amax(0)).exp_()
    x.div_(x.sum(0))
