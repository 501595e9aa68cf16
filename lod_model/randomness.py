"""Random numbers: torch's generator forked and seeded, draws from it, and fields of draws that are made later, perhaps on another device."""

import contextlib
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

PIECE = 2**20


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


@dataclass(frozen=True)
class Fields:
    """Whole volumes of random numbers, made when they are asked for. ``start`` is a seed, or a state of torch's generator, (n,) uint8.

    On a CPU they are what that generator draws; another device has another generator, of which these are draws of the same distribution.
    """

    start: int | torch.Tensor

    def generator(self, device: torch.device) -> torch.Generator:
        """A fresh one; the fields are its draws, one after the other."""
        generator = torch.Generator(device)
        if isinstance(self.start, int):
            return generator.manual_seed(self.start)
        if device.type == "cpu":
            return generator.set_state(self.start)
        return generator.manual_seed(int.from_bytes(hashlib.sha256(self.start.numpy()).digest()[:8], "big") >> 1)


def normals_later(shape: tuple[int, ...], fields: int) -> Fields:
    """Of torch's current generator, which goes on as if so many fields of ``torch.randn`` had been drawn.

    >>> with reproducible(0):
    ...     later, after = normals_later((5, 7, 3), 2), torch.rand(())
    >>> with reproducible(0):
    ...     first, second, then = torch.randn(5, 7, 3), torch.randn(5, 7, 3), torch.rand(())
    >>> generator = later.generator(torch.device("cpu"))
    >>> [torch.equal(x, torch.randn(5, 7, 3, generator=generator)) for x in (first, second)], torch.equal(after, then)
    ([True, True], True)
    """
    later, number = Fields(torch.get_rng_state()), math.prod(shape)
    for _ in range(fields):
        if number < 16:
            torch.randn(number)
            continue
        # a normal number takes one uniform, of a rest the last 16 are drawn again; uniforms are made in half the time
        for first in range(0, number, PIECE):
            torch.rand(min(PIECE, number - first))
        if number % 16:
            torch.rand(16)
    return later
