"""What a scanner does to a picture after the anatomy: contrast, bias field, motion, ghosting, spikes, noise, thick slices, blur, window.

Motion, ghosting and spikes are TorchIO's. The rest is the same arithmetic in one or two passes, because TorchIO's own costs more than a
training step at coarse grids: the bias field is its polynomial as three small matrix products (exact; 70 ms → 2 ms at 128³), blur and thick
slices are one matrix an axis (thick slices average what they cover, which RandomAnisotropy's nearest sampling does not).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from lod_model.randomness import Fields, chance, normals_later, reproducible, uniform

Step = Callable[[torch.Tensor], torch.Tensor]
"""Drawn parameters of one thing that is done to a picture (D, H, W) float32 on any device; what it is given, it may change."""


def corrupt(image: np.ndarray, *, seed: int, strength: float = 1.0, voxel_mm: float, inverted: float = 0.1) -> np.ndarray:
    """A random acquisition of ``image`` (D, H, W) float in [0, 1], LIA, isotropic voxels of ``voxel_mm``; float32 in [0, 1], a new array.

    All parameters come from ``seed``; ``strength`` scales their ranges, 0 returns the image as it is. ``inverted`` is the share with dark and
    bright exchanged; the other chances are constants below.

    >>> cube = np.pad(np.full((6, 5, 7), 0.6, np.float32), 4)
    >>> out = corrupt(cube, seed=3, voxel_mm=2.0)
    >>> out.shape, out.dtype.name, bool((out >= 0).all() and (out <= 1).all())
    ((14, 13, 15), 'float32', True)
    >>> bool((out == corrupt(cube, seed=3, voxel_mm=2.0)).all()), bool((cube == corrupt(cube, seed=3, strength=0, voxel_mm=2.0)).all())
    (True, True)
    """
    x = torch.from_numpy(np.array(image, np.float32, order="C"))
    if not strength:
        return x.numpy()
    with reproducible(seed):
        for step in draw_corruption(tuple(x.shape), strength=strength, voxel_mm=voxel_mm, inverted=inverted):
            x = step(x)
    return x.numpy()


def draw_corruption(shape: tuple[int, ...], *, strength: float, voxel_mm: float, inverted: float = 0.1) -> list[Step]:
    """What :func:`corrupt` does to a picture of that shape, in order, from torch's current generator."""
    steps: list[Step] = []
    if chance(inverted):
        steps.append(Inversion(uniform(0.5, 1.0)))
    if chance(0.5):
        steps.append(Gamma(float(np.exp(uniform(-0.5, 0.5) * strength))))
    if chance(0.6):
        steps.append(draw_bias(limit=0.35 * strength))
    steps += _draw_k_space(shape, strength, voxel_mm)
    noise_first = chance(0.5)  # on the acquired grid, then smoothed with the picture, or added by what came later
    steps += _draw_noise(shape, strength) if noise_first else []
    steps.append(_draw_resolution(strength, voxel_mm))
    steps += [] if noise_first else _draw_noise(shape, strength)
    low = uniform(0, 0.03) * strength if chance(0.3) else 0.0
    return [*steps, Window(low, uniform(0.0005, 0.001 + 0.009 * strength))]


@dataclass(frozen=True)
class Inversion:
    """See :func:`invert`."""

    depth: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return invert(x, depth=self.depth)


@dataclass(frozen=True)
class Gamma:
    """x to the power of ``exponent``."""

    exponent: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x.clamp_(min=0).pow_(self.exponent)


@dataclass(frozen=True)
class Bias:
    """tio.BiasField: times the exp of a polynomial in coordinates of −1…1, ``coefficients`` (k, k, k), evaluated axis by axis."""

    coefficients: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x.mul_(self.exponent(tuple(x.shape), x.device).exp_())

    def exponent(self, shape: tuple[int, ...], device: torch.device | None = None) -> torch.Tensor:
        """The polynomial, (D, H, W)."""
        order = torch.arange(len(self.coefficients), device=device)
        powers = [torch.linspace(-1, 1, n, device=device)[:, None] ** order for n in shape]  # (n, k) each
        field = torch.tensordot(self.coefficients.to(device or "cpu", non_blocking=True), powers[0], dims=([0], [1]))  # (k, k, D)
        field = torch.tensordot(field, powers[1], dims=([0], [1]))  # (k, D, H)
        return torch.tensordot(field, powers[2], dims=([0], [1]))  # (D, H, W)


