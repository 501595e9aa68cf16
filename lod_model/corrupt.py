"""What a scanner does to a picture after the anatomy: contrast, bias field, motion, ghosting, spikes, noise, thick slices, blur, window.

Motion, ghosting and spikes are TorchIO's. The rest is the same arithmetic in one or two passes, because TorchIO's own costs more than a
training step at coarse grids: the bias field is its polynomial as three small matrix products (exact; 70 ms → 2 ms at 128³), blur and thick
slices are one matrix an axis (thick slices average what they cover, which RandomAnisotropy's nearest sampling does not).
"""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch


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
        if chance(inverted):
            x = invert(x, depth=uniform(0.5, 1.0))
        if chance(0.5):
            x = x.clamp_(min=0).pow_(float(np.exp(uniform(-0.5, 0.5) * strength)))
        if chance(0.6):
            x *= bias_field(x.shape, limit=0.35 * strength)
        x = _k_space(x, strength, voxel_mm)
        noise_first = chance(0.5)  # on the acquired grid, then smoothed with the picture, or added by what came later
        x = _noise(x, strength) if noise_first else x
        x = _resolution(x, strength, voxel_mm)
        x = x if noise_first else _noise(x, strength)
        low = uniform(0, 0.03) * strength if chance(0.3) else 0.0
        return window(x, low=low, above=uniform(0.0005, 0.001 + 0.009 * strength)).numpy()


@contextlib.contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """torch's generator forked and seeded, and one thread: sums in another order would differ in their last bits between worker counts."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def uniform(low: float, high: float) -> float:
    """One draw from torch's current generator."""
    return low + (high - low) * float(torch.rand(()))


def chance(p: float) -> bool:
    """True with probability ``p``, from torch's current generator."""
    return float(torch.rand(())) < p


def invert(x: torch.Tensor, *, depth: float) -> torch.Tensor:
    """Dark becomes bright, air stays dark: from (0, 0) up to (edge, 1), then down to (high, 1 − depth), high being bright tissue.

    >>> invert(torch.tensor([0.0, 0.05, 0.1, 0.55, 1.0]), depth=0.5)
    tensor([0.0000, 0.5000, 1.0000, 0.7500, 0.5000])
    """
    high = max(quantile(x, 0.99), 1e-3)
    edge = 0.1 * high
    falling = 1 - depth * (x - edge) / (high - edge)
    return torch.minimum(x / edge, falling).clamp_(0, 1)


def bias_field(shape: tuple[int, ...], *, limit: float, order: int = 3) -> torch.Tensor:
    """(D, H, W): exp of a random polynomial in coordinates of −1…1, coefficients in ±``limit``: tio.RandomBiasField, evaluated axis by axis."""
    powers = [torch.linspace(-1, 1, n)[:, None] ** torch.arange(order + 1) for n in shape]  # (n, order + 1) each
    coefficients = (torch.rand((order + 1,) * 3) * 2 - 1) * limit
    degree = torch.arange(order + 1)
    coefficients[(degree[:, None, None] + degree[:, None] + degree) > order] = 0
    field = torch.tensordot(torch.tensordot(coefficients, powers[0], dims=([0], [1])), powers[1], dims=([0], [1]))  # (k, D, H)
    return torch.tensordot(field, powers[2], dims=([0], [1])).exp_()  # (D, H, W)


def _k_space(x: torch.Tensor, strength: float, voxel_mm: float) -> torch.Tensor:
    """Motion, ghosting, spikes: at most one in most pictures; rare, as each transforms the volume to k-space and back."""
    wanted = [chance(0.08), chance(0.08), chance(0.06)]
    if not any(wanted):
        return x
    import torchio as tio

    middle = np.diag([voxel_mm] * 3 + [1.0])
    middle[:3, 3] = -voxel_mm * np.array(x.shape) / 2  # RandomMotion turns about the world's origin
    transforms = [
        tio.RandomMotion(degrees=4 * strength, translation=4 * strength, num_transforms=2),
        tio.RandomGhosting(num_ghosts=(2, 7), intensity=(0.1 * strength, 0.6 * strength), restore=0.02),
        tio.RandomSpike(num_spikes=(1, 2), intensity=(0.1 * strength, 0.7 * strength)),
    ]
    picture = tio.ScalarImage(tensor=x[None], affine=middle)
    for transform, yes in zip(transforms, wanted, strict=True):
        picture = transform(picture) if yes else picture
    return picture.data[0].contiguous()


