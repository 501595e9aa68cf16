"""Four of TorchIO's random transforms as parameters and arithmetic: the same draws and, to rounding, the same picture, on any device.

RandomGamma, RandomAnisotropy, RandomBlur and RandomNoise, one after the other as Compose would. Resampling and blur are a matrix an axis.
"""

import math
from dataclasses import dataclass

import torch

from lod_model.corrupt import Gamma, Noise, Step, along
from lod_model.randomness import Fields


def draw_torchio_picture(*, log_gamma: float, p_gamma: float, thickness: tuple[float, float], p_thick: float, blur: float, p_blur: float,
                         noise: float, p_noise: float) -> list[Step]:  # fmt: skip
    """From torch's current generator: exponents exp(±``log_gamma``), one axis ``thickness`` times as coarse, deviations of the blur up to
    ``blur`` voxels along each axis and of the noise up to ``noise``, each with a chance of its own."""
    steps: list[Step] = []
    torch.rand(1)  # whether to do anything: each transform asks, also where the answer is known
    if _asked(p_gamma):
        steps.append(Gamma(math.exp(_between(-log_gamma, log_gamma))))
        torch.rand(1)
    if _asked(p_thick):
        steps.append(ThickSlices(int(torch.randint(0, 3, (1,))), _between(*thickness)))
        torch.rand(2)
    if _asked(p_blur):
        steps.append(Blur((_between(0, blur), _between(0, blur), _between(0, blur))))
        torch.rand(1)
    if _asked(p_noise):
        _between(0, 0)  # its mean
        steps.append(Noise(_between(0, noise), Fields(int(torch.randint(0, 2**31, (1,)))), of_bright=False))
        torch.rand(1)
    return steps


def _asked(p: float) -> bool:
    return float(torch.rand(1)) <= p


def _between(low: float, high: float) -> float:
    return float(torch.empty(1).uniform_(low, high))


@dataclass(frozen=True)
class ThickSlices:
    """RandomAnisotropy: along ``axis`` the nearest voxels ``factor`` voxels apart, centred, and linear interpolation back; 0 beyond them."""

    axis: int
    factor: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return along(x, self.matrix(x.shape[self.axis], x.device), self.axis)

    def matrix(self, n: int, device: torch.device | None = None) -> torch.Tensor:
        """(n, n). Positions in float64: the nearest voxel is a matter of rounding.

        >>> ThickSlices(0, 2.0).matrix(4)            # voxels 1 and 3 (halves go up), half a voxel to the left of where they are put back
        tensor([[0.0000, 1.0000, 0.0000, 0.0000],
                [0.0000, 0.7500, 0.0000, 0.2500],
                [0.0000, 0.2500, 0.0000, 0.7500],
                [0.0000, 0.0000, 0.0000, 1.0000]])
        """
        at = torch.arange(n, dtype=torch.float64, device=device)
        slices = max(1, math.floor(n / self.factor))
        first = (n - 1) / 2 - (slices - 1) / 2 * self.factor
        nearest = (first + torch.arange(slices, dtype=torch.float64, device=device) * self.factor + 0.5).floor()
        back = (at - first) / self.factor  # of each voxel, in slices
        weights = (1 - (back.clamp(0, slices - 1)[:, None] - torch.arange(slices, device=device)).abs()).clamp(min=0)  # (n, slices)
        weights = weights * ((back >= -0.5) & (back < slices - 0.5))[:, None]
        return (weights @ (nearest[:, None] == at).double()).float()


@dataclass(frozen=True)
class Blur:
    """Gaussians of ``deviations`` voxels along each axis, cut off at 4 of them; the picture is mirrored beyond its ends."""

    deviations: tuple[float, float, float]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        for axis, deviation in enumerate(self.deviations):
            if round(4 * deviation) > 0:
                x = along(x, self.matrix(x.shape[axis], deviation, x.device), axis)
        return x

    @staticmethod
    def matrix(n: int, deviation: float, device: torch.device | None = None) -> torch.Tensor:
        """(n, n), rows sum to 1."""
        radius = int(4 * deviation + 0.5)
        offsets = torch.arange(-radius, radius + 1, device=device)
        weights = torch.exp(-0.5 * (offsets.double() / deviation) ** 2)
        at = torch.arange(n, device=device)
        came = (at[:, None] + offsets) % (2 * n)  # (n, taps): mirrored at half a voxel beyond the ends, again and again
        came = torch.where(came < n, came, 2 * n - 1 - came)
        matrix = torch.zeros(n, n, dtype=torch.float64, device=device)
        return matrix.scatter_add_(1, came, (weights / weights.sum()).expand(n, -1).contiguous()).float()