def draw_bias(*, limit: float, order: int = 3) -> Bias:
    """Coefficients in ±``limit``."""
    coefficients = (torch.rand((order + 1,) * 3) * 2 - 1) * limit
    degree = torch.arange(order + 1)
    coefficients[(degree[:, None, None] + degree[:, None] + degree) > order] = 0
    return Bias(coefficients)


@dataclass(frozen=True)
class KSpace:
    """TorchIO's motion, ghosting or spikes, as drawn; on a processor alone."""

    transforms: tuple
    voxel_mm: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        picture = _picture(x[None], self.voxel_mm)
        for transform in self.transforms:
            picture = transform(picture)
        return picture["x"].data[0].contiguous()


def _picture(data: torch.Tensor, voxel_mm: float):
    import torchio as tio

    middle = np.diag([voxel_mm] * 3 + [1.0])
    middle[:3, 3] = -voxel_mm * np.array(data.shape[1:]) / 2  # motion turns about the world's origin
    return tio.Subject(x=tio.ScalarImage(tensor=data, affine=middle))


def _draw_k_space(shape: tuple[int, ...], strength: float, voxel_mm: float) -> list[KSpace]:
    """At most one in most pictures; rare, as each transforms the volume to k-space and back. TorchIO draws while it works on a picture, the
    same for any that has three axes: here on one of a few voxels."""
    wanted = [chance(0.08), chance(0.08), chance(0.06)]
    if not any(wanted):
        return []
    import torchio as tio

    transforms = [
        tio.RandomMotion(degrees=4 * strength, translation=4 * strength, num_transforms=2),
        tio.RandomGhosting(num_ghosts=(2, 7), intensity=(0.1 * strength, 0.6 * strength), restore=0.02),
        tio.RandomSpike(num_spikes=(1, 2), intensity=(0.1 * strength, 0.7 * strength)),
    ]
    small = _picture(torch.ones(1, *(min(n, 4) for n in shape)), voxel_mm)
    for transform, yes in zip(transforms, wanted, strict=True):
        small = transform(small) if yes else small
    return [KSpace(tuple(small.history), voxel_mm)]


@dataclass(frozen=True)
class Noise:
    """Gaussian, or Rician as in a magnitude picture: |x + n₁ + i n₂|. The deviation is ``share`` of the picture's bright values, or of 1."""

    share: float
    fields: Fields
    rician: bool = False
    of_bright: bool = True

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        deviation = self.share * quantile(x, 0.99).clamp(min=1e-3) if self.of_bright else self.share
        fields = self.fields.each(torch.randn, x)
        x += next(fields).mul_(deviation)
        if self.rician:
            x = x.square_().add_(next(fields).mul_(deviation).square_()).sqrt_()
        return x


def _draw_noise(shape: tuple[int, ...], strength: float) -> list[Noise]:
    if not chance(0.7):
        return []
    share, rician = uniform(0, 0.07) * strength, chance(0.5)
    return [Noise(share, normals_later(shape, 2 if rician else 1), rician)]


@dataclass(frozen=True)
class Resolution:
    """Along each axis a point spread of full width ``widths_mm`` and slices of ``slices_mm``, see :func:`resampling`."""

    slices_mm: tuple[float, ...]
    widths_mm: tuple[float, ...]
    voxel_mm: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        for axis, (slice_mm, width_mm) in enumerate(zip(self.slices_mm, self.widths_mm, strict=True)):
            matrix = resampling(x.shape[axis], slice_mm=slice_mm, width_mm=width_mm, voxel_mm=self.voxel_mm, device=x.device)
            x = x if matrix is None else along(x, matrix, axis)
        return x


def _draw_resolution(strength: float, voxel_mm: float) -> Resolution:
    """Thick slices along one axis, up to 6 mm, or a coarser voxel, up to 3 mm; a point spread of its own along each axis."""
    thick = [0.0, 0.0, 0.0]
    kind = uniform(0, 1)
    if kind < 0.35:
        thick[int(uniform(0, 3))] = voxel_mm + max(6.0 - voxel_mm, 0) * uniform(0, 1) * strength
    elif kind < 0.5:
        thick = [voxel_mm + max(3.0 - voxel_mm, 0) * uniform(0, 1) * strength] * 3
    # Gaussian full widths up to 2.5 mm; blur is in millimetres too, so that a coarse grid hardly sees it
    widths = [uniform(0, 2.5) * strength for _ in range(3)] if chance(0.5) else [0.0] * 3
    return Resolution(tuple(thick), tuple(widths), voxel_mm)