def _noise(x: torch.Tensor, strength: float) -> torch.Tensor:
    """Gaussian, or Rician as in a magnitude picture: |x + n₁ + i n₂|."""
    if not chance(0.7):
        return x
    deviation = uniform(0, 0.07) * strength * max(quantile(x, 0.99), 1e-3)
    if chance(0.5):
        return (x + torch.randn(x.shape) * deviation).square_().add_((torch.randn(x.shape) * deviation).square_()).sqrt_()
    return x + torch.randn(x.shape) * deviation


def _resolution(x: torch.Tensor, strength: float, voxel_mm: float) -> torch.Tensor:
    """Thick slices along one axis, up to 6 mm, or a coarser voxel, up to 3 mm; a point spread of its own along each axis."""
    thick = [0.0, 0.0, 0.0]
    kind = uniform(0, 1)
    if kind < 0.35:
        thick[int(uniform(0, 3))] = voxel_mm + max(6.0 - voxel_mm, 0) * uniform(0, 1) * strength
    elif kind < 0.5:
        thick = [voxel_mm + max(3.0 - voxel_mm, 0) * uniform(0, 1) * strength] * 3
    # Gaussian full widths up to 2.5 mm; blur is in millimetres too, so that a coarse grid hardly sees it
    widths = [uniform(0, 2.5) * strength for _ in range(3)] if chance(0.5) else [0.0] * 3
    for axis in range(3):
        matrix = resampling(x.shape[axis], slice_mm=thick[axis], width_mm=widths[axis], voxel_mm=voxel_mm)
        if matrix is not None:
            x = along(x, matrix, axis)
    return x


def resampling(n: int, *, slice_mm: float, width_mm: float, voxel_mm: float) -> torch.Tensor | None:
    """(n, n): a Gaussian of full width at half maximum ``width_mm``, then slices of ``slice_mm`` that average what they cover, and linear
    interpolation back. Rows sum to 1; None where nothing changes.

    >>> resampling(4, slice_mm=4.0, width_mm=0, voxel_mm=2.0)[0]     # slices of two voxels, centred between them
    tensor([0.5000, 0.5000, 0.0000, 0.0000])
    """
    at = torch.arange(n, dtype=torch.float32)
    matrix = None
    sigma = width_mm / voxel_mm / 2.3548
    if sigma > 0.2:
        matrix = torch.exp(-0.5 * ((at[:, None] - at) / sigma) ** 2)
        matrix /= matrix.sum(1, keepdim=True)
    step = slice_mm / voxel_mm
    slices = int(round(n / step)) if step > 1.05 else n
    if 1 <= slices < n:
        step = n / slices
        start = torch.arange(slices)[:, None] * step
        cover = (torch.minimum(start + step, at + 1) - torch.maximum(start, at)).clamp(min=0) / step  # (slices, n)
        where = ((at + 0.5) / step - 0.5).clamp(0, slices - 1)
        back = (1 - (where[:, None] - torch.arange(slices)).abs()).clamp(min=0)  # (n, slices)
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
    return ((x - low) / max(high - low, 1e-6)).clamp_(0, 1) if high > low + 1e-6 else x.clamp(0, 1)


def quantile(x: torch.Tensor, q: float) -> float:
    """Of at most some 64³ voxels of a regular subset: a sort of all would cost more than the rest."""
    part = x[tuple(slice(None, None, -(-n // 64)) for n in x.shape)].flatten()
    return float(part.kthvalue(max(1, min(part.numel(), round(q * part.numel()))))[0])
