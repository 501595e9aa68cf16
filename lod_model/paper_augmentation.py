"""The picture's part of preset ``paper``: Svanera et al. 2024, an additive field and one of eight operations.

The paper augments after the z-score, ours are intensities of 0…255, z-scored afterwards. Blur, noise, ghosts, resolution, slices, salt and
pepper, and contrast about the mean commute with that; gamma does not (ours raises the picture scaled to 0…1 by its minimum and maximum),
and a shift of the mean by the additive field is taken out again. The strength of that field is ours, as the paper names none.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from lod_model.corrupt import Bias, Step, along, draw_bias, resampling
from lod_model.randomness import Fields, uniform


@dataclass(frozen=True)
class AdditiveField:
    """Plus a polynomial of order 3, at most ``share`` of the picture's deviation anywhere."""

    polynomial: Bias
    share: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        field = self.polynomial.exponent(tuple(x.shape), x.device)
        low, high = field.aminmax()
        return x.add_(field.mul_(self.share * x.std(correction=0) / torch.maximum(high, -low).clamp(min=1e-6)))


@dataclass(frozen=True)
class BoxBlur:
    """The mean of 3³ voxels, of those that there are."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.avg_pool3d(x[None, None], 3, stride=1, padding=1, count_include_pad=False)[0, 0]


@dataclass(frozen=True)
class SaltAndPepper:
    """A fifth of 1 % of the voxels get the brightest value, the other four fifths the darkest."""

    fields: Fields

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        draw = next(self.fields.each(torch.rand, x))
        return torch.where(draw < 0.002, x.max(), torch.where(draw < 0.01, x.min(), x))


@dataclass(frozen=True)
class GaussianNoise:
    """A fifth of the picture becomes noise of its moments."""

    fields: Fields

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        draw = next(self.fields.each(torch.randn, x))
        deviation, mean = torch.std_mean(x, correction=0)
        return x.mul_(0.8).add_(draw.mul_(deviation).add_(mean), alpha=0.2)


@dataclass(frozen=True)
class Ghosts:
    """1–4 copies, evenly shifted along one axis, weigh 0.15 together; TorchIO's ghosts come from k-space and have no such weight."""

    copies: int
    axis: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        shifts = [round(x.shape[self.axis] * i / (self.copies + 1)) for i in range(1, self.copies + 1)]
        return 0.85 * x + 0.15 / self.copies * sum(torch.roll(x, shift, self.axis) for shift in shifts)


@dataclass(frozen=True)
class Downscale:
    """Voxels of ``step`` times the edge."""

    step: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        for axis in range(3):
            matrix = resampling(x.shape[axis], slice_mm=self.step, width_mm=0, voxel_mm=1, device=x.device)
            x = x if matrix is None else along(x, matrix, axis)
        return x


@dataclass(frozen=True)
class RangeGamma:
    """Scaled to 0…1 by its own range, to the power of ``exponent``, and back."""

    exponent: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        low, high = x.aminmax()
        span = (high - low).clamp(min=1e-6)
        return x.sub_(low).div_(span).pow_(self.exponent).mul_(span).add_(low)


@dataclass(frozen=True)
class Contrast:
    """Stretched about the mean, within its range."""

    factor: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        (low, high), mean = x.aminmax(), x.mean()
        return x.sub_(mean).mul_(self.factor).add_(mean).clamp_(low, high)


@dataclass(frozen=True)
class RepeatedSlices:
    """LIA: axis 1 runs from top to bottom, so its slices are axial."""

    every: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x.index_select(1, torch.arange(x.shape[1], device=x.device) // self.every * self.every)


def draw_additive_field() -> AdditiveField:
    """From torch's current generator."""
    return AdditiveField(draw_bias(limit=0.5), uniform(0, 0.5))


def draw_one_of_eight() -> Step:
    """From torch's current generator, each equally likely."""
    return DRAWS[int(torch.randint(len(DRAWS), ()))]()


def _integer(low: int, above: int) -> int:
    return int(torch.randint(low, above, ()))


DRAWS: tuple[Callable[[], Step], ...] = (
    BoxBlur,
    lambda: SaltAndPepper(Fields(torch.get_rng_state())),
    lambda: GaussianNoise(Fields(torch.get_rng_state())),
    lambda: Ghosts(_integer(1, 5), _integer(0, 3)),
    lambda: Downscale(1 / uniform(0.25, 0.75)),
    lambda: RangeGamma(uniform(0.5, 3)),
    lambda: Contrast(uniform(0.5, 3)),
    lambda: RepeatedSlices(_integer(2, 5)),
)