@dataclass(frozen=True)
class Window:
    """See :func:`window`."""

    low: float
    above: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return window(x, low=self.low, above=self.above)


def invert(x: torch.Tensor, *, depth: float) -> torch.Tensor:
    """Dark becomes bright, air stays dark: from (0, 0) up to (edge, 1), then down to (high, 1 − depth), high being bright tissue.

    >>> invert(torch.tensor([0.0, 0.05, 0.1, 0.55, 1.0]), depth=0.5)
    tensor([0.0000, 0.5000, 1.0000, 0.7500, 0.5000])
    """
    high = quantile(x, 0.99).clamp(min=1e-3)
    edge = 0.1 * high
    falling = 1 - depth * (x - edge) / (high - edge)
    return torch.minimum(x / edge, falling).clamp_(0, 1)


def bias_field(shape: tuple[int, ...], *, limit: float, order: int = 3) -> torch.Tensor:
    """(D, H, W): what tio.RandomBiasField multiplies by, drawn from torch's current generator."""
    return draw_bias(limit=limit, order=order).exponent(shape).exp_()


def resampling(
    n: int, *, slice_mm: float, width_mm: float, voxel_mm: float, device: torch.device | None = None
) -> torch.Tensor | None:
    """(n, n): a Gaussian of full width at half maximum ``width_mm``, then slices of ``slice_mm`` that average what they cover, and linear
    interpolation back. Rows sum to 1; None where nothing changes.

    >>> resampling(4, slice_mm=4.0, width_mm=0, voxel_mm=2.0)[0]     # slices of two voxels, centred between them
    tensor([0.5000, 0.5000, 0.0000, 0.0000])
    """
    at = torch.arange(n, dtype=torch.float32, device=device)
    matrix = None
    sigma = width_mm / voxel_mm / 2.3548
    if sigma > 0.2:
        matrix = torch.exp(-0.5 * ((at[:, None] - at) / sigma) ** 2)
        matrix /= matrix.sum(1, keepdim=True)
    step = slice_mm / voxel_mm
    slices = int(round(n / step)) if step > 1.05 else n
    if 1 <= slices < n:
        step = n / slices
        start = torch.arange(slices, device=device)[:, None] * step
        cover = (torch.minimum(start + step, at + 1) - torch.maximum(start, at)).clamp(min=0) / step  # (slices, n)
        where = ((at + 0.5) / step - 0.5).clamp(0, slices - 1)
        back = (1 - (where[:, None] - torch.arange(slices, device=device)).abs()).clamp(min=0)  # (n, slices)
        matrix = back @ cover if matrix is None else back @ (cover @ matrix)
    return matrix


def along(x: torch.Tensor, matrix: torch.Tensor, axis: int) -> torch.Tensor:
    """``matrix`` (m, n) applied to one of the axes of ``x`` (…, D, H, W): 0, 1 or 2."""
    if axis == 0:
        return (matrix @ x.flatten(-2)).unflatten(-1, x.shape[-2:])
    return matrix @ x if axis == 1 else x @ matrix.T


def window(x: torch.Tensor, *, low: float, above: float) -> torch.Tensor:
    """[0, 1] from ``low`` up to what a share ``above`` of the voxels exceeds, clipped."""
    high = quantile(x, 1 - above)
    spread = high > low + 1e-6
    return x.sub_(torch.where(spread, low, 0.0)).div_(torch.where(spread, (high - low).clamp(min=1e-6), 1.0)).clamp_(0, 1)


def quantile(x: torch.Tensor, q: float) -> torch.Tensor:
    """(): of at most some 64³ voxels of a regular subset: a sort of all would cost more than the rest."""
    part = x[tuple(slice(None, None, -(-n // 64)) for n in x.shape)].flatten()
    return part.kthvalue(max(1, min(part.numel(), round(q * part.numel()))))[0]
